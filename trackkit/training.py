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
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from trackkit import checkpoints
from trackkit.errors import CheckpointError, TrackkitError
from trackkit.paths import atomic_write, writable
from trackkit.sampling import Samples, batches
from trackkit.stages import Stage
from trackkit.trackers.base import Tracker
from trackkit.weights import describe, save

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
    save_seconds: float = 30.0,
    log_steps: int = 20,
    progress: bool = True,
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
        save_seconds: least time between two saved states.
        log_steps: steps between two lines of the log.

    Returns the log as a list of {"stage", "step", "loss", ..., "lr", "samples_per_second"}; `step`
    counts over all stages, the losses are means since the last line.

    Raises CheckpointError if `out` holds another run, TrackkitError for a stage with a pattern that
    matches no parameter, or if the loss stops being finite.
    """
    for stage in stages:  # now, not after the stages before it
        _groups(tracker, stage)
    out = writable(out)
    accelerator = _accelerator(device, precision)
    run = _Run(tracker, stages, sequences, out, seed, precision)
    position = run.restore()
    if accelerator.scaler is not None and run.scaler is not None:
        accelerator.scaler.load_state_dict(run.scaler)
    threads = torch.get_num_threads()
    # threads that wait for a core which a worker has make all of them wait
    if accelerator.device.type == "cpu":
        torch.set_num_threads(max(1, min(threads, _cores() - workers)))
    tracker.to(memory_format=torch.channels_last)  # convolutions are a quarter faster
    total = sum(stage.steps for stage in stages)
    main = accelerator.is_main_process
    bar = tqdm(
        total=total, initial=position, desc=type(tracker).__name__, disable=not progress or not main
    )
    try:
        first = 0  # step at which the stage begins, counted over all stages
        for stage in stages:
            if position < first + stage.steps:
                _train_stage(
                    run, stage, first, position, accelerator, workers, save_seconds, log_steps, bar
                )
                position = first + stage.steps
            first += stage.steps
    finally:
        bar.close()
        torch.set_num_threads(threads)
        tracker.to(memory_format=torch.contiguous_format).requires_grad_(True).eval()
    if main and not run.final_path.exists():
        run.finish()
    accelerator.wait_for_everyone()
    return run.log


def _train_stage(
    run: _Run,
    stage: Stage,
    first: int,
    position: int,
    accelerator,
    workers,
    save_seconds,
    log_steps,
    bar,
):
    tracker, world, rank = run.tracker, accelerator.num_processes, accelerator.process_index
    if stage.batch % world:
        raise TrackkitError(
            f"stage {stage.name}: its batch of {stage.batch} cannot be shared by {world} processes"
        )
    freeze(tracker, stage.trainable)
    optimizer = _optimizer(stage, tracker)
    model, optimizer = accelerator.prepare(_Loss(tracker, stage.loss), optimizer)
    if position > first:
        run.restore_optimizer(optimizer)
    # offset by `first`, so that two stages never see the same samples
    samples = Samples(
        run.sequences, stage.sample, run.seed + 1_000_003 * first, stage.steps * stage.batch
    )
    pinned = accelerator.device.type == "cuda"
    loader = batches(
        samples, stage.batch // world, position - first, stage.steps, workers, rank, world, pinned
    )
    sums, count, since, saved = {}, 0, time.perf_counter(), time.perf_counter()
    for step, batch in enumerate(loader, start=position):
        torch.manual_seed((run.seed * 1_000_003 + step) * world + rank)
        rate = stage.rate(step - first)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        # for losses that change on the way
        batch["progress"] = torch.tensor((step - first) / stage.steps)
        losses = model({k: v.to(accelerator.device, non_blocking=True) for k, v in batch.items()})
        accelerator.backward(losses["loss"])
        if stage.clip is not None:
            accelerator.clip_grad_norm_(
                [p for p in tracker.parameters() if p.requires_grad], stage.clip
            )
        optimizer.step()
        optimizer.zero_grad()
        for key, value in losses.items():
            sums[key] = sums.get(key, 0) + value.detach()
        count += 1
        bar.update()
        last = step + 1 == first + stage.steps
        if (step + 1) % log_steps == 0 or last:
            means = {
                key: accelerator.reduce(value, "mean").item() / count for key, value in sums.items()
            }
            run.check(step + 1, means["loss"])
            now = time.perf_counter()
            record = {"stage": stage.name, "step": step + 1, "lr": rate}
            record |= {key: round(value, 6) for key, value in means.items()}
            record["samples_per_second"] = round(count * stage.batch / (now - since), 1)
            run.log.append(record)
            bar.set_postfix(loss=f"{record['loss']:.3f}")
            sums, count, since = {}, 0, now
        if last or time.perf_counter() - saved >= save_seconds:
            if accelerator.is_main_process:
                run.check(step + 1, losses["loss"].item())
                run.save(step + 1, optimizer, accelerator)
            saved = time.perf_counter()
    # or the next stage's gradients would be unscaled once for each optimiser so far
    accelerator.free_memory()


class _Run:
    """The files of one run and what identifies it."""

    def __init__(
        self, tracker: Tracker, stages: list[Stage], sequences, out: Path, seed: int, precision: str
    ):
        self.tracker, self.sequences, self.seed = tracker, sequences, seed
        self.state_path, self.final_path, self.log_path = (
            out / "state.safetensors",
            out / "tracker.safetensors",
            out / "log.jsonl",
        )
        self.log: list[dict] = []
        identity = {
            **describe(tracker),
            "stages": [dataclasses.asdict(stage) for stage in stages],
            "seed": seed,
            "precision": precision,
            "data": repr(sequences),
        }
        # as it comes back from a file: lists for tuples
        self.identity = json.loads(json.dumps(identity))
        self.scaler: dict | None = None  # of a restored run in fp16
        self._loaded: dict[str, Tensor] = {}

    def restore(self) -> int:
        """Load the state if there is one; returns the number of steps done."""
        for path in (self.state_path, self.final_path, self.log_path):
            # of a run that was killed while it wrote
            for partial in path.parent.glob(f".{path.stem}.*"):
                partial.unlink(missing_ok=True)
        if not self.state_path.exists():
            return 0
        tensors, about = checkpoints.read(self.state_path)
        odd = [key for key, value in self.identity.items() if about.get(key) != value]
        if odd:
            raise CheckpointError(
                f"{self.state_path.parent} holds another run (other {', '.join(odd)}); choose "
                "another folder (--out), or delete this one to start anew"
            )
        weights = {
            k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")
        }
        checkpoints.load_strictly(self.tracker, weights, str(self.state_path))
        self._loaded, self.scaler = tensors, about["scaler"]
        self.log = [
            record for record in read_log(self.state_path.parent) if record["step"] <= about["step"]
        ]
        return about["step"]

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        state = optimizer.state_dict()
        entries: dict[int, dict] = {}
        for key, value in self._loaded.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                entries.setdefault(int(index), {})[name] = value
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

    def save(self, step: int, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
        tensors = {f"weights.{k}": v for k, v in self.tracker.state_dict().items()}
        for index, entry in optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{index}.{k}": v for k, v in entry.items() if isinstance(v, Tensor)
            }
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        # the log first: lines beyond the state are dropped on resume, missing ones could not be
        # made up
        with atomic_write(self.log_path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in self.log))
        checkpoints.write(
            self.state_path, tensors, {**self.identity, "step": step, "scaler": scaler}
        )

    def finish(self) -> None:
        save(
            self.tracker,
            self.final_path,
            trained={k: self.identity[k] for k in ("seed", "precision", "data")},
        )


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
    """The log lines of a run's folder, oldest first; empty if it has none yet."""
    path = Path(run) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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

    if device not in ("auto", "cpu", "cuda"):
        raise TrackkitError(f'device must be "auto", "cpu" or "cuda", got {device!r}')
    if device == "cuda" and not torch.cuda.is_available():
        raise TrackkitError(
            "device cuda: torch sees no GPU here; `trackkit doctor` says what it sees"
        )
    # "auto" means CUDA or the CPU: geometry is kept in float64, which Apple's GPUs do not have
    cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    # accelerate keeps the first call's choices for the whole process
    if "WORLD_SIZE" not in os.environ:
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=cpu, mixed_precision=precision)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
