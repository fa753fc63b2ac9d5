"""Scenes: draws a procedural world, whole frames or windows of them, in integer arithmetic."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from trackkit.synth.textures import (
    ALPHA,
    MASK,
    ONES,
    SINE_FIXED,
    SPRITE,
    SPRITE_LEVELS,
    Ints,
    Lanes,
    bilinear,
    circle,
    mix,
    noise_tape,
    texture,
)
from trackkit.synth.worlds import World

BLUR_TAPS = 8
Image = NDArray[np.uint8]


class Scene(World):
    """A world that can be seen: the same arguments give the same pixels and labels, on every
    machine.

    Frames are drawn when asked for, whole or as a window, so a training sample costs just the
    pixels of its crops. Arguments and attributes are those of `World`.
    """

    def __init__(self, config, seed: tuple[int, ...]):
        super().__init__(config, seed)
        self._sprites: dict[tuple[int, int, int], Lanes] = {}

    def box(self, t: int) -> tuple[float, float, float, float]:
        """The label of frame t: left, top, width, height in pixels."""
        return tuple(self.boxes_xywh[t].tolist())

    def render(
        self, t: int, left: float = 0, top: float = 0, side: float | None = None,
        size: int | None = None, fill: tuple[int, int, int] | None = None,
    ) -> Image:  # fmt: skip
        """Frame t: uint8 (3, height, width). With `side` and `size`, the square window of `side`
        frame pixels whose corner is (left, top), drawn as (3, size, size).

        Outside the frame a window shows `fill`, by default the mean colour of the frame's
        background. Raises ValueError for a window without a positive side and size.
        """
        if side is None:
            return self._draw(t, 0.0, 0.0, 1.0, *self.size)
        if size is None or size < 1 or side <= 0:
            raise ValueError(
                f"a window needs a positive side and size, got side {side}, size {size}"
            )
        step = side / size
        image = self._draw(t, left, top, step, size, size)
        for axis, start in ((2, left), (1, top)):
            at = start + (np.arange(size) + 0.5) * step
            outside = np.nonzero((at < 0) | (at >= self.size[2 - axis]))[0]
            if len(outside):
                colour = (self.mean_colour(t) if fill is None else np.array(fill, np.uint8))[
                    :, None, None
                ]
                if axis == 2:
                    image[:, :, outside] = colour
                else:
                    image[:, outside] = colour
        return image

    def reduced(self, t: int, factor: int) -> Image:
        """Frame t at 1/factor of its size, rounded up."""
        width, height = (-(-side // factor) for side in self.size)
        return self._draw(t, 0.0, 0.0, float(factor), width, height)

    def mean_colour(self, t: int) -> Image:
        """About the mean colour of frame t: that of its background, uint8 (3,)."""
        step = max(self.size) / 12
        width, height = (int(side / step) for side in self.size)
        image = _unpack(
            self._lit(
                self._backdrop_at(t, 0.0, 0.0, step, width, max(height, 1)), t, 0.0, 0.0, step
            )
        )
        return (image.reshape(3, -1).sum(1, dtype=np.int64) // image[0].size).astype(np.uint8)

    def target_mask(self, t: int) -> Image:
        """Opacity 0..255 of the whole target in frame t, uint8 (height, width), as if nothing hid
        it.
        """
        return self._mask(t, self._target_parts)

    def hidden_mask(self, t: int) -> Image:
        """Opacity 0..255 of everything in front of the target in frame t, uint8 (height, width)."""
        return self._mask(t, range(self._target_parts[-1] + 1, len(self._owner)))

    def _mask(self, t: int, parts: Iterable[int]) -> Image:
        width, height = self.size
        mask = np.zeros((height, width), np.uint8)
        for part in parts:
            drawn = self._part_at(part, t, 0.0, 0.0, 1.0, 0, 0, width, height) >> ALPHA
            np.maximum(mask, drawn.astype(np.uint8), out=mask)
        return mask

    def _draw(self, t: int, left: float, top: float, step: float, width: int, height: int) -> Image:
        """The world behind a grid of pixels, (3, height, width); pixel (0, 0) starts at (left,
        top).
        """
        shifts = []  # of the copies that make the blur, in pixels of this image
        if self.strengths["blur"] > 0:
            taps = (np.arange(BLUR_TAPS) / (BLUR_TAPS - 1) - 0.5)[:, None]
            shifts = [
                np.floor(way * taps / step + 0.5).astype(np.int64) for way in self._smear[..., t]
            ]
        pad = sum(int(np.abs(s).max()) for s in shifts)
        x, y = left - pad * step, top - pad * step
        canvas = self._backdrop_at(t, x, y, step, width + 2 * pad, height + 2 * pad)
        middle, reach = self._to_frame[2::3, :, t], self._reach[:, :, t]
        corner = np.array([[x], [y]])
        low = np.maximum(np.floor((middle - reach - corner) / step), 0).astype(np.int64)
        high = np.minimum(
            np.floor((middle + reach - corner) / step) + 1, [[canvas.shape[1]], [canvas.shape[0]]]
        )
        for part, (x0, y0, x1, y1) in enumerate(
            np.concatenate([low, high.astype(np.int64)]).T.tolist()
        ):
            if x0 < x1 and y0 < y1:
                drawn = self._part_at(part, t, x, y, step, x0, y0, x1, y1)
                alpha = drawn >> ALPHA
                alpha += alpha >> np.uint64(7)
                canvas[y0:y1, x0:x1] = mix(canvas[y0:y1, x0:x1], drawn, alpha)
        canvas = self._lit(canvas, t, x, y, step)
        for s in shifts:
            edge = int(np.abs(s).max())
            if edge:
                rows, columns = canvas.shape[0] - 2 * edge, canvas.shape[1] - 2 * edge
                total = np.zeros((rows, columns), np.uint64)
                for dx, dy in s.tolist():
                    total += canvas[edge + dy : edge + dy + rows, edge + dx : edge + dx + columns]
                canvas = (total >> np.uint64(3)) & MASK
        image = _unpack(canvas)
        if self._noise:
            self._add_noise(image, t, step)
        return image

    def _backdrop_at(
        self, t: int, left: float, top: float, step: float, width: int, height: int
    ) -> Lanes:
        m = self._to_backdrop[:, t].tolist()
        levels = self._backdrop.levels
        level = _level((m[0] * m[4] - m[1] * m[3]) * step * step, len(levels))
        n = 512 >> level
        uv = _grid([k / (1 << level) for k in m], left, top, step, 0, 0, width, height)
        uv &= (n << 16) - 1
        return bilinear(levels[level].ravel(), n + 1, uv)

    def _part_at(
        self, part: int, t: int, left: float, top: float, step: float,
        x0: int, y0: int, x1: int, y1: int,
    ) -> Lanes:  # fmt: skip
        """A part of a body as the pixels x0..x1, y0..y1 of the grid see it, with its opacity."""
        m = self._to_part[:, part, t].tolist()
        level = _level(
            abs(m[0] * m[4] - m[1] * m[3]) * step * step * (SPRITE * SPRITE // 4), SPRITE_LEVELS
        )
        n = SPRITE >> level
        half = n / 2
        texels = [k * half for k in m]
        texels[2] += half
        texels[5] += half
        uv = _grid(texels, left, top, step, x0, y0, x1, y1)
        if self._bent_parts[part]:
            waves, centre = _fixed(self._bend_waves[part]), (n << 15) - 32768
            # texels in 16.16 times waves in 0.16, to steps of 1/4096 turn; half a sprite is one
            # unit
            down = 16 + 16 + (SPRITE.bit_length() - 2 - level) - 12
            first, second = (int(phase * 4096) for phase in self._bend_phase[:, part, t].tolist())
            p, q = (_fixed(amount * half) for amount in self._bend[:, part, t].tolist())
            u, v = uv
            v -= (SINE_FIXED.take((((u - centre) * waves >> down) + second) & 4095) * q) >> 12
            u -= (SINE_FIXED.take((((v - centre) * waves >> down) + first) & 4095) * p) >> 12
        np.maximum(uv, 0, out=uv)
        np.minimum(uv, ((n - 1) << 16) - 1, out=uv)
        return bilinear(self._sprite(part, level, t), n, uv)

    def _sprite(self, part: int, level: int, t: int) -> Lanes:
        body, slot = self.bodies[self._owner[part]], self._slot[part]
        step = int(self._drift[t]) if body.role == "target" else 0
        key = (part, level, step)
        if key not in self._sprites:
            n, form = SPRITE >> level, body.skeleton[slot]
            # a narrow limb wears a narrow piece
            columns = int(n * min(2 * form.width / form.length, 1))

            def piece(which: int, x: int, y: int) -> Lanes:
                x, y = (x + 2 * step) % (SPRITE + 1) >> level, y >> level  # slides as it turns away
                cloth = texture(self.config.bank, which).levels[level][y : y + n, x : x + columns]
                return cloth if columns == n else cloth[:, np.arange(n) * columns // n]

            colour = piece(*body.textures[slot])
            if step:
                colour = mix(colour, piece(*body.later[slot]), np.uint64(12 * step))
            outline = self._shape(part)
            colour = mix(colour, body.tint, body.tint_weight) * outline.shade[level]
            self._sprites[key] = (((colour >> np.uint64(8)) & MASK) | outline.alpha[level]).ravel()
        return self._sprites[key]

    def _lit(self, canvas: Lanes, t: int, left: float, top: float, step: float) -> Lanes:
        if self._grey:
            red, green = canvas & np.uint64(255), (canvas >> np.uint64(16)) & np.uint64(255)
            blue = (canvas >> np.uint64(32)) & np.uint64(255)
            grey = (
                red * np.uint64(77) + green * np.uint64(150) + blue * np.uint64(29)
            ) >> np.uint64(8)
            canvas = mix(canvas, grey * ONES, self._grey)
        if self._shadow_depth:
            height, width = canvas.shape
            c, d = (float(k) / (0.25 * max(self.size)) for k in circle(np.array(self._shadow_turn)))
            e = 0.5 - 2 * float(self._shadow_at[t]) - 0.5 * (c * self.size[0] + d * self.size[1])
            ramp = _grid([c, d, e, 0, 0, 0], left, top, step, 0, 0, width, height)[0]
            weight = 256 - ((np.clip(ramp, 0, 65536) * self._shadow_depth) >> 16)
            canvas = ((canvas * weight.view(np.uint64)) >> np.uint64(8)) & MASK
        if self._gain[t] < 256:
            canvas = (((canvas * np.uint64(self._gain[t])) >> np.uint64(8)) & MASK) + self._bias[t]
        return canvas

    def _add_noise(self, image: Image, t: int, step: float) -> None:
        """Sensor noise. A pixel of a coarser window would average several of the frame's, so it
        gets less.
        """
        first, tape = self._noise_at[t], noise_tape()
        grain = (
            tape[first : first + image.size]
            if image.size <= len(tape) // 2
            else np.resize(tape, image.size)
        )
        grain = grain * np.int16(self._noise * 256 / max(step, 1.0))
        grain >>= 8
        grain = grain.reshape(image.shape)
        grain += image
        np.maximum(grain, 0, out=grain)
        image[...] = np.minimum(grain, 255, out=grain)


def _fixed(value: float) -> int:
    """16.16 fixed point, to the nearest."""
    return int(value * 65536 + (0.5 if value >= 0 else -0.5))


def _level(area: float, levels: int) -> int:
    """Level of a pyramid to sample when a pixel covers `area` texels of its finest level."""
    level = 0
    while level < levels - 1 and area > 2 << 2 * level:
        level += 1
    return level


def _grid(
    m: list[float], left: float, top: float, step: float, x0: int, y0: int, x1: int, y1: int
) -> Ints:
    """Where the pixels x0..x1, y0..y1 of a grid look in a texture: texel indices u, v (2, rows,
    columns), 16.16.

    m = (a, b, e, c, d, f) maps frame pixels to texels; texel k has its centre at k + 0.5.
    """
    a, b, e, c, d, f = m
    x, y = left + (x0 + 0.5) * step, top + (y0 + 0.5) * step
    across = np.array([[[_fixed(a * step)]], [[_fixed(c * step)]]]) * np.arange(x1 - x0)
    down = np.array([[[_fixed(b * step)]], [[_fixed(d * step)]]]) * np.arange(y1 - y0)[:, None]
    down += np.array([[[_fixed(a * x + b * y + e - 0.5)]], [[_fixed(c * x + d * y + f - 0.5)]]])
    return across + down


def _unpack(canvas: Lanes) -> Image:
    image = np.empty((3, *canvas.shape), np.uint8)
    for channel in range(3):
        image[channel] = canvas >> np.uint64(16 * channel)  # the cast keeps the low 8 bits
    return image
