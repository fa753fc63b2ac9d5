"""Matching: where has each piece of the target gone? What the tiny trackers start from.

The papers' trackers start from backbones that have seen ImageNet. Ours learn from procedural video,
whose boxes say where each piece of a target has gone: what lies a third of the way across the box
in one frame does so in the next. A small network learns to give both places the same features, and
all others different ones (InfoNCE: van den Oord, Li, Vinyals, arXiv 1807.03748), from many such
places in each sample. Its weights come with trackkit, data_samples/weights/matching-tiny; OSTrack's
tiny member starts from them (`load_pretrained`).

It tracks, too: each piece votes for where the target's centre is, and the size stays. As it is of
no paper it has no name on the command line:

    train(Matching(), Matching().recipe("laptop"), pool(400), "runs/matching")
    weights.load("runs/matching/tracker.safetensors", classes=(Matching,))
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.backbones import SmallNet, normalise
from trackkit.boxes import clip_with_margin, cxcywh_to_xywh, xywh_to_cxcywh
from trackkit.crops import frame_sizes
from trackkit.errors import Range, check_fields
from trackkit.frames import SampleSpec
from trackkit.heads import hann_window
from trackkit.stages import Stage
from trackkit.trackers.base import Prediction, Tracker


@dataclass(frozen=True)
class MatchingConfig:
    """Numbers of the network, of tracking and of training."""

    template_size: int = 48  # side of the template crop, pixels; a multiple of 8
    search_size: int = 96  # side of the search crop, pixels; a multiple of 8
    template_factor: float = 1.5  # side of the template's window, in square roots of target areas
    search_factor: float = 3.0  # side of the search window in the same units
    width: int = 64  # channels of a token
    margin: float = 4.0  # the box keeps so many frame pixels inside the frame
    exact: bool = True  # boxes go in and out of crops exactly

    def __post_init__(self):
        size, factor = Range(1, 4096), Range(0, 100, above=True)
        check_fields(
            self, template_size=size, search_size=size, template_factor=factor,
            search_factor=factor, width=size, margin=Range(0, 4096), exact=(True, False),
        )  # fmt: skip
        if self.template_size % SmallNet.stride or self.search_size % SmallNet.stride:
            raise ValueError(f"the sizes of crops must be multiples of {SmallNet.stride}")


@dataclass(frozen=True)
class MatchingState:
    """What is remembered of B sequences."""

    box: Tensor  # (B, 4) xywh, frame pixels, float64
    pieces: Tensor  # (B, D, z, z), the template's features, of length 1
    to_centre: Tensor  # (B, z * z, 2), from each piece to the target's centre, crop pixels
    inside: Tensor  # (B, z * z) bool, which pieces are the target's


class Matching(Tracker):
    """The network, the way it tracks and the way it learns."""

    Config = MatchingConfig

    def __init__(self, config: MatchingConfig | None = None):
        super().__init__(config or MatchingConfig())
        self.net = SmallNet()
        self.project = nn.Conv2d(self.net.channels, self.config.width, 1)
        self.norm = nn.BatchNorm2d(self.config.width, affine=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))  # of similarities, cosines

    def features(self, crops: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> (B, D, S / 8, S / 8), each of length 1."""
        pixels = normalise(crops).contiguous(memory_format=torch.channels_last)
        return F.normalize(self.norm(self.project(self.net(pixels))), dim=1)

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by before a softmax."""
        return self.log_scale.exp().clamp(max=40)

    # ---- tracking ----

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> MatchingState:
        frames, boxes = self.checked(frames, boxes_xywh)
        crops, windows = self.template_crop.around(frames, boxes)
        place = (xywh_to_cxcywh(windows.to_crop(boxes)) / windows.size).float()
        pieces = self.features(crops)
        across = relative(place, pieces.shape[-1])  # (B, z * z, 2), in boxes
        to_centre = -across * place[:, None, 2:] * windows.size
        return MatchingState(boxes, pieces, to_centre, (across.abs() < 0.5).all(-1))

    def step(
        self, state: MatchingState, frames: list[Tensor], maps: bool = False
    ) -> tuple[MatchingState, Prediction]:
        cfg, frames = self.config, self.moved(frames)
        crops, windows = self.search_crop.around(frames, state.box)
        found = self.features(crops)  # (B, D, g, g)
        grid, stride = found.shape[-1], SmallNet.stride
        alike = state.pieces.flatten(2).transpose(1, 2) @ found.flatten(2)  # (B, z * z, g * g)
        share = (self.scale * alike).softmax(-1) * state.inside[..., None].to(alike)
        # each piece votes, where it may be, for a centre; a crop pixel is as large in both crops
        # if the windows are to the sizes of the crops as they are by default
        ratio = cfg.search_size / cfg.search_factor * cfg.template_factor / cfg.template_size
        at = cells(grid).to(share) * stride  # (g * g, 2), crop pixels
        votes = (at + state.to_centre[:, :, None].to(share) * ratio) / stride - 0.5
        votes = votes.round().long().clamp(-1, grid) + 1  # a rim collects what falls outside
        index = (votes[..., 1] * (grid + 2) + votes[..., 0]).flatten(1)
        heat = share.new_zeros(len(crops), (grid + 2) ** 2).scatter_add(1, index, share.flatten(1))
        heat = heat.unflatten(1, (grid + 2, grid + 2))[:, 1:-1, 1:-1]
        heat = F.avg_pool2d(heat[:, None], 3, 1, 1)[:, 0] * hann_window(grid, "open").to(heat)
        near = heat / heat.flatten(1).amax(1)[:, None, None] > 0.5
        weight = (heat * near).flatten(1)
        weight = weight / weight.sum(1, keepdim=True)
        centre = (weight @ cells(grid).to(weight)) * stride  # (B, 2), crop pixels
        score = heat.flatten(1).amax(1) / state.inside.sum(1).clamp(min=1)
        size = state.box[:, 2:]
        where = torch.cat([centre.double().cpu(), torch.ones(len(crops), 2).double()], 1)
        middle = xywh_to_cxcywh(windows.to_frame(cxcywh_to_xywh(where)))[:, :2]
        box = cxcywh_to_xywh(torch.cat([middle, size], 1))
        box = clip_with_margin(box, frame_sizes(frames), cfg.margin)
        seen = {"crop": crops, "window": windows.rows, "votes": heat} if maps else None
        score = score.clamp(0, 1).double().cpu()
        return replace(state, box=box), Prediction(box, score, seen)

    # ---- training ----

    def loss(self, batch: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        """Cross-entropy of where each piece of the target went. Candidates are the cells of all
        search crops of the batch; the truth lies between four of them, which share it.
        """
        z = self.features(batch["templates"][:, 0]).flatten(2).transpose(1, 2)  # (B, n, D)
        x = self.features(batch["searches"].flatten(0, 1))  # (B * N, D, g, g)
        grid, crops = x.shape[-1], batch["searches"].shape[:2]
        old, new = batch["template_boxes"][:, 0], batch["search_boxes"]  # (B, 4), (B, N, 4)
        across = relative(old, math.isqrt(z.shape[1]))  # (B, n, 2)
        went = new[:, :, None, :2] + across[:, None] * new[:, :, None, 2:]  # (B, N, n, 2)
        went = went * grid - 0.5  # in cells, whose middles are whole numbers
        known = (across.abs() < 0.5).all(-1)[:, None] & ((went > 0) & (went < grid - 1)).all(-1)
        # similarities (B, n, B, N, g * g), of each template with all search crops
        alike = self.scale * (z.flatten(0, 1) @ x.flatten(2).transpose(1, 2).flatten(0, 1).T)
        alike = alike.unflatten(0, z.shape[:2]).unflatten(2, (*crops, grid * grid))
        rows = torch.arange(len(z), device=z.device)
        own = alike[rows, :, rows].transpose(1, 2)  # (B, N, n, g * g)
        others = alike.flatten(3).logsumexp(3)  # (B, n, B)
        others = others.masked_fill(torch.eye(len(z), device=z.device).bool()[:, None], -1e4)
        everything = torch.logaddexp(own.logsumexp(3), others.logsumexp(2)[:, None] - math.log(4))
        low = went.clamp(0, grid - 1.001).floor()
        part = (went.clamp(0, grid - 1.001) - low)[..., None, :]
        right_below = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], device=z.device)  # (4, 2)
        weights = torch.where(right_below > 0, part, 1 - part).prod(-1)  # (B, N, n, 4)
        corners = low[..., None, :].long() + right_below
        hit = (weights * own.gather(3, corners[..., 1] * grid + corners[..., 0])).sum(-1)
        loss = ((everything - hit) * known).sum() / known.sum().clamp(min=1)
        return {"loss": loss, "scale": self.scale.detach()}

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
        rates = {"lr": 2e-3, "lr_end": 1e-4, "warmup": 30, "clip": 1.0, "weight_decay": 1e-3}
        return [Stage("matching", steps, 16, self.samples(), **rates)]


def cells(grid: int) -> Tensor:
    """Middles of the cells of a map, row by row, in cells: (grid * grid, 2) of x, y."""
    middles = torch.arange(grid) + 0.5
    return torch.cartesian_prod(middles, middles).flip(1)


def relative(boxes: Tensor, grid: int) -> Tensor:
    """Where the cells of a crop are as seen from boxes (B, 4) in it, cxcywh in units of the crop:
    (B, grid * grid, 2), from -0.5 to 0.5 inside the box.
    """
    at = cells(grid).to(boxes) / grid
    return (at - boxes[:, None, :2]) / boxes[:, None, 2:]
