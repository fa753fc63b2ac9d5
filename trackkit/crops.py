"""Square crops that know their own geometry: a box goes from the frame into the crop and back exactly.

A `Windows` is a batch of squares on the pixel grid of their frames; `cut` resamples the pixels in them. All
trackers and all training samples get their pixels here, so there is one place where coordinates change.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from trackkit.errors import DataError


def context_side(boxes_xywh: Tensor, context: float = 0.0) -> Tensor:
    """Side of the square with the area of each box after a margin: sqrt((w + p)(h + p)), (..., 4) -> (...).

    p = context * (w + h). SiamFC pads with context 0.5 (paper, section 2.4); STARK and its heirs use 0 and
    multiply by a factor instead.
    """
    w, h = boxes_xywh[..., 2], boxes_xywh[..., 3]
    p = context * (w + h)
    return ((w + p) * (h + p)).sqrt()


@dataclass(frozen=True)
class Windows:
    """B squares of frame pixels, each shown as a crop of `size` x `size` pixels.

    Attributes:
        left, top, side: int64 tensors (B,), frame pixels. A window may reach outside its frame.
        size: side of the crop in crop pixels.
    """

    left: Tensor
    top: Tensor
    side: Tensor
    size: int

    @classmethod
    def around(cls, centre_xy: Tensor, side: Tensor, size: int, grid: int = 1) -> Windows:
        """Windows of about `side` frame pixels around `centre_xy` (B, 2), snapped to the pixel grid.

        left = round(cx - side / 2), the rule of both SiamFC and STARK (ties to even); `side` is rounded,
        so pass `side.ceil()` where the authors round up. With `grid` > 1 all numbers become multiples of it,
        so the same window has integer coordinates in a frame decoded at 1/grid of its size.

        Raises DataError when a centre or side is not finite.
        """
        if not (torch.isfinite(centre_xy).all() and torch.isfinite(side).all()):
            raise DataError("a crop window needs finite numbers; the box or the network's output is NaN or infinite")
        side = (side / grid).round().clamp(min=1) * grid
        corner = ((centre_xy - side[:, None] / 2) / grid).round() * grid
        return cls(corner[:, 0].long(), corner[:, 1].long(), side.long(), size)

    def __len__(self) -> int:
        return len(self.side)

    @property
    def scale(self) -> Tensor:
        """Crop pixels per frame pixel, float64 (B,)."""
        return self.size / self.side.double()

    def to_crop(self, boxes_xywh: Tensor) -> Tensor:
        """Frame pixels -> crop pixels; boxes (B, 4) or (B, K, 4), one window for each leading index."""
        origin, scale = self._map(boxes_xywh)
        return (boxes_xywh - origin) * scale

    def to_frame(self, boxes_xywh: Tensor) -> Tensor:
        """Crop pixels -> frame pixels, the inverse of `to_crop`; float64."""
        origin, scale = self._map(boxes_xywh)
        return boxes_xywh.double() / scale + origin

    def _map(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        zero = torch.zeros_like(self.left)
        origin = torch.stack([self.left, self.top, zero, zero], -1).double()  # (B, 4): sizes do not shift
        scale = self.scale[:, None]
        if boxes.ndim == 3:
            origin, scale = origin[:, None], scale[:, None]
        return origin.to(boxes.device), scale.to(boxes.device)

    def reduced(self, factor: int) -> Windows:
        """The same windows in frames decoded at 1/factor of their size; the factor must divide them."""
        return Windows(self.left // factor, self.top // factor, self.side // factor, self.size)

    def divisible(self, factor: int) -> bool:
        """Whether `reduced(factor)` is exact."""
        return all(not (v % factor).any() for v in (self.left, self.top, self.side))


def reduction(side: float, size: int) -> int:
    """Largest JPEG reduction (1, 2, 4 or 8) that leaves at least one decoded pixel for each crop pixel."""
    return max(r for r in (1, 2, 4, 8) if r == 1 or r * size <= side)


def mean_colour(frame: Tensor) -> Tensor:
    """Mean colour of a uint8 frame (3, H, W): float32 (3,), 0..255."""
    rows = frame.float().sum(2)  # below 2**24, so exact in float32, on every device and in any order
    return (rows.double().sum(1) / (frame.shape[1] * frame.shape[2])).float()


def cut(frames: list[Tensor] | Tensor, windows: Windows, fill: Tensor | None = None) -> Tensor:
    """Resample the pixels of each window: B frames uint8 (3, H, W) -> uint8 (B, 3, size, size).

    Frames may differ in size and lie on any device; the crops lie there too. Bilinear, pixel for pixel what
    OpenCV's `resize` gives. Outside the frame the crop has the colour `fill`,
    0..255, shape (3,) or (B, 3); None means the mean colour of each frame.
    """
    crops = []
    for index, frame in enumerate(frames):
        left, top, side = (int(v[index]) for v in (windows.left, windows.top, windows.side))
        colour = None if fill is None else fill if fill.ndim == 1 else fill[index]
        crops.append(_resize(_square(frame, left, top, side, colour), windows.size))
    return torch.stack(crops)


def _square(frame: Tensor, left: int, top: int, side: int, colour: Tensor | None) -> Tensor:
    height, width = frame.shape[1:]
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    if (x2 - x1, y2 - y1) == (side, side):
        return frame[:, y1:y2, x1:x2]
    colour = mean_colour(frame) if colour is None else colour.to(frame.device)
    square = colour.round().to(torch.uint8).repeat(side, side, 1).permute(2, 0, 1)  # channels innermost
    if x2 > x1 and y2 > y1:
        square[:, y1 - top : y2 - top, x1 - left : x2 - left] = frame[:, y1:y2, x1:x2]
    return square


def _resize(square: Tensor, size: int) -> Tensor:
    """Bilinear in OpenCV's fixed-point arithmetic, bit for bit, on every device: uint8 (3, n, n) -> (3, size, size).

    The arithmetic truncates twice and so darkens a crop by 1/8 of a grey level on average. That is nothing to
    a trained network, but the difference between agreeing with the authors' code to 1e-5 px and to 1e-1 px.
    """
    side = square.shape[1]
    rows, columns = square.permute(1, 2, 0).reshape(side, side * 3), _columns(side, size, square.device)
    above, below, weight_above, weight_below = _rows(side, size, square.device)
    if side <= size:
        rows = _blend_columns(rows, *columns)
        upper, lower = rows[above], rows[below]
    else:  # fewer rows are wanted than there are
        upper, lower = _blend_columns(rows[above], *columns), _blend_columns(rows[below], *columns)
    upper = upper.mul_(weight_above).bitwise_right_shift_(16)
    lower = lower.mul_(weight_below).bitwise_right_shift_(16)
    blend = upper.add_(lower).add_(2).bitwise_right_shift_(2)
    return blend.to(torch.uint8).view(size, size, 3).permute(2, 0, 1)


def _blend_columns(rows: Tensor, left: Tensor, right: Tensor, weight_left: Tensor, weight_right: Tensor) -> Tensor:
    def gather(index: Tensor) -> Tensor:
        if rows.device.type == "cpu":  # NumPy gathers bytes five times faster than torch does
            return torch.from_numpy(np.take(rows.numpy(), index.numpy(), 1)).int()
        return rows.index_select(1, index).int()

    return gather(left).mul_(weight_left).add_(gather(right).mul_(weight_right)).bitwise_right_shift_(4)


@lru_cache(maxsize=512)
def _rows(side: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two source rows of each crop row and their weights, which sum to 2048."""
    position = ((torch.arange(size, dtype=torch.float64) + 0.5) * (side / size) - 0.5).float()
    first = position.floor()
    low, high = ((1 - (position - first)) * 2048).round().int(), ((position - first) * 2048).round().int()
    first = first.long()
    taps = first.clamp(0, side - 1), (first + 1).clamp(0, side - 1), low[:, None], high[:, None]
    return tuple(t.to(device) for t in taps)


@lru_cache(maxsize=512)
def _columns(side: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_rows` for the interleaved colours of a row. Beyond the border OpenCV takes the last pixel alone."""
    left, right, low, high = _rows(side, size, device)
    alone = (left == right)[:, None]
    low, high = torch.where(alone, 2048, low).int(), torch.where(alone, 0, high).int()
    colours = torch.arange(3, device=device)
    indices = [(3 * index[:, None] + colours).flatten() for index in (left, right)]
    return (*indices, *(weight.flatten().repeat_interleave(3) for weight in (low, high)))
