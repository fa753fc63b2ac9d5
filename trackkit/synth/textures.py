"""Procedural textures, outlines and the integer arithmetic that draws them, for `trackkit.synth`.

Everything is bit-identical on every machine. Random numbers are raw PCG64 words (a stream that
numpy guarantees); parameters are computed with + - * / and square roots in float64, which IEEE 754
rounds the same way everywhere; pixels are integers.

A colour is one uint64 with four 16-bit lanes (red, green, blue, alpha from the low end), of which
the low 8 bits carry the value. A lane times a weight up to 256 stays inside its lane, so one
multiplication weighs all four channels: bilinear sampling and blending need no loop over channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Lanes = NDArray[np.uint64]
Floats = NDArray[np.float64]

MASK = np.uint64(0x00FF00FF00FF00FF)
ONES = np.uint64(0x0000000100010001)  # times a grey value: that grey in red, green and blue
ALPHA = np.uint64(48)
SPRITE = 128  # texels along an object's sprite at level 0
SPRITE_LEVELS = 4
OUTLINE = 48  # vertices of an outline
PI = 3.141592653589793


class Bank(NamedTuple):
    """How many of each a split's worlds are made of."""

    backgrounds: int
    textures: int
    shapes: int


# by `SynthConfig.bank`: what is trained on has to be as various as possible
BANK_SIZES = (Bank(64, 160, 192), Bank(16, 40, 48), Bank(16, 40, 48))
TRAIN = 0


class Draw:
    """Random numbers from a key of integers: the same key gives the same numbers on every
    machine.
    """

    def __init__(self, *key: int):
        self._bits = np.random.PCG64(np.random.SeedSequence(key))
        self._words: list[int] = []

    def _word(self) -> int:
        if not self._words:
            self._words = (self._bits.random_raw(128) >> np.uint64(11)).tolist()
        return self._words.pop()

    def unit(self, *shape: int) -> Floats:
        """Uniform float64 in [0, 1), of the given shape."""
        return (self._bits.random_raw(math.prod(shape)) >> np.uint64(11)).reshape(shape) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        """One number in [low, high)."""
        return low + (high - low) * (self._word() * 2.0**-53)

    def below(self, count: int) -> int:
        """One integer in 0 .. count - 1."""
        return self._word() * count >> 53


def _sine_table() -> Floats:
    x = np.arange(1025) * (PI / 2048)
    square, quarter = x * x, np.zeros(1025)
    for k in (19, 17, 15, 13, 11, 9, 7, 5, 3):  # Taylor's series from its far end (Horner)
        quarter = (1.0 + quarter) * (-square / (k * (k - 1)))
    quarter = x * (1.0 + quarter)
    half = np.concatenate([quarter, quarter[-2:0:-1]])
    return np.concatenate([half, -half])


SINE = _sine_table()  # one turn in 4096 steps
SINE_FIXED = np.floor(SINE * 4096 + 0.5).astype(np.int64)


def sine(turns: Floats) -> Floats:
    """Sine of an angle in turns, from a table of 4096 steps."""
    return SINE[np.floor(turns * 4096 + 0.5).astype(np.int64) & 4095]


def circle(turns: Floats) -> tuple[Floats, Floats]:
    """Cosine and sine of an angle in turns, from the same table."""
    step = np.floor(turns * 4096 + 0.5).astype(np.int64)
    return SINE[(step + 1024) & 4095], SINE[step & 4095]


def spline(control: Floats, interval: int, frames: int) -> Floats:
    """Smooth curves: uniform quadratic B-splines with a control point every `interval` frames.

    control (..., K) with K >= (frames - 1) // interval + 3 -> (..., frames).
    """
    t = np.arange(frames)
    k, x = t // interval, (t % interval) / interval
    return (
        control[..., k] * (0.5 * (1 - x) * (1 - x))
        + control[..., k + 1] * (0.5 + x - x * x)
        + control[..., k + 2] * (0.5 * x * x)
    )


# --- lanes ----------------------------------------------------------------------------------------


def pack(rgb: Ints) -> Lanes:
    """(..., 3) integers 0..255 -> lanes with alpha 0."""
    c = rgb.astype(np.uint64)
    return c[..., 0] | (c[..., 1] << np.uint64(16)) | (c[..., 2] << np.uint64(32))


def mix(a: Lanes, b: Lanes, weight: Lanes | np.uint64) -> Lanes:
    """a where weight is 0, b where it is 256, lane by lane."""
    return ((a * (np.uint64(256) - weight) + b * weight) >> np.uint64(8)) & MASK


def halve(lanes: Lanes) -> Lanes:
    """(2n, 2n) -> (n, n): the mean of each 2 x 2 square."""
    total = lanes[::2, ::2] + lanes[1::2, ::2] + lanes[::2, 1::2] + lanes[1::2, 1::2]
    return ((total + np.uint64(0x0002000200020002)) >> np.uint64(2)) & MASK


def bilinear(flat: Lanes, stride: int, uv: Ints) -> Lanes:
    """Sample a texture of `stride` columns, stored flat, at texel coordinates u, v (2, rows,
    columns), 16.16.

    The caller keeps them inside, with one column and one row to spare.
    """
    whole = uv >> 16
    at = whole[1] * stride
    at += whole[0]
    share = ((uv >> 12) & 15).view(np.uint64)
    (fx, fy), (gx, gy) = share, 16 - share
    upper = flat.take(at) * gx
    upper += flat[1:].take(at) * fx
    lower = flat[stride:].take(at) * gx
    lower += flat[stride + 1 :].take(at) * fx
    upper *= gy
    lower *= fy
    upper += lower
    upper >>= np.uint64(8)
    upper &= MASK
    return upper


# --- textures -------------------------------------------------------------------------------------


def _smooth(image: Ints, times: int) -> Ints:
    """Binomial blur of (n, n, ...) integers that wraps around."""
    for _ in range(times):
        for axis in (0, 1):
            image = (np.roll(image, 1, axis) + 2 * image + np.roll(image, -1, axis) + 2) >> 2
    return image


def _cloud(draw: Draw, n: int, coarsest: int) -> Ints:
    """(n, n) noise that wraps, about -128..127, with as much contrast at every scale up to
    `coarsest`.
    """
    total, cell, octaves = np.zeros((n, n), np.int64), coarsest, 0
    while cell >= 1:
        grid = np.floor(draw.unit(n // cell, n // cell) * 256).astype(np.int64) - 128
        for _ in range(cell.bit_length() - 1):
            grid = _smooth(grid.repeat(2, 0).repeat(2, 1), 1)
        total, cell, octaves = total + grid * 2, cell // 4, octaves + 1
    return total // octaves


def _palette(draw: Draw, colours: int, chroma: float, low: float, high: float) -> Floats:
    """(colours, 3): greys between low and high, with a colour cast of up to `chroma`."""
    grey = low + (high - low) * draw.unit(colours, 1)
    return np.clip(grey + (draw.unit(colours, 3) * 2 - 1) * chroma, 8, 247)


def dead_leaves(
    draw: Draw,
    n: int,
    leaves: int,
    small: float,
    large: float,
    palette: Floats,
    shading: float,
    detail: float,
    blur: int,
    corners: float,
    crisp: bool = False,
) -> Lanes:
    """A texture of overlapping leaves whose radii follow the power law r**-3, which wraps around.

    Such images share the scale invariance, edges and occlusions of natural images (Lee, Mumford and
    Huang, "Occlusion models for natural images", IJCV 2001). n: texels along a side, a power of
    two. small, large: radii in texels. shading: slope of brightness across a leaf. detail: contrast
    of the grain inside leaves. blur: passes of a binomial filter. corners: share of rectangles
    among the ellipses. crisp: nearly as sharp as photographs, which the worlds to test on are not
    (`test_pictures_have_the_statistics_of_natural_images`).
    """
    owner = np.zeros((n, n), np.int64)
    u = draw.unit(leaves, 8)
    ratio = (small / large) * (small / large)
    radius = small / np.sqrt(1 - u[:, 0] * (1 - ratio))
    ground = min(leaves // 4, int(3 * n * n / (large * large)) + 4)
    # large ones at the bottom cover the ground
    radius[:ground] = large * (0.5 + 0.5 * u[:ground, 0])
    thin = 0.35 + 0.65 * u[:, 1]
    cos, sin = circle(u[:, 2])
    centre = np.floor(u[:, 3:5] * n)
    for leaf in range(leaves):
        r = radius[leaf]
        reach = int(r) + 1
        line = np.arange(-reach, reach + 1)
        if len(line) > n:
            line = line[:n]
        along = (cos[leaf] * line)[None] + (sin[leaf] * line)[:, None]
        across = ((cos[leaf] * line)[:, None] - (sin[leaf] * line)[None]) / thin[leaf]
        if u[leaf, 5] < corners:
            inside = np.maximum(np.abs(along), np.abs(across)) < 0.8 * r
        else:
            inside = along * along + across * across < r * r
        x, y = int(centre[leaf, 0]) - reach, int(centre[leaf, 1]) - reach
        for oy in (0, n, -n):
            for ox in (0, n, -n):
                top, left = y + oy, x + ox
                y0, x0, y1, x1 = (
                    max(top, 0),
                    max(left, 0),
                    min(top + len(line), n),
                    min(left + len(line), n),
                )
                if y0 < y1 and x0 < x1:
                    part = inside[y0 - top : y1 - top, x0 - left : x1 - left]
                    np.copyto(owner[y0:y1, x0:x1], leaf, where=part)
    slope = (draw.unit(leaves, 2) * 2 - 1) * shading
    slope[0] = 0  # leaf 0 is also whatever ground is still bare
    grain = np.floor(draw.unit(leaves) * detail).astype(np.int64)
    jitter = (draw.unit(leaves, 3) - 0.5) * 24 + (draw.unit(leaves, 1) - 0.5) * 36
    base = palette[np.floor(u[:, 6] * len(palette)).astype(np.int64)] + jitter
    grid = np.arange(n)
    # Distance from the leaf's centre, the short way round.
    dx = (grid[None] - centre[owner, 0] + n / 2) % n - n / 2
    dy = (grid[:, None] - centre[owner, 1] + n / 2) % n - n / 2
    shade = (slope[owner, 0] * dx + slope[owner, 1] * dy) * (32 / radius[owner])
    light = np.floor(shade).astype(np.int64) + ((_cloud(draw, n, n // 8) * grain[owner]) >> 6)
    colour = np.floor(base).astype(np.int64)[owner] + light[..., None]
    return pack(np.clip(_smooth(colour, blur // 3 if crisp else blur), 4, 251))


@dataclass(frozen=True)
class Texture:
    """A texture at 1, 1/2, 1/4 ... of its size, (n, n) lanes each, and its mean colour (red, green,
    blue).
    """

    levels: tuple[Lanes, ...]
    mean: tuple[int, int, int]


def _pyramid(lanes: Lanes, count: int) -> Texture:
    levels = [lanes]
    while len(levels) < count:
        levels.append(halve(levels[-1]))
    last = levels[-1]
    mean = [
        int(((last >> np.uint64(16 * channel)) & np.uint64(255)).sum()) // last.size
        for channel in range(3)
    ]
    return Texture(tuple(levels), tuple(mean))


@lru_cache(maxsize=sum(b.backgrounds for b in BANK_SIZES))
def background(bank: int, index: int) -> Texture:
    """Background `index` of a bank: 512 texels along a side at level 0, every level with its first
    row and column repeated at the end.
    """
    draw = Draw(11, bank, index)
    middle, spread = draw.between(75, 180), draw.between(25, 80)
    palette = _palette(
        draw,
        3 + draw.below(5),
        (10.0, 24.0, 40.0, 4.0)[index % 4],
        middle - spread,
        middle + spread,
    )
    soft = draw.below(4)
    style, leaves = index // 4 % 4, partial(dead_leaves, draw, 512, crisp=bank == TRAIN)
    if style == 0:  # busy
        lanes = leaves(900, 5, 120, palette, 0.5, 36, 1 + soft, 0.3)
    elif style == 1:  # few large things, out of focus
        lanes = leaves(160, 16, 200, palette, 1.0, 12, 8 + 4 * soft, 0.2)
    elif style == 2:  # walls, streets: corners and grain
        lanes = leaves(300, 9, 170, palette, 0.6, 30, 1 + soft, 0.85)
    else:  # foliage, ground: grain over leaves
        lanes = leaves(500, 7, 90, palette, 0.8, 70, 2 + 2 * soft, 0.0)
    tile = _pyramid(lanes, 6)
    return Texture(tuple(np.pad(level, (0, 1), mode="wrap") for level in tile.levels), tile.mean)


@lru_cache(maxsize=sum(b.textures for b in BANK_SIZES))
def texture(bank: int, index: int) -> Texture:
    """Texture `index` for objects, 256 texels along a side; a sprite wears a 128 x 128 piece of
    it.
    """
    draw = Draw(12, bank, index)
    middle, spread = draw.between(70, 185), draw.between(25, 90)
    palette = _palette(
        draw,
        2 + draw.below(4),
        (10.0, 35.0, 65.0, 5.0)[index % 4],
        middle - spread,
        middle + spread,
    )
    style, leaves = index // 4 % 5, partial(dead_leaves, draw, 256, crisp=bank == TRAIN)
    if style == 0:
        lanes = leaves(200, 6, 60, palette, 0.7, 40, 1, 0.3)
    elif style == 1:  # faces, plain clothes: large soft patches
        lanes = leaves(60, 12, 90, palette, 1.2, 12, 8, 0.1)
    elif style == 2:  # vehicles: plates and edges
        lanes = leaves(90, 10, 80, palette, 0.8, 10, 1, 0.9)
    elif style == 3:  # fur, leaves
        lanes = leaves(200, 6, 50, palette, 0.6, 90, 2, 0.0)
    else:
        lanes = leaves(100, 8, 70, palette, 1.0, 30, 3, 0.4)
    return _pyramid(lanes, SPRITE_LEVELS)


# --- outlines -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """An outline inside the square from -1 to 1, drawn on a sprite.

    outline: (OUTLINE, 2) vertices. points: (N, 2) inside it, evenly spread, and so are the first n
    of them. area: its area, of 4. inside: (SPRITE, SPRITE) bool. For each level: alpha (n, n),
    already in its lane, and shade (n, n), a weight 0..256 that rounds the object off.
    """

    outline: Floats
    points: Floats
    area: float
    inside: NDArray[np.bool_]
    alpha: tuple[Lanes, ...]
    shade: tuple[Lanes, ...]


def _angle(x: Floats, y: Floats) -> Floats:
    """Direction of (x, y) in turns, 0..1, to 1e-5 rad; polynomial of Abramowitz and Stegun's
    kind.
    """
    ax, ay = np.abs(x), np.abs(y)
    low, high = np.minimum(ax, ay), np.maximum(np.maximum(ax, ay), 1e-9)
    a = low / high
    q = a * a
    series = -0.11643287 + q * (0.05265332 - 0.0117212 * q)
    turn = a * (0.99997726 + q * (-0.33262347 + q * (0.19354346 + q * series))) / (2 * PI)
    turn = np.where(ay > ax, 0.25 - turn, turn)
    turn = np.where(x < 0, 0.5 - turn, turn)
    return np.where(y < 0, 1 - turn, turn) % 1.0


@lru_cache(maxsize=sum(b.shapes for b in BANK_SIZES))
def shape(bank: int, index: int) -> Shape:
    """Outline `index` of a bank: wavy blobs, rounded boxes, and mixtures. 0..7 are plain (limbs,
    poles).
    """
    draw = Draw(13, bank, index)
    turns = np.arange(1024) / 1024
    c, s = circle(turns)
    box = 1 / np.sqrt(np.sqrt(c * c * c * c + s * s * s * s))  # superellipse of order 4
    wave = np.ones(1024)
    if index >= 8:
        for k in range(2, 7):
            wave = wave + (draw.between(0, 0.6 / k)) * sine(k * turns + draw.between(0, 1))
        wave = np.maximum(wave, 0.35)
    squareness = draw.between(0.6, 1) if index < 8 else draw.between(-0.3, 1)
    radius = wave * (1 + max(squareness, 0.0) * (box - 1))
    extent_x, extent_y = (np.abs(radius * c).max(), np.abs(radius * s).max())
    radius = radius * (0.9 / max(extent_x, extent_y))
    keep = np.arange(OUTLINE) * 1024 // OUTLINE
    outline = np.stack([radius[keep] * c[keep], radius[keep] * s[keep]], -1)

    line = (np.arange(SPRITE) + 0.5) * (2 / SPRITE) - 1
    x, y = line[None] + 0 * line[:, None], line[:, None] + 0 * line[None]
    away = np.sqrt(x * x + y * y)
    edge = radius[np.floor(_angle(x, y) * 1024).astype(np.int64) & 1023]
    cover = np.clip((edge - away) * (SPRITE / 4) + 0.5, 0, 1)  # the edge is two texels soft
    tilt = circle(np.array(draw.between(0, 1)))
    lit = tilt[0] * x + tilt[1] * y
    inner = np.minimum(away / edge, 1)
    dark = draw.between(20, 90) * inner * inner * inner + draw.between(10, 60) * (1 - lit) * 0.5
    alpha = np.floor(cover * 255 + 0.5).astype(np.uint64) << ALPHA
    shade = np.floor(256 - dark).astype(np.uint64)
    alphas, shades = [alpha], [shade]
    while len(alphas) < SPRITE_LEVELS:
        alphas.append(halve(alphas[-1]))
        shades.append(halve(shades[-1] - np.uint64(1)) + np.uint64(1))
    for level in alphas:  # sampling clamps at the rim, which must be clear
        level[0] = level[-1] = level[:, 0] = level[:, -1] = 0
    # Roberts' R2 sequence: every beginning of it fills the square evenly.
    spread = (
        np.arange(1, 1501)[:, None] * np.array([0.7548776662466927, 0.5698402909980532])
    ) % 1.0 * 2 - 1
    far = np.sqrt(spread[:, 0] * spread[:, 0] + spread[:, 1] * spread[:, 1])
    points = spread[
        far < radius[np.floor(_angle(spread[:, 0], spread[:, 1]) * 1024).astype(np.int64) & 1023]
    ]
    area = 4 * int((away < edge).sum()) / (SPRITE * SPRITE)
    return Shape(outline, points, area, away < edge, tuple(alphas), tuple(shades))


@lru_cache(maxsize=1)
def noise_tape() -> NDArray[np.int16]:
    """2**19 noise values, bell-shaped, with a standard deviation of about 74."""
    u = np.floor(Draw(14).unit(4, 1 << 19) * 128).astype(np.int16)
    return u[0] + u[1] + u[2] + u[3] - np.int16(254)
