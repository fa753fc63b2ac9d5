"""A tracked frame of ProContEXT-256: what dropping search tokens gains, and what not making what is
not needed does.

Three steps take turns: trackkit's at the keep ratios 1 and 0.7, and a plain version at 0.7 of the
same network, which embeds the patches of all templates in every frame and forms every attention
map. Times are CPU time on one thread, so that other programs count less; cropping and decoding are
in them. Random weights; the plain version's boxes are compared first.

    OMP_NUM_THREADS=1 python benchmarks/procontext_speed.py
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trackkit.backbones import normalise
from trackkit.boxes import cxcywh_to_xywh
from trackkit.trackers.ostrack import Template
from trackkit.trackers.procontext import ProContEXT, ProContEXTConfig, ProContEXTState

FRAMES, TURNS, TO_REACH = 3, 7, 1.15
TOLERANCE = 0.01  # pixels, the golden files'


class Plain:
    """The same tracker with the same weights, by the book."""

    def __init__(self, tracker: ProContEXT, frame: Tensor, box: Tensor):
        self.net = copy.deepcopy(tracker)
        specs = [replace(tracker.template_crop, factor=k) for k in tracker.config.template_factors]
        self.crops = [normalise(spec.around([frame], box)[0]) for spec in specs]

    @torch.no_grad()
    def step(self, state: ProContEXTState, frames: list[Tensor]):
        state = replace(
            state, template=self.encoded(state.template), dynamic=self.encoded(state.dynamic)
        )
        with sdpa_kernel(SDPBackend.MATH):  # forms the maps
            return self.net.step(state, frames)

    def encoded(self, group: Template) -> Template:
        tokens = [self.net.tokens(crop, self.net.position_z) for crop in self.crops]
        return replace(group, tokens=torch.cat(tokens, 1))


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pruned = ProContEXT(ProContEXTConfig.procontext_256()).eval()
    whole = ProContEXT(ProContEXTConfig.procontext_256(keep_ratio=1.0)).eval()
    whole.load_state_dict(pruned.state_dict(), assign=True)
    frames = [torch.randint(0, 256, (3, 480, 640), dtype=torch.uint8) for _ in range(FRAMES + 1)]
    box = cxcywh_to_xywh(torch.tensor([[320.0, 240, 100, 80]], dtype=torch.float64))
    plain = Plain(pruned, frames[0], box)
    state = pruned.start(frames[:1], box)

    worst = 0.0
    for frame in frames[1:]:
        worst = max(
            worst,
            (pruned.step(state, [frame])[1].box - plain.step(state, [frame])[1].box)
            .abs()
            .max()
            .item(),
        )
    print(
        f"largest difference from the plain version over {FRAMES} frames: {worst:.1e} px "
        f"(tolerance {TOLERANCE})"
    )

    seconds: dict[str, list[float]] = {
        "keep ratio 1": [],
        "keep ratio 0.7": [],
        "keep ratio 0.7, plain": [],
    }
    for turn in range(TURNS):
        for times, net in zip(seconds.values(), (whole, pruned, plain), strict=True):
            began = time.process_time()
            net.step(state, [frames[1 + turn % FRAMES]])
            times.append(time.process_time() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(
            f"{name:<24}{median * 1e3:7.1f} ms a frame (median of {TURNS}, "
            f"{min(seconds[name]) * 1e3:.1f} to {max(seconds[name]) * 1e3:.1f})"
        )
    ratio = medians["keep ratio 1"] / medians["keep ratio 0.7"]
    print(
        f"0.7 against 1: {ratio:.2f}x (to reach: {TO_REACH}); against the plain version: "
        f"{medians['keep ratio 0.7, plain'] / medians['keep ratio 0.7']:.2f}x"
    )
    return 0 if worst <= TOLERANCE and ratio >= TO_REACH else 1


if __name__ == "__main__":
    sys.exit(main())
