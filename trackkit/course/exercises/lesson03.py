"""Exercises of lesson 03, STARK-ST: frames of a triplet, the loss of the score, when and where to
renew the template.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trackkit.boxes import xywh_to_cxcywh
from trackkit.course.checks import exercise
from trackkit.crops import Windows, context_side
from trackkit.losses import balanced_bce

# ---- the frames of a triplet ----


def dynamic_range(first: int, search: int, max_gap: int, length: int) -> tuple[int, int]:
    """Frames low, ..., high - 1 that a dynamic template may show: near the search frame, on the
    first template's side.

    The rule by which `sampling.choose_frames` draws for the order "trident", written as a range.
    """
    low, high = (search, search + max_gap) if first >= search else (search - max_gap, search)
    return max(low, 0), min(high, length)


def _within(low: int, high: int, length: int) -> tuple[int, int]:
    return max(low, 0), min(high, length)


@exercise(
    "dynamic_range",
    reference=dynamic_range,
    mistakes={
        "The dynamic template always comes before the search frame. It lies on the first "
        "template's side: after the search "
        "frame when the first template does.": lambda first, search, max_gap, length: _within(
            search - max_gap, search, length
        ),
        "The dynamic template always comes after the search frame. It lies on the first template's "
        "side.": (lambda first, search, max_gap, length: _within(search, search + max_gap, length)),
        "The sides are swapped. When the first template comes after the search frame, so does the "
        "dynamic one.": (
            lambda first, search, max_gap, length: dynamic_range(
                2 * search - first - (first == search), search, max_gap, length
            )
        ),
        "When first template and search frame coincide, the range begins at the search frame: "
        "compare with >=.": (
            lambda first, search, max_gap, length: dynamic_range(first - 1, search, max_gap, length)
        ),
        "You allow both sides of the search frame. Only the first template's side counts.": (
            lambda first, search, max_gap, length: _within(
                search - max_gap, search + max_gap, length
            )
        ),
        "You took the frames near the first template. The dynamic one has to be near the search "
        "frame, since it stands for "
        "what the target looked like lately.": lambda first, search, max_gap, length: dynamic_range(
            search, first, max_gap, length
        ),
        "You took the frames between the first template and the search frame. The paper can be "
        "read like that, but the rule "
        "asks for the search frame's surroundings, at most max_gap away, and may go beyond the "
        "first template.": (
            lambda first, search, max_gap, length: (
                (search, first) if first >= search else (first, search)
            )
        ),
        "The range leaves the sequence: frames are numbered 0 to length - 1. Clip both ends.": (
            lambda first, search, max_gap, length: (
                (search, search + max_gap) if first >= search else (search - max_gap, search)
            )
        ),
        "The range begins before frame 0. Clip its lower "
        "end.": lambda first, search, max_gap, length: (
            (search, min(search + max_gap, length))
            if first >= search
            else (search - max_gap, search)
        ),
        "The range goes beyond the end of the sequence. Clip its upper end to `length`.": (
            lambda first, search, max_gap, length: (
                (search, search + max_gap)
                if first >= search
                else (max(search - max_gap, 0), search)
            )
        ),
        "Your second number is the last frame of the range. As in Python's range, it is the one "
        "after it.": (
            lambda first, search, max_gap, length: (
                dynamic_range(first, search, max_gap, length)[0],
                dynamic_range(first, search, max_gap, length)[1] - 1,
            )
        ),
        "You clipped the upper end to the last frame. It is the one after it: `length`, not length "
        "- 1.": (
            lambda first, search, max_gap, length: (
                dynamic_range(first, search, max_gap, length)[0],
                min(dynamic_range(first, search, max_gap, length)[1], length - 1),
            )
        ),
        "When the first template comes later, the range begins with the search frame itself, not "
        "with the one after it.": (
            lambda first, search, max_gap, length: (
                dynamic_range(first, search, max_gap, length)[0] + (first >= search),
                dynamic_range(first, search, max_gap, length)[1],
            )
        ),
        "When the first template comes later, your range is one frame late: it begins with the "
        "search frame itself.": (
            lambda first, search, max_gap, length: (
                _within(search + 1, search + max_gap + 1, length)
                if first >= search
                else _within(search - max_gap, search, length)
            )
        ),
        "When the first template comes first, the dynamic one lies before the search frame. Your "
        "range has the search frame in it.": (
            lambda first, search, max_gap, length: (
                dynamic_range(first, search, max_gap, length)[0],
                dynamic_range(first, search, max_gap, length)[1] + (first < search),
            )
        ),
        "The frame max_gap before the search frame belongs to the range: it begins at search - "
        "max_gap.": (
            lambda first, search, max_gap, length: (
                _within(search, search + max_gap, length)
                if first >= search
                else _within(search - max_gap + 1, search, length)
            )
        ),
        "You stop at the first template. The dynamic one may lie beyond it, as long as it is near "
        "the search frame.": (
            lambda first, search, max_gap, length: (
                (search, min(search + max_gap, first))
                if first >= search
                else (max(search - max_gap, first), search)
            )
        ),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    drawn = [torch.randint(0, 400, (2,), generator=generator).tolist() for _ in range(8)]
    by_hand = [
        (2, 7, 3, 10),
        (7, 2, 3, 10),
        (5, 5, 3, 10),
        (1, 4, 200, 10),
        (8, 4, 200, 10),
        (0, 9, 4, 10),
        (9, 0, 4, 10),
    ]
    return by_hand + [(first, search, 60, 400) for first, search in drawn]


# ---- the loss of the score head ----


def score_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 3 as it must read, for logits (B,) and labels (B,) of 1 or 0: the mean cross-entropy, a
    scalar.
    """
    return F.binary_cross_entropy_with_logits(logits, labels)


def _from_probabilities(probability: Tensor, labels: Tensor) -> Tensor:
    return -(labels * probability.log() + (1 - labels) * (1 - probability).log()).mean()


@exercise(
    "score_loss",
    reference=score_loss,
    gradient=True,
    mistakes={
        "The minus sign is missing, as in the paper's Eq. 3. Both logarithms are negative, so "
        "minimising this makes "
        "right answers impossible instead of likely.": lambda logits, labels: (
            -score_loss(logits, labels)
        ),
        "You took the logits as probabilities. P = sigmoid(logit); a logit can be negative and has "
        "no logarithm then.": (_from_probabilities),
        "The formula is right, the arithmetic is not: sigmoid(120) is 1 to the last digit, and "
        "log(1 - 1) is minus infinity. "
        "log(sigmoid(v)) is F.logsigmoid(v), and log(1 - sigmoid(v)) is "
        "F.logsigmoid(-v).": lambda logits, labels: _from_probabilities(logits.sigmoid(), labels),
        "Two things. The minus sign is missing, as in the paper's Eq. 3. And log(sigmoid(v)) "
        "breaks for large v: write "
        "F.logsigmoid(v), and F.logsigmoid(-v) for log(1 - sigmoid(v)).": lambda logits, labels: (
            -_from_probabilities(logits.sigmoid(), labels)
        ),
        "The formula is right, the arithmetic is not: torch limits the logarithm of a probability "
        "to -100, so a very wrong "
        "answer costs too little. Go from the logit to the logarithm in one step: "
        "F.logsigmoid.": lambda logits, labels: F.binary_cross_entropy(logits.sigmoid(), labels),
        "The minus sign belongs to both halves. Here it stands before the first one "
        "only.": lambda logits, labels: (
            (1 - labels) * F.logsigmoid(-logits) - labels * F.logsigmoid(logits)
        ).mean(),
        "A sigmoid is applied twice.": lambda logits, labels: score_loss(logits.sigmoid(), labels),
        "The labels are inverted: 1 means that the search crop shows the "
        "target.": lambda logits, labels: score_loss(logits, 1 - labels),
        "Only samples with label 1 cost something. The second half, (1 - y) log(1 - P), is "
        "missing.": (lambda logits, labels: -(labels * F.logsigmoid(logits)).mean()),
        "Only samples with label 0 cost something. The first half, y log P, is "
        "missing.": lambda logits, labels: -((1 - labels) * F.logsigmoid(-logits)).mean(),
        "1 - P is the sigmoid of minus the logit: sigmoid(-v), not 1 - "
        "sigmoid(-v).": lambda logits, labels: -F.logsigmoid(logits).mean(),
        "This is the sum over the batch. Take the mean.": lambda logits, labels: (
            score_loss(logits, labels) * len(labels)
        ),
        "This is one loss for each sample. Take the mean.": lambda logits, labels: (
            F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        ),
        "This is the mean squared error of the probability. Cross-entropy takes "
        "logarithms.": lambda logits, labels: (logits.sigmoid() - labels).square().mean(),
        "This is the balanced loss of lesson 01. Here one half of the samples is negative by "
        "construction, and all weigh "
        "the same.": balanced_bce,
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    drawn = torch.randn(9, generator=generator) * 3
    labels = (torch.rand(9, generator=generator) < 0.5).float()
    labels[:3] = torch.tensor([1.0, 0.0, 0.0])
    extreme = torch.tensor([120.0, -120.0, 3.0, 120.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    return [
        (torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.0])),
        (drawn, labels),
        extreme,
    ]


# ---- when to renew ----


def due(count: Tensor, score: Tensor, interval: int, threshold: float) -> Tensor:
    """Which of B sequences renew their dynamic template: frames since the first (B,), scores (B,)
    -> bool (B,).
    """
    return (count % interval == 0) & (score > threshold)


@exercise(
    "due",
    reference=due,
    mistakes={
        "A score of exactly the threshold is not enough: use > instead of "
        ">=.": lambda count, score, interval, threshold: (
            (count % interval == 0) & (score >= threshold)
        ),
        "The score is inverted: a frame is remembered when its score is above the threshold.": (
            lambda count, score, interval, threshold: (count % interval == 0) & (score < threshold)
        ),
        "You renew in every confident frame. It must also be time: count is a multiple of the "
        "interval.": (lambda count, score, interval, threshold: score > threshold),
        "You renew whenever it is time, whatever the score. It must also be above the threshold.": (
            lambda count, score, interval, threshold: count % interval == 0
        ),
        "You renew when it is time or the score is high. Both must hold: "
        "&.": lambda count, score, interval, threshold: (
            (count % interval == 0) | (score > threshold)
        ),
        "You are one frame early. `count` has this frame in it already, so compare count % "
        "interval with 0.": (
            lambda count, score, interval, threshold: due(count + 1, score, interval, threshold)
        ),
        "You are one frame late. `count` has this frame in it already, so compare count % interval "
        "with 0.": (
            lambda count, score, interval, threshold: due(count - 1, score, interval, threshold)
        ),
        "Once the interval has passed you renew in every confident frame. Only its multiples "
        "count: count % interval.": (
            lambda count, score, interval, threshold: (count >= interval) & (score > threshold)
        ),
        "You renew in all frames but the multiples of the interval: compare the remainder with "
        "0.": (
            lambda count, score, interval, threshold: (count % interval != 0) & (score > threshold)
        ),
        "You renew once, when the first interval is over. Compare the remainder with 0: count % "
        "interval == 0.": (
            lambda count, score, interval, threshold: (count == interval) & (score > threshold)
        ),
        "// is how often the interval fits into the count. Its remainder is %: count % interval == "
        "0.": (
            lambda count, score, interval, threshold: (count // interval == 0) & (score > threshold)
        ),
        "The score is a probability already: no "
        "sigmoid.": lambda count, score, interval, threshold: due(
            count, score.sigmoid(), interval, threshold
        ),
        "One answer for the whole batch. Each sequence has its own count and score: no .any() and "
        "no .all().": (
            lambda count, score, interval, threshold: due(count, score, interval, threshold).any()
        ),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    scores = torch.tensor([0.9, 0.9, 0.5, 0.2, 0.51, 0.7], dtype=torch.float64)
    counts = torch.tensor([10, 9, 20, 30, 21, 40])
    drawn = torch.rand(40, generator=generator, dtype=torch.float64)
    many = torch.randint(1, 60, (40,), generator=generator)
    first = torch.tensor([10, 11]), torch.tensor([0.8, 0.8], dtype=torch.float64), 10, 0.5
    return [first, (counts, scores, 10, 0.5), (many, drawn, 5, 0.3), (many, drawn, 1, 0.6)]


# ---- where the new template is cut ----


def template_window(
    held: Tensor, due: Tensor, old_xywh: Tensor, new_xywh: Tensor, factor: float
) -> Tensor:
    """Where the dynamic templates of B sequences lie after a frame, as left, top, side in frame
    pixels: (B, 3) -> (B, 3).

    held (B, 3) is where they lay before, due (B,) which are renewed, old and new (B, 4) the boxes
    before and after.
    """
    side = (context_side(new_xywh) * factor).ceil()
    window = Windows.around(xywh_to_cxcywh(new_xywh)[:, :2], side, 1)
    fresh = torch.stack([window.left, window.top, window.side], 1)
    return torch.where(due[:, None], fresh, held)


def _cut(held: Tensor, due: Tensor, centre: Tensor, side: Tensor) -> Tensor:
    window = Windows.around(centre, side, 1)
    return torch.where(due[:, None], torch.stack([window.left, window.top, window.side], 1), held)


def _floored(held: Tensor, due: Tensor, new_xywh: Tensor, side: Tensor) -> Tensor:
    corner = (_middle(new_xywh) - side[:, None] / 2).floor()
    return torch.where(due[:, None], torch.cat([corner, side[:, None]], 1), held)


def _middle(box_xywh: Tensor) -> Tensor:
    return xywh_to_cxcywh(box_xywh)[:, :2]


@exercise(
    "template_window",
    reference=template_window,
    mistakes={
        "The template is cut at the old box, where the search crop was centred. Cut it at the new "
        "one.": (lambda held, due, old, new, factor: template_window(held, due, old, old, factor)),
        "The size is that of the old box. Take both place and size from the new one.": (
            lambda held, due, old, new, factor: _cut(
                held, due, _middle(new), (context_side(old) * factor).ceil()
            )
        ),
        "The place is that of the old box. Take both place and size from the new one.": (
            lambda held, due, old, new, factor: _cut(
                held, due, _middle(old), (context_side(new) * factor).ceil()
            )
        ),
        "Left and top are swapped. The order is left, top, "
        "side.": lambda held, due, old, new, factor: torch.where(
            due[:, None],
            template_window(held, torch.ones_like(due), old, new, factor)[:, [1, 0, 2]],
            held,
        ),
        "All templates are renewed as soon as one is due. Keep those that are not: "
        "torch.where(due[:, None], ..., held).": (
            lambda held, due, old, new, factor: template_window(
                held, due.any().expand_as(due), old, new, factor
            )
        ),
        "All templates are renewed in every frame. Keep those that are not due: torch.where(due[:, "
        "None], ..., held).": (
            lambda held, due, old, new, factor: template_window(
                held, torch.ones_like(due), old, new, factor
            )
        ),
        "You renew those that are not due, and keep the "
        "others.": lambda held, due, old, new, factor: template_window(
            held, ~due, old, new, factor
        ),
        "The window is centred on the top-left corner of the box. Its centre is left + width / 2, "
        "top + height / 2.": (
            lambda held, due, old, new, factor: _cut(
                held, due, new[:, :2], (context_side(new) * factor).ceil()
            )
        ),
        "The window begins at the top-left corner of the box, so that there is no margin left and "
        "above. Centre it on the box.": (
            lambda held, due, old, new, factor: _cut(
                held,
                due,
                new[:, :2] + (context_side(new) * factor).ceil()[:, None] / 2,
                (context_side(new) * factor).ceil(),
            )
        ),
        "The factor is missing: the window's side is `factor` times the square root of the box's "
        "area.": (lambda held, due, old, new, factor: template_window(held, due, old, new, 1.0)),
        "The side is `factor` times the longer side of the box. Take the square root of its "
        "area.": (
            lambda held, due, old, new, factor: _cut(
                held, due, _middle(new), (new[:, 2:].amax(1) * factor).ceil()
            )
        ),
        "The factor is under the root. Take the root of the area first, then "
        "multiply.": lambda held, due, old, new, factor: _cut(
            held, due, _middle(new), (new[:, 2:].prod(1) * factor).sqrt().ceil()
        ),
        "The side is `factor` times the mean of width and height. Take the square root of the "
        "area.": (
            lambda held, due, old, new, factor: _cut(
                held, due, _middle(new), (new[:, 2:].mean(1) * factor).ceil()
            )
        ),
        "Left and top are rounded down. They go to the nearest pixel, ties to the even one; "
        "Windows.around does it.": (
            lambda held, due, old, new, factor: _floored(
                held, due, new, (context_side(new) * factor).ceil()
            )
        ),
        "The side is `factor` times the area. Take the square root of the "
        "area.": lambda held, due, old, new, factor: _cut(
            held, due, _middle(new), (new[:, 2:].prod(1) * factor).ceil()
        ),
        "The side is rounded to the nearest pixel. STARK rounds it up: "
        ".ceil().": lambda held, due, old, new, factor: _cut(
            held, due, _middle(new), context_side(new) * factor
        ),
        "The side is rounded down. STARK rounds it up: "
        ".ceil().": lambda held, due, old, new, factor: _cut(
            held, due, _middle(new), (context_side(new) * factor).floor()
        ),
        "The margin of SiamFC is added. Here the side is the square root of width times height, "
        "times the factor.": (
            lambda held, due, old, new, factor: _cut(
                held, due, _middle(new), (context_side(new, 0.5) * factor).ceil()
            )
        ),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    def tensor(*rows):
        return torch.tensor(rows, dtype=torch.float64)

    held = torch.tensor([[70, 60, 80]])
    first = held, torch.tensor([True]), tensor([90.0, 80, 40, 40]), tensor([100.0, 90, 45, 20]), 2.0
    two = (
        torch.tensor([[70, 60, 80], [10, 20, 30]]),
        torch.tensor([False, True]),
        tensor([90.0, 80, 40, 40], [5.0, 9, 20, 31]),
    )
    drawn = [torch.rand(8, 4, generator=generator, dtype=torch.float64) * 60 + 20 for _ in range(2)]
    due = torch.rand(8, generator=generator) < 0.5
    due[:2] = torch.tensor([True, False])
    none = torch.zeros(8, dtype=torch.bool)
    held = torch.randint(0, 90, (8, 3), generator=generator)
    return [
        first,
        (*two, tensor([92.0, 83, 44, 38], [8.0, 9, 22, 33]), 2.0),
        (held, due, *drawn, 2.0),
        (held, none, *drawn, 1.5),
    ]
