"""A tracked frame of USTAM-B288: trackkit's step against a plain version of the same network, in
turns, in this run.

The plain version is what a straightforward implementation does, and MixFormer's stage-one tracker
too: every frame it puts both templates and the search crop through the whole network as one row of
tokens, and each block forms its attention maps. Ours computes the templates' keys and values once,
leaves attention to the fused kernel, and forms a map only in the two blocks that need one. Cropping
and decoding are in the times of both. Random weights; the outputs are compared first.

    OMP_NUM_THREADS=1 python benchmarks/ustam_speed.py
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trackkit.backbones import normalise
from trackkit.boxes import clip_with_margin
from trackkit.crops import frame_sizes
from trackkit.trackers.ustam import USTAM, USTAMConfig

FRAMES, TURNS, TO_REACH = 3, 7, 1.25
TOLERANCE = {"corner logits": 5e-5, "boxes, px": 0.01}  # the golden files'


@dataclass
class Plain:
    """The same tracker with the same weights, by the book."""

    tracker: USTAM

    def start(self, frame: Tensor, box: Tensor) -> None:
        cfg = self.tracker.config
        self.template, _ = self.tracker.template_crop.around([frame], box)
        self.box, self.carried = box, torch.zeros(1, cfg.heads, cfg.grid**2, cfg.grid**2)

    @torch.no_grad()
    def step(self, frame: Tensor) -> Tensor:
        net, cfg = self.tracker, self.tracker.config
        crop, windows = net.search_crop.around([frame], self.box)
        template = net.tokens(normalise(self.template), net.position_t)
        x = torch.cat([template, template, net.tokens(normalise(crop), net.position_s)], 1)
        n = cfg.grid**2
        known = x.shape[1] - n
        for i, block in enumerate(net.blocks):
            q, k, v = block.project(x)
            old = _map(q[:, :, :known], k[:, :, :known]) @ v[:, :, :known]
            share = _map(q[:, :, known:], k)
            if i == 0:
                share = torch.cat([share[..., :known], share[..., known:] * (1 + self.carried)], -1)
            if i == cfg.depth - 1:
                ours = share[..., known:]
                m = ours.mean(-2).amax(-1)[..., None, None]
                self.carried = ours + net.spatial_attention.fc((ours - m).softmax(-1))
                share = torch.cat([share[..., :known], self.carried], -1)
            x = block.think(block.gather(x, torch.cat([old, share @ v], 2)))
        boxes, _ = net.locate(x[:, known:])
        box = net.search_crop.to_frame(boxes.double(), windows, self.box)
        self.box = clip_with_margin(box, frame_sizes([frame]), cfg.margin)
        return self.box


def _map(q: Tensor, k: Tensor) -> Tensor:
    return ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1)


def main() -> None:
    torch.manual_seed(0)
    ours = USTAM(USTAMConfig.b288()).eval()
    nn.init.normal_(ours.spatial_attention.fc.weight, std=0.1)
    nn.init.normal_(ours.box_head.top_left.conv5.weight, std=0.5)
    frames = [torch.randint(0, 256, (3, 480, 640), dtype=torch.uint8) for _ in range(FRAMES + 1)]
    box = torch.tensor([[270.0, 200.0, 100.0, 80.0]], dtype=torch.float64)
    plain, state, corners, worst = (
        Plain(ours),
        ours.start(frames[:1], box),
        [],
        dict.fromkeys(TOLERANCE, 0.0),
    )
    plain.start(frames[0], box)
    hook = ours.box_head.register_forward_hook(
        lambda module, given, made: corners.append(torch.cat(made))
    )
    for frame in frames[1:]:
        state, prediction = ours.step(state, [frame])
        theirs = plain.step(frame)
        for name, a, b in (("boxes, px", theirs, prediction.box), ("corner logits", *corners[-2:])):
            worst[name] = max(worst[name], float((a - b).abs().max()))
    hook.remove()
    for name, allowed in TOLERANCE.items():
        print(
            f"largest difference over {FRAMES} frames, {name}: {worst[name]:.1e} (allowed: "
            f"{allowed:.0e})"
        )
        assert worst[name] <= allowed
    seconds: dict[str, list[float]] = {"plain": [], "trackkit": []}
    for turn in range(TURNS):
        frame = frames[1 + turn % FRAMES]
        for name, step in (
            ("plain", lambda f: plain.step(f)),
            ("trackkit", lambda f: ours.step(state, [f])),
        ):
            began = time.perf_counter()
            step(frame)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        f"seconds a frame, {torch.get_num_threads()} threads: plain {medians['plain']:.3f}, "
        f"trackkit {medians['trackkit']:.3f}"
    )
    print(f"{medians['plain'] / medians['trackkit']:.2f} times as fast (to reach: {TO_REACH})")


if __name__ == "__main__":
    main()
