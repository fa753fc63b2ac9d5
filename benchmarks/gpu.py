"""What a GPU does with trackkit, in one command of at most 8 minutes that writes RESULTS.md.

    python benchmarks/gpu.py                                     # on a machine with a GPU
    python benchmarks/gpu.py --device cpu --quick --out FILE     # a rehearsal, under a minute

1. Agreement: every tracker answers the same frames on the CPU and on the device. In float32 boxes
   must agree to 1e-3 px, or the network's maps to a ten-thousandth of their largest value: the best
   of many nearly equal cells of random weights may be another. Under bfloat16 boxes are stated.
2. Tracking: frames per second, batch 1 and 32, in float32, bfloat16 and compiled.
3. Training: samples per second and TFLOP/s of the first stage under bfloat16, floating-point
   operations of forward and backward as torch counts them, and the share of the matrix rate that
   this card reached in this run.
4. Loading: samples per second of one worker and of all, with crops made by the loader or left to
   the device.
5. Learning: ostrack-tiny trains for two minutes on procedural video and is scored on data_samples.

Weights are random but for part 5, which says nothing about speed. A part that would pass the
budget is left out and says so; one that fails says why, and the command ends with 1. The report is
written anew after each part.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from trackkit import training
from trackkit.costs import FUSED
from trackkit.evaluation import evaluate
from trackkit.got10k import GOT10k
from trackkit.paths import SAMPLES, atomic_write, cores
from trackkit.sampling import Samples, batches, training_set
from trackkit.stages import Stage
from trackkit.synth import SynthConfig, SynthDataset
from trackkit.trackers.base import Tracker
from trackkit.weights import TRACKERS, UNTRAINED, create, load, shipped

LARGE = ("stark-st50", "sbt-base", "ostrack-256", "procontext-256", "dastm", "ustam-b288")
LARGE += ("ustam-l384",)
TINY = ("stark-tiny", "ustam-tiny")
BUDGET, LEARNING = 460.0, 120.0  # seconds: of all parts, of the last
WITHIN, ALIKE = 1e-3, 1e-4  # px, and of maps' largest values, in float32
TRAIN_BATCH = 32


class Device:
    """Where to measure, and how: with or without bfloat16, and waiting for what was asked."""

    def __init__(self, name: str):
        self.device = torch.device(name)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def bf16(self, on: bool = True):
        return torch.autocast(self.device.type, torch.bfloat16) if on else nullcontext()

    def seconds(self, call: Callable[[], object], least: float) -> float:
        """Of one call: the mean over as many as fit into `least` seconds, two to warm up not
        counted.
        """
        call(), call(), self.sync()
        count, began = 0, time.perf_counter()
        while count < 3 or time.perf_counter() - began < least:
            call()
            count += 1
        self.sync()
        return (time.perf_counter() - began) / count


def video(count: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Frames 640 x 480 and the first box."""
    config = SynthConfig(width=640, height=480, frames=24, split="val")
    sequence = SynthDataset(config, seed=1, length=1)[0]
    return [sequence.frame(t) for t in range(count)], sequence.boxes_xywh[:1]


# ---- the parts: each yields lines of the report ----


def agreement(on: Device, quick: bool, left: Callable[[], float]) -> Iterator[str]:
    names = [n for n, (cls, _) in TRACKERS.items() if cls not in UNTRAINED]
    names = [n for n in names if n.endswith("-tiny")] if quick else names
    frames, box = video(3)
    yield "| tracker | float32, px | float32, maps | bfloat16, px |\n|---|---|---|---|"
    apart = []
    for name in names:
        if left() < 10:
            yield f"| {name} | not measured: out of time | | |"
            continue
        torch.manual_seed(0)
        tracker = load(name) if shipped(name) else create(name)
        truth, maps = answers(tracker, frames, box)
        tracker.to(on.device)
        found, seen = answers(tracker, frames, box)
        full = (found - truth).abs().max().item()
        same = max(difference(seen[key], maps[key]) for key in maps)
        with on.bf16():
            half = (answers(tracker, frames, box)[0] - truth).abs().max().item()
        yield f"| {name} | {full:.1e} | {same:.1e} | {half:.2f} |"
        if full > WITHIN and same > ALIKE:
            apart.append(name)
    if apart:
        raise AssertionError(f"these answer otherwise than on the CPU: {', '.join(apart)}")


def answers(
    tracker: Tracker, frames: list[torch.Tensor], box: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The boxes of all frames, and the maps of the second, in which all are at the given box."""
    state, found, maps = tracker.start(frames[:1], box), [], {}
    for frame in frames[1:]:
        state, prediction = tracker.step(state, [frame], maps=True)
        found.append(prediction.box)
        maps = maps or prediction.maps
    floats = {k: v.cpu() for k, v in maps.items() if torch.is_floating_point(v)}
    return torch.cat(found), floats


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference in units of the largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item()


def tracking(on: Device, quick: bool, left: Callable[[], float]) -> Iterator[str]:
    frames, box = video(2)
    least = 0.05 if quick else 1.0
    yield "| frames per second | float32 | bf16 | bf16, compiled | float32, 32 at once | bf16, 32 |"
    yield "|---|---|---|---|---|---|"
    for name in TINY if quick else LARGE:
        if left() < 30:
            yield f"| {name} | not measured: out of time | | | | |"
            continue
        tracker, rates = create(name).to(on.device), []
        for count, half, compiled in (
            (1, False, False), (1, True, False), (1, True, True), (32, False, False),
            (32, True, False),
        ):  # fmt: skip
            if compiled and quick:
                rates.append("-")
                continue
            given = [frames[0].to(on.device)] * count, box.expand(count, 4)
            later = [frames[1].to(on.device)] * count
            if compiled:
                tracker.forward = torch.compile(tracker.forward)
            with on.bf16(half):
                state = tracker.start(*given)
                each = on.seconds(lambda: tracker.step(state, later), least)  # noqa: B023
            if compiled:
                del tracker.forward
            rates.append(f"{count / each:.0f}")
        yield f"| {name} | {' | '.join(rates)} |"


def matrix_rate(on: Device, quick: bool) -> float:
    """Floating-point operations per second of a large product in bfloat16."""
    side = 512 if quick else 8192
    a, b = (torch.randn(side, side, device=on.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / on.seconds(lambda: a @ b, 0.2)


def throughput(on: Device, quick: bool, left: Callable[[], float]) -> Iterator[str]:
    peak = matrix_rate(on, quick)
    yield f"Matrix products in bfloat16: {peak / 1e12:.3g} TFLOP/s.\n"
    yield "| training, bfloat16 | samples a step | samples/s | TFLOP/s | share of the matrix rate |"
    yield "|---|---|---|---|---|"
    count = 4 if quick else TRAIN_BATCH
    for name in TINY if quick else LARGE:
        if left() < 30:
            yield f"| {name} | not measured: out of time | | | |"
            continue
        tracker = create(name).to(on.device, memory_format=torch.channels_last)
        stage = tracker.recipe("tiny" if quick else "gpu")[0]
        batch = sample_batch(stage, count, on)
        training.freeze(tracker, stage.trainable)
        learned = [p for p in tracker.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, 1e-4, fused=on.device.type == "cuda")

        def step(tracker=tracker, stage=stage, batch=batch, optimizer=optimizer) -> None:
            with on.bf16():
                loss = tracker.loss(batch, stage.loss)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
            step()
        work = counter.get_total_flops()
        rate = 1 / on.seconds(step, 0.1 if quick else 3.0)
        share = work * rate / peak
        yield f"| {name} | {count} | {count * rate:.1f} | {work * rate / 1e12:.3g} | {share:.1%} |"


def sample_batch(stage: Stage, count: int, on: Device) -> dict[str, torch.Tensor]:
    """A batch as the loader makes it, on the device."""
    samples = Samples(training_set("stream"), stage.sample, 0, count)
    (batch,) = batches(samples, count, 0, 1)
    return {key: value.to(on.device) for key, value in batch.items()}


def loading(on: Device, quick: bool, left: Callable[[], float]) -> Iterator[str]:
    yield "| samples/s of the loader | one worker | all |\n|---|---|---|"
    steps, every = (3, 1) if quick else (40, cores())
    data = GOT10k(SAMPLES, "train")
    for name in TINY[:1] if quick else ("stark-st50", "ustam-b288"):
        spec = create(name).recipe("gpu")[0].sample
        for packed in (False, True):
            rates = []
            for workers in (1, every):
                if left() < 20:
                    rates.append("out of time")
                    continue
                samples = Samples(data, spec, 0, 8 * steps * workers, packed)
                began = None
                for index, _ in enumerate(batches(samples, 8, 0, steps * workers, workers)):
                    if index == workers:  # those before it had the workers' start in them
                        began = time.perf_counter()
                done = 8 * (steps * workers - workers - 1)
                rates.append(f"{done / (time.perf_counter() - began):.0f}")
            where = "made by the device" if packed else "made by the loader"
            yield f"| {name}, crops {where} | {' | '.join(rates)} |"


def learning(on: Device, quick: bool, left: Callable[[], float]) -> Iterator[str]:
    """Of the tiny OSTrack, as `trackkit train` would do it in so much time."""
    seconds = min(2.0 if quick else LEARNING, left() - 20)
    torch.manual_seed(0)
    tracker = create("ostrack-tiny")
    tracker.load_pretrained()
    stage = tracker.recipe("laptop")[0]
    rest = {"device": on.device.type, "workers": 0 if quick else min(8, cores()), "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        probe = stage.resized(3 if quick else 60)
        log = training.train(tracker, [probe], training_set("stream"), f"{folder}/0", **rest)
        steps = max(3, round(seconds * log[-1]["samples_per_second"] / stage.batch))
        tracker = create("ostrack-tiny")
        tracker.load_pretrained()
        began = time.perf_counter()
        stage = stage.resized(min(steps, 5000))
        log = training.train(tracker, [stage], training_set("stream"), f"{folder}/1", **rest)
        took = time.perf_counter() - began
        videos = GOT10k(SAMPLES, "val")
        scores = evaluate(tracker, videos, f"{folder}/2", "trained").sequence_mean
    yield (
        f"ostrack-tiny, {stage.steps} steps of {stage.batch} in {took:.0f} s: loss "
        f"{log[0]['loss']:.2f} -> {log[-1]['loss']:.2f}, AO {scores.ao:.3f} on {len(videos)} "
        "procedural videos."
    )


PARTS = {
    "Agreement with the CPU": agreement,
    "Tracking": tracking,
    "Training": throughput,
    "Loading": loading,
    "Learning": learning,
}


def machine(device: torch.device) -> str:
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{name}, {cores()} cores, torch {torch.__version__}, Python {platform.python_version()}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny trackers, few repetitions")
    parser.add_argument("--out", type=Path, help="the report (a GPU: benchmarks/RESULTS.md)")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no GPU; --device cpu --quick is a rehearsal")
    if options.device == "cpu" and options.out is None:
        parser.error("name a file with --out: RESULTS.md is for what a GPU does")
    out = options.out or Path(__file__).parent / "RESULTS.md"
    # float32 is float32: TF32 rounds to 10 bits
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if options.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", cores())))
    on, began, failed = Device(options.device), time.perf_counter(), False
    words = ["python", *sys.argv] if argv is None else ["python", "benchmarks/gpu.py", *argv]
    report = f"# Measured\n\n`{' '.join(words)}`, {time.strftime('%Y-%m-%d')}, on "
    report += f"{machine(on.device)}.\nWeights are random where speed is measured.\n"
    for title, part in PARTS.items():
        report += f"\n## {title}\n\n"
        try:
            for line in part(on, options.quick, lambda: BUDGET - (time.perf_counter() - began)):
                print(line, flush=True)
                report += line + "\n"
        except Exception as error:  # whatever it is, the other parts are worth having
            failed = True
            report += f"\nFAILED: {type(error).__name__}: {error}\n"
            traceback.print_exc()
        with atomic_write(out) as partial:
            partial.write_text(report, "utf-8")
    print(f"{out}: {time.perf_counter() - began:.0f} s{', with failures' if failed else ''}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
