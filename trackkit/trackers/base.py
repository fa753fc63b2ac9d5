"""What every tracker is: a network, a frozen config, and a state that the caller holds.

    state = tracker.start(frames, boxes_xywh)          # frames: B images, boxes: (B, 4)
    state, prediction = tracker.step(state, frames)    # the next image of each of the B sequences

Nothing about a sequence is kept on the module, so one tracker follows many sequences at once and any run can
be copied, edited and continued from any frame.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from trackkit.boxes import check_boxes
from trackkit.errors import DataError, TrackkitError

State = TypeVar("State")


@dataclass(frozen=True)
class Prediction:
    """What a tracker says about one frame of each of B sequences.

    Attributes:
        box: (B, 4) float64 on the CPU, xywh, frame pixels; may reach outside the frame.
        score: (B,) on the CPU, confidence in [0, 1]; its meaning is the tracker's.
        maps: named intermediate results (responses, attention) when asked for, else None.
    """

    box: Tensor
    score: Tensor
    maps: dict[str, Tensor] | None = None


class Tracker(nn.Module):
    """Base class. A subclass has a `Config` dataclass and gives `start`, `step`, `loss` and `recipe`."""

    Config: ClassVar[type]

    def __init__(self, config: Any = None):
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the weights are; frames are moved there."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> Any:
        """State after the first frame of B sequences: frames uint8 (3, H, W), boxes (B, 4) in pixels.

        Raises DataError for a box that is not finite, has no area or lies outside its frame.
        """
        raise NotImplementedError

    def step(self, state: Any, frames: list[Tensor], maps: bool = False) -> tuple[Any, Prediction]:
        """Follow the B targets into their next frames. The state given is left unchanged."""
        raise NotImplementedError

    def loss(self, batch: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        """Losses of a batch from `sampling`; the entry "loss" is minimised. `kind` is the stage's `loss`.

        In training the batch also has "progress", the share of the stage's steps that are done, a tensor () in [0, 1).
        """
        raise TrackkitError(f"{type(self).__name__} has nothing to train")

    def recipe(self, scale: str) -> list[Any]:
        """The training stages (`training.Stage`) at `scale`: tiny, laptop, gpu or paper."""
        raise TrackkitError(f"{type(self).__name__} has nothing to train")

    def load_pretrained(self) -> bool:
        """Take the backbone's weights from where the paper's training starts; False if it starts from random ones.

        They come from torchvision's or timm's cache or, once, from the network; TrackkitError if neither has them.
        """
        return False

    def checked(self, frames: list[Tensor], boxes_xywh: Tensor) -> tuple[list[Tensor], Tensor]:
        """Frames on the tracker's device and boxes as float64 (B, 4), or DataError. For `start`."""
        boxes = torch.as_tensor(boxes_xywh, dtype=torch.float64)
        if len(frames) != len(boxes):
            raise DataError(f"start: {len(frames)} frames but {len(boxes)} boxes; give one box for each frame")
        frames = self.moved(frames)
        for index, frame in enumerate(frames):
            check_boxes(boxes[index : index + 1], f"first box of sequence {index}", (frame.shape[2], frame.shape[1]))
        return frames, boxes

    def moved(self, frames: list[Tensor]) -> list[Tensor]:
        """The frames on the tracker's device; DataError if they are not uint8 (3, H, W)."""
        for frame in frames:
            if frame.dtype != torch.uint8 or frame.ndim != 3 or frame.shape[0] != 3:
                raise DataError(f"a frame must be uint8 (3, H, W), RGB; got {frame.dtype} {tuple(frame.shape)}")
        return [frame.to(self.device, non_blocking=True) for frame in frames]


def take(state: State, indices: list[int]) -> State:
    """The states of some of the B sequences, in the order of `indices`."""
    return _map(lambda t: t[torch.as_tensor(indices, device=t.device)], state)


def join(first: State, second: State) -> State:
    """Two batches of states as one. States that differ in the number of their parts say with `fitted` how to fill up."""
    if hasattr(first, "fitted"):
        first, second = first.fitted(second), second.fitted(first)
    return _map(lambda a, b: torch.cat([a, b]), first, second)


def _map(function, *states):
    """Apply `function` to the tensors at the same place of equally built states."""
    first = states[0]
    if isinstance(first, Tensor):
        return function(*states)
    if dataclasses.is_dataclass(first):
        names = [f.name for f in dataclasses.fields(first)]
        return type(first)(**{n: _map(function, *(getattr(s, n) for s in states)) for n in names})
    if isinstance(first, (list, tuple)):
        return type(first)(_map(function, *parts) for parts in zip(*states, strict=True))
    if any(s != first for s in states):
        raise TypeError(f"states differ in a part that is no tensor: {states}")
    return first
