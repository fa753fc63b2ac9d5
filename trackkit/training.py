"""One training loop for all trackers: stages, mixed precision, several GPUs, exact resume.

A run is a folder: `log.jsonl` (one line every few steps), `state.safetensors` (everything needed to
go on; also loads as a tracker) and, when the last stage is done, `tracker.safetensors`. Files are
replaced whole, so a run that is killed at any moment continues from its last state with the same
command, and on a CPU ends with the same weights as one that was never interrupted: each sample
depends only on (seed, its number), each step's other random numbers only on (seed, the step).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import os
import signal
import threading
import time
import warnings
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trackkit import checkpoints
from trackkit.errors import CheckpointError, Stopped, TrackkitError
from trackkit.paths import alone, atomic_write, cores, remove_partials, writable
from trackkit.progress import bar
from trackkit.sampling import Samples, batches, rendered, worker_errors
from trackkit.sequences import identity
from trackkit.stages import Stage
from trackkit.trackers.base import Tracker
from trackkit.tracking import device_called
from trackkit.weights import describe, save

CROPS = ("auto", "loader", "device")  # where they are made

if TYPE_CHECKING:
    from accelerate import Accelerator


class _Loss(nn.Module):
    """The tracker's loss as a `forward`, which is what data-parallel wrappers and autocast take
    hold of.
    """

    def __init__(self, tracker: Tracker, kind: str):
        super().__init__()
        self.tracker, self.kind = tracker, kind

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.tracker.loss(batch, self.kind)


def train(
    tracker: Tracker,
    stages: list[Stage],
    sequences,
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    precision: str = "no",
    workers: int = 0,
    crops: str = "auto",
    save_seconds: float = 30.0,
    log_steps: int = 20,
    progress: bool = True,
    start: str = "",
) -> list[dict]:
    """Train through all stages, or go on where an earlier call with the same arguments stopped.

    Args:
        tracker: trained in place; its initial weights do not matter when a state exists.
        sequences: a data set, see `sampling.Samples`.
        out: the run's folder.
        seed: of the samples and of dropout. (Seed the initial weights before making the tracker.)
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        precision: "no" (float32), "bf16" or "fp16".
        workers: loader processes; they change the speed, not the samples. (On a CPU each takes a
            core from torch, whose number of threads changes the last bits of the weights: for an
            exact resume keep it.)
        crops: who resizes, mirrors and colours them: the "loader", or the "device" that trains, so
            that a worker only decodes; "auto" is the device if that is a GPU. The same bytes.
        save_seconds: least time between two saved states.
        log_steps: steps between two lines of the log.
        start: what the weights began as (`weights.begin`): a run that began otherwise is another.

    Returns the log as a list of {"stage", "step", "loss", ..., "lr", "samples_per_second"}; `step`
    counts over all stages, the losses are means since the last line.

    Raises CheckpointError if `out` holds another run, TrackkitError for a stage with a pattern that
    matches no parameter, or if the loss stops being finite.
    """
    if crops not in CROPS:
        raise TrackkitError(f"crops are made by one of {', '.join(CROPS)}, not by {crops!r}")
    for stage in stages:  # now, not after the stages before it
        _groups(tracker, stage)
    out, accelerator = writable(out), _accelerator(device, precision)
    # of several processes the first one writes
    held = alone(out, "trains") if accelerator.is_main_process else nullcontext()
    with held, _Stop() as stop:
        packed = crops == "device" or (crops == "auto" and accelerator.device.type == "cuda")
        run = _Run(tracker, stages, sequences, out, seed, precision, accelerator, packed)
        run.identity |= {"start": start} if start else {}
        return run.train(workers, save_seconds, log_steps, progress, stop)


class _Stop:
    """Notes Ctrl-C (SIGINT) and SIGTERM while a training runs, so that it can save before it ends.

    A second signal ends the program at once. Only the main thread is told of signals; in others
    nothing changes.
    """

    def __init__(self):
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is signal.SIG_IGN:  # as under nohup
                    continue
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


class _Run:
    """One training run: its loop, its files, and what identifies it."""

    def __init__(self, tracker, stages, sequences, out: Path, seed, precision, accelerator, packed):
        self.tracker, self.stages, self.sequences, self.seed = tracker, stages, sequences, seed
        self.accelerator, self.out = accelerator, out
        self.state_path, self.final_path, self.log_path = (
            out / name for name in ("state.safetensors", "tracker.safetensors", "log.jsonl")
        )
        self.packed = packed  # whether the loader hands on rectangles in place of crops
        self.log: list[dict] = []
        mine = {
            **describe(tracker),
            "stages": [dataclasses.asdict(stage) for stage in stages],
            "seed": seed,
            "precision": precision,
            "data": identity(sequences),
        }
        # as it comes back from a file: lists for tuples
        self.identity = json.loads(json.dumps(mine))
        # of a state: all its tensors, and how many of them are the optimizer's
        self._loaded: dict[str, Tensor] = {}
        self._entries = 0
        # losses since the last line of the log
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    # ---- the loop ----

    def train(self, workers, save_seconds, log_steps, progress, stop: _Stop) -> list[dict]:
        """All stages that are left; see the function `train`."""
        tracker, accelerator = self.tracker, self.accelerator
        position = self.restore()
        threads = torch.get_num_threads()
        # threads that wait for a core which a worker has make all of them wait
        if accelerator.device.type == "cpu":
            torch.set_num_threads(max(1, min(threads, cores() - workers)))
        tracker.to(memory_format=torch.channels_last)  # convolutions are a quarter faster
        quiet = not (progress and accelerator.is_main_process)
        name = type(tracker).__name__
        try:
            with bar(
                total=self.steps, initial=position, desc=name, unit="step", shown=not quiet
            ) as shown:
                first = 0  # step at which the stage begins, counted over all stages
                for stage in self.stages:
                    if position < first + stage.steps:
                        self._stage(
                            stage, first, position, workers, save_seconds, log_steps, shown, stop
                        )
                        position = first + stage.steps
                    first += stage.steps
        finally:
            torch.set_num_threads(threads)
            tracker.to(memory_format=torch.contiguous_format).requires_grad_(True).eval()
        if accelerator.is_main_process:
            self.finish()
        accelerator.wait_for_everyone()
        return self.log

    def _stage(self, stage, first, position, workers, save_seconds, log_steps, shown, stop) -> None:
        tracker, accelerator = self.tracker, self.accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        if stage.batch % world:
            raise TrackkitError(
                f"stage {stage.name}: its batch of {stage.batch} cannot be shared by {world} "
                "processes"
            )
        freeze(tracker, stage.trainable)
        optimizer = _optimizer(stage, tracker)
        model, optimizer = accelerator.prepare(_Loss(tracker, stage.loss), optimizer)
        if position > first:
            self.restore_optimizer(optimizer)
        # offset by `first`, so that two stages never see the same samples
        seed, count = self.seed + 1_000_003 * first, stage.steps * stage.batch
        samples = Samples(self.sequences, stage.sample, seed, count, self.packed)
        pinned, begin = accelerator.device.type == "cuda", position - first
        source = batches(
            samples, stage.batch // world, begin, stage.steps, workers, rank, world, pinned
        )
        since = saved = time.perf_counter()
        resumed = self.count  # steps of the first line that another process did
        with worker_errors(), closing(source) as loader:
            for step, batch in enumerate(loader, start=position):
                torch.manual_seed((self.seed * 1_000_003 + step) * world + rank)
                rate = stage.rate(step - first)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["factor"]
                # for losses that change on the way
                batch["progress"] = torch.tensor((step - first) / stage.steps)
                batch = {k: v.to(accelerator.device, non_blocking=True) for k, v in batch.items()}
                batch = rendered(batch)
                losses = model(batch)
                accelerator.backward(losses["loss"])
                if stage.clip is not None:
                    learning = [p for p in tracker.parameters() if p.requires_grad]
                    accelerator.clip_grad_norm_(learning, stage.clip)
                optimizer.step()
                optimizer.zero_grad()
                for key, value in losses.items():
                    self.sums[key] = self.sums.get(key, 0) + value.detach()
                self.count += 1
                shown.update()
                last = step + 1 == first + stage.steps
                line = (step + 1) % log_steps == 0 or last
                if line:
                    means = {
                        key: accelerator.reduce(value, "mean").item() / self.count
                        for key, value in self.sums.items()
                    }
                    self.check(step + 1, means["loss"])
                    now = time.perf_counter()
                    record = {"stage": stage.name, "step": step + 1, "lr": rate}
                    record |= {key: round(value, 6) for key, value in means.items()}
                    done = (self.count - resumed) * stage.batch
                    record["samples_per_second"] = round(done / (now - since), 1)
                    self.log.append(record)
                    shown.set_postfix(refresh=False, loss=f"{record['loss']:.3f}")
                    self.sums, self.count, resumed, since = {}, 0, 0, now
                stopped = self._stopped(stop, line)
                if last or stopped or time.perf_counter() - saved >= save_seconds:
                    if accelerator.is_main_process:
                        self.check(step + 1, losses["loss"].item())
                        self.save(step + 1, optimizer)
                    saved = time.perf_counter()
                if stopped and step + 1 < self.steps:
                    raise Stopped(
                        f"{self.out}: stopped after step {step + 1} of {self.steps}, and saved",
                        stop.signal or signal.SIGTERM,
                    )
        # or the next stage's gradients would be unscaled once for each optimiser so far
        accelerator.free_memory()

    def _stopped(self, stop: _Stop, line: bool) -> bool:
        """Whether a signal has come; several processes agree on it when they log, so that none
        waits for one that has ended.
        """
        told = stop.signal is not None
        if self.accelerator.num_processes == 1:
            return told
        if not line:
            return False
        flag = torch.tensor(float(told), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    # ---- the files ----

    def restore(self) -> int:
        """Load the state if there is one; returns the number of steps done."""
        for path in (self.state_path, self.final_path, self.log_path):
            remove_partials(self.out.glob(f".{path.stem}.*"))
        finished = self._finished_before()
        if not self.state_path.exists():
            if finished:  # and somebody has removed the state
                checkpoints.load_strictly(self.tracker, finished, str(self.final_path))
                self.log = read_log(self.out)
            return self.steps if finished else 0
        tensors, about = checkpoints.read(self.state_path)
        self._must_be_mine(about)
        step, count = about.get("step"), about.get("count")
        whole = isinstance(step, int) and isinstance(count, int)
        if not (whole and 0 <= count <= step <= self.steps):
            raise CheckpointError(
                f"{self.state_path}: step {step!r}, {count!r} of them since the log's last line, "
                f"cannot be in a run of {self.steps}; delete the folder to start anew"
            )
        state = {key: _under(tensors, f"{key}.") for key in ("weights", "sums")}
        checkpoints.load_strictly(self.tracker, state["weights"], str(self.state_path))
        if about.get("scaler") is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(about["scaler"])
        # of several processes those of the first stand for all
        device = self.accelerator.device
        self.sums, self.count = {k: v.to(device) for k, v in state["sums"].items()}, count
        self._loaded, self._entries = tensors, about.get("optimizer")
        self.log = [record for record in read_log(self.out) if record["step"] <= step]
        return step

    def _finished_before(self) -> dict[str, Tensor] | None:
        """The weights that this run ended with if the folder has them; None if there are none, or
        damaged ones. Raises CheckpointError for a file of something else, which is left alone.
        """
        if not os.path.exists(self.final_path):
            return None
        try:
            tensors, about = checkpoints.read(self.final_path)
        except checkpoints.Damaged:
            return None
        self._must_be_mine(about.get("trained") or {})
        return tensors

    def _must_be_mine(self, about: dict) -> None:
        odd = [key for key, value in self.identity.items() if about.get(key) != value]
        if odd:
            raise CheckpointError(
                f"{self.out} holds another run (other {', '.join(odd)}); choose another folder "
                "(--out), or delete this one to start anew"
            )

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        state = optimizer.state_dict()
        entries: dict[int, dict] = {}
        for key, value in self._loaded.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                entries.setdefault(int(index), {})[name] = value
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        shapes = {index: trained[index].shape for index in entries if index < len(trained)}
        for index, entry in entries.items():
            sizes = {tuple(value.shape) for value in entry.values() if value.ndim}
            if sizes - {tuple(shapes.get(index, ()))}:
                raise CheckpointError(f"{self.state_path}: its optimizer is of other parameters")
        if sum(map(len, entries.values())) != self._entries:
            raise CheckpointError(
                f"{self.state_path}: entries of the optimizer are missing; delete the folder to "
                "start anew"
            )
        optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})

    def check(self, step: int, loss: float) -> None:
        """Stop if the loss or a weight is not finite, before it is saved. Under fp16 the scaler
        skips such steps.
        """
        weights = (p for p in self.tracker.parameters())
        if (math.isfinite(loss) or self.identity["precision"] == "fp16") and all(
            torch.isfinite(p).all() for p in weights
        ):
            return
        raise TrackkitError(
            f"the loss is {loss} at step {step}, or a weight has become infinite; "
            f"{self.state_path} keeps the last good "
            "state, if there was one. Lower the rate, set a clip, or try precision no"
        )

    def save(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        tensors = {f"weights.{k}": v for k, v in self.tracker.state_dict().items()}
        for index, entry in optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{index}.{k}": v for k, v in entry.items() if isinstance(v, Tensor)
            }
        entries = sum(key.startswith("optimizer.") for key in tensors)
        tensors |= {f"sums.{k}": v for k, v in self.sums.items()}
        scaler = self.accelerator.scaler
        scaler = None if scaler is None else scaler.state_dict()
        # the log first: lines beyond the state are dropped on resume, missing ones could not be
        # made up
        with atomic_write(self.log_path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in self.log))
        about = {"step": step, "count": self.count, "optimizer": entries, "scaler": scaler}
        checkpoints.write(self.state_path, tensors, self.identity | about)

    def finish(self) -> None:
        """Write the weights, unless they are there already."""
        there, mine = self._finished_before() or {}, self.tracker.state_dict()
        if there.keys() != mine.keys() or not all(
            torch.equal(there[key], value.cpu()) for key, value in mine.items()
        ):
            save(self.tracker, self.final_path, trained=self.identity)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def freeze(tracker: nn.Module, trainable: tuple[str, ...]) -> None:
    """Let only the parameters whose names match a pattern learn; frozen batch norms keep their
    statistics.

    Raises TrackkitError for a pattern that matches nothing.
    """
    parameters = dict(tracker.named_parameters())
    learning = _matching(list(parameters), trainable, f"parameter of {type(tracker).__name__}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in learning)
    tracker.train()
    for module in tracker.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            p.requires_grad for p in module.parameters()
        ):
            module.eval()


def read_log(run: str | Path) -> list[dict]:
    """The log lines of a run's folder, oldest first; empty if it has none yet.

    A line that is damaged, as after a full disk, is left out with a warning: the log is for people,
    and must not keep a run whose state is whole from going on.
    """
    path, lines, damaged = Path(run) / "log.jsonl", [], []
    if not os.path.exists(path):
        return lines
    try:
        texts = path.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        warnings.warn(f"{path}: cannot be read ({error.strerror}); left out", stacklevel=2)
        return lines
    kinds = {"stage": str, "step": int, "loss": float}
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if not all(isinstance(line[key], kind) for key, kind in kinds.items()):
                raise ValueError("no line of a log")
            lines.append(line)
        except (ValueError, TypeError, LookupError, RecursionError):
            damaged.append(number)
    if damaged:
        more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
        warnings.warn(f"{path}, line {damaged[0]}{more}: damaged, and left out", stacklevel=2)
    return lines


def _matching(names: list[str], patterns: tuple[str, ...], what: str) -> dict[str, int]:
    """The names that match one of the patterns, each with the number of the first that it
    matches.
    """
    found: dict[str, int] = {}
    for number, pattern in enumerate(patterns):
        hits = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise TrackkitError(f"no {what} matches {pattern!r}")
        found |= {name: number for name in hits if name not in found}
    return found


def _groups(tracker: nn.Module, stage: Stage) -> list[dict]:
    """The trainable parameters by their factor of the learning rate, as an optimiser takes them."""
    parameters, kind = dict(tracker.named_parameters()), type(tracker).__name__
    learning = _matching(list(parameters), stage.trainable, f"parameter of {kind}")
    patterns = tuple(pattern for pattern, _ in stage.rates)
    special = _matching(
        list(learning), patterns, f"parameter of {kind} that stage {stage.name} trains"
    )
    groups: dict[float, list[nn.Parameter]] = {}
    for name in (name for name in parameters if name in learning):
        groups.setdefault(stage.rates[special[name]][1] if name in special else 1.0, []).append(
            parameters[name]
        )
    return [
        {"params": group, "lr": stage.lr * factor, "factor": factor}
        for factor, group in groups.items()
    ]


def _optimizer(stage: Stage, tracker: nn.Module) -> torch.optim.Optimizer:
    groups = _groups(tracker, stage)
    if stage.momentum is None:
        return torch.optim.AdamW(groups, lr=stage.lr, weight_decay=stage.weight_decay)
    return torch.optim.SGD(
        groups, lr=stage.lr, momentum=stage.momentum, weight_decay=stage.weight_decay
    )


def _accelerator(device: str, precision: str) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    cpu = device_called(device).type == "cpu"
    # accelerate keeps the first call's choices for the whole process
    if "WORLD_SIZE" not in os.environ:
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=cpu, mixed_precision=precision)
