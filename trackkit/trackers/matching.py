"""Matching: where has each piece of the target gone? What the tiny trackers start from.

The papers' trackers start from backbones that have seen ImageNet. Ours learn from procedural video,
whose boxes say where each piece of a target has gone: what lies a third of the way across the box
in one frame does so in the next. A small network learns to give both places the same features, and
all others different ones (InfoNCE: van den Oord, Li, Vinyals, arXiv 1807.03748), from many such
places in each sample.

    train(Matching(), Matching().recipe("laptop"), pool(400), "runs/matching")

Its weights come with trackkit, data_samples/weights/matching-tiny; OSTrack's tiny member starts
from them (`SmallNet.load_pretrained`). It does not track.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.backbones import SmallNet, normalise
from trackkit.crops import CropSpec
from trackkit.errors import Range, check_fields
from trackkit.frames import SampleSpec
from trackkit.losses import mean_of, place_cross_entropy
from trackkit.stages import Stage
from trackkit.trackers.base import Tracker


@dataclass(frozen=True)
class MatchingConfig:
    width: int = 64  # channels of a feature

    def __post_init__(self):
        check_fields(self, width=Range(1, 4096))


class Matching(Tracker):
    """The network and the way it learns."""

    Config = MatchingConfig
    # a crop pixel is as large in both
    template_crop = CropSpec(48, factor=1.5, fill=0)
    search_crop = CropSpec(96, factor=3.0, fill=0)

    def __init__(self, config: MatchingConfig = MatchingConfig()):
        super().__init__(config)
        self.net = SmallNet()
        self.project = nn.Conv2d(self.net.channels, config.width, 1)
        self.norm = nn.BatchNorm2d(config.width, affine=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))  # of similarities, cosines

    def features(self, crops: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> (B, S / 8 * S / 8, D), row by row, each of length 1."""
        pixels = normalise(crops).contiguous(memory_format=torch.channels_last)
        features = F.normalize(self.norm(self.project(self.net(pixels))), dim=1)
        return features.flatten(2).transpose(1, 2)

    def loss(self, batch: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        """Cross-entropy of where each piece of the target went, mean over all pieces that the
        search crops show. Candidates are the cells of all search crops of the batch.
        """
        z = self.features(batch["templates"][:, 0])  # (B, n, D)
        x = self.features(batch["searches"].flatten(0, 1))  # (B * N, g * g, D)
        samples, cells, grid = len(z), x.shape[1], math.isqrt(x.shape[1])
        old, new = batch["template_boxes"][:, 0], batch["search_boxes"]  # (B, 4), (B, N, 4)
        across = relative(old, math.isqrt(z.shape[1]))  # (B, n, 2)
        went = new[:, :, None, :2] + across[:, None] * new[:, :, None, 2:]  # (B, N, n, 2)
        went = went * grid - 0.5  # in cells, whose middles are whole numbers
        known = (across.abs() < 0.5).all(-1)[:, None] & ((went > 0) & (went < grid - 1)).all(-1)

        scale = self.log_scale.exp().clamp(max=40)
        alike = scale * (z.flatten(0, 1) @ x.flatten(0, 1).T)  # each template, all search crops
        alike = alike.unflatten(0, z.shape[:2]).unflatten(2, (samples, -1))
        sample = torch.arange(samples, device=z.device)
        own = alike[sample, :, sample].unflatten(2, (-1, cells)).transpose(1, 2)  # (B, N, n, g * g)
        same = (sample == sample[:, None])[:, None]  # (B, 1, B)
        others = alike.logsumexp(3).masked_fill(same, -1e4)  # (B, n, B)
        # a quarter of their weight, so that the places nearby, which are harder, count
        others = others.logsumexp(2)[:, None] - math.log(4)  # (B, 1, n)
        elsewhere = mean_of(F.softplus(others - own.logsumexp(3)), known)
        here = place_cross_entropy(own.unflatten(3, (grid, grid)), went / grid, known)
        return {"loss": elsewhere + here, "elsewhere": elsewhere, "scale": scale.detach()}

    def samples(self) -> SampleSpec:
        """A template and two searches near it in time, whatever lies between."""
        return SampleSpec(
            template=replace(self.template_crop, jitter_size=0.1, jitter_centre=0.3),
            search=replace(self.search_crop, jitter_size=0.3, jitter_centre=1.5),
            searches=2,
            order="any",
            max_gap=40,
            flip=0.5,
            grey=0.1,
            brightness=0.25,
            masks=True,  # only so that crops without anything in them are drawn again
        )

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        """One stage, the same at all scales but for its length."""
        self.check_preset(preset)
        steps = {"tiny": 300, "laptop": 2500, "gpu": 20_000, "paper": 100_000}[scale]
        rates = {"lr": 2e-3, "lr_end": 4e-5, "cosine": (-1.0, 1.0), "warmup": 30, "clip": 1.0}
        return [Stage("matching", steps, 16, self.samples(), weight_decay=1e-3, **rates)]


def relative(boxes: Tensor, grid: int) -> Tensor:
    """Where the cells of a crop are as seen from boxes (B, 4) in it, cxcywh in units of the crop:
    (B, grid * grid, 2), from -0.5 to 0.5 inside the box.
    """
    middles = (torch.arange(grid, device=boxes.device) + 0.5) / grid
    at = torch.cartesian_prod(middles, middles).flip(1)  # x, y
    return (at - boxes[:, None, :2]) / boxes[:, None, 2:]
