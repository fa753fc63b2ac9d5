"""Boxes: four formats, areas, overlaps.

A box in a file or in the public API is `xywh`: left, top, width, height in pixels, where the pixel
in the corner covers the square from (0, 0) to (1, 1). Networks use `cxcywh` (centre) or `xyxy`
(corners). Every function takes and returns tensors of shape (..., 4) and broadcasts over the
leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trackkit.errors import DataError

# sides of a box in units of the frame's longer side: windows around larger ones take gigabytes
LARGEST = 10


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Left, top, width, height -> left, top, right, bottom. Shape (..., 4)."""
    x, y, w, h = boxes.unbind(-1)
    return torch.stack([x, y, x + w, y + h], -1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """Left, top, right, bottom -> left, top, width, height. Shape (..., 4)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1, y1, x2 - x1, y2 - y1], -1)


def xywh_to_cxcywh(boxes: Tensor) -> Tensor:
    """Left, top, width, height -> centre x, centre y, width, height. Shape (..., 4)."""
    x, y, w, h = boxes.unbind(-1)
    return torch.stack([x + w / 2, y + h / 2, w, h], -1)


def cxcywh_to_xywh(boxes: Tensor) -> Tensor:
    """Centre x, centre y, width, height -> left, top, width, height. Shape (..., 4)."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx - w / 2, cy - h / 2, w, h], -1)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre x, centre y, width, height -> left, top, right, bottom. Shape (..., 4)."""
    return xywh_to_xyxy(cxcywh_to_xywh(boxes))


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Left, top, right, bottom -> centre x, centre y, width, height. Shape (..., 4)."""
    return xywh_to_cxcywh(xyxy_to_xywh(boxes))


def area(boxes_xywh: Tensor) -> Tensor:
    """Area of each box, shape (...); a box with a negative side has area 0."""
    return boxes_xywh[..., 2].clamp(min=0) * boxes_xywh[..., 3].clamp(min=0)


def iou(a_xywh: Tensor, b_xywh: Tensor) -> Tensor:
    """Intersection over union, pair by pair: (..., 4) and (..., 4) -> (...), in [0, 1].

    Two empty boxes have overlap 0. For every box against every box, index with None:
    `iou(a[:, None], b[None])`.
    """
    a, b = xywh_to_xyxy(a_xywh), xywh_to_xyxy(b_xywh)
    corner_min = torch.maximum(a[..., :2], b[..., :2])
    corner_max = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (corner_max - corner_min).clamp(min=0).prod(-1)
    union = area(a_xywh) + area(b_xywh) - intersection
    return torch.where(union > 0, intersection / union, torch.zeros_like(union))


def giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU, pair by pair: (..., 4) corners -> (...), in (-1, 1].

    IoU minus the share of the smallest enclosing box that neither box covers, so two boxes that do
    not touch still tell how far apart they are. Source: Rezatofighi et al., CVPR 2019, Eq. 3 and
    Algorithm 1.
    """
    inner = torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.maximum(
        a_xyxy[..., :2], b_xyxy[..., :2]
    )
    outer = torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.minimum(
        a_xyxy[..., :2], b_xyxy[..., :2]
    )
    intersection, hull = inner.clamp(min=0).prod(-1), outer.clamp(min=0).prod(-1)
    union = area(xyxy_to_xywh(a_xyxy)) + area(xyxy_to_xywh(b_xyxy)) - intersection
    tiny = torch.finfo(union.dtype).tiny  # two empty boxes have no union and no hull
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def clip_xywh(boxes_xywh: Tensor, width: float, height: float) -> Tensor:
    """The part of each box inside a `width` x `height` frame; (..., 4) -> (..., 4).

    A box entirely outside becomes a box of zero width or height at the border.
    """
    x1, y1, x2, y2 = xywh_to_xyxy(boxes_xywh).unbind(-1)
    x1, x2 = x1.clamp(0, width), x2.clamp(0, width)
    y1, y2 = y1.clamp(0, height), y2.clamp(0, height)
    return torch.stack([x1, y1, x2 - x1, y2 - y1], -1)


def follow_size(old_xywh: Tensor, new_xywh: Tensor, rate: float) -> Tensor:
    """The new boxes (..., 4), xywh, with a share of the change of size: both sides are those of the
    old ones times (new / old) ** rate, around the new centre. A rate of 1 leaves them.

    A single frame says little about the size, and an error in it moves and scales the next window.
    """
    if rate == 1:
        return new_xywh
    ratio = (new_xywh[..., 2:] / old_xywh[..., 2:]).clamp(0.1, 10) ** rate
    sides = old_xywh[..., 2:] * ratio
    return torch.cat([new_xywh[..., :2] + (new_xywh[..., 2:] - sides) / 2, sides], -1)


def bias_of(found_xywh: Tensor, truth_xywh: Tensor) -> Tensor:
    """By how much boxes (..., 4) that were found are off: (..., 4), from their centre to the true
    one in sizes of the true box, at most 0.3, and true size over found size, 1/2 to 2.
    """
    found, truth = xywh_to_cxcywh(found_xywh), xywh_to_cxcywh(truth_xywh)
    move = ((truth[..., :2] - found[..., :2]) / truth[..., 2:]).clamp(-0.3, 0.3)
    return torch.cat([move, (truth[..., 2:] / found[..., 2:]).clamp(0.5, 2)], -1)


def without_bias(found_xywh: Tensor, bias: Tensor | None) -> Tensor:
    """Boxes (..., 4) as they would be if they were off by as much as those that `bias_of` saw; as
    they are without a bias.
    """
    if bias is None:
        return found_xywh
    found = xywh_to_cxcywh(found_xywh)
    sides = found[..., 2:] * bias[..., 2:]
    return cxcywh_to_xywh(torch.cat([found[..., :2] + bias[..., :2] * sides, sides], -1))


def clip_with_margin(boxes_xywh: Tensor, sizes: Tensor, margin: float) -> Tensor:
    """Boxes (B, 4) kept in their frames of `sizes` (B, 2) width and height, at least `margin`
    pixels inside and large.

    Unlike `clip_xywh` it never leaves an empty box, so a tracker can go on from any. The rule of
    STARK and its heirs.
    """
    low, high = xywh_to_xyxy(boxes_xywh).split(2, -1)
    low = torch.minimum(low.clamp(min=0), sizes - margin)
    high = torch.minimum(high.clamp(min=margin), sizes)
    return torch.cat([low, (high - low).clamp(min=margin)], -1)


def check_boxes(boxes_xywh: Tensor, what: str, frame_size: tuple[int, int] | None = None) -> Tensor:
    """Return the boxes as float64 (N, 4) if a tracker can start from them.

    `what` names their origin in the error. With `frame_size` (width, height) the box must also
    share at least a part with the frame.

    Raises DataError for a wrong shape, NaN or infinite numbers, a width or height that is not
    positive, or a box outside its frame or `LARGEST` times larger than it.
    """
    boxes = torch.as_tensor(boxes_xywh, dtype=torch.float64)
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        raise DataError(
            f"{what}: expected boxes of shape (N, 4) as left, top, width, height, got "
            f"{tuple(boxes.shape)}"
        )
    for index, box in enumerate(boxes):
        text = ", ".join(f"{v:g}" for v in box.tolist())
        if not torch.isfinite(box).all():
            raise DataError(
                f"{what}: box {index} ({text}) is not finite; give left, top, width, height in "
                "pixels"
            )
        if box[2] <= 0 or box[3] <= 0:
            raise DataError(
                f"{what}: box {index} ({text}) has no area; width and height must be positive "
                "pixels"
            )
        if frame_size is not None and box[2:].max() > LARGEST * max(frame_size):
            raise DataError(
                f"{what}: box {index} ({text}) is more than {LARGEST} times as large as its "
                f"{frame_size[0]}x{frame_size[1]} frame; give left, top, width, height in pixels"
            )
        if frame_size is not None and area(clip_xywh(box, *frame_size)) <= 0:
            raise DataError(
                f"{what}: box {index} ({text}) lies outside its {frame_size[0]}x{frame_size[1]} "
                "frame; "
                "give left, top, width, height in pixels of that frame"
            )
    return boxes
