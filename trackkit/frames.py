"""Which frames of a sequence make a training sample: those good enough, and how they are drawn."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trackkit.errors import DataError
from trackkit.sequences import Sequence

if TYPE_CHECKING:
    from trackkit.sampling import SampleSpec


@dataclass(frozen=True)
class FrameRule:
    """Which frames are good enough to train on. All of them must show the target
    (`Sequence.visible`).

    Attributes:
        min_area: square pixels. min_side, max_side: pixels, for both sides of the box.
        min_share, max_share: sides of the box in units of the frame's sides.
        max_aspect: longer side over shorter side.
        min_cover_share: the visibility level must exceed this share of the sequence's best level,
            and 1.
        min_frames, min_usable: a sequence with fewer frames, or fewer that pass, is not used at
            all.
    """

    min_area: float = 0.0
    min_side: float = 0.0
    max_side: float = float("inf")
    min_share: float = 0.0
    max_share: float = float("inf")
    max_aspect: float = float("inf")
    min_cover_share: float = 0.0
    min_frames: int = 2
    min_usable: int = 2

    def __post_init__(self):
        if self.min_usable < 2:
            raise ValueError(
                f"a sample needs two usable frames, min_usable cannot be {self.min_usable}"
            )

    def usable(self, sequence: Sequence) -> np.ndarray:
        """Indices of the frames that pass, in order. The first frame's size stands for all."""
        if not sequence.labelled:
            raise DataError(
                f"sequence {sequence.name} has no boxes beyond the first frame; it cannot be "
                "trained on"
            )
        width, height = sequence.frame_size(0)
        sides = np.nan_to_num(sequence.boxes_xywh[:, 2:].numpy())
        shares = sides / (width, height)
        short, long = sides.min(1), sides.max(1)
        cover = sequence.cover.numpy()
        passes = (
            sequence.visible.numpy()
            & (sides.prod(1) >= self.min_area)
            & (short >= self.min_side)
            & (long <= self.max_side)
            & (shares.min(1) >= self.min_share)
            & (shares.max(1) <= self.max_share)
            & (long <= self.max_aspect * np.maximum(short, 1e-9))
            & (cover > (max(1, self.min_cover_share * cover.max()) if self.min_cover_share else 0))
        )
        return passes.nonzero()[0]


def choose_frames(
    spec: SampleSpec, usable: np.ndarray, rng: np.random.Generator, length: int = 0
) -> np.ndarray:
    """Frame indices of one sample, templates first: (T + N,) out of the usable ones, of which there
    are two or more.

    "forward", "any", "clip": every set of T + N different frames within `max_gap` is equally likely
    (a clip: every start of its span). A sequence with fewer usable frames than T + N within
    `max_gap` repeats some. `length` of the sequence: "trident" alone needs it, as its later
    templates are drawn from all frames.
    """
    if spec.order == "causal":
        return _causal(spec, usable, rng)
    if spec.order == "trident":
        return _trident(spec, usable, rng, length)
    count = spec.templates + spec.searches
    # how many usable frames each possible first frame has within the gap, itself included
    ahead = np.searchsorted(usable, usable + spec.max_gap) - np.arange(len(usable))
    if ahead.max() < count:
        start = int(rng.integers(len(usable)))
        return np.sort(rng.choice(usable[start : start + ahead[start]], count))
    # drawn as often as it is the first of some set of frames, so that all sets are equally likely
    weights = np.array([math.comb(int(n) - 1, count - 1) for n in ahead], dtype=float)
    start = int(rng.choice(len(usable), p=weights / weights.sum()))
    window = usable[start : start + ahead[start]]
    if spec.order == "clip":
        first = int(rng.integers(spec.templates, len(window) - spec.searches + 1))
        templates = np.sort(rng.choice(window[:first], spec.templates, replace=False))
        return np.concatenate([templates, window[first : first + spec.searches]])
    chosen = np.concatenate([window[:1], rng.choice(window[1:], count - 1, replace=False)])
    return np.sort(chosen) if spec.order == "forward" else rng.permutation(chosen)


def _causal(spec: SampleSpec, usable: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The template is any usable frame t but the last, the searches come from (t, t + max_gap)."""
    # wider after each template with nothing usable behind it
    for gap in itertools.count(spec.max_gap, step=5):
        start = int(rng.integers(len(usable) - 1))
        later = usable[start + 1 : np.searchsorted(usable, usable[start] + gap)]
        if len(later):
            searches = rng.choice(later, spec.searches, replace=len(later) < spec.searches)
            return np.concatenate([usable[start : start + 1], np.sort(searches)])


def _trident(
    spec: SampleSpec, usable: np.ndarray, rng: np.random.Generator, length: int
) -> np.ndarray:
    """Any first template z, any search s; the others in [s, s + max_gap) if z >= s, else in [s -
    max_gap, s).
    """
    first, search = rng.choice(usable, 2)
    low, high = (
        (search, search + spec.max_gap) if first >= search else (search - spec.max_gap, search)
    )
    dynamic = rng.integers(max(low, 0), min(high, length), spec.templates - 1)
    return np.concatenate([[first], dynamic, [search]])
