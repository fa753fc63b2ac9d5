"""What a training sample is made of: which frames of a sequence, and how their crops are taken."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np

from trackkit.crops import CropSpec
from trackkit.errors import DataError
from trackkit.sequences import Sequence


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


ORDERS = ("forward", "any", "clip", "causal", "trident")


@dataclass(frozen=True)
class SampleSpec:
    """One training sample: T templates and N searches of one sequence.

    Attributes:
        template, search: how their crops are taken.
        templates, searches: T and N.
        order: which frames show what.
            "forward": templates come before searches. "any": the frames are mixed.
            "clip": templates come first, then the searches as neighbouring usable frames.
            "causal": any frame is the template, the searches are drawn from those after it
            (STARK-S). "trident": first template and search are any two frames, even the same; the
            other templates lie near the search, on the first one's side, and need not show the
            target (STARK-ST).
        max_gap: all frames of a sample lie within this many frames. "causal": the searches lie so
            near to the template (farther only where none do). "trident": the later templates lie so
            near to the search.
        rule: which frames may be used.
        flip, grey: probabilities of mirroring the sample and of removing its colours.
        brightness: each crop is brightened or darkened by up to this share.
        flip_each: probability that a crop is mirrored by itself, after `flip`.
        masks: the sample says which pixels lie outside their frame. Crops of which a tracker would
            see nothing else are drawn again.
        negatives: probability that the searches do not show the target; the sample says whether
            they do.
        same_window: later searches are cut from the first one's window, moved by up to
            `search.shift_px`, so that what was seen in one lies near the same place in the next
            (USTAM).
        template_factors: with these, each template frame is cropped once with each of them in place
            of `template.factor`; the sample has all frames with the first factor, then all with the
            next (ProContEXT).
    """

    template: CropSpec
    search: CropSpec
    templates: int = 1
    searches: int = 1
    order: str = "forward"
    max_gap: int = 100
    rule: FrameRule = dataclasses.field(default_factory=FrameRule)
    flip: float = 0.0
    grey: float = 0.0
    brightness: float = 0.0
    flip_each: float = 0.0
    masks: bool = False
    negatives: float = 0.0
    same_window: bool = False
    template_factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        if self.templates < 1 or self.searches < 1 or self.max_gap < 1:
            raise ValueError(
                "a sample needs at least one template, one search and a gap of one frame"
            )
        if (self.order == "causal" and self.templates > 1) or (
            self.order == "trident" and self.searches > 1
        ):
            raise ValueError('the order "causal" has one template, "trident" has one search')


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
