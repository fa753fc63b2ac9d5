"""CPU time of a tracked frame for every tiny tracker, on one thread, and in units of the tiny
SiamFC's.

python benchmarks/tiny_steps.py
"""

from __future__ import annotations

import statistics
import time

import torch

from trackkit.weights import TRACKERS, create

FRAMES, WARM_UP = 40, 10  # the warm-up fills DASTM's memory


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    frame = torch.randint(0, 256, (3, 480, 640), dtype=torch.uint8)
    box = torch.tensor([[270.0, 200.0, 100.0, 80.0]], dtype=torch.float64)
    trackers = {name: create(name) for name in TRACKERS if name.endswith("-tiny")}
    states = {name: tracker.start([frame], box) for name, tracker in trackers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trackers}
    for _ in range(WARM_UP + FRAMES):  # in turns, so that all meet the same machine
        for name, tracker in trackers.items():
            began = time.process_time()
            states[name], _ = tracker.step(states[name], [frame])
            seconds[name].append(time.process_time() - began)
    middle = {name: statistics.median(values[WARM_UP:]) for name, values in seconds.items()}
    print(f"a frame of 640 x 480, one thread, CPU time, median of {FRAMES}")
    for name, value in middle.items():
        print(
            f"{name:<18}{value * 1e3:5.1f} ms   {value / middle['siamfc-tiny']:.2f} of siamfc-tiny"
        )


if __name__ == "__main__":
    main()
