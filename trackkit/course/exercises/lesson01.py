"""Exercises of lesson 01, SiamFC: correlation, labels, loss, window, and the way back to frame
pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trackkit.course.checks import exercise
from trackkit.heads import hann_window
from trackkit.losses import balanced_bce
from trackkit.trackers.siamfc import cross_correlation, damped, label_map, peak_shift

# ---- cross-correlation ----


def _first_exemplar(exemplar: Tensor, search: Tensor) -> Tensor:
    return cross_correlation(exemplar[:1].expand_as(exemplar), search)


def _each_channel(exemplar: Tensor, search: Tensor) -> Tensor:
    batch, channels, height, width = search.shape
    kernel = exemplar.reshape(batch * channels, 1, *exemplar.shape[2:])
    response = F.conv2d(
        search.reshape(1, batch * channels, height, width), kernel, groups=batch * channels
    )
    return response.reshape(batch, channels, *response.shape[2:])


@exercise(
    "cross_correlation",
    reference=cross_correlation,
    gradient=True,
    mistakes={
        "The exemplar is turned by 180 degrees. That is a convolution in the mathematical sense; "
        "correlation slides the exemplar as it is, and so does "
        "F.conv2d.": lambda exemplar, search: cross_correlation(exemplar.flip(2, 3), search),
        "Every search map meets the first exemplar. Pair i of the batch needs exemplar i: fold the "
        "batch into the "
        "channels and use groups.": _first_exemplar,
        "Every search map meets every exemplar: the result has shape (B, B, ...). Pair i needs "
        "exemplar i only: "
        "fold the batch into the channels and use groups.": lambda exemplar, search: F.conv2d(
            search, exemplar
        ),
        "There is one response for each channel. The products are also summed over the "
        "channels.": _each_channel,
        "You averaged over the channels. The correlation is a sum.": lambda exemplar, search: (
            cross_correlation(exemplar, search) / exemplar.shape[1]
        ),
        "You averaged over all products. The correlation is a sum; its scale is a separate "
        "factor.": (
            lambda exemplar, search: cross_correlation(exemplar, search) / exemplar[0].numel()
        ),
        "The pairs are right, but the batch is in the second dimension: (1, B, ...). Swap the "
        "first two.": (
            lambda exemplar, search: cross_correlation(exemplar, search).transpose(0, 1)
        ),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    shapes = [(1, 1, 2, 3), (1, 3, 2, 5), (3, 4, 3, 8)]  # B, C, exemplar, search
    return [
        (torch.randn(b, c, h, h, generator=generator), torch.randn(b, c, s, s, generator=generator))
        for b, c, h, s in shapes
    ]


# ---- labels ----


def _labels(
    size: int, reach: float, norm: str = "sum", centre: float | None = None, strict: bool = False
) -> Tensor:
    cells = (torch.arange(size) - ((size - 1) / 2 if centre is None else centre)).abs()
    rows, columns = cells[:, None].expand(size, size), cells[None, :].expand(size, size)
    distance = {
        "sum": rows + columns,
        "euclid": (rows**2 + columns**2).sqrt(),
        "largest": torch.maximum(rows, columns),
    }[norm]
    return (distance < reach if strict else distance <= reach).float()


@exercise(
    "label_map",
    reference=label_map,
    mistakes={
        "The map is shifted by half a cell. With cells 0 to size - 1 the centre is at (size - 1) / "
        "2.": (lambda size, stride, radius: _labels(size, radius / stride, centre=size / 2)),
        "The map is shifted by half a cell when the size is even. The centre is at (size - 1) / 2, "
        "which is not a whole number then.": (
            lambda size, stride, radius: _labels(size, radius / stride, centre=size // 2)
        ),
        "The radius is in pixels of the search crop and your distance in cells. Divide by the "
        "stride.": (lambda size, stride, radius: _labels(size, radius)),
        "You used the Euclidean distance. It is the paper's, but the library follows the code: "
        "|dx| + |dy|.": (lambda size, stride, radius: _labels(size, radius / stride, "euclid")),
        "Your positive cells form a square, so you took the larger of |dx| and |dy|. Take their "
        "sum.": (lambda size, stride, radius: _labels(size, radius / stride, "largest")),
        "A cell exactly at the radius is positive too: use <= instead of <.": (
            lambda size, stride, radius: _labels(size, radius / stride, strict=True)
        ),
        "Your negatives are -1, as in the paper's formula. Here labels are 1 and 0.": (
            lambda size, stride, radius: 2 * label_map(size, stride, radius) - 1
        ),
        "Positives and negatives are swapped.": lambda size, stride, radius: (
            1 - label_map(size, stride, radius)
        ),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    stride = int(torch.randint(2, 9, (), generator=generator))
    return [
        (5, 8, 8.0),
        (5, 4, 10.0),
        (8, 4, 8.0),
        (15, 8, 16),
        (17, 8, 20.0),
        (20, stride, 3.5 * stride),
    ]


# ---- loss ----


def _bce(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels, reduction=reduction)


def _halves_of_each_map(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([balanced_bce(a, b) for a, b in zip(logits, labels, strict=True)]).mean()


def _means_without_guard(logits: Tensor, labels: Tensor) -> Tensor:
    each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (each[labels > 0.5].mean() + each[labels <= 0.5].mean()) / 2


@exercise(
    "balanced_bce",
    reference=balanced_bce,
    gradient=True,
    mistakes={
        "This is the plain mean: the few positives hardly count. Give each class one half of the "
        "weight.": _bce,
        "This is the plain sum. Give each class one half of the weight.": lambda logits, labels: (
            _bce(logits, labels, "sum")
        ),
        "Each class has weight 1, so the loss is twice as large. The two halves make 1 together.": (
            lambda logits, labels: 2 * balanced_bce(logits, labels)
        ),
        "The loss is right up to a mean over all cells. The weights sum to 1 already, so sum the "
        "products.": (lambda logits, labels: balanced_bce(logits, labels) / logits.numel()),
        "A sigmoid is applied twice. The function with logits in its name has one inside.": (
            lambda logits, labels: balanced_bce(logits.sigmoid(), labels)
        ),
        "You balanced each map for itself. Count positives and negatives over the whole "
        "batch.": _halves_of_each_map,
        "With only one class in the batch the mean over the other is 0/0. "
        "That class contributes 0: clamp its count to at least 1.": _means_without_guard,
        "Positives and negatives are swapped.": lambda logits, labels: balanced_bce(
            logits, 1 - labels
        ),
    },
)
def _(generator: torch.Generator) -> list[tuple]:
    cases = [(torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[1.0, 0.0, 0.0]]))]
    for batch, size, share in ((2, 3, 0.2), (4, 7, 0.1)):
        labels = (torch.rand(batch, 1, size, size, generator=generator) < share).float()
        labels[0, 0, :2, 0] = torch.tensor([1.0, 0.0])
        cases.append((torch.randn(batch, 1, size, size, generator=generator) * 3, labels))
    return [*cases, (torch.randn(1, 1, 3, 3, generator=generator), torch.zeros(1, 1, 3, 3))]


# ---- window ----


def _outer(line: Tensor) -> Tensor:
    window = line[:, None] * line[None, :]
    return window / window.sum()


def _window(size: int) -> Tensor:
    """As `SiamFC.step` has it."""
    window = hann_window(size, "zero")
    return window / window.sum()


def _sum_of_lines(size: int) -> Tensor:
    hann = torch.hann_window(size, periodic=False)
    window = hann[:, None] + hann[None, :]
    return window / window.sum()


@exercise(
    "hann_window",
    reference=_window,
    mistakes={
        "The window is not normalised. Divide it by its sum, so that it can be mixed with a "
        "response that sums to 1.": (lambda size: hann_window(size, "zero")),
        "Its largest value is 1. Divide by the sum instead of the maximum.": lambda size: (
            hann_window(size, "zero") / hann_window(size, "zero").max()
        ),
        "The window is not symmetric: torch.hann_window is periodic unless you say "
        "periodic=False.": lambda size: _outer(torch.hann_window(size)),
        "This is one line. The window is its outer product with itself.": lambda size: (
            torch.hann_window(size, periodic=False) / torch.hann_window(size, periodic=False).sum()
        ),
        "You added the two lines. Multiply them: the window must vanish on the whole "
        "border.": _sum_of_lines,
        "This is a Hamming window. It does not fall to 0 at the border; take "
        "torch.hann_window.": lambda size: _outer(torch.hamming_window(size, periodic=False)),
    },
    tolerance=1e-6,
)
def _(generator: torch.Generator) -> list[tuple]:
    return [(3,), (5,), (8,), (int(torch.randint(20, 60, (), generator=generator)),)]


# ---- from the peak to frame pixels ----


def _from_centre(
    response: Tensor, stride: int, upsample: int, side: Tensor, search_size: int, centre
) -> Tensor:
    """`peak_shift` with another idea of where the middle of n cells is."""
    size = response.shape[-1]
    offset = (centre(size) - (size - 1) / 2) * stride / upsample * side / search_size
    return peak_shift(response, stride, upsample, side, search_size) - offset[:, None]


def _one_peak(
    response: Tensor, stride: int, upsample: int, side: Tensor, search_size: int
) -> Tensor:
    size, peak = response.shape[-1], int(response.argmax())
    cells = torch.tensor([peak % size, peak // size], dtype=torch.float64) - (size - 1) / 2
    return cells * stride / upsample * (side / search_size)[:, None]


@exercise(
    "peak_shift",
    reference=peak_shift,
    mistakes={
        "x and y are swapped. For a map with n columns, argmax % n is the column (x) and argmax // "
        "n the row (y).": (lambda *a: peak_shift(*a).flip(1)),
        "All maps got one and the same peak. Flatten each map by itself, response.flatten(1), and "
        "take argmax(1).": (_one_peak),
        "The shift is off by half a cell: the centre of cells 0 to n - 1 is (n - 1) / 2, not n / "
        "2.": lambda *a: _from_centre(*a, centre=lambda n: n / 2),
        "The shift is off by half a cell when n is even: the centre is (n - 1) / 2, not n // "
        "2.": lambda *a: _from_centre(*a, centre=lambda n: n // 2),
        "The shift is in search-crop pixels. Multiply by side / search_size to get frame pixels.": (
            lambda response, stride, upsample, side, search_size: peak_shift(
                response, stride, upsample, torch.ones_like(side), 1
            )
        ),
        "You went from frame to crop. One crop pixel is side / search_size frame pixels.": (
            lambda response, stride, upsample, side, search_size: peak_shift(
                response, stride, upsample, search_size / side, 1
            )
        ),
        "The stride is missing: neighbouring cells of the network's response are `stride` crop "
        "pixels apart.": (
            lambda response, stride, upsample, side, search_size: peak_shift(
                response, 1, upsample, side, search_size
            )
        ),
        "The upsampling is missing: the map has `upsample` cells for each of the network's.": (
            lambda response, stride, upsample, side, search_size: peak_shift(
                response, stride, 1, side, search_size
            )
        ),
        "You multiplied by `upsample`; finer cells are closer together, so divide.": (
            lambda response, stride, upsample, side, search_size: peak_shift(
                response, stride * upsample, 1, side, search_size
            )
        ),
        "The sign is wrong: a peak right of the centre means that the target moved to the right.": (
            lambda *a: -peak_shift(*a)
        ),
        "This is the position of the peak from the corner. Subtract the centre of the map, (n - 1) "
        "/ 2.": lambda *a: _from_centre(*a, centre=lambda n: 0),
    },
    tolerance=1e-6,
)
def _(generator: torch.Generator) -> list[tuple]:
    first = torch.zeros(1, 5, 5)
    first[0, 1, 4] = 1
    cases = [(first, 8, 1, torch.tensor([127.5], dtype=torch.float64), 255)]
    for batch, size, stride, upsample in ((2, 6, 8, 2), (3, 12, 4, 4), (2, 17, 8, 16)):
        side = torch.rand(batch, generator=generator, dtype=torch.float64) * 300 + 50
        cases.append(
            (torch.rand(batch, size, size, generator=generator), stride, upsample, side, 255)
        )
    return cases


# ---- size ----


@exercise(
    "damped",
    reference=damped,
    mistakes={
        "The whole change is taken at once. Only the share `rate` of it "
        "counts.": lambda factor, rate: factor,
        "The shares are swapped: `rate` belongs to the new size, 1 - rate to the "
        "old.": lambda factor, rate: damped(factor, 1 - rate),
        "The old size is missing: its factor is 1 and its share 1 - rate.": lambda factor, rate: (
            rate * factor
        ),
        "You damped in the exponent, factor ** rate. That is close, but SiamFC mixes the sizes "
        "linearly.": (lambda factor, rate: factor**rate),
        "This is only the change. A size that stays as it is has the factor 1, so add "
        "1.": lambda factor, rate: rate * (factor - 1),
    },
    tolerance=1e-7,
)
def _(generator: torch.Generator) -> list[tuple]:
    factors = 1.05 ** torch.arange(-2, 3, dtype=torch.float64)
    drawn = torch.rand(4, generator=generator, dtype=torch.float64) + 0.5
    return [(torch.tensor([1.0, 1.0375], dtype=torch.float64), 0.59), (factors, 0.3), (drawn, 0.75)]
