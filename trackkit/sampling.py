"""Training samples: which frames of a sequence, which windows in them, which changes to the pixels.

One description, `SampleSpec`, serves all trackers (pairs, triplets, clips) and all data sets.
Sample `i` of a seed is always the same sample: its random numbers come from (seed, i) and nothing
else, so neither the number of loader workers nor of GPUs nor an interruption changes what a tracker
sees.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from trackkit.boxes import cxcywh_to_xywh, xywh_to_cxcywh
from trackkit.crops import CropSpec, Windows, context_side, gt_in_crop, outside, reduction, shown
from trackkit.errors import DataError, TrackkitError
from trackkit.frames import SampleSpec, choose_frames
from trackkit.got10k import GOT10k
from trackkit.images import Picture
from trackkit.rectangles import Packed, Rectangle, Style, pack, restyle
from trackkit.sequences import Sequence, Still
from trackkit.synth import SynthConfig, SynthDataset
from trackkit.synth.pool import pool

log = logging.getLogger("trackkit")

TRIES = 100  # draws before giving up: data that need more are broken
TOKEN = 16  # crop pixels from one token of a tracker to the next, or a multiple of it


def jitter_box(
    box_xywh: Tensor, size: float, centre: float, normal: Tensor, uniform: Tensor
) -> Tensor:
    """A box that is off as a tracker's last one may be: (..., 4) -> (..., 4) for draws (..., 2).

    The sides are multiplied by exp(size * normal), normal ~ N(0, 1). The centre then moves along
    each axis by centre * (uniform - 1/2) of the new size sqrt(w h), uniform ~ U(0, 1). STARK: 0.5
    and 4.5.
    """
    old = xywh_to_cxcywh(box_xywh)
    sides = old[..., 2:] * (size * normal).exp()
    move = sides.prod(-1, keepdim=True).sqrt() * centre * (uniform - 0.5)
    return cxcywh_to_xywh(torch.cat([old[..., :2] + move, sides], -1))


def choose_window(
    box_xywh: Tensor, spec: CropSpec, rng: np.random.Generator
) -> tuple[Windows, Tensor]:
    """A jittered window for a target (1, 4), and the target's box in its crop: cxcywh in units of
    the crop (4,).
    """
    zoom = 1 + spec.scale * (2 * rng.random() - 1)
    shift = _shift(spec, rng)
    around = box_xywh
    if spec.jitter_size or spec.jitter_centre:
        normal, uniform = torch.from_numpy(rng.standard_normal(2)), torch.from_numpy(rng.random(2))
        around = jitter_box(box_xywh, spec.jitter_size, spec.jitter_centre, normal, uniform)
    side = context_side(around, spec.context) * spec.factor / zoom
    if around is not box_xywh or not spec.exact:  # STARK rounds up
        side = side.ceil()
    return _window(box_xywh, spec, xywh_to_cxcywh(around)[:, :2] + shift * side / spec.size, side)


def move_window(
    window: Windows, box_xywh: Tensor, spec: CropSpec, rng: np.random.Generator
) -> tuple[Windows, Tensor]:
    """A window moved by up to `spec.shift_px`, and the box of a target (1, 4) in its crop: cxcywh
    in units of the crop (4,).
    """
    centre = torch.stack([window.left, window.top], -1) + window.side[:, None] * (
        0.5 + _shift(spec, rng) / spec.size
    )
    return _window(box_xywh, spec, centre, window.side.double())


def _shift(spec: CropSpec, rng: np.random.Generator) -> Tensor:
    """By how much a window moves along each axis: (2,), crop pixels."""
    return torch.from_numpy(spec.shift_px * (2 * rng.random(2) - 1))


def _window(
    box_xywh: Tensor, spec: CropSpec, centre: Tensor, side: Tensor
) -> tuple[Windows, Tensor]:
    """The window of this side (1,) around a centre (1, 2), frame pixels, and where a target's box
    lies in it.
    """
    grid = reduction(float(side), spec.size)
    window = Windows.around(centre, side, spec.size, grid)
    if spec.exact:
        inside = xywh_to_cxcywh(window.to_crop(box_xywh)) / spec.size
    elif grid == 1:
        inside = gt_in_crop(box_xywh, centre, window)
    # the authors' window, to which their rule belongs, does not lie on the grid of a reduced frame
    else:
        theirs = Windows.around(centre, side, spec.size)
        boxes = theirs.to_frame(cxcywh_to_xywh(gt_in_crop(box_xywh, centre, theirs)) * spec.size)
        inside = xywh_to_cxcywh(window.to_crop(boxes)) / spec.size
    return window, inside[0].float()


class Shot(NamedTuple):
    """What a crop is made of: a frame of a sequence, and the box (1, 4) xywh that counts as the
    target's.
    """

    sequence: Sequence
    still: Still | Picture
    box_xywh: Tensor


class Place(NamedTuple):
    """Where a crop is: its window, the box in it (4,) cxcywh in units of the crop, its mask (S, S)
    if asked for.
    """

    window: Windows
    box: Tensor
    mask: Tensor | None


class Samples(Dataset):
    """Sample `i` of `seed`, for i in 0 .. `length` - 1, as a dict of tensors.

    templates uint8 (T, 3, z, z), template_boxes (T, 4); searches uint8 (N, 3, x, x), search_boxes
    (N, 4). With K `spec.template_factors` there are T * K templates, the first T with the first
    factor. Boxes are cxcywh in units of the crop. With `spec.masks` also template_masks bool (T, z,
    z) and search_masks (N, x, x), True outside the frame. With `spec.negatives` also labels float32
    (N,), 1 where the search shows the target and 0 where it does not; the box then means nothing.
    With `packed` templates and searches are `Packed` rectangles, which become those crops, byte for
    byte, where they are rendered.

    A sequence with too few usable frames is not used, and not in silence either: each process names
    it once in its log, and another one is drawn. (Of `procedural` data, whose sequences nobody
    can mend, they are named at the level "debug".) A file that cannot be read stops training with
    an error that names it. DataError when 100 draws in a row give nothing to train on.
    """

    def __init__(self, sequences, spec: SampleSpec, seed: int, length: int, packed: bool = False):
        if len(sequences) == 0:
            raise DataError("the training set has no sequences")
        if seed < 0:
            raise DataError(f"the seed must not be negative, got {seed}")
        self.sequences, self.spec, self.seed, self.length = sequences, spec, seed, length
        self.packed = packed
        factors = spec.template_factors or (spec.template.factor,)
        templates = [
            dataclasses.replace(spec.template, factor=f)
            for f in factors
            for _ in range(spec.templates)
        ]
        self._templates, self._crops = len(templates), templates + [spec.search] * spec.searches
        self._fills = [
            None if crop.fill is None else torch.full((3,), float(crop.fill))
            for crop in self._crops
        ]
        self._named: set[int] = set()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        spec, rng = self.spec, np.random.default_rng([self.seed, index])
        for _ in range(TRIES):
            shots, shown = self._shots(rng)
            places = self._places(shots, rng)
            if places is not None:
                break
        else:
            raise DataError(
                f"{TRIES} samples drawn, all with a box of no size or a crop outside its frame; "
                f"the last one of {', '.join(sorted({shot.sequence.name for shot in shots}))}: "
                "check the labels"
            )
        rectangles = [
            shot.sequence.rectangle(shot.still, place.window, fill)
            for shot, place, fill in zip(shots, places, self._fills, strict=True)
        ]
        boxes, masks, style = self._augment(places, rng)
        t = self._templates
        sample = {
            "templates": self._pixels(rectangles, style, slice(None, t)),
            "template_boxes": boxes[:t],
            "searches": self._pixels(rectangles, style, slice(t, None)),
            "search_boxes": boxes[t:],
        }
        if spec.masks:
            sample |= {
                "template_masks": torch.stack(masks[:t]),
                "search_masks": torch.stack(masks[t:]),
            }
        if spec.negatives:
            sample["labels"] = torch.full((spec.searches,), float(shown))
        return sample

    def _shots(self, rng: np.random.Generator) -> tuple[list[Shot], bool]:
        """What the crops are made of, templates first, and whether the searches show the target."""
        spec = self.spec
        sequence, usable = self._draw(rng)
        frames = choose_frames(spec, usable, rng, len(sequence))
        shots = _opened(sequence, frames, sequence.boxes_xywh[frames])
        templates = shots[: spec.templates] * (self._templates // spec.templates)
        shots = templates + shots[spec.templates :]
        if not (spec.negatives and rng.random() < spec.negatives):
            return shots, True
        hidden = (~sequence.visible).numpy().nonzero()[0]
        if len(hidden):  # the target is not there: look in the middle of the frame
            frames = rng.choice(hidden, spec.searches)
            sizes = [sequence.frame_size(int(f)) for f in frames]
            middle = [[w * 7 // 16, h * 7 // 16, w // 8, h // 8] for w, h in sizes]
            boxes = torch.tensor(middle, dtype=torch.float64)
        else:  # the target is always there: look at another sequence's
            sequence, _ = self._draw(rng)
            frames = rng.integers(len(sequence), size=spec.searches)
            boxes = sequence.boxes_xywh[frames]
        return templates + _opened(sequence, frames, boxes), False

    def _places(self, shots: list[Shot], rng: np.random.Generator) -> list[Place] | None:
        """The windows of a sample, or None if one of its boxes has no size or a tracker would see
        nothing in a crop.
        """
        places = []
        for i, ((_, still, box), crop) in enumerate(zip(shots, self._crops, strict=True)):
            numbers = box[0].tolist()
            if not (all(map(math.isfinite, numbers)) and min(numbers[2:]) > 0):
                return None
            if self.spec.same_window and i > self._templates:
                window, inside = move_window(places[self._templates].window, box, crop, rng)
            else:
                window, inside = choose_window(box, crop, rng)
            mask = None
            if self.spec.masks:
                lost = 0 if crop.exact else 1
                width, height = (length - lost for length in still.size)
                left, top, side = window.rows[0].tolist()
                if shown(left, top, side, width, height) == (left, top, left + side, top + side):
                    mask = torch.zeros(crop.size, crop.size, dtype=torch.bool)
                else:
                    mask = outside(window, [(width, height)])[0]
                    # a token reads the pixel in its corner; none would be left to attend to,
                    # mirrored or not
                    corners = mask[::TOKEN, ::TOKEN], mask.flip(-1)[::TOKEN, ::TOKEN]
                    if any(bool(tokens.all()) for tokens in corners):
                        return None
            places.append(Place(window, inside, mask))
        return places

    def _draw(self, rng: np.random.Generator) -> tuple[Sequence, np.ndarray]:
        """A sequence and its usable frames."""
        rule = self.spec.rule
        for _ in range(TRIES):
            number = int(rng.integers(len(self.sequences)))
            sequence = self.sequences[number]
            usable = rule.usable(sequence)
            if len(usable) >= rule.min_usable and len(sequence) >= rule.min_frames:
                return sequence, usable
            if number not in self._named:
                self._named.add(number)
                made = getattr(self.sequences, "procedural", False)
                level = logging.DEBUG if made else logging.WARNING
                text = "%s: %d of %d frames pass %s; another sequence is drawn"
                log.log(level, text, sequence.name, len(usable), len(sequence), rule)
        text = f"{TRIES} sequences drawn, none with enough frames that pass {rule}"
        raise DataError(f"{text}; loosen the rule or check the labels")

    def _augment(
        self, places: list[Place], rng: np.random.Generator
    ) -> tuple[Tensor, list[Tensor | None], Style]:
        """Boxes and masks as they are after mirroring, and what is done to the pixels."""
        spec, count = self.spec, len(places)
        flip, grey = rng.random(2) < (spec.flip, spec.grey)
        factors = 1 + spec.brightness * (2 * rng.random(count) - 1)
        flips = np.full(count, flip)
        if spec.flip_each:
            flips ^= rng.random(count) < spec.flip_each
        boxes, masks = torch.stack([p.box for p in places]), [p.mask for p in places]
        for i in flips.nonzero()[0]:
            boxes[i, 0] = 1 - boxes[i, 0]
            masks[i] = None if masks[i] is None else masks[i].flip(-1)
        style = Style(
            torch.from_numpy(flips) if spec.flip or spec.flip_each else None,
            torch.full((count,), bool(grey)) if spec.grey else None,
            torch.from_numpy(factors).float() if spec.brightness else None,
        )
        return boxes, masks, style

    def _pixels(self, rectangles: list[Rectangle], style: Style, part: slice) -> Tensor | Packed:
        """Some of a sample's crops."""
        rectangles = rectangles[part]
        style = Style(*(None if values is None else values[part] for values in style))
        if self.packed:
            return pack(rectangles, style)
        return restyle(torch.stack([r.crop() for r in rectangles]), style)


def _opened(sequence: Sequence, frames: np.ndarray, boxes: Tensor) -> list[Shot]:
    return [
        Shot(sequence, sequence.still(int(f)), box[None])
        for f, box in zip(frames, boxes, strict=True)
    ]


STREAM = "stream"  # in place of a path: procedural videos without end


def training_set(root: str | os.PathLike | None = None, seed: int = 0):
    """GOT-10k's train split under `root` or TRACKKIT_GOT10K; with neither, the pool of procedural
    videos (`synth.pool`), and for `root` "stream" videos that are drawn as they are needed, without
    end, other ones for each `seed`.

    Raises DataError if the path holds no GOT-10k.
    """
    if root is not None and str(root) == STREAM:
        return SynthDataset(SynthConfig(), seed=seed, length=1_000_000)
    if root is None and not os.environ.get("TRACKKIT_GOT10K"):
        return pool()
    return GOT10k(root, "train")


def batches(
    samples: Samples,
    batch: int,
    first_step: int,
    steps: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    pinned: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """The batches of steps first_step .. steps - 1; process `rank` of `world` gets its share of
    each step.

    `batch` counts samples of one process. Step s is made of samples s * batch * world onwards, so a
    run that continues at step s sees what it would have seen. `pinned` memory travels to a GPU
    faster.
    """
    plan = [
        range((step * world + rank) * batch, (step * world + rank + 1) * batch)
        for step in range(first_step, steps)
    ]
    loader = DataLoader(
        _Told(samples),
        batch_sampler=plan,
        num_workers=workers,
        pin_memory=pinned,
        collate_fn=_collate,
        worker_init_fn=_ignore_signals,
    )
    with worker_errors():
        try:
            iterator = iter(loader)
        except OSError as error:
            raise TrackkitError(
                f"{workers} loader workers cannot be started ({error.strerror}); use fewer "
                "(--workers)"
            ) from error
        for ready in iterator:
            if isinstance(ready, Exception):
                raise ready
            yield ready


@contextmanager
def worker_errors() -> Iterator[None]:
    """Where torch may tell that a loader worker has died: it does so by a signal's handler, hence
    anywhere while workers run. Raises TrackkitError that says what to do.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrackkitError(
            "a loader worker was ended from outside, which is what happens when memory runs out; "
            "use fewer workers (--workers) or smaller batches"
        ) from error


class _Told(Dataset):
    """Samples whose errors come back as values: from a worker process, torch would hand on only a
    traceback as text.
    """

    def __init__(self, samples: Samples):
        self.samples = samples

    def __getitem__(self, index: int) -> dict[str, Tensor] | Exception:
        try:
            return self.samples[index]
        except TrackkitError as error:
            return error
        except (MemoryError, RuntimeError) as error:
            # torch has no error of its own for this
            if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
                raise
            return TrackkitError("there is no memory left for a sample; use smaller batches")


def _collate(samples: list) -> dict[str, Tensor] | Exception:
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    packed = [key for key, value in samples[0].items() if isinstance(value, Packed)]
    joined = {key: Packed.join([sample.pop(key) for sample in samples]) for key in packed}
    return joined | default_collate(samples)


def rendered(batch: dict[str, Tensor | Packed]) -> dict[str, Tensor]:
    """A batch with its packed rectangles made into crops, on their device."""
    return {k: v.render() if isinstance(v, Packed) else v for k, v in batch.items()}


def _ignore_signals(_: int) -> None:
    """Ctrl-C reaches all processes of a terminal, and SIGTERM all of a job; the training process
    saves and ends the others, which end by themselves when it has gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
