"""Exercises of lesson 02, STARK-S: attention, heads, positions, an encoder layer, soft-argmax, GIoU
and the box loss.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit import boxes
from trackkit.attention import EncoderLayer, sine_position
from trackkit.course.checks import exercise
from trackkit.heads import soft_argmax
from trackkit.losses import localisation

# ---- attention ----


def attend(query: Tensor, key: Tensor, value: Tensor, ignore: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by torch's kernel: (B, Q, d), (B, T, d), (B, T, e), (B, T) bool ->
    (B, Q, e).
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=~ignore[:, None, :])


def _attend(
    query: Tensor, key: Tensor, value: Tensor, ignore: Tensor, root: float = 0.5, axis: int = -1
) -> Tensor:
    scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** root).masked_fill(
        ignore[:, None], -math.inf
    )
    return scores.softmax(axis) @ value


def _zeros_for_ignored(query: Tensor, key: Tensor, value: Tensor, ignore: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(ignore[:, None], 0).softmax(-1) @ value


def _ignored_after_softmax(query: Tensor, key: Tensor, value: Tensor, ignore: Tensor) -> Tensor:
    share = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return share.masked_fill(ignore[:, None], 0) @ value


def _no_softmax(query: Tensor, key: Tensor, value: Tensor, ignore: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(ignore[:, None], 0) @ value


@exercise(
    "attend",
    reference=attend,
    gradient=True,
    mistakes={
        "The softmax runs over the queries. Each query shares itself out among the tokens, so each "
        "row (the last axis) "
        "sums to 1.": lambda *a: _attend(*a, axis=-2),
        "The scores are not divided by sqrt(d), so the softmax is too sharp.": lambda *a: _attend(
            *a, root=0
        ),
        "You divided by d. Divide by its square root.": lambda *a: _attend(*a, root=1),
        "You multiplied by sqrt(d). Divide.": lambda *a: _attend(*a, root=-0.5),
        "You divided by the root of the number of tokens. d is the length of a "
        "query.": lambda query, key, *rest: attend(
            query * (query.shape[-1] / key.shape[1]) ** 0.5, key, *rest
        ),
        "The mask is inverted: `ignore` is True for tokens that nobody may look "
        "at.": lambda query, key, value, ignore: _attend(query, key, value, ~ignore),
        "The mask is not used. Ignored tokens get a score of minus infinity before the softmax.": (
            lambda query, key, value, ignore: attend(query, key, value, torch.zeros_like(ignore))
        ),
        "You gave ignored tokens a score of 0. exp(0) is 1, so they are still looked at; use "
        "-math.inf.": _zeros_for_ignored,
        "You masked after the softmax, so the rows do not sum to 1 any more. Mask the scores, then "
        "take the softmax.": (_ignored_after_softmax),
        "There is no softmax. Without it the scores are no shares.": _no_softmax,
        "Two things are missing: the division by sqrt(d), and the mask, which gives ignored tokens "
        "a score of minus infinity.": (
            lambda query, key, value, ignore: _attend(
                query, key, value, torch.zeros_like(ignore), root=0
            )
        ),
        "You divided by sqrt(d) after the softmax. Divide the scores, then take the "
        "softmax.": lambda query, *rest: _attend(query, *rest, root=0) / query.shape[-1] ** 0.5,
        "These are the shares. One step more: mix the values with "
        "them.": lambda query, key, value, ignore: attend(
            query, key, torch.eye(key.shape[1]).expand(len(key), -1, -1), ignore
        ),
        "Scores compare queries with keys; you compared them with "
        "values.": lambda query, key, value, ignore: attend(query, value, value, ignore),
        "You mixed the keys. What is fetched are the values.": lambda query, key, value, ignore: (
            attend(query, key, key, ignore)
        ),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    cases = []
    for batch, queries, tokens, width in ((1, 1, 3, 2), (1, 2, 4, 3), (2, 3, 6, 8)):
        query, key, value = (
            torch.randn(batch, n, width, generator=generator) * 2 for n in (queries, tokens, tokens)
        )
        ignore = torch.zeros(batch, tokens, dtype=torch.bool)
        ignore[-1, -1] = tokens > 3
        cases.append((query, key, value, ignore))
    return cases


# ---- heads ----


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """Each head's share of the width: (B, T, D) -> (B, H, T, D / H)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


@exercise(
    "split_heads",
    reference=split_heads,
    gradient=True,
    mistakes={
        "You only reshaped to (B, H, T, D / H). That cuts the row of tokens, not the width: first "
        "(B, T, H, D / H), then "
        "swap T and H.": lambda tokens, heads: tokens.reshape(
            tokens.shape[0], heads, tokens.shape[1], -1
        ),
        "T and H are not swapped: this is (B, T, H, D / H).": lambda tokens, heads: (
            tokens.unflatten(-1, (heads, -1))
        ),
        "The heads take turns: head h got channels h, h + H, h + 2 H, ... It owns D / H "
        "neighbouring channels.": (
            lambda tokens, heads: tokens.unflatten(-1, (-1, heads)).permute(0, 3, 1, 2)
        ),
        "There are D / H heads of H channels, and it should be the other way "
        "round.": lambda tokens, heads: tokens.unflatten(-1, (-1, heads)).transpose(1, 2),
        "The last two axes are swapped: this is (B, H, D / H, T).": lambda tokens, heads: (
            split_heads(tokens, heads).transpose(2, 3)
        ),
        "The heads are folded into the batch. Here they are an axis of their own, (B, H, T, D / "
        "H).": (lambda tokens, heads: split_heads(tokens, heads).flatten(0, 1)),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    first = torch.arange(12.0).view(1, 2, 6), 3
    return [
        first,
        (torch.randn(1, 3, 8, generator=generator), 2),
        (torch.randn(2, 5, 12, generator=generator), 4),
    ]


# ---- positions ----


def _sine(
    outside: Tensor,
    width: int,
    first: int = 1,
    stretch: float = 2 * math.pi,
    axes: tuple[int, int] = (1, 2),
    halves: bool = False,
    paired: bool = True,
    swap: bool = False,
    everywhere: bool = False,
    split: bool = True,
    whole: bool = False,
) -> Tensor:
    """`sine_position` with habits that can be changed."""
    inside, half = (torch.ones_like(outside) if everywhere else ~outside).float(), width // 2
    index = torch.arange(half)
    exponent = 2 * (index // 2) if paired else index
    wavelength = 10_000 ** (exponent / (half if split else width))
    parts = []
    for axis in axes:
        count = inside.cumsum(axis) - 1 + first
        last = outside.shape[axis] if whole else count.narrow(axis, count.shape[axis] - 1, 1)
        angle = (count / (last + 1e-6) * stretch if stretch else count)[..., None] / wavelength
        if halves:
            parts.append(torch.cat([angle[..., ::2].sin(), angle[..., 1::2].cos()], -1))
        else:
            sine = (index % 2 == 0) ^ swap
            parts.append(torch.where(sine, angle.sin(), angle.cos()))
    return torch.cat(parts, -1).flatten(1, 2)


@exercise(
    "sine_position",
    reference=sine_position,
    mistakes={
        "x and y are swapped: the first half of the channels tells y, the second x. y grows along "
        "axis 1 of "
        "(B, h, w).": lambda *a: _sine(*a, axes=(2, 1)),
        "You counted from 0. The first cell inside the frame has number 1, as a cumulative sum "
        "gives it.": (lambda *a: _sine(*a, first=0)),
        "The count is not stretched. Divide it by its last value and multiply by 2 "
        "pi.": lambda *a: _sine(*a, stretch=0),
        "The count ends at 1 instead of 2 pi.": lambda *a: _sine(*a, stretch=1),
        "The count ends at pi instead of 2 pi.": lambda *a: _sine(*a, stretch=math.pi),
        "All sines come before all cosines. Here they take turns: even channels sine, odd ones "
        "cosine.": (lambda *a: _sine(*a, halves=True)),
        "Sine and cosine are swapped: even channels are sines.": lambda *a: _sine(*a, swap=True),
        "Each channel has a wavelength of its own. A sine and the cosine after it share one: 2 * "
        "(i // 2).": (lambda *a: _sine(*a, paired=False)),
        "The exponent of the wavelength is divided by the whole width. Each axis has only half of "
        "it.": (lambda *a: _sine(*a, split=False)),
        "You divided by the number of all cells of the axis. N is the last count: that of the "
        "cells inside the frame.": (lambda *a: _sine(*a, whole=True)),
        "Cells outside the frame are counted too. Sum up `~outside`.": lambda *a: _sine(
            *a, everywhere=True
        ),
        "The count runs over the cells outside the frame. Invert the "
        "mask.": lambda outside, width: _sine(~outside, width),
        "The grid is still a grid, (B, h, w, width). Its cells become one row of tokens: "
        "flatten(1, 2).": (
            lambda outside, width: sine_position(outside, width).unflatten(1, outside.shape[1:])
        ),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    cut = torch.zeros(2, 5, 5, dtype=torch.bool)
    cut[0, :, :2], cut[1, 3:] = True, True
    size = int(torch.randint(6, 12, (), generator=generator))
    return [
        (torch.zeros(1, 2, 2, dtype=torch.bool), 8),
        (torch.zeros(1, 2, 3, dtype=torch.bool), 8),
        (torch.zeros(1, size, size, dtype=torch.bool), 16),
        (cut, 32),
    ]


# ---- the encoder's layer ----


def encoder_layer(layer: EncoderLayer, x: Tensor, position: Tensor) -> Tensor:
    """A layer's output for tokens and positions (B, T, D) -> (B, T, D), norms after each step."""
    return layer(x, position)[0]


def _layer(
    layer: EncoderLayer,
    x: Tensor,
    position: Tensor,
    on: tuple[bool, bool, bool] = (True, True, False),
    first: bool = True,
    second: bool = True,
    order: str = "post",
    relu: bool = True,
    last: str = "norm2",
) -> Tensor:
    """`encoder_layer` with parts left out: `on` are the places of the position (query, key,
    value).
    """

    def norm(which, t: Tensor, when: str) -> Tensor:
        return which(t) if order == when else t

    y = norm(layer.norm1, x, "pre")
    query, key, value = (y + position if there else y for there in on)
    change = norm(layer.norm1, layer.self_attn(query, key, value)[0], "change")
    x = norm(layer.norm1, x + change if first else change, "post")
    y = layer.linear1(norm(layer.norm2, x, "pre"))
    change = norm(layer.norm2, layer.linear2(F.relu(y) if relu else y), "change")
    end = {"norm1": layer.norm1, "none": nn.Identity()}.get(last, layer.norm2)
    return norm(end, x + change if second else change, "post")


@exercise(
    "encoder_layer",
    reference=encoder_layer,
    gradient=True,
    mistakes={
        "You added the positions to the values too. They say where to look and must not become "
        "part of what is seen.": (lambda *a: _layer(*a, on=(True, True, True))),
        "You added the positions to the queries only. The keys need them too.": lambda *a: _layer(
            *a, on=(True, False, False)
        ),
        "You added the positions to the keys only. The queries need them too.": lambda *a: _layer(
            *a, on=(False, True, False)
        ),
        "The positions are not used. Add them to queries and keys.": lambda *a: _layer(
            *a, on=(False, False, False)
        ),
        "You added the positions to the tokens themselves, so they stay in x for good. Add them to "
        "queries and keys "
        "only.": lambda layer, x, position: encoder_layer(
            layer, x + position, torch.zeros_like(position)
        ),
        "After attention the token itself is missing: x + change, not just the "
        "change.": lambda *a: _layer(*a, first=False),
        "After the two linear layers the token itself is missing: x + change, not just the "
        "change.": lambda *a: _layer(*a, second=False),
        "Both sums are missing. Each step adds a change to the tokens: x + change.": lambda *a: (
            _layer(*a, first=False, second=False)
        ),
        "You normalised before each step (pre-norm). STARK does it after the sum: norm(x + "
        "change).": lambda *a: _layer(*a, order="pre"),
        "You normalised the change alone. Normalise the sum: norm(x + change).": lambda *a: _layer(
            *a, order="change"
        ),
        "The last norm is missing: norm2, after the second sum.": lambda *a: _layer(
            *a, last="none"
        ),
        "You used norm1 twice. The second sum has its own, norm2.": lambda *a: _layer(
            *a, last="norm1"
        ),
        "The norms are missing.": lambda *a: _layer(*a, order="none"),
        "There is no ReLU between the two linear layers, so they are one linear "
        "layer.": lambda *a: _layer(*a, relu=False),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    def case(batch: int, tokens: int, width: int, heads: int) -> tuple:
        layer = EncoderLayer(width, heads, 2 * width, dropout=0.0).requires_grad_(False)
        for parameter in layer.parameters():  # norms too: as they start, they hide where they are
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        return layer, *(torch.randn(batch, tokens, width, generator=generator) for _ in range(2))

    return [case(1, 2, 4, 2), case(2, 5, 8, 2)]


# ---- soft-argmax ----


def _expected(
    logits: Tensor, shift: float = 0.0, size: float | None = None, axis: str = "map"
) -> Tensor:
    side = logits.shape[-1]
    if axis == "map":
        probability = logits.flatten(1).softmax(1).view_as(logits)
    else:
        probability = {
            "row": logits.softmax(2),
            "column": logits.softmax(1),
            "batch": logits.softmax(0),
        }[axis]
    steps = (torch.arange(side, dtype=logits.dtype) + shift) / (side if size is None else size)
    return torch.stack([probability.sum(1) @ steps, probability.sum(2) @ steps], 1)


def _hard_argmax(logits: Tensor) -> Tensor:
    side, peak = logits.shape[-1], logits.flatten(1).argmax(1)
    return torch.stack([peak % side, peak // side], 1) / side


@exercise(
    "soft_argmax",
    reference=soft_argmax,
    gradient=True,
    mistakes={
        "x and y are swapped. x counts columns, the last axis; to get a column's probability, sum "
        "over the rows.": (lambda logits: soft_argmax(logits).flip(1)),
        "The result is shifted by half a cell. Cell 0 stands for 0 here, as in the authors' "
        "code.": lambda logits: _expected(logits, shift=0.5),
        "You counted cells from 1.": lambda logits: _expected(logits, shift=1),
        "The result is in cells. Divide by s, so that it is a share of the crop.": lambda logits: (
            _expected(logits, size=1)
        ),
        "You divided by s - 1. The last cell begins at (s - 1) / s of the crop, it does not end "
        "there.": lambda logits: _expected(logits, size=logits.shape[-1] - 1),
        "This is the argmax: the cell of the maximum. The expectation weighs all cells by their "
        "probability.": _hard_argmax,
        "Two things. x and y are swapped: x counts columns, the last axis. And the result is in "
        "cells: divide by s.": (lambda logits: _expected(logits, size=1).flip(1)),
        "The softmax runs over each row by itself. All s * s cells of a map share one probability "
        "of 1: flatten(1) "
        "first.": lambda logits: _expected(logits, axis="row"),
        "The softmax runs over each column by itself. All s * s cells of a map share one "
        "probability of 1: flatten(1) "
        "first.": lambda logits: _expected(logits, axis="column"),
        "The softmax runs over the batch. Each map has a probability of 1 for itself: flatten(1), "
        "then softmax(1).": (lambda logits: _expected(logits, axis="batch")),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    first = torch.zeros(1, 2, 2)
    first[0, 0, 1] = math.log(3)
    rest = [torch.randn(b, s, s, generator=generator) * 3 for b, s in ((1, 3), (2, 5), (3, 12))]
    return [(logits,) for logits in (first, *rest)]


# ---- GIoU ----


def _areas(a_xyxy: Tensor, b_xyxy: Tensor, clamp: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Intersection, union and hull."""
    inner = torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.maximum(
        a_xyxy[..., :2], b_xyxy[..., :2]
    )
    outer = torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.minimum(
        a_xyxy[..., :2], b_xyxy[..., :2]
    )
    intersection = (inner.clamp(min=0) if clamp else inner).prod(-1)
    union = sum((box[..., 2:] - box[..., :2]).prod(-1) for box in (a_xyxy, b_xyxy)) - intersection
    return intersection, union, outer.prod(-1)


def _giou_of_areas(a_xyxy: Tensor, b_xyxy: Tensor, areas: Tensor) -> Tensor:
    intersection, _, hull = _areas(a_xyxy, b_xyxy)
    union = areas - intersection
    tiny = torch.finfo(union.dtype).tiny
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def _from_areas(combine, **options):
    return lambda a_xyxy, b_xyxy: combine(*_areas(a_xyxy, b_xyxy, **options))


@exercise(
    "giou",
    reference=boxes.giou,
    gradient=True,
    mistakes={
        "This is the IoU. Subtract the share of the hull that neither box covers.": _from_areas(
            lambda i, u, h: i / u
        ),
        "You divided the empty part by the union. It is a share of the hull: (hull - union) / "
        "hull.": _from_areas(lambda i, u, h: i / u - (h - u) / u),
        "The penalty is added. A larger hull means boxes further apart, so subtract.": _from_areas(
            lambda i, u, h: i / u + (h - u) / h
        ),
        "You subtracted the share of the hull that is covered, union / hull. Subtract the empty "
        "share, 1 - union / hull.": (_from_areas(lambda i, u, h: i / u - u / h)),
        "This is intersection / hull. IoU divides by the union, and the hull enters in a second "
        "term.": _from_areas(lambda i, u, h: i / h),
        "The union counts the intersection twice. Subtract it once from the sum of the "
        "areas.": _from_areas(lambda i, u, h: i / (u + i) - (h - u - i) / h),
        "The empty part is what *neither* box covers: hull - union, not hull - "
        "intersection.": _from_areas(lambda i, u, h: i / u - (h - i) / h),
        "`area` takes width and height, and got corners: convert with xyxy_to_xywh "
        "first.": lambda a_xyxy, b_xyxy: _giou_of_areas(
            a_xyxy, b_xyxy, boxes.area(a_xyxy) + boxes.area(b_xyxy)
        ),
        "The empty part is not divided by the hull, so it depends on the unit of "
        "length.": _from_areas(lambda i, u, h: i / u - (h - u)),
        "Sides of the intersection can be negative when boxes do not touch: clamp them to 0 before "
        "you multiply.": (_from_areas(lambda i, u, h: i / u - (h - u) / h, clamp=False)),
        "This is the loss, 1 - GIoU.": lambda a_xyxy, b_xyxy: 1 - boxes.giou(a_xyxy, b_xyxy),
        "The boxes are read as left, top, width, height. They are corners, "
        "xyxy.": lambda a_xyxy, b_xyxy: boxes.giou(
            boxes.xywh_to_xyxy(a_xyxy), boxes.xywh_to_xyxy(b_xyxy)
        ),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    pair = torch.tensor([[0.0, 0, 4, 2]]), torch.tensor([[2.0, 1, 6, 4]])
    apart = (
        torch.tensor([[0.0, 0, 2, 2], [1, 1, 4, 3]]),
        torch.tensor([[5.0, 6, 8, 10], [1, 7, 3, 9]]),
    )

    def drawn() -> Tensor:
        corner = torch.rand(8, 2, generator=generator) * 8
        return torch.cat([corner, corner + 1 + torch.rand(8, 2, generator=generator) * 6], -1)

    return [pair, apart, (drawn(), drawn())]


# ---- the loss ----


def box_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """2 * GIoU loss + 5 * L1 (Eq. 2) of boxes (B, 4), cxcywh in units of the crop: a scalar."""
    giou, l1 = localisation(boxes.cxcywh_to_xyxy(predicted), boxes.cxcywh_to_xyxy(truth))
    return 2 * giou + 5 * l1


def _box_loss(
    predicted: Tensor,
    truth: Tensor,
    weights: tuple[float, float] = (2, 5),
    l1: str = "mean",
    overlap: str = "giou",
):
    a, b = boxes.cxcywh_to_xyxy(predicted), boxes.cxcywh_to_xyxy(truth)
    gap = {"cxcywh": predicted - truth}.get(l1, a - b).abs()
    distance = {"sum": gap.sum(), "boxes": gap.sum(-1).mean(), "squared": gap.square().mean()}.get(
        l1, gap.mean()
    )
    share = {
        "giou": boxes.giou(a, b),
        "iou": boxes.iou(boxes.xyxy_to_xywh(a), boxes.xyxy_to_xywh(b)),
    }
    term = {
        "reward": boxes.giou(a, b),
        "sum": 1 - boxes.giou(a, b),
        "raw": 1 - boxes.giou(predicted, truth),
    }.get(overlap)
    term = 1 - share[overlap] if term is None else term
    return weights[0] * (term.sum() if overlap == "sum" else term.mean()) + weights[1] * distance


@exercise(
    "box_loss",
    reference=box_loss,
    gradient=True,
    mistakes={
        "The weights are swapped: 2 for GIoU, 5 for L1.": lambda *a: _box_loss(*a, weights=(5, 2)),
        "The weights are missing: 2 for GIoU, 5 for L1.": lambda *a: _box_loss(*a, weights=(1, 1)),
        "L1 is summed over all numbers. Take the mean, or the loss grows with the "
        "batch.": lambda *a: _box_loss(*a, l1="sum"),
        "L1 is summed over the four coordinates of a box, and only then averaged (as in DETR). "
        "STARK's code takes the mean "
        "of all 4 B numbers.": lambda *a: _box_loss(*a, l1="boxes"),
        "L1 compares centres and sizes. Convert both to corners first: "
        "cxcywh_to_xyxy.": lambda *a: _box_loss(*a, l1="cxcywh"),
        "Both terms are summed over the batch. Take means, or the loss grows with the "
        "batch.": lambda *a: _box_loss(*a, overlap="sum", l1="sum"),
        "This is only the GIoU term. Add 5 times the L1 term.": lambda *a: _box_loss(
            *a, weights=(2, 0)
        ),
        "This is only the L1 term. Add 2 times the GIoU term.": lambda *a: _box_loss(
            *a, weights=(0, 5)
        ),
        "You converted to xywh. Both terms compare corners: "
        "cxcywh_to_xyxy.": lambda predicted, truth: (
            2
            * (1 - boxes.giou(boxes.cxcywh_to_xywh(predicted), boxes.cxcywh_to_xywh(truth))).mean()
            + 5 * (boxes.cxcywh_to_xywh(predicted) - boxes.cxcywh_to_xywh(truth)).abs().mean()
        ),
        "The differences are squared. L1 takes their absolute values.": lambda *a: _box_loss(
            *a, l1="squared"
        ),
        "giou expects corners, and you gave it centres and sizes: cxcywh_to_xyxy.": lambda *a: (
            _box_loss(*a, overlap="raw")
        ),
        "Nothing was converted. Both terms compare corners: cxcywh_to_xyxy.": lambda *a: _box_loss(
            *a, overlap="raw", l1="cxcywh"
        ),
        "The GIoU enters with the wrong sign. A good box has a GIoU of 1 and must cost nothing: 1 "
        "- giou.": lambda *a: _box_loss(*a, overlap="reward"),
        "This is the IoU loss. Once the boxes do not touch, it does not say in which direction to "
        "go; take giou.": (lambda *a: _box_loss(*a, overlap="iou")),
        "The GIoU loss is summed over the batch. Take the mean.": lambda *a: _box_loss(
            *a, overlap="sum"
        ),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    pair = (
        torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.3, 0.4, 0.2, 0.2]]),
        torch.tensor([[0.6, 0.5, 0.3, 0.3], [0.7, 0.8, 0.2, 0.1]]),
    )

    def drawn() -> Tensor:
        return torch.rand(6, 4, generator=generator) * 0.5 + 0.2

    return [pair, (drawn(), drawn())]
