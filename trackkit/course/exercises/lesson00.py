"""Exercises of lesson 00, the first tracker: overlaps, scores, crops and template matching."""

from __future__ import annotations

import torch
from torch import Tensor

from trackkit import boxes
from trackkit.course.checks import exercise
from trackkit.crops import Windows
from trackkit.evaluation import average_overlap, success_rate
from trackkit.trackers.references import normalised_cross_correlation

# ---- overlap ----


def _intersection(a: Tensor, b: Tensor, clamp: bool = True) -> Tensor:
    a, b = boxes.xywh_to_xyxy(a), boxes.xywh_to_xyxy(b)
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    return (sides.clamp(min=0) if clamp else sides).prod(-1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole != 0, part / whole, torch.zeros_like(part))


def _unclamped(a_xywh: Tensor, b_xywh: Tensor) -> Tensor:
    inter = _intersection(a_xywh, b_xywh, clamp=False)
    return _ratio(inter, boxes.area(a_xywh) + boxes.area(b_xywh) - inter)


def _unguarded(a_xywh: Tensor, b_xywh: Tensor) -> Tensor:
    inter = _intersection(a_xywh, b_xywh)
    return inter / (boxes.area(a_xywh) + boxes.area(b_xywh) - inter)


def _one_pixel_more(a_xywh: Tensor, b_xywh: Tensor) -> Tensor:
    one = torch.tensor([0, 0, 1, 1], dtype=a_xywh.dtype)
    return boxes.iou(a_xywh + one, b_xywh + one)


@exercise(
    "iou",
    reference=boxes.iou,
    mistakes={
        "You read the boxes as corners (xyxy). They are left, top, width, height: right = left + "
        "width.": (
            lambda a_xywh, b_xywh: boxes.iou(boxes.xyxy_to_xywh(a_xywh), boxes.xyxy_to_xywh(b_xywh))
        ),
        "You read the boxes as centre and size (cxcywh). Their first two numbers are the top-left "
        "corner.": (
            lambda a_xywh, b_xywh: boxes.iou(
                boxes.cxcywh_to_xywh(a_xywh), boxes.cxcywh_to_xywh(b_xywh)
            )
        ),
        "Boxes that do not touch have a negative side of intersection; two of them multiply to a "
        "positive area. "
        "Clamp both sides to at least 0.": _unclamped,
        "Two empty boxes give 0/0. Their overlap is defined as 0.": _unguarded,
        "The union counts the intersection twice. Subtract it once from the sum of the "
        "areas.": lambda a_xywh, b_xywh: _ratio(
            _intersection(a_xywh, b_xywh), boxes.area(a_xywh) + boxes.area(b_xywh)
        ),
        "You divided by the area of the first box. Divide by the union.": lambda a_xywh, b_xywh: (
            _ratio(_intersection(a_xywh, b_xywh), boxes.area(a_xywh))
        ),
        "You divided by the area of the second box. Divide by the union.": lambda a_xywh, b_xywh: (
            _ratio(_intersection(a_xywh, b_xywh), boxes.area(b_xywh))
        ),
        "You divided by the smaller of the two areas. Divide by the "
        "union.": lambda a_xywh, b_xywh: _ratio(
            _intersection(a_xywh, b_xywh), torch.minimum(boxes.area(a_xywh), boxes.area(b_xywh))
        ),
        "This is the area of the intersection. Divide it by the area of the "
        "union.": lambda a_xywh, b_xywh: _intersection(a_xywh, b_xywh),
        "You added one pixel to the sides, as if corners were pixel numbers. Here they are edges: "
        "width = right - left.": (_one_pixel_more),
        "You compared every box with every other. Box i of the first list meets box i of the "
        "second only.": (lambda a_xywh, b_xywh: boxes.iou(a_xywh[:, None], b_xywh[None])),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    pair = torch.tensor([[0.0, 0, 4, 2]]), torch.tensor([[2.0, 1, 4, 3]])
    apart = (
        torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 2]]),
        torch.tensor([[5.0, 6, 3, 4], [1, 7, 2, 2]]),
    )
    a = torch.rand(8, 4, generator=generator) * 15 + 6
    b = a + (torch.rand(8, 4, generator=generator) - 0.5) * 8
    return [pair, apart, (a, b), (torch.zeros(2, 4), torch.zeros(2, 4))]


# ---- scores ----


def _overlaps(generator: torch.Generator) -> list[Tensor]:
    """Overlaps (M,), with entries of exactly 0 and exactly 0.5."""
    short = torch.tensor([0.9, 0.5, 0.25, 0.0, 0.75], dtype=torch.float64)
    return [short, torch.cat([torch.rand(30, generator=generator, dtype=torch.float64), short])]


@exercise(
    "success_rate",
    reference=success_rate,
    mistakes={
        "An overlap of exactly the threshold is no success: use > instead of "
        ">=.": lambda overlaps, threshold: float((overlaps >= threshold).double().mean()),
        "This is in percent. The rate is a share between 0 and 1.": lambda overlaps, threshold: (
            100 * success_rate(overlaps, threshold)
        ),
        "This is the number of successes. Divide it by the number of "
        "frames.": lambda overlaps, threshold: float((overlaps > threshold).sum()),
        "This is the share of failures.": lambda overlaps, threshold: (
            1 - success_rate(overlaps, threshold)
        ),
        "This is the mean overlap of the successes. How large an overlap is does not matter beyond "
        "the threshold.": (
            lambda overlaps, threshold: float(overlaps[overlaps > threshold].mean())
        ),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    return [(overlaps, threshold) for overlaps in _overlaps(generator) for threshold in (0.5, 0.75)]


@exercise(
    "average_overlap",
    reference=average_overlap,
    mistakes={
        "This is in percent. The average is between 0 and 1.": lambda overlaps: (
            100 * average_overlap(overlaps)
        ),
        "This is the sum. Divide it by the number of frames.": lambda overlaps: float(
            overlaps.sum()
        ),
        "This is the median.": lambda overlaps: float(overlaps.median()),
        "You left out the frames with overlap 0. Lost frames count too.": lambda overlaps: float(
            overlaps[overlaps > 0].mean()
        ),
        "You left out the first overlap. The first frame of the video is not in this list any "
        "more.": (lambda overlaps: float(overlaps[1:].mean())),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    return [(overlaps,) for overlaps in _overlaps(generator)]


# ---- from the frame into the crop ----


def frame_to_crop(box_xywh: Tensor, window: Windows) -> Tensor:
    """`Windows.to_crop` as a function: frame pixels -> crop pixels, (B, 4) -> (B, 4)."""
    return window.to_crop(box_xywh)


def _corner(window: Windows, sizes: bool = False) -> Tensor:
    corner = torch.stack([window.left, window.top], -1).double()
    return torch.cat([corner, corner if sizes else torch.zeros_like(corner)], -1)


def _scaled(box: Tensor, window: Windows) -> Tensor:
    return box * window.scale[:, None]


@exercise(
    "frame_to_crop",
    reference=frame_to_crop,
    mistakes={
        "The corner of the window is not subtracted. Crop pixel (0, 0) shows frame pixel (left, "
        "top).": _scaled,
        "The scale is missing: `side` frame pixels become `size` crop "
        "pixels.": lambda box_xywh, window: box_xywh - _corner(window),
        "The scale is upside down. Crop pixels per frame pixel are size / "
        "side.": lambda box_xywh, window: (box_xywh - _corner(window)) / window.scale[:, None],
        "You subtracted the corner from width and height too. A shift does not change "
        "sizes.": lambda box_xywh, window: _scaled(box_xywh - _corner(window, sizes=True), window),
        "Width and height are not scaled. They are lengths in pixels "
        "too.": lambda box_xywh, window: torch.cat(
            [window.to_crop(box_xywh)[:, :2], box_xywh[:, 2:].double()], -1
        ),
        "You scaled first and then subtracted the corner, which is in frame pixels. Subtract, then "
        "scale.": (lambda box_xywh, window: _scaled(box_xywh, window) - _corner(window)),
        "The corner is added. Subtract it: a window further right shows the target further left.": (
            lambda box_xywh, window: _scaled(box_xywh + _corner(window), window)
        ),
        "left and top are swapped. x belongs to left, y to top.": lambda box_xywh, window: (
            window.to_crop(box_xywh - _corner(window).flip(-1).roll(2, -1) + _corner(window))
        ),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    first = (
        torch.tensor([[30.0, 20, 10, 8]], dtype=torch.float64),
        Windows(torch.tensor([20]), torch.tensor([5]), torch.tensor([40]), 20),
    )
    box = torch.rand(4, 4, generator=generator, dtype=torch.float64) * 90 + 5
    left, top = torch.randint(-20, 50, (2, 4), generator=generator)
    side = torch.randint(60, 200, (4,), generator=generator)
    return [first, (box, Windows(left, top, side, 127))]


# ---- template matching ----


def _ncc(
    template: Tensor, image: Tensor, centre: str = "channel", window_norm: bool = True
) -> Tensor:
    """The definition, window by window, with parts that can be left out."""
    height, width = template.shape[1:]
    patches = image.double().unfold(1, height, 1).unfold(2, width, 1)  # (C, H', W', h, w)
    patches = patches.permute(1, 2, 0, 3, 4)  # (H', W', C, h, w)
    template = template.double()
    if centre != "none":
        dims = (-2, -1) if centre == "channel" else (-3, -2, -1)
        template = template - template.mean(dims, keepdim=True)
        patches = patches - patches.mean(dims, keepdim=True)
    products = (patches * template).sum((-3, -2, -1))
    norms = template.norm() * (patches.flatten(2).norm(dim=-1) if window_norm else 1)
    return _ratio(products, norms.expand_as(products))


def _unguarded_ncc(template: Tensor, image: Tensor) -> Tensor:
    right = normalised_cross_correlation(template, image)
    flat = _ncc(template, image).eq(0) & right.eq(0)
    return torch.where(flat, torch.nan, right)


def _raw_products(template: Tensor, image: Tensor) -> Tensor:
    return torch.nn.functional.conv2d(image.double()[None], template.double()[None])[0, 0]


@exercise(
    "ncc",
    reference=normalised_cross_correlation,
    mistakes={
        "The means are not subtracted, so bright windows win whatever they "
        "show.": lambda template, image: _ncc(template, image, "none"),
        "You subtracted one mean for all channels. Each channel has its own, so that a tint drops "
        "out as well.": (lambda template, image: _ncc(template, image, "all")),
        "You divided by the norm of the template only. Windows of high contrast win; divide by "
        "their norms too.": (lambda template, image: _ncc(template, image, window_norm=False)),
        "This is the sum of products. Subtract the means and divide by both norms.": _raw_products,
        "The means are subtracted, but nothing is divided. Divide by the norms of template and "
        "window.": (
            lambda template, image: (
                _ncc(template, image, window_norm=False)
                * (template.double() - template.double().mean((-2, -1), keepdim=True)).norm()
            )
        ),
        "A window of one colour gives 0/0. Its similarity is defined as 0.": _unguarded_ncc,
        "The template is turned by 180 degrees (a convolution). Correlation slides it as it is.": (
            lambda template, image: normalised_cross_correlation(template.flip(1, 2), image)
        ),
        "Rows and columns of the result are swapped.": lambda template, image: (
            normalised_cross_correlation(template, image).T
        ),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    cases = []
    for channels, height, width, size in ((1, 2, 2, 3), (3, 2, 3, 6), (3, 4, 5, 12)):
        image = torch.randint(
            0, 256, (channels, size, size), generator=generator, dtype=torch.uint8
        )
        cases.append((image[:, 1 : 1 + height, 1 : 1 + width].clone(), image))
    flat = cases[-1][1].clone()
    flat[:, :5, :6] = 100
    return [*cases, (cases[-1][0], flat)]
