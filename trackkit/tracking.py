"""The tracking loop: one sequence, many in lock-step, or the frames of a user's own loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from trackkit.boxes import check_boxes
from trackkit.errors import DataError, TrackkitError
from trackkit.progress import bar
from trackkit.sequences import Sequence
from trackkit.trackers.base import Prediction, Tracker, join, take


@dataclass(frozen=True)
class Track:
    """A tracker's run through one sequence of N frames; row 0 is the given box.

    Attributes:
        boxes_xywh: (N, 4) float64, frame pixels. scores: (N,), the first is 1.
        seconds: (N,), time spent by the tracker, reading of frames excluded. In lock-step with
            others it is this sequence's share of the time of the whole batch.
    """

    boxes_xywh: Tensor
    scores: Tensor
    seconds: Tensor


def track(tracker: Tracker, sequence: Sequence) -> Track:
    """Follow the first box of one sequence to its end."""
    return next(track_many(tracker, [sequence], batch=1))[1]


def track_many(
    tracker: Tracker, sequences, batch: int = 8, progress: bool = False
) -> Iterator[tuple[int, Track]]:
    """Follow many sequences, `batch` at a time as one batch; yields (index, Track) as each one
    ends.

    When a sequence ends the next takes its place, so the batch stays full. The boxes do not depend
    on `batch` beyond float rounding. `progress` shows a bar that counts frames.
    """
    if batch < 1:
        raise TrackkitError(f"batch must be at least 1, got {batch}")
    frames = sum(len(s) for s in sequences) if progress else 0
    with bar(total=frames, desc="frames", unit="frame", shown=progress) as shown:
        yield from _track_many(tracker, sequences, batch, shown)


def _track_many(tracker: Tracker, sequences, batch: int, shown) -> Iterator[tuple[int, Track]]:
    waiting = iter(range(len(sequences)))
    slots: list[_Slot] = []
    state = None
    while True:
        fresh = [_Slot(i, sequences[i]) for i in islice(waiting, batch - len(slots))]
        if fresh:
            for slot in fresh:
                first, size = slot.sequence.boxes_xywh[:1], slot.sequence.frame_size(0)
                check_boxes(first, f"sequence {slot.sequence.name}, first frame", size)
            began = now(tracker.device)
            first_boxes = torch.cat([slot.sequence.boxes_xywh[:1] for slot in fresh])
            started = tracker.start([slot.sequence.frame(0) for slot in fresh], first_boxes)
            share = (now(tracker.device) - began) / len(fresh)
            for slot, box in zip(fresh, first_boxes, strict=True):
                slot.add(box, torch.tensor(1.0), share)
            state = started if state is None else join(state, started)
            slots += fresh
            shown.update(len(fresh))
        ended = [slot for slot in slots if slot.done]
        if ended:
            keep = [k for k, slot in enumerate(slots) if not slot.done]
            state = take(state, keep) if keep else None
            slots = [slots[k] for k in keep]
            for slot in ended:
                yield slot.index, slot.track()
            continue
        if not slots:
            return
        try:
            frames = [slot.sequence.frame(len(slot.boxes)) for slot in slots]
        except DataError:
            # a damaged video may turn out shorter than it said; then its slot is done
            if not any(slot.done for slot in slots):
                raise
            continue
        began = now(tracker.device)
        state, prediction = tracker.step(state, frames)
        share = (now(tracker.device) - began) / len(slots)
        for slot, box, score in zip(slots, prediction.box, prediction.score, strict=True):
            slot.add(box, score, share)
        shown.update(len(slots))


class _Slot:
    """A sequence on its way through a tracker."""

    def __init__(self, index: int, sequence: Sequence):
        self.index, self.sequence = index, sequence
        self.boxes: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.seconds: list[float] = []

    @property
    def done(self) -> bool:
        return len(self.boxes) == len(self.sequence)

    def add(self, box: Tensor, score: Tensor, seconds: float) -> None:
        self.boxes.append(box)
        self.scores.append(score.cpu())
        self.seconds.append(seconds)

    def track(self) -> Track:
        return Track(
            torch.stack(self.boxes),
            torch.stack(self.scores),
            torch.tensor(self.seconds, dtype=torch.float64),
        )


def device_called(name: str) -> torch.device:
    """The device for "auto" (a GPU if there is one), "cpu" or "cuda"; TrackkitError if there is
    none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise TrackkitError(f'device must be "auto", "cpu" or "cuda", got {name!r}')
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise TrackkitError(
            "device cuda: torch sees no GPU here; `trackkit doctor` says what it sees"
        )
    # "auto" means CUDA or the CPU: geometry is kept in float64, which Apple's GPUs do not have
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def now(device: torch.device) -> float:
    """Seconds on a clock that is read when the device has finished its work."""
    if device.type in ("cuda", "mps", "xpu"):
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Online:
    """A tracker for a loop of one's own, with the two calls of the GOT-10k toolkit.

        online = Online(tracker)
        online.init(image, (x, y, w, h))
        box = online.update(next_image)

    Images are uint8, (3, H, W) tensors or (H, W, 3) arrays, RGB. Boxes are left, top, width, height
    in pixels. Raises DataError for any other image or box.
    """

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self.state = None
        self.prediction: Prediction | None = None

    def init(self, image, box) -> None:
        """Start at this box in this image."""
        try:
            box = torch.as_tensor(box, dtype=torch.float64, device="cpu").reshape(1, -1)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise DataError(
                f"a box must be four numbers, left, top, width, height in pixels; got {box!r:.60}"
            ) from error
        self.state = self.tracker.start([_as_frame(image)], box)

    def update(self, image, maps: bool = False) -> tuple[float, float, float, float]:
        """The target's box in the next image; `prediction` keeps the score and, if asked, the
        maps.
        """
        if self.state is None:
            raise RuntimeError("call init(image, box) before update(image)")
        self.state, self.prediction = self.tracker.step(self.state, [_as_frame(image)], maps)
        return tuple(self.prediction.box[0].tolist())


def _as_frame(image) -> Tensor:
    if not isinstance(image, Tensor):
        try:
            array = np.asarray(image)
        except ValueError:  # lists of unequal length
            array = np.asarray(image, dtype=object)
        if array.dtype.kind not in "biuf":  # None, text, objects
            raise DataError(
                "an image must be a uint8 tensor (3, H, W) or array (H, W, 3), RGB; got "
                f"a {type(image).__name__} {array.dtype} {array.shape}"
            )
        # a copy of what torch cannot share: image[..., ::-1], which makes RGB of OpenCV's BGR, and
        # what must not be written to
        image = torch.from_numpy(np.require(array, requirements="CW"))
    return (
        image.permute(2, 0, 1)
        if image.ndim == 3 and image.shape[-1] == 3 and image.shape[0] != 3
        else image
    )
