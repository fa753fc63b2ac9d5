"""Scenes: draws a procedural world, whole frames or windows of them, in integer arithmetic."""
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trackkit.textures import (
    ALPHA, MASK, ONES, SINE_FIXED, SPRITE, SPRITE_LEVELS, Floats, Ints, Lanes, bilinear, cosine, mix, noise_tile,
    shape, sine, texture,
)  # fmt: skip
from trackkit.worlds import World

BLUR_TAPS = 8
_LINE = np.arange(8192)


def _fixed(value: float) -> int:
    """16.16 fixed point, to the nearest."""
    return int(value * 65536 + (0.5 if value >= 0 else -0.5))


class Scene(World):
    """A world that can be seen: the same arguments give the same pixels and labels, on every machine.

    Frames are drawn when asked for, whole or as a window, so a training sample costs just the pixels of its
    crops. Arguments and attributes are those of `World`.
    """

    def __init__(self, config, seed: tuple[int, ...]):
        super().__init__(config, seed)
        self._sprites: dict[tuple[int, int, int], Lanes] = {}

    def render(self, t: int, left: float = 0, top: float = 0, side: float | None = None, size: int | None = None,
               fill: tuple[int, int, int] | None = None) -> NDArray[np.uint8]:  # fmt: skip
        """Frame t: uint8 (3, height, width); or the square window from (left, top) with `side` frame pixels,
        drawn as (3, size, size).

        Outside the frame a window shows `fill`, by default the mean colour of the frame's background.
        """
        if side is None:
            return self._finish(t, left, top, 1.0, *self.size)
        if size is None:
            raise ValueError("a window needs its size in crop pixels")
        step = side / size
        image = self._finish(t, left, top, step, size, size)
        inside = []
        for start, length in ((left, self.size[0]), (top, self.size[1])):
            at = start + (np.arange(size) + 0.5) * step
            inside.append((at >= 0) & (at < length))
        if not (inside[0].all() and inside[1].all()):
            colour = self.mean_colour(t) if fill is None else np.array(fill, np.uint8)
            outside = ~(inside[1][:, None] & inside[0][None])
            image[:, outside] = colour[:, None]
        return image

    def reduced(self, t: int, factor: int) -> NDArray[np.uint8]:
        """Frame t at 1/factor of its size, rounded up."""
        width, height = (-(-side // factor) for side in self.size)
        return self._finish(t, 0, 0, float(factor), width, height)

    def mean_colour(self, t: int) -> NDArray[np.uint8]:
        """About the mean colour of frame t: that of its background, uint8 (3,)."""
        step = max(self.size) / 12
        width, height = (max(int(side / step), 1) for side in self.size)
        image = self._unpack(self._lit(self._draw_backdrop(t, 0, 0, step, width, height), t, 0, 0, step))
        return (image.reshape(3, -1).sum(1, dtype=np.int64) // (width * height)).astype(np.uint8)

    def _finish(self, t: int, left: float, top: float, step: float, width: int, height: int) -> NDArray[np.uint8]:
        shifts = [np.floor(v * (np.arange(BLUR_TAPS) / (BLUR_TAPS - 1) - 0.5)[:, None] / step + 0.5).astype(np.int64)
                  for v in self._smear[..., t]]  # fmt: skip
        if self.strengths["blur"] == 0:
            shifts = []
        pad = sum(int(np.abs(s).max()) for s in shifts)
        left, top = left - pad * step, top - pad * step
        canvas = self._draw_backdrop(t, left, top, step, width + 2 * pad, height + 2 * pad)
        for part in range(len(self._owner)):
            self._draw_part(canvas, part, t, left, top, step)
        canvas = self._lit(canvas, t, left, top, step)
        for s in shifts:
            reach = int(np.abs(s).max())
            if reach:
                rows, columns = canvas.shape[0] - 2 * reach, canvas.shape[1] - 2 * reach
                total = np.zeros((rows, columns), np.uint64)
                for dx, dy in s:
                    total += canvas[reach + dy : reach + dy + rows, reach + dx : reach + dx + columns]
                canvas = (total >> np.uint64(3)) & MASK
        image = self._unpack(canvas)
        if self._noise:
            self._add_noise(image, t, left + pad * step, top + pad * step, step)
        return image

    def _draw_backdrop(self, t: int, left: float, top: float, step: float, width: int, height: int) -> Lanes:
        m = self._to_backdrop[:, t]
        levels = self._backdrop.levels
        scale = (m[0] * m[4] - m[1] * m[3]) * step * step
        level = 0
        while level < len(levels) - 1 and scale > 2.0 * (1 << 2 * level):
            level += 1
        n = 512 >> level
        u, v = _grid(m / (1 << level), 0.5, left, top, step, 0, 0, width, height)
        u &= (n << 16) - 1
        v &= (n << 16) - 1
        return bilinear(levels[level].ravel(), n + 1, u, v)

    def _draw_part(self, canvas: Lanes, part: int, t: int, left: float, top: float, step: float) -> None:
        (cx, cy), (rx, ry) = self._to_frame[2::3, part, t], self._reach[:, part, t]
        height, width = canvas.shape
        x0, x1 = max(int((cx - rx - left) / step) - 1, 0), min(int((cx + rx - left) / step) + 2, width)
        y0, y1 = max(int((cy - ry - top) / step) - 1, 0), min(int((cy + ry - top) / step) + 2, height)
        if x0 >= x1 or y0 >= y1:
            return
        drawn = self._sample(part, t, left, top, step, x0, y0, x1, y1)
        alpha = drawn >> ALPHA
        alpha += alpha >> np.uint64(7)
        region = canvas[y0:y1, x0:x1]
        region[...] = mix(region, drawn, alpha)

    def _sample(self, part: int, t: int, left: float, top: float, step: float, x0: int, y0: int, x1: int, y1: int
                ) -> Lanes:  # fmt: skip
        m = self._to_part[:, part, t]
        scale = (m[0] * m[4] - m[1] * m[3]) * step * step * (SPRITE * SPRITE // 4)
        level = 0
        while level < SPRITE_LEVELS - 1 and scale > 2.0 * (1 << 2 * level):
            level += 1
        n = SPRITE >> level
        texels = m * (n / 2)
        texels[2] += n / 2
        texels[5] += n / 2
        u, v = _grid(texels, 0.5, left, top, step, x0, y0, x1, y1)
        p, q = self._bend[:, part, t]
        if p != 0:
            # 0 in the part's square is texel n / 2; the sine table has 4096 steps to a turn.
            waves = int(self._bend_waves[part] / 2 * 65536)
            down = 16 + 16 + (SPRITE_LEVELS + 3 - level) - 1 - 12
            first, second = (int(phase % 1 * 4096) for phase in self._bend_phase[:, part, t])
            half = n << 15
            v -= (SINE_FIXED.take(((((u - half + 32768) * waves) >> down) + second) & 4095) * _fixed(q * n / 2)) >> 12
            u -= (SINE_FIXED.take(((((v - half + 32768) * waves) >> down) + first) & 4095) * _fixed(p * n / 2)) >> 12
        top_texel = ((n - 1) << 16) - 1
        np.clip(u, 0, top_texel, out=u)
        np.clip(v, 0, top_texel, out=v)
        return bilinear(self._sprite(part, level, t), n, u, v)

    def _sprite(self, part: int, level: int, t: int) -> Lanes:
        body, slot = self.bodies[self._owner[part]], self._slot[part]
        step = int(self._drift[t]) if self._owner[part] == self.target else 0
        key = (part, level, step)
        if key not in self._sprites:
            bank, n = self.config.bank, SPRITE >> level

            def piece(index: int, x: int, y: int) -> Lanes:
                return texture(bank, index).levels[level][y >> level : (y >> level) + n, x >> level : (x >> level) + n]

            which, x, y = body.textures[slot]
            colour = piece(which, (x + 2 * step) % 129, y)
            if step:
                which, x, y = body.later[slot]
                colour = mix(colour, piece(which, (x + 2 * step) % 129, y), np.uint64(12 * step))
            colour = mix(colour, body.tint, body.tint_weight)
            outline = shape(bank, body.shapes[slot])
            colour = ((colour * outline.shade[level]) >> np.uint64(8)) & MASK
            self._sprites[key] = (colour | outline.alpha[level]).ravel()
        return self._sprites[key]

    def _lit(self, canvas: Lanes, t: int, left: float, top: float, step: float) -> Lanes:
        s = self.strengths
        if s["colourless"] > 0:
            red, green = canvas & np.uint64(255), (canvas >> np.uint64(16)) & np.uint64(255)
            blue = (canvas >> np.uint64(32)) & np.uint64(255)
            grey = (red * np.uint64(77) + green * np.uint64(150) + blue * np.uint64(29)) >> np.uint64(8)
            canvas = mix(canvas, grey * ONES, self._grey)
        if self._shadow_depth:
            height, width = canvas.shape
            c, d = (float(f(np.array([self._shadow_turn]))[0]) for f in (cosine, sine))
            span = 0.25 * max(self.size)
            mid_x, mid_y = self.size[0] / 2 + c * 0, self.size[1] / 2
            m = np.array([c / span, d / span, -(c * mid_x + d * mid_y) / span - 2 * self._shadow_at[t] + 1.5, 0, 0, 0])
            ramp = _grid(m, 0.0, left, top, step, 0, 0, width, height)[0]
            weight = 256 - ((np.clip(ramp, 0, 65536) * self._shadow_depth) >> 16)
            canvas = ((canvas * weight.view(np.uint64)) >> np.uint64(8)) & MASK
        if s["illumination"] > 0 or s["low_contrast"] > 0:
            canvas = (((canvas * np.uint64(self._gain[t])) >> np.uint64(8)) & MASK) + self._bias[t]
        return canvas

    def _unpack(self, canvas: Lanes) -> NDArray[np.uint8]:
        image = np.empty((3, *canvas.shape), np.uint8)
        for channel in range(3):
            image[channel] = canvas >> np.uint64(16 * channel)  # keeps the low 8 bits
        return image

    def _add_noise(self, image: NDArray[np.uint8], t: int, left: float, top: float, step: float) -> None:
        """Noise belongs to the frame's pixels; a pixel of a coarser window averages several of them."""
        amount = int(self._noise * 256 / max(step, 1.0))
        columns = (_pixels(left, step, image.shape[2]) + self._noise_at[t, 0]) & 255
        rows = (_pixels(top, step, image.shape[1]) + self._noise_at[t, 1]) & 255
        grain = noise_tile()[:, rows][:, :, columns].astype(np.int32) * amount
        image[...] = np.clip(image + (grain >> 8), 0, 255)

    def target_mask(self, t: int) -> NDArray[np.uint8]:
        """Opacity 0..255 of the whole target in frame t, uint8 (height, width), as if nothing hid it."""
        return self._mask(t, self._parts_of(self.target))

    def hidden_mask(self, t: int) -> NDArray[np.uint8]:
        """Opacity 0..255 of everything in front of the target in frame t, uint8 (height, width)."""
        return self._mask(t, np.arange(self._parts_of(self.target)[-1] + 1, len(self._owner)))

    def _mask(self, t: int, parts: Ints) -> NDArray[np.uint8]:
        width, height = self.size
        mask = np.zeros((height, width), np.uint8)
        for part in parts:
            np.maximum(mask, (self._sample(part, t, 0, 0, 1.0, 0, 0, width, height) >> ALPHA).astype(np.uint8), out=mask)
        return mask


def _pixels(start: float, step: float, count: int) -> Ints:
    return np.floor(start + (np.arange(count) + 0.5) * step).astype(np.int64)


def _grid(m: Floats, shift: float, left: float, top: float, step: float, x0: int, y0: int, x1: int, y1: int
          ) -> tuple[Ints, Ints]:  # fmt: skip
    """16.16 fixed-point images, under the map m = (a, b, e, c, d, f), of the centres of a grid of pixels.

    Pixel (0, 0) of the grid starts at (left, top) and is `step` wide; columns x0..x1, rows y0..y1.
    """
    column, row = np.arange(x0, x1), np.arange(y0, y1)[:, None]
    x, y = left + 0.5 * step, top + 0.5 * step
    u = column * _fixed(m[0] * step) + (row * _fixed(m[1] * step) + _fixed(m[0] * x + m[1] * y + m[2] - shift))
    v = column * _fixed(m[3] * step) + (row * _fixed(m[4] * step) + _fixed(m[3] * x + m[4] * y + m[5] - shift))
    return u, v
