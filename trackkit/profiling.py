"""What a tracker costs: parameters, multiply-accumulates and frames per second, each by a stated
rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trackkit.errors import DataError
from trackkit.trackers import create
from trackkit.trackers.base import Tracker
from trackkit.tracking import now


def profile(name: str) -> dict:
    """Cost of the tracker called `name` as {"name", "parameters", "macs", "paper"}.

    `parameters` and `macs` are counted as the tracker's paper counts them, and `paper` holds the
    numbers that it prints, for comparison ({} if none). Papers differ in what they leave out, so a
    tracker that is to be compared has a method `profile()` that returns these three entries;
    without one it is counted by `count`.

    Raises TrackkitError for an unknown name.
    """
    with torch.device("meta"):  # shapes only: the largest would need gigabytes
        tracker = create(name)
    own = getattr(tracker, "profile", None)
    return {"name": name, **(own() if own else {**count(create(name)), "paper": {}})}


def table(profiles: list[dict]) -> list[str]:
    """Lines that show what `profile` says: what is counted here beside the paper's figures, with
    the deviation in percent.
    """
    lines = [
        f"{'tracker':<16}{'parameters':>14}  {'paper':<17}{'MACs a frame':>18}  "
        f"{'paper':<17}".rstrip()
    ]
    for row in profiles:
        line = f"{row['name']:<16}"
        for key, width, scale, unit in (("parameters", 14, 1e6, "M"), ("macs", 18, 1e9, "G")):
            printed = row["paper"].get(key)
            beside = (
                "-"
                if printed is None
                else f"{_figure(printed / scale)} {unit}".ljust(9)
                + _percent(row[key] / printed - 1, "+")
            )
            line += f"{row[key]:>{width},}  {beside:<17}"
        lines.append((line + "; ".join(_remarks(row["paper"]))).rstrip())
    return lines


def _figure(value: float) -> str:
    """As papers print it: 23.5, 21.27, 38.0."""
    text = f"{value:.10g}"
    return text if "." in text else f"{text}.0"


def _percent(share: float, sign: str = "") -> str:
    return f"{round(share, 3) + 0.0:{sign}.1%}".replace("%", " %")  # + 0.0: no negative zero


def _remarks(paper: dict) -> list[str]:
    """What a paper says besides counts."""
    said = []
    if "peak_memory_bytes" in paper:
        said.append(f"{paper['peak_memory_bytes'] / 1e9:.2f} GB at most")
    if "frames_per_second" in paper:
        said.append(f"{paper['frames_per_second']} frames/s")
    if "high_computation_share" in paper:
        said.append(f"{_percent(paper['high_computation_share'])} of frames at high computation")
    return [*said, paper["note"]] if "note" in paper else said


def count(tracker: Tracker) -> dict[str, int]:
    """{"parameters", "macs"}: all parameters, and `macs` of one tracked frame, not the first."""
    frame, box = _example()
    state = tracker.eval().start([frame], box)
    return {"parameters": parameters(tracker), "macs": macs(lambda: tracker.step(state, [frame]))}


def parameters(module: nn.Module) -> int:
    """Number of parameters, each counted once; buffers such as running means are not parameters."""
    return sum(p.numel() for p in module.parameters())


def macs(function: Callable[[], object]) -> int:
    """Multiply-accumulates of a call of `function`: convolutions and matrix products, attention
    included.

    One multiply-accumulate is two floating-point operations; papers call either of the two a FLOP.
    Additions of biases, norms, activations, softmax and interpolation are not counted. The fused
    attention kernels of the CPU and nn.MultiheadAttention's fast path are invisible to torch's
    counter, so both are switched off meanwhile; so is `attention.look_by_few`, which gets the same
    result with fewer products than the network is said to have.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        usual = patch("trackkit.attention.look_by_few", lambda layer, *given: layer(*given)[0])
        with (
            usual,
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            function()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() // 2


def by_layers(network: nn.Module, function: Callable[[], object], norm: int = 4) -> dict[str, int]:
    """{"parameters", "macs"} of a call of `function` as the counter of the field, thop, has them.

    It sees only layers that the call goes through: linear and convolution layers (without biases),
    and `norm` for each output of a layer or batch norm (0 in its older versions). So the products
    of attention are not counted, nor are parameters outside these layers. Works on the device
    "meta" too.
    """
    total, seen = 0, set()

    def add(module: nn.Module, given: tuple, made: Tensor) -> None:
        nonlocal total
        seen.add(module)
        linear = isinstance(module, (nn.Linear, nn.Conv2d))
        total += made.numel() * (module.weight[0].numel() if linear else norm)

    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)
    hooks = [
        module.register_forward_hook(add)
        for module in network.modules()
        if isinstance(module, kinds)
    ]
    try:
        with torch.no_grad():
            function()
    finally:
        for hook in hooks:
            hook.remove()
    return {"parameters": sum(parameters(module) for module in seen), "macs": total}


@dataclass(frozen=True)
class Speed:
    """How fast a tracker is, and on what.

    Attributes:
        fps: sequence frames per second, frames / seconds. milliseconds: median time of a step with
            its batch.
        frames: steps that were timed. batch: sequences in one step. device, threads, precision:
            where.
    """

    fps: float
    milliseconds: float
    frames: int
    batch: int
    device: str
    threads: int
    precision: str

    def __str__(self) -> str:
        return (
            f"{self.fps:.1f} frames/s ({self.milliseconds:.2f} ms a step of {self.batch}, median "
            "of "
            f"{self.frames}; {self.device}, {self.threads} CPU threads, {self.precision})"
        )


def frames_per_second(
    tracker: Tracker,
    frames: list[Tensor] | None = None,
    box_xywh: Tensor | None = None,
    repeats: int = 20,
    warm_up: int = 3,
    batch: int = 1,
) -> Speed:
    """Time the steps of a tracker: cropping, network and decoding of the box, not the reading of
    frames.

    `frames` are consecutive images, uint8 (3, H, W), the first with the target at `box_xywh` (4,),
    pixels; they are repeated as needed. None: noise of 640x480 with a target of 100x80. `warm_up`
    steps are not timed. The clock is read when the device has finished its work. On a GPU the
    transfer of the frame is part of the step. `batch` copies of the sequence are tracked at once.

    Raises DataError for counts below 1, frames without a box, or a box outside the first frame.
    """
    if min(repeats, batch) < 1 or warm_up < 0:
        raise DataError(
            f"need repeats and batch >= 1, warm_up >= 0; got {repeats}, {batch} and {warm_up}"
        )
    if (frames is None) != (box_xywh is None):
        raise DataError("give both frames and the first box, or neither")
    if frames is None:
        frame, box_xywh = _example()
        frames = [frame, frame]
    if len(frames) < 2:
        raise DataError("give at least two frames: the first to start from, the others to time")
    box = torch.as_tensor(box_xywh, dtype=torch.float64).reshape(1, 4)
    state = tracker.eval().start([frames[0]] * batch, box.repeat(batch, 1))
    seconds = []
    for index in range(warm_up + repeats):
        image = frames[1 + index % (len(frames) - 1)]
        began = now(tracker.device)
        state, _ = tracker.step(state, [image] * batch)
        seconds.append(now(tracker.device) - began)
    timed = torch.tensor(seconds[warm_up:], dtype=torch.float64)
    device = tracker.device
    return Speed(
        fps=repeats * batch / float(timed.sum()),
        milliseconds=float(timed.median()) * 1e3,
        frames=repeats,
        batch=batch,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        precision=str(next((p.dtype for p in tracker.parameters()), torch.float64)).removeprefix(
            "torch."
        ),
    )


def _example() -> tuple[Tensor, Tensor]:
    """A frame of noise, uint8 (3, 480, 640), and a box in its middle, (1, 4)."""
    noise = torch.Generator().manual_seed(0)
    frame = torch.randint(0, 256, (3, 480, 640), generator=noise, dtype=torch.uint8)
    return frame, torch.tensor([[270.0, 200.0, 100.0, 80.0]], dtype=torch.float64)
