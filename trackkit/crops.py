"""Square crops that know their own geometry: a box goes from the frame into the crop and back
exactly.

A `Windows` is a batch of squares on the pixel grid of their frames; `cut` resamples the pixels in
them. All trackers and all training samples get their pixels here, so there is one place where
coordinates change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from trackkit.boxes import cxcywh_to_xywh, xywh_to_cxcywh
from trackkit.errors import DataError

STRIP = 64  # rows of a crop that are made together


def context_side(boxes_xywh: Tensor, context: float = 0.0) -> Tensor:
    """Side of the square with the area of each box after a margin: sqrt((w + p)(h + p)), (..., 4)
    -> (...).

    p = context * (w + h). SiamFC pads with context 0.5 (paper, section 2.4); STARK and its heirs
    use 0 and multiply by a factor instead.
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
        """Windows of about `side` frame pixels around `centre_xy` (B, 2), snapped to the pixel
        grid.

        left = round(cx - side / 2), the rule of both SiamFC and STARK (ties to even); `side` is
        rounded, so pass `side.ceil()` where the authors round up. With `grid` > 1 all numbers
        become multiples of it, so the same window has integer coordinates in a frame decoded at
        1/grid of its size.

        Raises DataError when a centre or side is not finite.
        """
        if not (torch.isfinite(centre_xy).all() and torch.isfinite(side).all()):
            raise DataError(
                "a crop window needs finite numbers; the box or the network's output is NaN or "
                "infinite"
            )
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
        """Frame pixels -> crop pixels; boxes (B, 4) or (B, K, 4), one window for each leading
        index.
        """
        origin, scale = self._map(boxes_xywh)
        return (boxes_xywh - origin) * scale

    def to_frame(self, boxes_xywh: Tensor) -> Tensor:
        """Crop pixels -> frame pixels, the inverse of `to_crop`; float64."""
        origin, scale = self._map(boxes_xywh)
        return boxes_xywh.double() / scale + origin

    def _map(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        zero = torch.zeros_like(self.left)
        # (B, 4): sizes do not shift
        origin = torch.stack([self.left, self.top, zero, zero], -1).double()
        scale = self.scale[:, None]
        if boxes.ndim == 3:
            origin, scale = origin[:, None], scale[:, None]
        return origin.to(boxes.device), scale.to(boxes.device)

    def reduced(self, factor: int) -> Windows:
        """The same windows in frames decoded at 1/factor of their size; the factor must divide
        them.
        """
        return Windows(self.left // factor, self.top // factor, self.side // factor, self.size)

    @property
    def rows(self) -> Tensor:
        """Left, top and side of each window, int64 (B, 3): as states and maps keep them."""
        return torch.stack([self.left, self.top, self.side], 1)

    def divisible(self, factor: int) -> bool:
        """Whether `reduced(factor)` is exact."""
        return all(not (v % factor).any() for v in (self.left, self.top, self.side))


def reduction(side: float, size: int) -> int:
    """Largest JPEG reduction (1, 2, 4 or 8) that leaves at least one decoded pixel for each crop
    pixel.
    """
    return max(r for r in (1, 2, 4, 8) if r == 1 or r * size <= side)


def frame_sizes(frames: list[Tensor]) -> Tensor:
    """Width and height of each frame (3, H, W): float64 (B, 2), on the CPU."""
    return torch.tensor([frame.shape[:0:-1] for frame in frames], dtype=torch.float64)


def mean_colour(frame: Tensor) -> Tensor:
    """Mean colour of a uint8 frame (3, H, W): float32 (3,), 0..255."""
    if frame.device.type == "cpu":  # three times faster
        lines = frame.permute(1, 2, 0).reshape(frame.shape[1], -1).numpy()
        sums = torch.from_numpy(lines.sum(0, dtype=np.uint32).astype(np.float64)).view(-1, 3).sum(0)
    else:  # below 2**24, so exact in float32, in any order
        sums = frame.float().sum(2).double().sum(1)
    return (sums / (frame.shape[1] * frame.shape[2])).float()


def cut(frames: list[Tensor] | Tensor, windows: Windows, fill: Tensor | None = None) -> Tensor:
    """Resample the pixels of each window: B frames uint8 (3, H, W) -> uint8 (B, 3, size, size).

    Frames may differ in size and lie on any device; the crops lie there too. Bilinear, pixel for
    pixel what OpenCV's `resize` gives. Outside the frame the crop has the colour `fill`, 0..255,
    shape (3,) or (B, 3); None means the mean colour of each frame.
    """
    parts, rows, colours, first = [], [], [], 0
    for index, (frame, (left, top, side)) in enumerate(
        zip(frames, windows.rows.tolist(), strict=True)
    ):
        x1, y1, x2, y2 = shown(left, top, side, *frame.shape[:0:-1])
        parts.append(frame[:, y1:y2, x1:x2])
        rows.append([first, y2 - y1, x2 - x1, left - x1, top - y1, side])
        first += 3 * (y2 - y1) * (x2 - x1)
        if fill is not None:
            colours.append(fill if fill.ndim == 1 else fill[index])
        elif (x1, y1, x2, y2) == (left, top, left + side, top + side):  # no other colour is seen
            colours.append(torch.zeros(3, device=frame.device))
        else:
            colours.append(mean_colour(frame))
    colours, device = torch.stack(colours), parts[0].device
    if device.type == "cpu":
        plan = zip(parts, rows, colours.cpu(), strict=True)
        return torch.stack([resize(part, *row[3:], windows.size, c) for part, row, c in plan])
    pixels = torch.cat([part.permute(1, 2, 0).flatten() for part in parts])
    table = torch.tensor(rows).to(colours.device)
    table = torch.cat([table, colours.round().long()], 1).to(device)
    return resample(pixels, table, windows.size)


def shown(left: int, top: int, side: int, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what a window shows of a frame; its first pixel if nothing."""
    part = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    return part if part[0] < part[2] and part[1] < part[3] else (0, 0, 1, 1)


def resample(pixels: Tensor, table: Tensor, size: int) -> Tensor:
    """`cut` for many windows at once, on any device, byte for byte: uint8 (N, 3, size, size).

    Args:
        pixels: uint8 (bytes,), what the windows show of their frames, one behind the other, each
            (h, w, 3).
        table: int64 (N, 9): first byte, h, w; left, top, side of the window in these pixels; red,
            green, blue outside.
        size: side of the crops.
    """
    first, height, width, left, top, side = table[:, :6].T[..., None]  # (N, 1) each
    begin, share = _positions(side.double(), size)
    low, high = ((1 - share) * 2048).round().int(), (share * 2048).round().int()
    before, behind = (torch.minimum((begin + i).clamp(min=0), side - 1) for i in (0, 1))
    # at the border OpenCV takes the last column alone, but blends the last row with itself
    alone = before == behind
    low_column, high_column = low.masked_fill(alone, 2048), high.masked_fill(alone, 0)
    colour = table[:, None, None, 6:].to(torch.uint8)
    bytes_of = torch.arange(3, device=table.device)

    def line(rows: Tensor) -> Tensor:
        """Rows (N, size) of the windows, blended along them: int32 (N, size, size, 3)."""
        y, blend = top + rows, 0
        for columns, weight in ((before, low_column), (behind, high_column)):
            x = left + columns
            inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
            at = first[:, :, None] + 3 * (y[:, :, None] * width[:, :, None] + x[:, None])
            seen = pixels[(at * inside)[..., None] + bytes_of]
            seen = torch.where(inside[..., None], seen, colour)
            blend = blend + seen.int() * weight[:, None, :, None]
        return blend.bitwise_right_shift(4)

    upper, lower = (
        (line(rows) * weight[:, :, None, None]).bitwise_right_shift(16)
        for rows, weight in ((before, low), (behind, high))
    )
    return (upper + lower + 2).bitwise_right_shift(2).to(torch.uint8).permute(0, 3, 1, 2)


def outside(windows: Windows, frame_sizes: Iterable[tuple[int, int]]) -> Tensor:
    """Which pixels of each crop lie outside their frame, if only in part: bool (B, size, size).

    `frame_sizes` are B pairs (width, height). A crop pixel blends up to four frame pixels; it is
    inside when all that count are. This is the mask of the STARK family: ones on the padded pixels
    of the window, resized by OpenCV's `resize`, "not zero" -> True. Their code pads one column and
    one row too early, so that the last ones of a frame are lost. A frame one pixel narrower and
    lower gives the same: to imitate it, pass width - 1 and height - 1 here and `frame[:, :-1, :-1]`
    to `cut`.
    """
    masks = []
    corners = zip(windows.left.tolist(), windows.top.tolist(), windows.side.tolist(), strict=True)
    for (left, top, side), (width, height) in zip(corners, frame_sizes, strict=True):
        first, last = _reach(side, windows.size)
        columns = (first < -left) | (last >= width - left)
        rows = (first < -top) | (last >= height - top)
        masks.append(rows[:, None] | columns)
    return torch.from_numpy(np.stack(masks))


@dataclass(frozen=True)
class CropSpec:
    """How a crop is taken around a target: a tracker states it once, for tracking (`around`,
    `to_frame`) and, with jitter added, for training (`sampling`).

    Attributes:
        size: side of the crop in crop pixels.
        factor: side of the window in units of `context_side(box, context)`.
        context: margin before the factor, see `crops.context_side`.
        shift_px: the window moves by up to this many crop pixels along each axis, uniformly.
        scale: the target appears larger or smaller by up to this share, uniformly.
        jitter_size, jitter_centre: the crop is taken around a box that is off in size and place,
            see `jitter_box`.
        fill: grey level 0..255 outside the frame; None is the frame's mean colour.
        exact: the sample's box lies where the target is (`Windows.to_crop`); False imitates the
            STARK authors, for whom it is half a crop pixel off (`gt_in_crop`) and the last row and
            column of a frame are masked.
    """

    size: int
    factor: float
    context: float = 0.0
    shift_px: float = 0.0
    scale: float = 0.0
    jitter_size: float = 0.0
    jitter_centre: float = 0.0
    fill: int | None = None
    exact: bool = True

    def __post_init__(self):
        if self.size < 1 or self.factor <= 0 or not 0 <= self.scale < 1:
            raise ValueError(f"impossible crop: {self}")
        if min(self.jitter_size, self.jitter_centre) < 0 or not 0 <= (self.fill or 0) <= 255:
            raise ValueError(f"a jitter must not be negative, a fill lies in 0..255: {self}")

    def around(self, frames: list[Tensor], boxes_xywh: Tensor) -> tuple[Tensor, Windows]:
        """Crops uint8 (B, 3, size, size) around the boxes (B, 4) and their windows, without jitter:
        `around_box` with this crop's numbers.
        """
        fill = (
            None
            if self.fill is None
            else torch.full((3,), float(self.fill), device=frames[0].device)
        )
        side = context_side(boxes_xywh, self.context) * self.factor
        windows = Windows.around(xywh_to_cxcywh(boxes_xywh)[:, :2], side.ceil(), self.size)
        if not self.exact:
            frames = [frame[:, :-1, :-1] for frame in frames]
        return cut(frames, windows, fill), windows

    def to_frame(self, boxes: Tensor, windows: Windows, around_xywh: Tensor) -> Tensor:
        """Boxes (B, 4) found in crops of `around` -> frame pixels, see `box_to_frame`."""
        return box_to_frame(boxes, windows, around_xywh, self.exact)


def around_box(
    frames: list[Tensor], boxes_xywh: Tensor, factor: float, size: int, exact: bool = True
) -> tuple[Tensor, Windows]:
    """Crops uint8 (B, 3, size, size) around the boxes (B, 4) as STARK and its heirs take them, and
    their windows.

    The side is ceil(sqrt(w h) * factor) frame pixels; outside the frame is black. Without `exact`
    the last row and column of a frame are lost too, see `outside`.
    """
    return CropSpec(size, factor, fill=0, exact=exact).around(frames, boxes_xywh)


def box_to_frame(
    boxes: Tensor, windows: Windows, around_xywh: Tensor, exact: bool = True
) -> Tensor:
    """Boxes (B, 4) found in crops, cxcywh in units of the crop -> xywh, frame pixels.

    The windows are those of `around_box`, taken around `around_xywh` (B, 4). Without `exact` they
    count as centred there, as STARK and its heirs have it, although they were snapped to whole
    pixels.
    """
    if exact:
        return windows.to_frame(cxcywh_to_xywh(boxes * windows.size))
    boxes = boxes * windows.side[:, None]
    # not where the window is: where it was meant to be
    corner = xywh_to_cxcywh(around_xywh)[:, :2] - windows.side[:, None] / 2
    return cxcywh_to_xywh(torch.cat([boxes[:, :2] + corner, boxes[:, 2:]], 1))


def gt_in_crop(boxes_xywh: Tensor, centre_xy: Tensor, windows: Windows) -> Tensor:
    """STARK's rule for boxes in crops: (B, 4) xywh in frame pixels -> (B, 4) cxcywh in units of the
    crop, float64.

    The windows were taken around `centre_xy` (B, 2). The rule ignores that they were then snapped
    to the pixel grid, and it puts the centre of a crop at (size - 1) / 2, half a crop pixel from
    where it is. `Windows.to_crop` has neither habit; this one is for agreement with the targets
    that the authors train on.
    """
    boxes, scale = xywh_to_cxcywh(boxes_xywh.double()), windows.scale[:, None]
    centre = (windows.size - 1) / 2 + (boxes[:, :2] - centre_xy) * scale
    return torch.cat([centre, boxes[:, 2:] * scale], 1) / windows.size


def warp_crops(
    frames: list[Tensor], centre: Tensor, side: Tensor, size: int, fill: Tensor
) -> tuple[Tensor, Tensor]:
    """STMTrack's crops uint8 (B, 3, size, size) around `centre` (B, 2), `side` (B,) frame pixels
    wide; their scale (B,).

    The centre is cut to whole pixels and the side rounded, to s. Crop pixels 0 .. size - 1 lie
    evenly on window pixels 0 .. s, so the window is one pixel wider than s, which is why the scale,
    crop pixels per frame pixel, is size / (s + 1). From a side of 2.1 sizes on, only every second
    pixel of the frame is used, from 3.1 on every third, and so on. Each crop pixel blends its four
    neighbours linearly; those outside the frame have the colour `fill`, cut to integers.

    This is OpenCV 5's `warpAffine`, but for one pixel in a hundred crops, by a grey level. It
    calculates in float32 with fused multiply-adds: as a product is exact in float64, so is its sum
    but for one rounding. Raises DataError for numbers that are not finite.
    """
    if not (torch.isfinite(centre).all() and torch.isfinite(side).all()):
        raise DataError(
            "a crop window needs finite numbers; the box or the network's output is NaN or infinite"
        )
    crops, scales = [], []
    steps = torch.arange(size, dtype=torch.float64, device=frames[0].device)
    for frame, at, wide, colour in zip(frames, centre.tolist(), side.tolist(), fill, strict=True):
        skip = max(int(wide / size - 0.1), 1)
        x, y = (int(c) for c in at)
        if skip > 1:
            frame = frame[:, y % skip :: skip, x % skip :: skip]
            x, y = x // skip, y // skip
        s = max(round(wide / skip), 2)
        scales.append(size / ((s + 1) * skip))
        step = float(np.float32(s / (size - 1)))
        left, top = (c - (s - 1) // 2 for c in (x, y))
        columns = (steps * step + left).float()  # rounded once
        rows = (steps * step).float() + top  # rounded twice, as there
        colour = colour.to(frame.device, torch.uint8)[:, None, None]
        (index_y, known_y, share_y), (index_x, known_x, share_x) = (
            _neighbours(*given) for given in ((rows, frame.shape[1]), (columns, frame.shape[2]))
        )
        # a large skip can leave nothing of a small frame
        seen = frame[:, index_y][:, :, index_x] if frame.numel() else colour
        # (3, 2 size, 2 size)
        pixels = torch.where(known_y[:, None] & known_x, seen, colour).double()
        left, right = pixels[..., :size], pixels[..., size:]
        above, below = (left + share_x * (right - left)).float().split(size, 1)
        crops.append(
            (above + share_y[:, None] * (below - above).double()).float().round().to(torch.uint8)
        )
    return torch.stack(crops), torch.tensor(scales, dtype=torch.float64)


def resize(part: Tensor, left: int, top: int, side: int, size: int, colour: Tensor) -> Tensor:
    """`cut` for a window in what it shows of a frame (3, h, w), on the CPU: uint8 (3, size, size).

    Bilinear in OpenCV's fixed-point arithmetic, bit for bit. That truncates twice and so darkens a
    crop by 1/8 of a grey level on average: nothing to a trained network, but the difference between
    agreeing with the authors' code to 1e-5 px and to 1e-1 px. In NumPy, which gathers bytes five
    times faster than torch does, and in strips that stay in the processor's cache.
    """
    pixels = part.permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    (above, below, share_above, share_below), (before, behind, share_before, share_behind) = _plan(
        side, size
    )
    above, below, before, behind = above + top, below + top, before + left, behind + left
    # a pixel of colour all around stands for all beyond it
    if (left, top, height, width) != (0, 0, side, side):
        framed = np.empty((height + 2, width + 2, 3), np.uint8)
        framed[:] = colour.round().to(torch.uint8).numpy()
        framed[1:-1, 1:-1] = pixels
        pixels = framed
        above, below = (index.clip(-1, height) + 1 for index in (above, below))
        before, behind = (index.clip(-1, width) + 1 for index in (before, behind))
    lines = pixels.reshape(len(pixels), -1)
    before, behind = ((3 * x[:, None] + np.arange(3)).ravel() for x in (before, behind))
    crop = np.empty((size, 3 * size), np.uint8)
    for start in range(0, size, STRIP):
        strip = slice(start, start + STRIP)
        a, b = above[strip], below[strip]
        if b[-1] - a[0] < 2 * len(a):
            source, a, b = lines[a[0] : b[-1] + 1], a - a[0], b - a[0]
        else:  # fewer rows are wanted than there are
            source = lines[np.concatenate([a, b])]
            a, b = np.arange(len(a)), np.arange(len(a), 2 * len(a))
        blend = np.multiply(source.take(before, 1), share_before, dtype=np.int32)
        blend += np.multiply(source.take(behind, 1), share_behind, dtype=np.int32)
        blend >>= 4
        upper, lower = blend.take(a, 0), blend.take(b, 0)
        upper *= share_above[strip]
        lower *= share_below[strip]
        upper >>= 16
        lower >>= 16
        upper += lower
        upper += 2
        upper >>= 2
        crop[strip] = upper
    return torch.from_numpy(crop).view(size, size, 3).permute(2, 0, 1)


def _positions(side: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For each crop pixel along one axis: the pixel of the window that it begins at, int64 from -1
    on, and how far towards the next one it lies, float32 0..1. `side` float64 (..., 1).
    """
    steps = torch.arange(size, dtype=torch.float64, device=side.device) + 0.5
    position = (steps * (side / size) - 0.5).float()
    begin = position.floor()
    return begin.long(), position - begin


@lru_cache(maxsize=512)
def _source(side: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for one window, without torch's start-up of a dozen operations: int64, float32
    (size,).
    """
    position = ((np.arange(size) + 0.5) * (side / size) - 0.5).astype(np.float32)
    begin = np.floor(position)
    return begin.astype(np.int64), position - begin


def _reach(side: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last pixel of the window that count in each crop pixel, along one axis:
    int64 (size,).
    """
    first, share = _source(side, size)
    return first.clip(min=0), (first + (share > 0)).clip(max=side - 1)


@lru_cache(maxsize=512)
def _plan(side: int, size: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """What `resize` needs: of each crop row the two rows of the window and their weights, sums of
    2048, int32 (size, 1); and the same for columns, the weights for interleaved colours (3 size,).
    """
    first, share = _source(side, size)
    low, high = (np.rint(s * np.float32(2048)).astype(np.int32) for s in (1 - share, share))
    first, second = first.clip(0, side - 1), (first + 1).clip(0, side - 1)
    # at the border OpenCV takes the last column alone, but blends the last row with itself
    alone = first == second
    columns = np.where(alone, 2048, low), np.where(alone, 0, high)
    columns = (np.repeat(weights, 3).astype(np.int32) for weights in columns)
    return (first, second, low[:, None], high[:, None]), (first, second, *columns)


def _neighbours(places: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: the pixels before all places (S,) and then those behind, (2 S,), cut to 0 ..
    length - 1; which of them were there already; and how far each place is from the one before
    towards the other, (S,) float64.
    """
    before = places.floor()
    index = torch.cat([before, before + 1]).long()
    return index.clamp(0, length - 1), (index >= 0) & (index < length), (places - before).double()
