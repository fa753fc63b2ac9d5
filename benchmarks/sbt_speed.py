"""A step of SBT-base against a plain version: how much computing the template once and never
forming attention maps saves.

    python benchmarks/sbt_speed.py

The plain version is the same network with the same weights as the authors' code runs it: every
frame it encodes the template again, carries it through all blocks, and forms every attention map.
Both get the same crops and must say the same. Nine tenths of our step are matrix products and
convolutions, at what a core can do (95 to 100 GFLOP/s where this was written), and the template's
part behind the first CA block cannot be kept. So there is not much more to win on a CPU.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from trackkit.backbones import normalise
from trackkit.crops import around_box
from trackkit.trackers.sbt import SBT
from trackkit.weights import create

ROUNDS = 15
TOLERANCE = 2e-5  # of the goldens, logits


def attention(block, x: Tensor, z: Tensor) -> Tensor:
    """Tokens of the map x look at those of z, through a softmax map."""
    batch, height, width, channels = x.shape
    q = (
        block.q(block.norm1(x))
        .view(batch, -1, block.heads, channels // block.heads)
        .transpose(1, 2)
    )
    keys = block.norm1(z)
    keys = block.reduce_norm(block.reduce(keys.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    k, v = (
        block.kv(keys)
        .view(batch, -1, 2, block.heads, channels // block.heads)
        .permute(2, 0, 3, 1, 4)
    )
    share = (q @ k.transpose(-1, -2) * (channels // block.heads) ** -0.5).softmax(-1)
    return block.proj((share @ v).transpose(1, 2).reshape(batch, height, width, channels))


@torch.no_grad()
def plain(tracker: SBT, template: Tensor, search: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised crops -> class logits (B, N, 2) and boxes (B, N, 4)."""
    x, z = search.permute(0, 2, 3, 1), template.permute(0, 2, 3, 1)
    for stage, cross in zip(tracker.backbone.stages, tracker.config.cross, strict=True):
        x, z = (stage.embed(image)[0] for image in (x, z))
        for number, block in enumerate(stage.blocks, 1):
            seen_by_x, seen_by_z = (z, x) if number in cross else (x, z)
            x, z = x + attention(block, x, seen_by_x), z + attention(block, z, seen_by_z)
            x, z = (image + block.mlp(block.norm2(image)) for image in (x, z))
    features = tracker.backbone.norm(x).flatten(1, 2)
    return tracker.class_head(features), tracker.box_head(features).sigmoid()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tracker = create("sbt-base")
    cfg = tracker.config
    frame = torch.randint(0, 256, (3, 480, 640), dtype=torch.uint8)
    box = torch.tensor([[270.0, 200.0, 100.0, 80.0]], dtype=torch.float64)
    state = tracker.start([frame], box)

    def ours() -> tuple[Tensor, Tensor]:
        _, prediction = tracker.step(state, [frame])
        return prediction.score, prediction.box

    def theirs() -> tuple[Tensor, Tensor]:
        template, _ = around_box([frame], box, cfg.template_factor, cfg.template_size, cfg.exact)
        search, _ = around_box([frame], box, cfg.search_factor, cfg.search_size, cfg.exact)
        return plain(tracker, normalise(template), normalise(search))

    with torch.no_grad():
        search, _ = around_box([frame], box, cfg.search_factor, cfg.search_size, cfg.exact)
        answer = tracker(state.template, normalise(search))
    logits, boxes = theirs()
    difference = max(
        (answer.logits - logits).abs().max().item(), (answer.boxes - boxes).abs().max().item()
    )
    if difference > TOLERANCE:
        raise SystemExit(f"the two versions differ by {difference:.1e}, more than {TOLERANCE:.0e}")

    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(ROUNDS):  # in turns, so that both meet the same machine
        for name, function in (("ours", ours), ("plain", theirs)):
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = statistics.median(p / o for o, p in zip(seconds["ours"], seconds["plain"], strict=True))
    print(
        f"SBT-base, one thread, {ROUNDS} steps each: ours {middle['ours'] * 1e3:.0f} ms, plain "
        f"{middle['plain'] * 1e3:.0f} ms"
    )
    print(f"ratio {ratio:.2f} (outputs differ by {difference:.0e}; required 1.3)")


if __name__ == "__main__":
    main()
