"""What every tracker is: a network, a frozen config, and a state that the caller holds.

    state = tracker.start(frames, boxes_xywh)          # frames: B images, boxes: (B, 4)
    state, prediction = tracker.step(state, frames)    # the next image of each of the B sequences

Nothing about a sequence is kept on the module, so one tracker follows many sequences at once and
any run can be copied, edited and continued from any frame.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from trackkit import checkpoints
from trackkit.boxes import check_boxes
from trackkit.crops import CropSpec
from trackkit.errors import DataError, TrackkitError
from trackkit.paths import SAMPLES

State = TypeVar("State")


@dataclass(frozen=True)
class Prediction:
    """What a tracker says about one frame of each of B sequences.

    Attributes:
        box: (B, 4) float64 on the CPU, xywh, frame pixels; may reach outside the frame.
        score: (B,) float64 on the CPU, confidence in [0, 1]; its meaning is the tracker's.
        maps: named intermediate results (responses, attention) when asked for, else None.
    """

    box: Tensor
    score: Tensor
    maps: dict[str, Tensor] | None = None


class Tracker(nn.Module):
    """Base class. A subclass has a `Config` dataclass and gives `start`, `step`, `loss` and
    `recipe`.

    `start` and `step` run without gradients and in evaluation mode, whatever was called before, and
    what goes in and comes out is checked: see `_tracking` and `_checked`. The weights are float32:
    after `.half()`, `.double()` or `.to(dtype)` they raise TrackkitError; `torch.autocast` is the
    way to a lower precision. `trackkit.trackers.template` is an example to copy.
    """

    Config: ClassVar[type]
    # what `recipe` has to offer where a paper and its code, or two data sets, differ
    presets: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **rest: Any):
        super().__init_subclass__(**rest)
        if "start" in vars(cls):
            cls.start = _tracking(cls.start)
        if "step" in vars(cls):
            cls.step = _tracking(_checked(cls.step))

    def __init__(self, config: Any = None):
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the weights are; frames are moved there."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def template_crop(self) -> CropSpec:
        """How the template is cropped, in tracking and in training. This is the rule of STARK and
        its heirs, for configs with their fields; other trackers state their own.
        """
        cfg = self.config
        return CropSpec(cfg.template_size, cfg.template_factor, fill=0, exact=cfg.exact)

    @property
    def search_crop(self) -> CropSpec:
        """How the search region is cropped, see `template_crop`."""
        cfg = self.config
        return CropSpec(cfg.search_size, cfg.search_factor, fill=0, exact=cfg.exact)

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> Any:
        """State after the first frame of B sequences: frames uint8 (3, H, W), boxes (B, 4) in
        pixels.

        Raises DataError for a box that is not finite, has no area or lies outside its frame.
        """
        raise NotImplementedError

    def step(self, state: Any, frames: list[Tensor], maps: bool = False) -> tuple[Any, Prediction]:
        """Follow the B targets into their next frames. The state given is left unchanged.

        Raises DataError for frames that are not uint8 (3, H, W) or not B, and if the network's
        answer is NaN or infinite.
        """
        raise NotImplementedError

    def loss(self, batch: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        """Losses of a batch from `sampling`; the entry "loss" is minimised. `kind` is the stage's
        `loss`.

        In training the batch also has "progress", the share of the stage's steps that are done, a
        tensor () in [0, 1).
        """
        raise TrackkitError(f"{type(self).__name__} has nothing to train")

    def recipe(self, scale: str, preset: str = "") -> list[Any]:
        """The training stages (`stages.Stage`) at `scale`: tiny, laptop, gpu or paper.

        `preset` is one of `presets`; "" is the tracker's own choice. Raises TrackkitError for one
        that there is not.
        """
        raise TrackkitError(f"{type(self).__name__} has nothing to train")

    def check_preset(self, preset: str) -> None:
        """For `recipe`."""
        if preset and preset not in self.presets:
            there = f"there are {', '.join(self.presets)}" if self.presets else "it has none"
            raise TrackkitError(f"{type(self).__name__} has no preset {preset!r}; {there}")

    def load_pretrained(self) -> bool:
        """Take the backbone's weights from where the paper's training starts; False if it starts
        from random ones.

        They come from torchvision's or timm's cache or, once, from the network; TrackkitError if
        neither has them.
        """
        return False

    def inherit(self, ancestor: str, rename: dict[str, str] | None = None) -> bool:
        """Take over what the tiny tracker `ancestor`, whose weights come with trackkit, has by the
        same names; `rename` gives ours for some of its own. The rest stays. True.

        Raises CheckpointError if an entry is of another size.
        """
        path = SAMPLES / "weights" / f"{ancestor}.safetensors"
        theirs, rename = checkpoints.read(path)[0], rename or {}
        theirs = {rename.get(key, key): value for key, value in theirs.items()}
        own = {key: theirs.get(key, value) for key, value in self.state_dict().items()}
        checkpoints.load_strictly(self, own, str(path))
        return True

    def checked(self, frames: list[Tensor], boxes_xywh: Tensor) -> tuple[list[Tensor], Tensor]:
        """Frames on the tracker's device and boxes as float64 (B, 4), or DataError. For `start`."""
        boxes = torch.as_tensor(boxes_xywh, dtype=torch.float64)
        if len(frames) != len(boxes):
            raise DataError(
                f"start: {len(frames)} frames but {len(boxes)} boxes; give one box for each frame"
            )
        if not len(frames):
            raise DataError("start: no frames; give at least one, and its box")
        frames = self.moved(frames)
        for index, frame in enumerate(frames):
            check_boxes(
                boxes[index : index + 1],
                f"first box of sequence {index}",
                (frame.shape[2], frame.shape[1]),
            )
        return frames, boxes

    def moved(self, frames: list[Tensor]) -> list[Tensor]:
        """The frames on the tracker's device; DataError if they are not uint8 (3, H, W)."""
        for frame in frames:
            if (
                not isinstance(frame, Tensor)
                or frame.dtype != torch.uint8
                or frame.ndim != 3
                or frame.shape[0] != 3
                or not frame.numel()
            ):
                got = (
                    f"{frame.dtype} {tuple(frame.shape)}"
                    if isinstance(frame, Tensor)
                    else f"a {type(frame).__name__}"
                )
                raise DataError(f"a frame must be uint8 (3, H, W), RGB; got {got}{_remedy(frame)}")
        return [frame.to(self.device, non_blocking=True) for frame in frames]


def _remedy(frame: Any) -> str:
    if not isinstance(frame, Tensor):
        return "; torch.from_numpy(array).permute(2, 0, 1) makes one of an (H, W, 3) array"
    if not frame.numel():
        return ", which has no pixels"
    if frame.dtype != torch.uint8:
        return "; values from 0 to 255, without a fraction: frame.round().to(torch.uint8)"
    if frame.ndim == 3 and frame.shape[0] == 4:
        return "; drop the alpha channel: frame[:3]"
    if frame.ndim == 3 and frame.shape[2] in (3, 4):
        return "; put the colours first: frame.permute(2, 0, 1)[:3]"
    if frame.ndim == 2 or (frame.ndim == 3 and frame.shape[0] == 1):
        return "; repeat a grey image for the three colours: frame.expand(3, -1, -1)"
    return ""


def _tracking(call: Callable) -> Callable:
    """`start` or `step` without gradients and in evaluation mode, so that no statistics of a batch
    norm change. Parts that were in training mode are so again afterwards: a training loop may track
    in between. TrackkitError for weights that are not float32.
    """

    @functools.wraps(call)
    def tracking_call(self: Tracker, *given: Any, **named: Any) -> Any:
        first = next(self.parameters(), None)  # for `.half()` and the like, which change all
        if first is not None and first.dtype != torch.float32:
            raise TrackkitError(
                f"{type(self).__name__} has weights of {first.dtype}, and tracks with "
                "torch.float32: tracker.float(); for a lower precision track under torch.autocast"
            )
        # not `self.modules()`: it takes five times as long, 1 % of a small tracker's step
        modules, learning = [self], []
        for module in modules:
            if module is not None:  # a part may be left out, as a ResNet's downsampling
                modules += module._modules.values()
                if module.training:
                    learning.append(module)
        try:
            for module in learning:
                module.training = False
            with torch.no_grad():
                return call(self, *given, **named)
        finally:
            for module in learning:
                module.training = True

    return tracking_call


def _checked(step: Callable) -> Callable:
    """`step` with its contract: as many frames as targets go in, a `Prediction` as it is described
    comes out, and its numbers are finite.
    """

    @functools.wraps(step)
    def checked_step(
        self: Tracker, state: Any, frames: list[Tensor], *rest: Any, **named: Any
    ) -> tuple[Any, Prediction]:
        batch = _batch(state)
        if batch is not None and len(frames) != batch:
            raise DataError(
                f"step: {len(frames)} frames for the state of {batch} targets; give the next frame "
                "of each, in the same order"
            )
        state, prediction = step(self, state, frames, *rest, **named)
        for name, value, shape in (
            ("box", prediction.box, (len(frames), 4)),
            ("score", prediction.score, (len(frames),)),
        ):
            got = value.dtype, value.device.type, tuple(value.shape)
            if got != (torch.float64, "cpu", shape):
                raise TrackkitError(
                    f"{type(self).__name__}.step: a prediction's {name} must be float64 {shape} on "
                    f"the CPU; got {got[0]} {got[2]} on {got[1]}"
                )
        fine = torch.isfinite(prediction.box).all(-1) & torch.isfinite(prediction.score)
        if not fine.all():
            which = int((~fine).nonzero()[0])
            raise DataError(
                f"step: the network's answer for target {which} is NaN or infinite; are its "
                "weights sound, is the precision enough?"
            )
        return state, prediction

    return checked_step


def _batch(state: Any) -> int | None:
    """B, the length of the first tensor in a state; None if it has no tensors."""
    if isinstance(state, Tensor):
        return len(state)
    parts = state if isinstance(state, (list, tuple)) else ()
    if dataclasses.is_dataclass(state):
        parts = [getattr(state, field.name) for field in dataclasses.fields(state)]
    return next((batch for batch in map(_batch, parts) if batch is not None), None)


def take(state: State, indices: list[int]) -> State:
    """The states of some of the B sequences, in the order of `indices`."""
    return _map(lambda t: t[torch.as_tensor(indices, device=t.device)], state)


def join(first: State, second: State) -> State:
    """Two batches of states as one. States that differ in the number of their parts say with
    `fitted` how to fill up.
    """
    if hasattr(first, "fitted"):
        first, second = first.fitted(second), second.fitted(first)
    return _map(lambda a, b: torch.cat([a, b]), first, second)


def put(state: State, rows: list[int], new: State) -> State:
    """The state with `rows` of its B sequences replaced by those of `new`, in that order."""

    def replaced(old: Tensor, fresh: Tensor) -> Tensor:
        return old.index_copy(0, torch.as_tensor(rows, device=old.device), fresh.to(old.device))

    return _map(replaced, state, new)


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
