"""Training losses that trackers share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trackkit.boxes import giou, xyxy_to_cxcywh


def balanced_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Logistic loss in which positives and negatives weigh one half each: two equal shapes ->
    scalar.

    A response map has a dozen positive cells among hundreds; without the balance "no" everywhere is
    a good answer. Labels are 0 or 1. If one class is missing the other keeps its half. Source:
    Bertinetto et al. 2016, section 2.2, Eq. 3-4 (labels there are +1 and -1).
    """
    positive = labels > 0.5
    weights = torch.where(
        positive,
        0.5 / positive.sum().clamp(min=1),
        0.5 / (~positive).sum().clamp(min=1),
    )
    return F.binary_cross_entropy_with_logits(
        logits, labels.to(logits.dtype), weights.to(logits.dtype), reduction="sum"
    )


def mean_of(values: Tensor, counted: Tensor | None) -> Tensor:
    """Mean of the values (...) that are `counted`, bool, of a shape that expands to theirs, or of
    all of them; 0 if none is.

    A sum under a mask, here and below: `values[counted]` would make a GPU wait, as the shape of the
    result is known only when the mask is. Up to the order of summation it is the same.
    """
    if counted is None:
        return values.mean()
    counted = counted.expand_as(values)
    return torch.where(counted, values, 0).sum() / counted.sum().clamp(min=1)


def localisation(
    boxes_xyxy: Tensor,
    truth_xyxy: Tensor,
    keep_degenerate: bool = True,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean GIoU loss and mean L1 distance of boxes (..., 4), corners in units of the crop: two
    scalars.

    L1 is the mean over all coordinates; it pulls when boxes do not touch, and GIoU = 1 - giou
    weighs small and large boxes alike. STARK adds them as 2 * GIoU + 5 * L1 (Eq. 2). A box whose
    corners are the wrong way round has no area; with `keep_degenerate` it still counts, else one
    such box turns the GIoU loss of the whole batch to 0 (the authors' code). The means are over the
    boxes that are `counted`, bool (...), or over all; where none is, they are 0.
    """
    if counted is not None:  # the others answer the truth: that costs nothing, nor has a gradient
        boxes_xyxy = torch.where(counted[..., None], boxes_xyxy, truth_xyxy)
    l1 = mean_of((boxes_xyxy - truth_xyxy).abs(), None if counted is None else counted[..., None])
    loss = mean_of(1 - giou(boxes_xyxy, truth_xyxy), counted)
    if not keep_degenerate:
        inside_out = (boxes_xyxy[..., 2:] < boxes_xyxy[..., :2]).any()
        loss = torch.where(inside_out, torch.zeros_like(loss), loss)
    return loss, l1


def ciou(boxes_xyxy: Tensor, truth_xyxy: Tensor) -> Tensor:
    """Complete IoU, pair by pair: (..., 4) corners -> (...), in [-1, 1].

    IoU, less the squared distance of the centres in units of the enclosing box's diagonal, less a
    penalty for another aspect ratio, which counts for more the better the boxes fit and not at all
    up to an IoU of 0.5. Source: Zheng et al. 2021 ("Enhancing Geometric Factors in Model Learning
    and Inference"), in the form of MixFormer's code.
    """
    middle, sides = xyxy_to_cxcywh(boxes_xyxy).split(2, -1)
    true_middle, true_sides = xyxy_to_cxcywh(truth_xyxy).split(2, -1)
    low, high = torch.minimum(boxes_xyxy, truth_xyxy), torch.maximum(boxes_xyxy, truth_xyxy)
    inner, outer = (
        (low[..., 2:] - high[..., :2]).clamp(min=0).prod(-1),
        (high[..., 2:] - low[..., :2]).clamp(min=0),
    )
    tiny = torch.finfo(outer.dtype).tiny  # for empty boxes
    union = sides.clamp(min=0).prod(-1) + true_sides.clamp(min=0).prod(-1) - inner
    iou = inner / union.clamp(min=tiny)
    distance = (middle - true_middle).square().sum(-1) / outer.square().sum(-1).clamp(min=tiny)
    angle, true_angle = (
        torch.atan(w / h) for w, h in (s.clamp(min=1e-6).unbind(-1) for s in (sides, true_sides))
    )
    aspect = 4 / math.pi**2 * (true_angle - angle).square()
    weight = torch.where(iou > 0.5, aspect / (1 - iou + aspect).clamp(min=tiny), 0).detach()
    return (iou - distance - weight * aspect).clamp(-1, 1)


def gaussian_target(boxes: Tensor, grid: int) -> Tensor:
    """What the score map should be: boxes (B, 4), cxcywh in units of the crop -> (B, grid, grid),
    0..1 (CenterNet; ProContEXT, Eq. 2).

    1 at the cell nearest to the centre, around it a Gaussian as wide as boxes may be off and still
    overlap by 0.7. (In ProContEXT's print the parentheses around the two squares are missing.) The
    radius is CornerNet's, whose formulas divide by 2 instead of 2 a, known and kept by all of its
    heirs. A centre in the last half cell rounds to a cell outside the map.
    """
    cx, cy, w, h = (boxes * grid).unbind(1)
    overlap, around, area = 0.7, h + w, h * w
    shares = (1 - overlap) / (1 + overlap), 1 - overlap, overlap - 1
    inner = (around + (around**2 - 4 * area * shares[0]).sqrt()) / 2
    outer = (2 * around + (4 * around**2 - 16 * area * shares[1]).sqrt()) / 2
    mixed = (
        -2 * overlap * around
        + (4 * overlap**2 * around**2 - 16 * overlap * area * shares[2]).sqrt()
    ) / 2
    radius = torch.minimum(torch.minimum(inner, outer), mixed).trunc()[:, None]
    sigma = (2 * radius + 1) / 6
    cells = torch.arange(grid, device=boxes.device)
    lines = []
    for centre in (cy, cx):
        distance = cells - centre.round()[:, None]
        lines.append(torch.exp(-(distance**2) / (2 * sigma**2)) * (distance.abs() <= radius))
    return lines[0][:, :, None] * lines[1][:, None, :]


def focal_loss(score: Tensor, target: Tensor) -> Tensor:
    """Penalty-reduced focal loss of score maps against Gaussian targets, two equal shapes -> scalar
    (CornerNet; ProContEXT, Eq. 3).

    Summed over the batch and divided by the number of peaks, cells that are exactly 1. Cells near a
    peak count little.
    """
    peak = target == 1
    at_peak = (1 - score) ** 2 * score.log()
    elsewhere = (1 - target) ** 4 * score**2 * (1 - score).log()
    return -torch.where(peak, at_peak, elsewhere).sum() / peak.sum().clamp(min=1)


def place_cross_entropy(logits: Tensor, place: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of maps (..., s, s) with the places (..., 2), x and y in [0, 1], that they
    should point at; over those that are `counted`, see `mean_of`.

    A place between cells (cell j stands for j / s, as in `heads.soft_argmax`) is shared by its four
    neighbours, so that the target's expectation is the place itself (after Li et al., "Generalized
    Focal Loss", NeurIPS 2020).
    """
    size = logits.shape[-1]
    at = (place * size).clamp(0, size - 1)
    low = at.floor().clamp(max=size - 2)
    share = torch.stack([1 - (at - low), at - low], -1)  # (..., 2 axes, 2 neighbours)
    log = logits.flatten(-2).log_softmax(-1)
    total = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            cell = (low[..., 1] + dy) * size + low[..., 0] + dx
            total = (
                total
                - share[..., 0, dx]
                * share[..., 1, dy]
                * log.gather(-1, cell.long()[..., None])[..., 0]
            )
    return mean_of(total, counted)


def cell_targets(cells: Tensor, truth: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """What each cell (N, 2) should say, for true boxes (B, 4) xyxy: is the target here, 1, 0 or -1
    (do not ask), and centreness (B, N).

    Where a query does not show the target, `shown` (B,), its box is of something similar: the cells
    in it must say no, the others are not asked.
    """
    low, high = cells - truth[:, None, :2], truth[:, None, 2:] - cells  # (B, N, 2)
    inside = (torch.cat([low, high], 2) > 0).all(2)
    product = torch.minimum(low, high).prod(2) / (torch.maximum(low, high).prod(2) + 1e-5)
    centre = torch.where(inside, product.abs().sqrt(), torch.zeros_like(product))
    return torch.where(shown[:, None], inside.long(), inside.long() - 1), centre


def detection_losses(
    score: Tensor, centre: Tensor, boxes: Tensor, cells: Tensor, truth: Tensor, shown: Tensor
) -> dict[str, Tensor]:
    """STMTrack's losses of B queries whose N cells answer: logits (B, N) of score and centreness,
    boxes (B, N, 4) xyxy, crop pixels; `cells`, `truth` and `shown` as in `cell_targets`.

    score: focal loss with alpha 0.75 and gamma 2, over the number of cells in the target. centre:
    cross-entropy less the least that can be reached, over the cells with any centreness, of
    negative queries too. sides: 3 * -log IoU of boxes whose ends are inside, over the cells in the
    target.
    """
    label, target = cell_targets(cells.float(), truth.float(), shown)
    positive = label == 1
    count = positive.sum().clamp(min=1)
    toward = torch.where(positive, 0.75, 0.25)
    cross = F.binary_cross_entropy_with_logits(score.float(), positive.float(), reduction="none")
    focal = toward * (1 - torch.exp(-cross)) ** 2 * cross
    focal = torch.where(label >= 0, focal, 0).sum() / count

    cross = F.binary_cross_entropy_with_logits(centre.float(), target, reduction="none")
    # the cross-entropy of the target with itself; F.binary_cross_entropy refuses autocast
    least = torch.special.entr(target) + torch.special.entr(1 - target)
    centreness = mean_of(cross - least, target > 0)

    # cells off the target answer the truth, which has no gradient
    truth = truth.float()[:, None].expand_as(boxes)
    boxes = torch.where(positive[..., None], boxes.float(), truth)
    sides, true_sides = (b[..., 2:] - b[..., :2] + 1 for b in (boxes, truth))
    low, high = torch.maximum(boxes, truth), torch.minimum(boxes, truth)
    shared = (high[..., 2:] - low[..., :2] + 1).clamp(min=0).prod(-1)
    iou = shared / (sides.prod(-1) + true_sides.prod(-1) - shared)
    log = -torch.where(positive, iou, 1).clamp(min=torch.finfo(torch.float32).tiny).log()
    log = log.sum() / count
    parts = {"score": focal, "centre": centreness, "sides": 3 * log}
    return {"loss": sum(parts.values()), **parts, "iou": mean_of(iou.detach(), positive)}
