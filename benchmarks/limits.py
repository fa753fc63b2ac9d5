"""How close a tracked frame comes to what a core can do: a tracker's step against its arithmetic.

    OMP_NUM_THREADS=1 python benchmarks/limits.py [NAME ...] [--rounds 9] [--json FILE]

The floor is the time of the step's multiply-accumulates (convolutions and matrix products,
attention included, shortcuts as they run) at the rate of a large matrix product, measured in turns
with the steps. All times are CPU time of one thread, on noise of 640x480; medians. The rest of a
line says where a step's time goes, by torch's profiler; `other` is what lies outside of torch's
operators: Python, NumPy's crop.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from trackkit.costs import macs
from trackkit.weights import create

TO_REACH = 1.2
NAMES = (
    "siamfc", "stark-s50", "stark-st50", "sbt-light", "sbt-base", "ostrack-256", "mixvit-b288",
)  # fmt: skip
# the first whose word is in an operator's name counts
KINDS = {
    "conv": ("conv",),
    "matmul": ("mm", "bmm", "baddbmm"),
    "attention": ("attention",),
    "pool": ("pool",),
    "norm": ("norm",),
    "activation": ("relu", "gelu", "softmax", "sigmoid"),
    "copy": ("copy", "cat", "stack", "clone", "index", "roll"),
}
SIDE = 1536  # of the matrices whose product gives the core's rate


def cpu_seconds(function) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def kind_of(operator: str) -> str:
    return next(
        (k for k, words in KINDS.items() if any(w in operator for w in words)), "elementwise"
    )


def shares(step) -> dict[str, float]:
    """Share of a step's time by kind of operator; they sum to 1."""
    began = time.process_time()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    whole = time.process_time() - began
    found = dict.fromkeys([*KINDS, "elementwise"], 0.0)
    for event in seen.key_averages():
        if event.key.startswith("aten::"):
            found[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    began = time.process_time()
    step()
    plain = time.process_time() - began  # the profiler's own time is not the step's
    found["other"] = max(min(plain, whole) - sum(found.values()), 0.0)
    total = sum(found.values())
    return {kind: value / total for kind, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    frame = torch.randint(0, 256, (3, 480, 640), dtype=torch.uint8)
    box = torch.tensor([[270.0, 200.0, 100.0, 80.0]], dtype=torch.float64)
    matrix = torch.randn(SIDE, SIDE)
    rows = []
    for name in options.names:
        tracker = create(name).eval()
        state = tracker.start([frame], box)

        def step(tracker=tracker, state=state):
            tracker.step(state, [frame])

        work = macs(step)
        step()
        product, ours = [], []
        for _ in range(options.rounds):  # in turns, so that both meet the same machine
            product.append(cpu_seconds(lambda: matrix @ matrix))
            ours.append(cpu_seconds(step))
        rate = 2 * SIDE**3 / statistics.median(product)
        floor, seconds = 2 * work / rate, statistics.median(ours)
        row = {"name": name, "gflops": rate / 1e9, "macs": work, "floor": floor, "ours": seconds}
        rows.append(row | {"ratio": seconds / floor, "shares": shares(step)})
        parts = sorted(rows[-1]["shares"].items(), key=lambda part: -part[1])
        print(
            f"{name:<13}{rate / 1e9:4.0f} GFLOP/s  floor {floor:.3f} s  ours {seconds:.3f} s  "
            f"ratio {seconds / floor:.2f} ({'kept' if seconds <= TO_REACH * floor else 'not kept'}"
            f", to reach {TO_REACH})  "
            + ", ".join(f"{kind} {share:.0%}" for kind, share in parts if share >= 0.01),
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
