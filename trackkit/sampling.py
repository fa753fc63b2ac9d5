"""Training samples: which frames of a sequence, which windows in them, which changes to the pixels.

One description, `SampleSpec`, serves all trackers (pairs, triplets, clips) and all data sets. Sample `i` of a
seed is always the same sample: its random numbers come from (seed, i) and nothing else, so neither the number
of loader workers nor of GPUs nor an interruption changes what a tracker sees.
"""
from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trackkit.boxes import xywh_to_cxcywh
from trackkit.crops import Windows, context_side, reduction
from trackkit.errors import DataError
from trackkit.got10k import GOT10k
from trackkit.sequences import Sequence
from trackkit.synth import SynthConfig, SynthDataset

log = logging.getLogger("trackkit")


@dataclass(frozen=True)
class CropSpec:
    """How a crop is taken around a target.

    Attributes:
        size: side of the crop in crop pixels.
        factor: side of the window in units of `context_side(box, context)`.
        context: margin before the factor, see `crops.context_side`.
        shift_px: the window moves by up to this many crop pixels along each axis, uniformly.
        scale: the target appears larger or smaller by up to this share, uniformly.
    """

    size: int
    factor: float
    context: float = 0.0
    shift_px: float = 0.0
    scale: float = 0.0

    def __post_init__(self):
        if self.size < 1 or self.factor <= 0 or not 0 <= self.scale < 1:
            raise ValueError(f"impossible crop: {self}")


@dataclass(frozen=True)
class FrameRule:
    """Which frames are good enough to train on. All of them must show the target (`Sequence.visible`).

    Attributes:
        min_area: square pixels. min_side, max_side: pixels, for both sides of the box.
        min_share, max_share: sides of the box in units of the frame's sides.
        max_aspect: longer side over shorter side.
        min_cover_share: the visibility level must exceed this share of the sequence's best level, and 1.
    """

    min_area: float = 0.0
    min_side: float = 0.0
    max_side: float = float("inf")
    min_share: float = 0.0
    max_share: float = float("inf")
    max_aspect: float = float("inf")
    min_cover_share: float = 0.0

    def usable(self, sequence: Sequence) -> np.ndarray:
        """Indices of the frames that pass, in order. The first frame's size stands for all."""
        if not sequence.labelled:
            raise DataError(f"sequence {sequence.name} has no boxes beyond the first frame; it cannot be trained on")
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


@dataclass(frozen=True)
class SampleSpec:
    """One training sample: T templates and N searches of one sequence.

    Attributes:
        template, search: how their crops are taken.
        templates, searches: T and N.
        order: "forward": templates come before searches; "any": the frames are mixed;
            "clip": templates come first, then the searches as neighbouring usable frames.
        max_gap: all frames of a sample lie within this many frames.
        rule: which frames may be used.
        flip, grey: probabilities of mirroring the sample and of removing its colours.
        brightness: each crop is brightened or darkened by up to this share.
    """

    template: CropSpec
    search: CropSpec
    templates: int = 1
    searches: int = 1
    order: str = "forward"
    max_gap: int = 100
    rule: FrameRule = FrameRule()
    flip: float = 0.0
    grey: float = 0.0
    brightness: float = 0.0

    def __post_init__(self):
        if self.order not in ("forward", "any", "clip"):
            raise ValueError(f'order must be "forward", "any" or "clip", got {self.order!r}')
        if self.templates < 1 or self.searches < 1 or self.max_gap < 1:
            raise ValueError("a sample needs at least one template, one search and a gap of one frame")


def choose_frames(spec: SampleSpec, usable: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Frame indices of one sample, templates first: (T + N,) out of the usable ones.

    Every set of T + N different frames within `max_gap` is equally likely (a clip: every start of its span). A
    sequence with fewer usable frames than T + N within `max_gap` repeats some.
    """
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


def take_crop(sequence: Sequence, frame: int, spec: CropSpec, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A jittered crop around the target: uint8 (3, S, S), and its box cxcywh in units of the crop (4,)."""
    box = sequence.boxes_xywh[frame : frame + 1]
    zoom = 1 + spec.scale * (2 * rng.random() - 1)
    shift = spec.shift_px * (2 * rng.random(2) - 1)  # crop pixels
    side = context_side(box, spec.context) * spec.factor / zoom
    centre = xywh_to_cxcywh(box)[:, :2] + torch.from_numpy(shift) * side / spec.size
    window = Windows.around(centre, side, spec.size, grid=reduction(float(side), spec.size))
    inside = xywh_to_cxcywh(window.to_crop(box))[0] / spec.size
    return sequence.crop(frame, window), inside.float()


class Samples(Dataset):
    """Sample `i` of `seed`, for i in 0 .. `length` - 1, as a dict of tensors.

    templates uint8 (T, 3, z, z), template_boxes (T, 4); searches uint8 (N, 3, x, x), search_boxes (N, 4).
    Boxes are cxcywh in units of the crop.

    A sequence without two usable frames is not used, and not in silence either: each process names it once in
    its log, and another one is drawn. (Of a procedural stream, whose sequences nobody can mend, they are named
    at the level "debug".) A file that cannot be read stops training with an error that names it.
    """

    def __init__(self, sequences, spec: SampleSpec, seed: int, length: int):
        if len(sequences) == 0:
            raise DataError("the training set has no sequences")
        if seed < 0:
            raise DataError(f"the seed must not be negative, got {seed}")
        self.sequences, self.spec, self.seed, self.length = sequences, spec, seed, length
        self._named: set[int] = set()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        spec, rng = self.spec, np.random.default_rng([self.seed, index])
        sequence, usable = self._draw(rng)
        frames = choose_frames(spec, usable, rng)
        specs = [spec.template] * spec.templates + [spec.search] * spec.searches
        crops, boxes = zip(*(take_crop(sequence, int(f), s, rng) for f, s in zip(frames, specs, strict=True)), strict=True)
        crops, boxes = self._augment(list(crops), torch.stack(boxes), rng)
        t = spec.templates
        return {
            "templates": torch.stack(crops[:t]),
            "template_boxes": boxes[:t],
            "searches": torch.stack(crops[t:]),
            "search_boxes": boxes[t:],
        }

    def _draw(self, rng: np.random.Generator) -> tuple[Sequence, np.ndarray]:
        for _ in range(100):
            number = int(rng.integers(len(self.sequences)))
            sequence = self.sequences[number]
            usable = self.spec.rule.usable(sequence)
            if len(usable) >= 2:
                return sequence, usable
            if number not in self._named:
                self._named.add(number)
                level = logging.DEBUG if isinstance(self.sequences, SynthDataset) else logging.WARNING
                text = "%s: %d of %d frames pass %s; another sequence is drawn"
                log.log(level, text, sequence.name, len(usable), len(sequence), self.spec.rule)
        raise DataError(f"100 sequences drawn, none with two frames that pass {self.spec.rule}; loosen the rule or check the labels")

    def _augment(self, crops: list[Tensor], boxes: Tensor, rng: np.random.Generator) -> tuple[list[Tensor], Tensor]:
        flip, grey = rng.random(2) < (self.spec.flip, self.spec.grey)
        factors = 1 + self.spec.brightness * (2 * rng.random(len(crops)) - 1)
        if flip:
            crops = [crop.flip(-1) for crop in crops]
            boxes = torch.cat([1 - boxes[:, :1], boxes[:, 1:]], 1)
        if grey:
            crops = [crop.float().mean(0, keepdim=True).round().to(torch.uint8).expand_as(crop) for crop in crops]
        if self.spec.brightness:
            crops = [(c * float(f)).round().clamp(0, 255).to(torch.uint8) for c, f in zip(crops, factors, strict=True)]
        return crops, boxes


def training_set(root: str | os.PathLike | None = None, seed: int = 0):
    """GOT-10k's train split under `root` or TRACKKIT_GOT10K; with neither, an endless procedural stream.

    Raises DataError if the path holds no GOT-10k.
    """
    if root is None and not os.environ.get("TRACKKIT_GOT10K"):
        return SynthDataset(SynthConfig(), seed=seed, length=1_000_000)
    return GOT10k(root, "train")


def batches(
    samples: Samples, batch: int, first_step: int, steps: int, workers: int = 0, rank: int = 0, world: int = 1, pinned: bool = False
) -> Iterator[dict[str, Tensor]]:
    """The batches of steps first_step .. steps - 1; process `rank` of `world` gets its share of each step.

    `batch` counts samples of one process. Step s is made of samples s * batch * world onwards, so a run that
    continues at step s sees what it would have seen. `pinned` memory travels to a GPU faster.
    """
    plan = [range((step * world + rank) * batch, (step * world + rank + 1) * batch) for step in range(first_step, steps)]
    return iter(DataLoader(samples, batch_sampler=plan, num_workers=workers, pin_memory=pinned))
