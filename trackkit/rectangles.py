"""Crops in two steps: where files are read, the rectangle of pixels that a crop needs; where there
is time to compute, the crop itself.

A loader worker can render its own crops (`Rectangle.crop`, `restyle`), or hand on bare rectangles
of many sizes in one buffer (`pack`) that a GPU renders all at once (`Packed.render`). Both give the
same bytes: bilinear in OpenCV's integers, then mirrored, grey, brighter or darker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trackkit.crops import resample, resize


class Rectangle(NamedTuple):
    """What one crop is made of.

    Attributes:
        pixels: uint8 (3, h, w), channels innermost in memory; all that the window shows of its
            frame, and no more.
        left, top, side: the window, in pixels of this rectangle. size: of the crop.
        fill: colour outside, 0..255, (3,).
    """

    pixels: Tensor
    left: int
    top: int
    side: int
    size: int
    fill: Tensor

    def crop(self) -> Tensor:
        """uint8 (3, size, size)."""
        whole = self.side, *self.pixels.shape[1:], self.left, self.top
        if whole == (self.size, self.size, self.size, 0, 0):
            return self.pixels.clone()
        return resize(*self)


class Style(NamedTuple):
    """What is done to the pixels of N crops after they are cut; None for what is not done.

    Attributes:
        flips, greys: bool (N,), mirrored left to right, without colours.
        factors: float32 (N,), brightness.
    """

    flips: Tensor | None
    greys: Tensor | None
    factors: Tensor | None


def restyle(crops: Tensor, style: Style) -> Tensor:
    """Crops uint8 (N, 3, S, S) in their style; the given ones may be changed."""
    flips, greys, factors = (None if s is None else s[:, None, None, None] for s in style)
    if crops.device.type == "cpu":  # where asking costs nothing, and work does
        if flips is not None:
            for i in style.flips.nonzero()[:, 0]:
                crops[i] = crops[i].flip(-1)
        flips, greys = None, greys if greys is not None and greys.any() else None
    if flips is not None:
        crops = torch.where(flips, crops.flip(-1), crops)
    if greys is not None:
        crops = torch.where(greys, grey_levels(crops), crops)
    if factors is not None:
        crops = crops.float().mul_(factors).round_().clamp_(max=255).to(torch.uint8)
    return crops


def grey_levels(crop: Tensor) -> Tensor:
    """Brightness of each pixel as OpenCV's RGB2GRAY has it, bit for bit: uint8 (..., 3, H, W) ->
    (..., 1, H, W).
    """
    red, green, blue = crop.int().split(1, -3)
    # 0.299, 0.587, 0.114 of 2 ** 15
    grey = 9798 * red + 19235 * green + 3735 * blue + (1 << 14)
    return grey.bitwise_right_shift(15).to(torch.uint8)


@dataclass(frozen=True)
class Packed:
    """Rectangles of crops of one size, as they travel to a GPU: few tensors, however many they are.

    Attributes:
        pixels: uint8 (bytes,), the rectangles one behind the other, each (h, w, 3).
        table: int64 (N, 9), see `crops.resample`.
        style: of the N crops.
        shape: of the result without its last three dimensions; its product is N.
        size: side of the crops.
    """

    pixels: Tensor
    table: Tensor
    style: Style
    shape: tuple[int, ...]
    size: int

    def _each(self, change) -> Packed:
        style = Style(*(None if s is None else change(s) for s in self.style))
        return Packed(change(self.pixels), change(self.table), style, self.shape, self.size)

    def to(self, device, non_blocking: bool = False) -> Packed:
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Packed:
        return self._each(lambda t: t.pin_memory())

    def render(self) -> Tensor:
        """The crops where the pixels are: uint8 (*shape, 3, size, size)."""
        crops = resample(self.pixels, self.table, self.size)
        return restyle(crops, self.style).unflatten(0, self.shape)

    @classmethod
    def join(cls, parts: list[Packed]) -> Packed:
        """The samples of a batch, each packed by itself; their dimension comes first."""
        starts = torch.tensor([0] + [len(part.pixels) for part in parts[:-1]]).cumsum(0)
        tables = torch.stack([part.table for part in parts])
        tables[..., 0] += starts[:, None]
        columns = zip(*(part.style for part in parts), strict=True)
        style = Style(*(None if column[0] is None else torch.cat(column) for column in columns))
        pixels, shape = torch.cat([part.pixels for part in parts]), (len(parts), *parts[0].shape)
        return cls(pixels, tables.flatten(0, 1), style, shape, parts[0].size)


def pack(rectangles: list[Rectangle], style: Style) -> Packed:
    """Rectangles of N crops of one size, shape (N,)."""
    rows, first = [], 0
    for pixels, left, top, side, _, fill in rectangles:
        rows.append([first, *pixels.shape[1:], left, top, side, *map(int, fill.round())])
        first += pixels.numel()
    pixels = torch.cat([r.pixels.permute(1, 2, 0).flatten() for r in rectangles])
    return Packed(pixels, torch.tensor(rows), style, (len(rows),), rectangles[0].size)
