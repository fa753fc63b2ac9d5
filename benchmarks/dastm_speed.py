"""Time and memory of DASTM's steps over a long video: bounded, as trackkit has it, and unbounded,
as STMTrack's authors have it.

    OMP_NUM_THREADS=1 python benchmarks/dastm_speed.py [NAME]

Both run the same network with the same random weights on the same frames, in turns. Up to the frame
from which on the bounded memory has to look at a neighbour of the frame it would like to see (5/4
of its capacity), the boxes of the two must be equal. Times are CPU time, so that other programs
count less: the median of the 41 steps around a frame. Memory is what the state holds.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time

import torch

from trackkit.trackers.stmtrack import STMTrackState
from trackkit.weights import create

FRAMES, LOOK, AROUND = 1000, (100, 300, 1000), 20
TO_REACH = 1.1  # a step at the last frame against one at the first: flat but for the clock


def held(state: STMTrackState) -> float:
    """Megabytes of features in the state."""
    return sum(slot.nbytes for slot in state.memory.slots) / 1e6


def main(name: str = "dastm-tiny") -> None:
    torch.manual_seed(0)
    bounded = create(name)
    endless = type(bounded)(dataclasses.replace(bounded.config, memory="unbounded")).eval()
    endless.load_state_dict(bounded.state_dict())
    frames = [torch.randint(0, 256, (3, 480, 640), dtype=torch.uint8) for _ in range(8)]
    box = torch.tensor([[270.0, 200.0, 100.0, 80.0]], dtype=torch.float64)
    trackers = {"bounded": bounded, "unbounded": endless}
    states = {kind: tracker.start(frames[:1], box) for kind, tracker in trackers.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in trackers}
    megabytes: dict[str, list[float]] = {kind: [] for kind in trackers}
    alike = 0
    for number in range(1, FRAMES + AROUND + 1):
        boxes = []
        for kind, tracker in trackers.items():
            began = time.process_time()
            states[kind], prediction = tracker.step(states[kind], [frames[number % 8]])
            seconds[kind].append(time.process_time() - began)
            megabytes[kind].append(held(states[kind]))
            boxes.append(prediction.box)
        alike += alike == number - 1 and torch.equal(*boxes)
    config = bounded.config
    print(f"{name}, {torch.get_num_threads()} thread(s), memory of {config.capacity} frames")
    print(f"{'frame':<12}" + "".join(f"{frame:>16}" for frame in LOOK))
    for kind in trackers:
        medians = [
            statistics.median(seconds[kind][frame - AROUND - 1 : frame + AROUND]) * 1e3
            for frame in LOOK
        ]
        print(
            f"{kind:<12}"
            + "".join(
                f"{ms:>7.1f} ms{megabytes[kind][frame - 1]:>6.1f}M"
                for ms, frame in zip(medians, LOOK, strict=True)
            )
        )
        if kind == "bounded":
            ratio, more = (
                medians[-1] / medians[0],
                megabytes[kind][LOOK[-1] - 1] - megabytes[kind][LOOK[0] - 1],
            )
    print(f"equal boxes up to frame {alike} (required: {config.capacity})")
    print(
        f"bounded, frame {LOOK[-1]} against {LOOK[0]}: {ratio:.2f} times the time (at most "
        f"{TO_REACH}), {more:.1f} MB more (at most 0)"
    )
    if alike < config.capacity or ratio > TO_REACH or more > 0:
        raise SystemExit("not flat, or not equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
