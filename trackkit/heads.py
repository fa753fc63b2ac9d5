"""Heads: from features to a box or a score."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.backbones import ConvStack


def soft_argmax(logits: Tensor) -> Tensor:
    """Expected position of a softmax over a map: (B, s, s) -> x and y (B, 2), in [0, (s - 1) / s].

    The mean of the cells' indices, weighted by their probabilities and divided by s. An argmax can
    only name a cell and passes no gradient; the expectation falls between cells and is smooth
    (STARK, Eq. 1). Cell 0 stands for 0, not for the middle of the first cell; the head learns that
    with everything else.
    """
    size = logits.shape[-1]
    # bfloat16 has 128 numbers between 0.5 and 1: pixels apart
    wide = torch.promote_types(logits.dtype, torch.float32)
    probability = logits.to(wide).flatten(1).softmax(1).view(-1, size, size)
    steps = torch.arange(size, device=logits.device, dtype=wide) / size
    # no @: autocast halves it
    return torch.stack(
        [(probability.sum(1) * steps).sum(1), (probability.sum(2) * steps).sum(1)], 1
    )


class CornerHead(nn.Module):
    """Two towers of convolutions, each with a map of where a corner of the box is: (B, D, s, s) ->
    2 x (B, s, s) logits.

    STARK, section 3.1 and Fig. 3: four 3x3 convolutions with batch norm, halving the channels, and
    a 1x1 convolution.
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.top_left, self.bottom_right = _tower(width, channels), _tower(width, channels)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.top_left(features)[:, 0], self.bottom_right(features)[:, 0]


class CenterHead(nn.Module):
    """Where the centre is, and what box stands there: (B, D, s, s) -> maps (B, s, s), (B, 2, s, s),
    (B, 2, s, s).

    Three towers as in `CornerHead`: how likely each cell holds the centre, 0..1 and never quite
    either; how far from the cell it is, in cells; width and height of the box, 0..1 (OSTrack, after
    CenterNet's "objects as points").
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.score, self.offset, self.size = (
            _tower(width, channels, outputs) for outputs in (1, 2, 2)
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score, size = (
            tower(features).float().sigmoid().clamp(1e-4, 1 - 1e-4)
            for tower in (self.score, self.size)
        )
        return score[:, 0], self.offset(features).float(), size


def _tower(width: int, channels: int, outputs: int = 1) -> nn.Sequential:
    sizes = [width, channels, channels // 2, channels // 4, channels // 8]
    layers = [_conv_norm(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(*layers, nn.Conv2d(sizes[-1], outputs, 1))


def _conv_norm(inputs: int, outputs: int) -> ConvStack:
    return ConvStack(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class PyramidCornerHead(nn.Module):
    """A corner head whose maps are four times finer than the features: (B, D, s, s) -> 2 x (B, 4 s,
    4 s) logits.

    The towers of `CornerHead` with two doublings of the resolution on the way. The features
    themselves come in again at each of them, and what each resolution alone would answer is added
    to the map ("CORNER_UP" in MixFormer's code).
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.top_left, self.bottom_right = (
            _PyramidTower(width, channels),
            _PyramidTower(width, channels),
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.top_left(features)[:, 0], self.bottom_right(features)[:, 0]


class _PyramidTower(nn.Module):
    def __init__(self, width: int, channels: int):
        super().__init__()
        a, b, c, d = channels, channels // 2, channels // 4, channels // 8
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            _conv_norm(*pair) for pair in ((width, a), (a, b), (b, c), (c, d))
        )
        self.conv5 = nn.Conv2d(d, 1, 1)
        # the features, for each doubling
        self.adjust1, self.adjust2 = _conv_norm(width, b), _conv_norm(width, c)
        # an answer at s
        self.adjust3 = nn.Sequential(_conv_norm(b, c), _conv_norm(c, d), _conv_norm(d, 1))
        self.adjust4 = nn.Sequential(_conv_norm(c, d), _conv_norm(d, 1))  # and at 2 s

    def forward(self, x: Tensor) -> Tensor:
        coarse = self.conv2(self.conv1(x))  # (B, b, s, s)
        middle = self.conv3(_doubled(coarse + self.adjust1(x)))  # (B, c, 2 s, 2 s)
        fine = self.conv4(_doubled(middle + _doubled(self.adjust2(x))))  # (B, d, 4 s, 4 s)
        return self.conv5(fine) + _doubled(_doubled(self.adjust3(coarse)) + self.adjust4(middle))


def _doubled(x: Tensor) -> Tensor:
    """Each cell becomes four equal ones."""
    return F.interpolate(x, scale_factor=2)


class SidesHead(nn.Module):
    """Three answers for each cell, from two towers (STMTrack, after FCOS): (B, D, h, w) -> (B, h
    w), (B, h w), (B, h w, 4).

    Logits: is the target here, and is its centre near. Distances to its left, top, right and
    bottom, in cells, above 0.
    """

    def __init__(self, width: int, channels: int, layers: int):
        super().__init__()
        self.score_tower, self.side_tower = (self._tower(width, channels, layers) for _ in range(2))
        self.score, self.centre, self.sides = (
            nn.Sequential(nn.Conv2d(channels, n, 1), nn.BatchNorm2d(n)) for n in (1, 1, 4)
        )
        self.scale, self.shift = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))
        for layer in (part for part in self.modules() if isinstance(part, nn.Conv2d)):
            nn.init.normal_(layer.weight, std=1e-4)
        nn.init.constant_(self.score[0].bias, -math.log(99))

    @staticmethod
    def _tower(width: int, channels: int, layers: int) -> nn.Sequential:
        convolutions = [
            nn.Conv2d(width if i == 0 else channels, channels, 3, padding=1) for i in range(layers)
        ]
        # no ReLU at the end
        return nn.Sequential(*[part for layer in convolutions for part in (layer, nn.ReLU())][:-1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen, sides = self.score_tower(x), self.sides(self.side_tower(x))
        # at ten cells bfloat16 has steps of half a pixel
        wide = torch.promote_types(sides.dtype, torch.float32)
        distances = (self.scale * sides.to(wide) + self.shift).exp()
        return (
            self.score(seen).flatten(1),
            self.centre(seen).flatten(1),
            distances.flatten(2).transpose(1, 2),
        )


class MLP(nn.Module):
    """Linear layers with ReLU between them: (..., D) -> (..., outputs)."""

    def __init__(self, width: int, hidden: int, outputs: int, depth: int = 3):
        super().__init__()
        sizes = [width, *[hidden] * (depth - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MixHead(nn.Module):
    """Two blocks that mix positions and channels in turns, for a fixed number of tokens: (B, N, C)
    -> (B, N, outputs).

    A linear layer over the positions is shared by all channels, one over the channels by all
    positions. SBT's Eq. 7 has channels first and keeps the sizes; a last linear layer, which the
    equation leaves out, makes the outputs. In the released code positions come first, C of them in
    between, and the last block makes the outputs.
    """

    def __init__(self, tokens: int, width: int, outputs: int, literal: bool = False):
        super().__init__()
        between = tokens if literal else width
        last = width if literal else outputs
        self.spatial = nn.ModuleList([nn.Linear(tokens, between), nn.Linear(between, tokens)])
        self.channel = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, last)])
        self.output = nn.Linear(width, outputs) if literal else None
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        for spatial, channel in zip(self.spatial, self.channel, strict=True):
            if self.output is not None:
                x = F.relu(channel(x))
            x = F.relu(spatial(x.transpose(1, 2))).transpose(1, 2)
            if self.output is None:
                x = channel(x) if channel is self.channel[-1] else F.relu(channel(x))
        return x if self.output is None else self.output(x)


def hann_window(size: int, border: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosine window (size, size), 1 or just below it in the middle: who weighs a response with it
    says that the target does not move far between two frames.

    Trackers have two conventions. `border` "zero": the outermost cells are 0 (SiamFC, SBT,
    STMTrack). "open": the window would reach 0 one cell further out (OSTrack, our template
    matching).
    """
    if border not in ("zero", "open"):
        raise ValueError(f'border must be "zero" or "open", got {border!r}')
    if border == "zero":
        window = torch.hann_window(size, periodic=False, dtype=dtype)
    else:
        window = torch.hann_window(size + 2, periodic=False, dtype=dtype)[1:-1]
    return window[:, None] * window
