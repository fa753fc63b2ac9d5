"""A tracked frame of STARK-S50: trackkit's step against a plain version of the same network, in
turns, in this run.

The plain version goes by the book: each frame it encodes the template again, applies the backbone's
frozen norms after its convolutions, and forms and keeps every attention map. Ours encodes the
template once, multiplies the norms into the convolutions, and leaves attention to the fused kernel.
Cropping and decoding are in the times of both. Random weights; the outputs are compared first, for
a box in the middle of the frame and for one at its border.

    python benchmarks/stark_speed.py                # with one thread, then with two
"""

from __future__ import annotations

import argparse
import math
import platform
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.attention import Attention, sine_position
from trackkit.backbones import normalise
from trackkit.boxes import clip_with_margin, xyxy_to_cxcywh
from trackkit.crops import around_box, box_to_frame, outside
from trackkit.trackers.stark import STARK, STARKConfig

TO_REACH = 1.3
TOLERANCE = {"corner logits": 1e-3, "box, px": 0.02}  # the golden files'
BOXES = (270.0, 200.0, 100.0, 80.0), (560.0, 10.0, 70.0, 60.0)


@dataclass
class Plain:
    """The same tracker with the same weights, written out."""

    net: STARK
    template: Tensor | None = None
    template_mask: Tensor | None = None

    def crop(self, frame: Tensor, box: Tensor, factor: float, size: int):
        crops, windows = around_box([frame], box, factor, size, self.net.config.exact)
        lost = 0 if self.net.config.exact else 1
        return (
            normalise(crops),
            outside(windows, [(frame.shape[2] - lost, frame.shape[1] - lost)]),
            windows,
        )

    def start(self, frame: Tensor, box: Tensor) -> None:
        cfg = self.net.config
        self.template, self.template_mask, _ = self.crop(
            frame, box, cfg.template_factor, cfg.template_size
        )

    def encode(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, positions and mask, token by token."""
        body = self.net.backbone
        x = body.maxpool(body.relu(body.bn1(body.conv1(image))))
        x = self.net.bottleneck(body.layer3(body.layer2(body.layer1(x))))
        cells = mask[:, ::16, ::16]
        return x.flatten(2).transpose(1, 2), sine_position(cells, x.shape[1]), cells.flatten(1)

    @torch.no_grad()
    def step(self, frame: Tensor, box: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        net, cfg, maps = self.net, self.net.config, []
        search, search_mask, windows = self.crop(frame, box, cfg.search_factor, cfg.search_size)
        parts = zip(
            self.encode(self.template, self.template_mask),
            self.encode(search, search_mask),
            strict=True,
        )
        memory, position, ignore = (torch.cat(pair, 1) for pair in parts)

        def attend(
            layer: Attention,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            hidden: Tensor | None = None,
        ) -> Tensor:
            pairs = zip(
                (query, key, value),
                layer.in_proj_weight.chunk(3),
                layer.in_proj_bias.chunk(3),
                strict=True,
            )
            q, k, v = (
                F.linear(*pair).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for pair in pairs
            )
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            if hidden is not None:
                scores = scores.masked_fill(hidden[:, None, None], -math.inf)
            maps.append(scores.softmax(-1))
            return layer.out_proj((maps[-1] @ v).transpose(1, 2).flatten(2))

        def think(layer: nn.Module, x: Tensor) -> Tensor:
            return layer.linear2(F.relu(layer.linear1(x)))

        for layer in net.encoder.layers:
            at = memory + position
            memory = layer.norm1(memory + attend(layer.self_attn, at, at, memory, ignore))
            memory = layer.norm2(memory + think(layer, memory))
        query = net.query.weight[None]
        x = torch.zeros_like(query)
        for layer in net.decoder.layers:
            x = layer.norm1(x + attend(layer.self_attn, x + query, x + query, x))
            x = layer.norm2(
                x + attend(layer.cross_attn, x + query, memory + position, memory, ignore)
            )
            x = layer.norm3(x + think(layer, x))
        x = net.decoder.norm(x)

        size = cfg.search_size // 16
        tokens = memory[:, -(size**2) :]
        grid = (tokens * (tokens @ x.transpose(1, 2))).transpose(1, 2).unflatten(2, (size, size))
        corners = [
            tower(grid)[:, 0] for tower in (net.box_head.top_left, net.box_head.bottom_right)
        ]
        place = []
        for corner in corners:
            share = corner.flatten(1).softmax(1).view(-1, size, size)
            steps = torch.arange(size) / size
            place += [(share.sum(1) * steps).sum(1), (share.sum(2) * steps).sum(1)]
        found = xyxy_to_cxcywh(torch.stack(place, 1)).double()
        frame_size = torch.tensor([[frame.shape[2], frame.shape[1]]], dtype=torch.float64)
        box = clip_with_margin(box_to_frame(found, windows, box, cfg.exact), frame_size, cfg.margin)
        return box, torch.stack(corners), maps


def spread(net: STARK) -> None:
    """Random weights under which the corner maps have peaks, and frozen norms that do something."""
    for name, tensor in net.backbone.named_buffers():
        nn.init.uniform_(
            tensor, *((0.8, 1.2) if name.endswith(("running_var", "weight")) else (-0.1, 0.1))
        )
    for block in (*net.backbone.layer1, *net.backbone.layer2, *net.backbone.layer3):
        block.bn3.weight.mul_(0.25)  # as trained ones do, keep the sum of the branches from growing
    for tower in (net.box_head.top_left, net.box_head.bottom_right):
        nn.init.normal_(tower[-1].weight, std=5.0)


def machine() -> str:
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    return (
        f"{cpu[1] if cpu else platform.processor() or platform.machine()}, torch "
        f"{torch.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ours = STARK(STARKConfig.s50()).eval()
    with torch.no_grad():
        spread(ours)
    frame = torch.randint(0, 256, (3, 480, 640), dtype=torch.uint8)
    plain, corners = Plain(ours), []
    hook = ours.box_head.register_forward_hook(
        lambda module, given, made: corners.append(torch.stack(made))
    )
    worst = dict.fromkeys(TOLERANCE, 0.0)
    for box in (torch.tensor([box], dtype=torch.float64) for box in BOXES):
        state = ours.start([frame], box)
        plain.start(frame, box)
        _, prediction = ours.step(state, [frame])
        theirs, logits, maps = plain.step(frame, box)
        worst["box, px"] = max(worst["box, px"], float((theirs - prediction.box).abs().max()))
        worst["corner logits"] = max(
            worst["corner logits"], float((logits - corners[-1]).abs().max())
        )
    hook.remove()
    print(f"STARK-S50, {machine()}; the plain version keeps {len(maps)} attention maps")
    for name, allowed in TOLERANCE.items():
        print(f"largest difference, {name}: {worst[name]:.1e} (allowed: {allowed:.0e})")
        if not worst[name] <= allowed:
            raise SystemExit("the two versions are not the same tracker")

    box = torch.tensor([BOXES[0]], dtype=torch.float64)
    state = ours.start([frame], box)
    plain.start(frame, box)
    ways = {"plain": lambda: plain.step(frame, box), "trackkit": lambda: ours.step(state, [frame])}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(arguments.rounds + 1):  # in turns, so that both meet the same machine
            for name, step in ways.items():
                began = time.perf_counter()
                step()
                if turn:  # the first is to warm up
                    seconds[name].append(time.perf_counter() - began)
        middle = {name: statistics.median(times) for name, times in seconds.items()}
        shown = ", ".join(
            f"{name} {1e3 * value:.0f} ms ({1 / value:.2f} frames/s)"
            for name, value in middle.items()
        )
        print(f"{threads} threads, medians of {arguments.rounds}: {shown}")
        print(f"{middle['plain'] / middle['trackkit']:.2f} times as fast (to reach: {TO_REACH})")


if __name__ == "__main__":
    main()
