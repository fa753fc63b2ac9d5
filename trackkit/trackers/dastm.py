"""STMTrack: a memory of past frames in place of a template. DASTM: the memory decides how to look at each of them.

Fu, Liu, Fu, Wang: "STMTrack: Template-Free Visual Tracking with Space-Time Memory Networks", CVPR 2021. Past frames are
encoded with a map of where the target was, and kept. Each cell of the present frame (query) gathers from all cells of the
memory what resembles it, and a head says for each cell whether the target is there and how far its sides are.

Zhou, Xie, Xu: "Dynamic Attention Mechanism in Spatiotemporal Memory Networks for Object Tracking" (DASTM). MobileOne
encodes the frames, and a module of channel and spatial attention strengthens the features of each memory frame before
they are kept: SE, coordinate attention or CBAM, chosen by a gate that looks at the frame (DASTM), or all three (SASTM).

STMTrack is that of the authors' code (fzh0917/STMTrack), whose checkpoints load by `trackkit.official`; two of its faults
are not kept: its label map wraps around where a box is larger than the crop, and its memory grows without end. There is
no code of DASTM. Where its paper is silent we follow STMTrack, and DyFPN, which it names as the model of its gate; each
such choice is a field of the config.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.attention import CBAM, SE, CoordinateAttention
from trackkit.backbones import Inception, MobileOne, SmallNet, normalise
from trackkit.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from trackkit.crops import Windows, cut, mean_colour
from trackkit.errors import DataError, TrackkitError
from trackkit.frames import FrameRule
from trackkit.sampling import CropSpec, SampleSpec
from trackkit.trackers.base import Prediction, Tracker
from trackkit.training import Stage

MODULES = ("se", "ca", "cbam")  # Table 1


@dataclass(frozen=True)
class DASTMConfig:
    """Numbers of the network, of training and of tracking; the defaults are DASTM.

    Attributes:
        trunk: "mobileone_s0" to "_s4", "inception" (STMTrack) or "tiny". The paper does not say which MobileOne.
        trunk_stage: stage of MobileOne whose output is used, 3 or 2; both are at stride 8 here.
        size: side of the memory crops, and of all crops in training. factor: side of their windows in units of the square
            root of the target's area. query_size: side of the query crop in tracking; the target appears equally large in
            both. (The paper tracks with 160 and does not say how; what is 72 pixels large in training would then be 40.)
        trim, query_trim: cells that are cut off on each side of the trunk's output.
        width: channels of memory and query. head_width, head_layers: of the head's towers.
        attention: modules for the memory, out of "se", "ca" and "cbam"; none is STMTrack.
        gate: "none" (all modules, `static` says how), "hard" (one module or none for a frame, learned straight through a
            Gumbel softmax), "soft" (a weighted sum, as Eq. 2 is written), "random" (Table 3).
        test_gate: another gate for tracking, "" for the same. seed: of random decisions in tracking.
        static: "mean" or "sum" of the modules. A sum triples the logits of the read-out.
        tau: temperature of the gate (Eq. 2). tau_end: what it falls to in training, geometrically; 0 leaves it.
        gate_reduction: d, the hidden layer has width / d units. gate_bias: first biases of "none" and of the modules.
        granularity: "frame", a decision for each memory frame when it is stored; "memory", one for all the frames that
            are looked at, made anew at each look.
        cost_weight, cost_share: adds cost_weight * |expected cost - cost_share| to the loss, the cost of the gate's
            choice in units of the dearest module's (after DyFPN).
        memory: "bounded" or "unbounded", see `victim`. capacity: frames that a bounded memory holds. segments: the stored
            frames are parted in so many, of each of which the middle is looked at. confidence: the latest frame
            is looked at too if its score exceeded this.
        train_frames: memory frames of a training sample.
        rate, window, penalty: of the size update, the cosine window and the penalty on changes of shape (`_choose`).
        min_size: of a box, frame pixels.
        exact: boxes go into and out of crops by the crops' own geometry (`crops.Windows`). The authors' crop ignores on
            the way out that windows are snapped to whole pixels, and skips pixels of large ones; False does as they do.
    """

    trunk: str = "mobileone_s1"
    trunk_stage: int = 3
    size: int = 289
    factor: float = 4.0
    query_size: int = 289
    trim: int = 6
    query_trim: int = 6
    width: int = 512
    head_width: int = 256
    head_layers: int = 7
    attention: tuple[str, ...] = MODULES
    gate: str = "hard"
    test_gate: str = ""
    seed: int = 0
    static: str = "mean"
    tau: float = 1.0
    tau_end: float = 0.0
    gate_reduction: int = 4
    gate_bias: tuple[float, float] = (0.0, 0.0)
    granularity: str = "frame"
    cost_weight: float = 0.0
    cost_share: float = 0.3
    memory: str = "bounded"
    capacity: int = 64
    segments: int = 4
    confidence: float = 0.6
    train_frames: int = 3
    rate: float = 0.95
    window: float = 0.21
    penalty: float = 0.04
    min_size: float = 10.0
    exact: bool = False

    def __post_init__(self):
        choices = {
            "trunk": ("inception", "tiny", *(f"mobileone_s{i}" for i in range(5))),
            "trunk_stage": (2, 3),
            "gate": ("none", "hard", "soft", "random"),
            "test_gate": ("", "hard", "soft", "random"),
            "static": ("mean", "sum"),
            "granularity": ("frame", "memory"),
            "memory": ("bounded", "unbounded"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(map(str, allowed))}; got {getattr(self, field)!r}")
        if sorted(set(self.attention) & set(MODULES)) != sorted(self.attention):
            raise ValueError(f"attention must name each of {', '.join(MODULES)} at most once; got {self.attention}")
        if self.gate != "none" and not self.attention:
            raise ValueError('a gate needs attention modules to choose from; without them gate must be "none"')
        if self.test_gate and self.gate == "none":
            raise ValueError("test_gate replaces a gate, and there is none")
        if self.segments < 1 or self.capacity < self.segments + 2 or self.train_frames < 1 or self.head_layers < 1:
            raise ValueError("need segments, train_frames, head_layers >= 1, and a capacity of at least segments + 2")
        if self.tau <= 0 or self.tau_end < 0 or self.factor <= 0:
            raise ValueError("tau and factor must be above 0, tau_end not below")
        if self.size == self.query_size and self.trim != self.query_trim:
            raise ValueError(f"memory and query crops are of one size, so trim and query_trim must be equal; got {self.trim}, {self.query_trim}")
        for size, trim in ((self.size, self.trim), (self.query_size, self.query_trim)):
            if size < 33 or cells_of(self.trunk, size) - 2 * trim < 1:
                raise ValueError(f"a crop of {size} px leaves no cells when {trim} are cut off on each side")

    @classmethod
    def stmtrack(cls, **changes) -> DASTMConfig:
        """STMTrack with the numbers for GOT-10k, LaSOT and TrackingNet; those for others are in `STMTRACK_SEARCHED`."""
        return cls(**{"trunk": "inception", "trim": 4, "query_trim": 4, "attention": (), "gate": "none", **changes})

    @classmethod
    def sastm(cls, **changes) -> DASTMConfig:
        """All modules for all frames (Table 2)."""
        return cls(**{"gate": "none", **changes})

    @classmethod
    def dastm(cls, **changes) -> DASTMConfig:
        """A gate chooses (Table 2)."""
        return cls(**changes)

    @classmethod
    def tiny(cls, **changes) -> DASTMConfig:
        """DASTM with a hundredth of the weights: learns from scratch on a laptop's CPU."""
        small = {
            "trunk": "tiny", "size": 97, "query_size": 97, "trim": 1, "query_trim": 1, "width": 64, "head_width": 48,
            "head_layers": 3, "min_size": 4.0, "exact": True,
        }  # fmt: skip
        return cls(**{**small, **changes})


# the authors searched these for each benchmark; for VOT every last frame counts as confident
STMTRACK_SEARCHED = {
    "otb": {"rate": 0.550, "window": 0.205, "penalty": 0.0759},
    "uav123": {"rate": 0.541, "window": 0.203, "penalty": 0.0707, "factor": 4.172},
    "vot": {"rate": 0.963, "window": 0.267, "penalty": 0.0412, "factor": 4.056, "confidence": 0.0},
}


def cells_of(trunk: str, size: int) -> int:
    """Cells along each side of the trunk's output for a crop of `size` pixels: 33 for 289 in Inception, 37 in the others."""
    if trunk == "inception":
        for kernel, stride in ((3, 2), (3, 1), (3, 2), (3, 1), (3, 2)):
            size = (size - kernel) // stride + 1
        return size
    return (size + 7) // 8


def cell_centres(config: DASTMConfig, size: int) -> Tensor:
    """Where the cells of a query crop of `size` are: x and y (N, 2), crop pixels, row by row. For 289: 25 x 25 of them,
    at 48, 56, ... 240.

    STMTrack counts 25 cells around the middle, although Inception's layers without padding see 3 pixels further up and
    left; the network learns that. Padded layers see cell k at pixel 8 k, which for 289 is the same 25 cells.
    """
    trim, first = config.trim if size == config.size else config.query_trim, 16 if config.trunk == "inception" else 0
    at = first + 8 * torch.arange(trim, cells_of(config.trunk, size) - trim)
    return torch.stack([at.repeat(len(at)), at.repeat_interleave(len(at))], 1)


# ---- attention for memory frames (DASTM, section III.B) ----


class Gate(nn.Module):
    """Which module a frame needs (Eq. 1): (B, C, h, w) -> logits (B, choices), of which the first is to use none.

    The paper has four outputs in its text and N = 3 in Eq. 2; to decide whether a module is needed at all takes four.
    """

    def __init__(self, channels: int, choices: int, reduction: int, bias: tuple[float, float]):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, channels // reduction), nn.Linear(channels // reduction, choices)
        with torch.no_grad():
            self.fc2.bias.copy_(torch.tensor([bias[0], *[bias[1]] * (choices - 1)]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x.mean((2, 3)))))


@dataclass(frozen=True)
class Choices:
    """What the gate said of B x T memory frames; the first of the N choices is to use no module."""

    probability: Tensor  # (B, T, N), Eq. 2
    weights: Tensor  # (B, T, N), what was used


class MemoryAttention(nn.Module):
    """The dynamic attention block, or its static relatives (Fig. 2): features of memory frames, strengthened."""

    def __init__(self, config: DASTMConfig):
        super().__init__()
        self.config = cfg = config
        kinds = {"se": SE, "ca": CoordinateAttention, "cbam": CBAM}
        self.branches = nn.ModuleDict({name: kinds[name](cfg.width) for name in MODULES if name in cfg.attention})
        if cfg.gate != "none":
            self.gate = Gate(cfg.width, 1 + len(self.branches), cfg.gate_reduction, cfg.gate_bias)

    def forward(
        self, x: Tensor, known: Tensor | None = None, draws: Tensor | None = None, tau: float = 0.0
    ) -> tuple[Tensor, Choices | None]:
        """Features (B, T, C, h, w) -> the same, and what the gate said.

        `known` (B, T) bool marks real frames. `draws` (B, 1) int64 are the decisions of a random gate in tracking.
        """
        cfg, batch, count = self.config, *x.shape[:2]
        frames = x.flatten(0, 1)  # (B * T, C, h, w)
        if cfg.gate == "none":
            share = 1 / len(self.branches) if cfg.static == "mean" else 1.0
            return sum(branch(frames) * share for branch in self.branches.values()).view_as(x), None
        logits = self.gate(frames).unflatten(0, (batch, count))
        if cfg.granularity == "memory":
            real = torch.ones_like(logits[..., :1]) if known is None else known[..., None].to(logits)
            logits = ((logits * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)).expand_as(logits)
        probability = (logits / (tau or cfg.tau)).softmax(-1)
        kind = cfg.gate if self.training else cfg.test_gate or cfg.gate
        if kind == "soft":
            weights = probability
        elif kind == "random":
            chosen = torch.randint(logits.shape[-1], (batch, count), device=x.device) if draws is None else draws
            chosen = chosen[:, :1].expand(-1, count) if cfg.granularity == "memory" else chosen  # one for all frames
            weights = F.one_hot(chosen, logits.shape[-1]).to(x)
        elif self.training:
            weights = self._drawn(logits, tau or cfg.tau)
        else:
            weights = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(x)
        mix = self.mixed if kind == "soft" or self.training else self.routed
        return mix(frames, weights.flatten(0, 1)).view_as(x), Choices(probability, weights)

    def _drawn(self, logits: Tensor, tau: float) -> Tensor:
        """One-hot decisions drawn from the gate's probabilities, with the gradient of a softmax (straight-through)."""
        if self.config.granularity == "memory":  # one draw for all frames
            return F.gumbel_softmax(logits[:, :1], tau, hard=True).expand_as(logits)
        return F.gumbel_softmax(logits, tau, hard=True)

    def mixed(self, frames: Tensor, weights: Tensor) -> Tensor:
        """All choices' outputs, weighted: (M, C, h, w) and (M, N) -> (M, C, h, w)."""
        outputs = [frames, *(branch(frames) for branch in self.branches.values())]
        return sum(w[:, None, None, None] * y for w, y in zip(weights.unbind(1), outputs, strict=True))

    def routed(self, frames: Tensor, weights: Tensor) -> Tensor:
        """The same for one-hot weights; only the modules that some frame has chosen are run, and only on its frames."""
        chosen, made = weights.argmax(1), frames
        for number, branch in enumerate(self.branches.values(), 1):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows) == len(frames):
                return branch(frames)
            if len(rows):
                made = made.index_copy(0, rows, branch(frames[rows]))
        return made


# ---- the network (STMTrack) ----


class SmallTrunk(SmallNet):
    """`SmallNet` with a place for the label map."""

    stem_channels, stem_padding = 16, 1

    def stem(self, crops: Tensor) -> Tensor:
        return self.layers[:2](normalise(crops).contiguous(memory_format=torch.channels_last))

    def rest(self, x: Tensor) -> Tensor:
        return self.layers[2:](x)


class Path(nn.Module):
    """Trunk and neck, of memory frames or of query frames: crops, RGB, 0..255 -> (B, C, h, w).

    A memory frame comes with its label map, 1 where the target is, which is added behind the trunk's stem.
    """

    def __init__(self, config: DASTMConfig, memory: bool, pretrained: bool):
        super().__init__()
        if config.trunk == "tiny":
            self.trunk = SmallTrunk()
        elif config.trunk == "inception":
            self.trunk = Inception(pretrained)
        else:
            self.trunk = MobileOne(config.trunk, config.trunk_stage, pretrained)
        if memory:
            self.label = nn.Conv2d(1, self.trunk.stem_channels, 3, 2, self.trunk.stem_padding, bias=False)
        self.neck = nn.Conv2d(self.trunk.channels, config.width, 3, padding=1)
        for layer in [self.neck, self.label] if memory else [self.neck]:
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(self.neck.bias)

    def forward(self, crops: Tensor, trim: int, labels: Tensor | None = None) -> Tensor:
        x = self.trunk.stem(crops)  # (B, c, S / 2, S / 2)
        if labels is not None:
            x = x + self.label(labels[:, None].to(x))
        x = self.trunk.rest(x)  # (B, c', S / 8, S / 8)
        return self.neck(x[:, :, trim : x.shape[2] - trim, trim : x.shape[3] - trim])


def read(query: Tensor, memory: Tensor, known: Tensor | None = None, maps: bool = False) -> tuple[Tensor, Tensor | None]:
    """What each query cell (B, Q, C) finds in the memory (B, M, C): (B, Q, C), and with `maps` where, (B, Q, M).

    The memory is key and value at once, nothing is projected, and the order of its frames does not matter. Q and M need
    not be equal. `known` (B, M) bool: which cells count.
    """
    allowed = None if known is None else known[:, None]  # (B, 1, M)
    if not maps:
        q, m = query[:, None], memory[:, None]  # one head
        return F.scaled_dot_product_attention(q, m, m, None if allowed is None else allowed[:, None])[:, 0], None
    logits = query @ memory.transpose(1, 2) / query.shape[-1] ** 0.5
    weights = (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).softmax(-1)
    return weights @ memory, weights


class Head(nn.Module):
    """Three answers for each cell, from two towers: is the target here, is its centre near, how far are its sides."""

    def __init__(self, config: DASTMConfig):
        super().__init__()
        width = config.head_width
        self.score_tower, self.side_tower = (self._tower(2 * config.width, width, config.head_layers) for _ in range(2))
        self.score, self.centre, self.sides = (nn.Sequential(nn.Conv2d(width, n, 1), nn.BatchNorm2d(n)) for n in (1, 1, 4))
        self.scale, self.shift = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))
        for layer in (part for part in self.modules() if isinstance(part, nn.Conv2d)):
            nn.init.normal_(layer.weight, std=1e-4)
        nn.init.constant_(self.score[0].bias, -math.log(99))

    @staticmethod
    def _tower(inputs: int, width: int, layers: int) -> nn.Sequential:
        convolutions = [nn.Conv2d(inputs if i == 0 else width, width, 3, padding=1) for i in range(layers)]
        return nn.Sequential(*[part for layer in convolutions for part in (layer, nn.ReLU())][:-1])  # no ReLU at the end

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 2 C, h, w) -> logits (B, h w) of score and centreness, distances (B, h w, 4) to left, top, right, bottom, crop pixels."""
        seen, sides = self.score_tower(x), self.side_tower(x)
        distances = (self.scale * self.sides(sides) + self.shift).exp() * 8
        return self.score(seen).flatten(1), self.centre(seen).flatten(1), distances.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Answer:
    """What the network says of B query crops, cell by cell, row by row."""

    score: Tensor  # (B, N) logits: is the target here
    centre: Tensor  # (B, N) logits: is its centre near
    boxes: Tensor  # (B, N, 4), xyxy, crop pixels; the middle of the first pixel is at 0
    weights: Tensor | None  # with `maps`: where in the memory each cell found it, (B, N, M)

    @property
    def confidence(self) -> Tensor:
        return self.score.sigmoid() * self.centre.sigmoid()


# ---- what to look at, and what to forget ----


def wanted(count: int, segments: int) -> list[int]:
    """Which of `count` past frames, numbered from 1, STMTrack looks at: the first, and the middle of each of `segments`
    parts.

    Up to `segments` frames: all of them.
    """
    if count <= segments:
        return list(range(1, count + 1))
    length = count // segments
    return sorted({1, *(part * length + length // 2 + 1 for part in range(segments))})


def nearest(held: list[int], frame: int) -> int:
    """The held frame that is nearest to the wanted one, of two equally near ones the older."""
    return min(held, key=lambda h: (abs(h - frame), h))


def victim(held: list[int], segments: int) -> int:
    """Which frame a full memory forgets; `held`, in order, ends with the new frame, which stays, as does the first.

    The authors keep all frames. What they look at only moves forward: while the video grows from n frames to n + 1, the
    middle of the first part, n / 8 for four parts, passes each frame once, and what is before it is never wanted again.
    So of the frames up to it the oldest goes, unless there is only one, which may still be the nearest. If none can go
    for that reason, the frame goes whose two neighbours are nearest to each other, of several the oldest: the others stay
    evenly spread over all that will be wanted.

    Until frame 5 / 4 K, a memory of K frames is the authors'. From then on it looks at frames that are at most n / K away
    from theirs: with 64, within a sixteenth of the length of a part.
    """
    middle = held[-1] // segments // 2 + 1
    passed = [frame for frame in held[1:] if frame <= middle]
    if len(passed) > 1:
        return passed[0]
    between = zip(held[:-2], held[1:-1], held[2:], strict=True)
    return min((after - before, frame) for before, frame, after in between)[1]


@dataclass(frozen=True)
class DASTMState:
    """What the tracker remembers of B sequences.

    The memory is a row of slots. A slot holds a frame of each sequence, not the same one: `held` has their numbers, 0 for
    none. A step replaces one slot and shares the others with the state before it.
    """

    centre: Tensor  # (B, 2), x and y, frame pixels, float64
    size: Tensor  # (B, 2), width and height, frame pixels, float64
    fill: Tensor  # (B, 3), mean colour of the first frame, shown outside of every frame
    count: Tensor  # (B,) int64, frames seen
    confident: Tensor  # (B,) bool, whether the latest frame is worth a look
    held: Tensor  # (B, K) int64, numbers of the frames in the slots, from 1
    slots: tuple[Tensor, ...]  # K x (B, h, w, C), their features
    chosen: Tensor  # (B, N) int64, how often the gate has chosen what

    def fitted(self, other: DASTMState) -> DASTMState:
        """The same with as many slots as `other` at least; for `trackers.join`."""
        missing = max(0, len(other.slots) - len(self.slots))
        empty = torch.zeros_like(self.slots[0])
        return replace(self, held=F.pad(self.held, (0, missing)), slots=self.slots + (empty,) * missing)


def warped(frames: list[Tensor], centre: Tensor, side: Tensor, size: int, fill: Tensor) -> tuple[Tensor, Tensor]:
    """STMTrack's crops uint8 (B, 3, size, size) around `centre` (B, 2), `side` (B,) frame pixels wide; their scale (B,).

    The centre is cut to whole pixels and the side rounded, to s. Crop pixels 0 .. size - 1 lie evenly on window pixels 0
    .. s, so the window is one pixel wider than s, which is why the scale, crop pixels per frame pixel, is size / (s + 1).
    From a side of 2.1 sizes on, only every second pixel of the frame is used, from 3.1 on every third, and so on. Each
    crop pixel blends its four neighbours linearly; those outside the frame have the colour `fill`, cut to integers.

    This is OpenCV 5's `warpAffine`, but for one pixel in a hundred crops, by a grey level. It calculates in float32 with
    fused multiply-adds: as a product is exact in float64, so is its sum but for one rounding. Raises DataError for
    numbers that are not finite.
    """
    if not (torch.isfinite(centre).all() and torch.isfinite(side).all()):
        raise DataError("a crop window needs finite numbers; the box or the network's output is NaN or infinite")
    crops, scales, steps = [], [], torch.arange(size, dtype=torch.float64)
    for frame, at, wide, colour in zip(frames, centre.tolist(), side.tolist(), fill, strict=True):
        skip = max(int(wide / size - 0.1), 1)
        x, y = (int(c) for c in at)
        if skip > 1:
            frame = frame[:, y % skip :: skip, x % skip :: skip]
            x, y = x // skip, y // skip
        s = max(round(wide / skip), 2)
        scales.append(size / ((s + 1) * skip))
        step = torch.tensor(s / (size - 1), dtype=torch.float32).double()
        left, top = (c - (s - 1) // 2 for c in (x, y))
        columns = (steps * step + left).float()  # rounded once
        rows = (steps * step).float() + top  # rounded twice, as there
        colour = colour.to(frame.device, torch.uint8)[:, None, None]
        (index_y, known_y, share_y), (index_x, known_x, share_x) = (
            (t.to(frame.device) for t in _neighbours(*given)) for given in ((rows, frame.shape[1]), (columns, frame.shape[2]))
        )
        pixels = torch.where(known_y[:, None] & known_x, frame[:, index_y][:, :, index_x], colour).double()  # (3, 2 size, 2 size)
        left, right = pixels[..., :size], pixels[..., size:]
        above, below = (left + share_x * (right - left)).float().split(size, 1)
        crops.append((above + share_y[:, None] * (below - above).double()).float().round().to(torch.uint8))
    return torch.stack(crops), torch.tensor(scales, dtype=torch.float64)


def _neighbours(places: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: the pixels before all places (S,) and then those behind, (2 S,), cut to 0 .. length - 1; which of
    them were there already; and how far each place is from the one before towards the other, (S,) float64."""
    before = places.floor()
    index = torch.cat([before, before + 1]).long()
    return index.clamp(0, length - 1), (index >= 0) & (index < length), (places - before).double()


def label_map(boxes_xyxy: Tensor, size: int) -> Tensor:
    """1 in the pixels of each box, cut to integers, both ends included, else 0: (..., 4) crop pixels -> (..., size, size)."""
    steps = torch.arange(size, device=boxes_xyxy.device)
    low, high = boxes_xyxy.trunc()[..., None, None, :2], boxes_xyxy.trunc()[..., None, None, 2:]
    inside = [(steps >= low[..., axis]) & (steps <= high[..., axis]) for axis in (0, 1)]  # (..., 1, size)
    return (inside[1].transpose(-1, -2) & inside[0]).float()


class DASTM(Tracker):
    """The network and the way it tracks."""

    Config = DASTMConfig

    def __init__(self, config: DASTMConfig = DASTMConfig(), pretrained: bool = False):
        """`pretrained` starts both trunks from ImageNet (torchvision's or timm's weights, from their cache or the network)."""
        super().__init__(config)
        self.memory, self.query = Path(config, True, pretrained), Path(config, False, pretrained)
        if config.attention:
            self.attention = MemoryAttention(config)
        self.head = Head(config)
        if config.trunk == "tiny":
            self._start_as_lookup()

    @torch.no_grad()
    def _start_as_lookup(self) -> None:
        """First weights for a short training, not in the papers: both paths begin alike, so that a query cell finds in the
        memory what resembles it; and the head begins with few cells in the target (in STMTrack's head, the norm behind
        the bias that was to say so removes it)."""
        nn.init.kaiming_normal_(self.memory.neck.weight, nonlinearity="linear")
        for name, parameter in self.query.named_parameters():
            parameter.copy_(self.memory.get_parameter(name))
        for layer in (part for part in self.head.modules() if isinstance(part, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.constant_(self.head.score[1].bias, -2.0)

    # ---- the network (Fig. 1) ----

    def cells(self, size: int) -> Tensor:
        """Where the cells of a query crop are, see `cell_centres`."""
        return cell_centres(self.config, size).to(self.head.scale)

    def _trim(self, size: int) -> int:
        return self.config.trim if size == self.config.size else self.config.query_trim

    def answer(self, query: Tensor, memory: Tensor, size: int, known: Tensor | None = None, maps: bool = False) -> Answer:
        """Features of queries (B, C, h, w) from crops of `size` and of memories (B, T, h', w', C), `known` (B, T) -> boxes."""
        tokens = memory.flatten(1, 3)  # (B, M, C)
        if known is not None:
            known = known.repeat_interleave(tokens.shape[1] // memory.shape[1], 1)
        found, weights = read(query.flatten(2).transpose(1, 2), tokens, known, maps)
        found = found.transpose(1, 2).unflatten(2, query.shape[2:])
        score, centre, distances = self.head(torch.cat([found, query], 1))
        cells = self.cells(size)
        return Answer(score, centre, torch.cat([cells - distances[..., :2], cells + distances[..., 2:]], 2), weights)

    def forward(self, memories: Tensor, labels: Tensor, queries: Tensor, tau: float = 0.0) -> tuple[Answer, Choices | None]:
        """Crops (B, T, 3, S, S) with their label maps (B, T, S, S), and crops (B, 3, S', S')."""
        size = queries.shape[-1]
        memory = self.memory(memories.flatten(0, 1), self.config.trim, labels.flatten(0, 1)).unflatten(0, memories.shape[:2])
        choices = None
        if self.config.attention:
            memory, choices = self.attention(memory, tau=tau)
        return self.answer(self.query(queries, self._trim(size)), memory.permute(0, 1, 3, 4, 2), size), choices

    # ---- tracking (STMTrack) ----

    @torch.no_grad()
    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> DASTMState:
        frames, boxes = self.checked(frames, boxes_xywh)
        batch, half = len(frames), boxes[:, 2:] / 2 if self.config.exact else (boxes[:, 2:] - 1) / 2
        state = DASTMState(
            centre=boxes[:, :2] + half,
            size=boxes[:, 2:],
            fill=torch.stack([mean_colour(frame) for frame in frames]),
            count=torch.ones(batch, dtype=torch.long),
            confident=torch.zeros(batch, dtype=torch.bool),
            held=torch.zeros(batch, 0, dtype=torch.long),
            slots=(),
            chosen=torch.zeros(batch, 1 + len(self.config.attention), dtype=torch.long),
        )
        return self._memorise(state, frames)

    @torch.no_grad()
    def step(self, state: DASTMState, frames: list[Tensor], maps: bool = False) -> tuple[DASTMState, Prediction]:
        cfg, frames = self.config, self.moved(frames)

        # 1. the past, and the surroundings of the last position
        past, known, numbers = self._recall(state)  # (B, T, h, w, C)
        choices = None
        if cfg.attention and cfg.granularity == "memory":
            past, choices = self.attention(past.permute(0, 1, 4, 2, 3), known, self._draws(state.count))
            past = past.permute(0, 1, 3, 4, 2)
        crops, scale, origin = self._look(frames, state, cfg.query_size)
        answer = self.answer(self.query(crops, self._trim(cfg.query_size)), past, cfg.query_size, known, maps)

        # 2. the best cell's box
        box, rate, score, response = self._choose(answer, state.size * scale[:, None])
        centre = origin + box[:, :2] / scale[:, None]
        size = state.size * (1 - rate) + box[:, 2:] / scale[:, None] * rate
        limit = torch.tensor([frame.shape[:0:-1] for frame in frames], dtype=torch.float64)  # (B, 2): width, height
        centre, size = torch.minimum(centre.clamp(min=0), limit), torch.minimum(size.clamp(min=cfg.min_size), limit)

        # 3. remember this frame
        state = replace(state, centre=centre, size=size, count=state.count + 1, confident=score > cfg.confidence)
        if choices is not None:
            state = replace(state, chosen=state.chosen + choices.weights[:, 0].round().long().cpu())
        state = self._memorise(state, frames)
        half = size / 2 if cfg.exact else (size - 1) / 2
        seen = None
        if maps:
            grid = round(answer.score.shape[1] ** 0.5)
            names = {"score": answer.score.sigmoid(), "centre": answer.centre.sigmoid(), "response": response.to(answer.score)}
            seen = {
                "crop": crops,
                **{name: value.unflatten(1, (grid, grid)) for name, value in names.items()},
                "read": answer.weights.unflatten(2, past.shape[1:4]),  # (B, N, T, h, w)
                "memory": numbers,  # (B, T), the frames looked at, from 1; 0 for none
                "chosen": state.chosen,
                "window": torch.cat([origin, (cfg.query_size / scale)[:, None]], 1),
            }
        return state, Prediction(torch.cat([centre - half, size], 1), score, seen)

    def _look(self, frames: list[Tensor], state: DASTMState, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Crops around the targets, crop pixels per frame pixel (B,), and where the middle of crop pixel 0 is in the frame (B, 2)."""
        side = self.config.factor * size / self.config.size * state.size.prod(1).sqrt()
        if self.config.exact:
            windows = Windows.around(state.centre, side, size)
            corner = torch.stack([windows.left, windows.top], 1)
            return cut(frames, windows, state.fill), windows.scale, corner + 0.5 / windows.scale[:, None]
        crops, scale = warped(frames, state.centre, side, size, state.fill)
        return crops, scale, state.centre - size // 2 / scale[:, None]

    def _choose(self, answer: Answer, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best box (B, 4) cxcywh, crop pixels, how far to follow its size (B, 1), its score (B,), the response (B, N).

        A box counts for less if its size or shape differs from the last one, (B, 2) crop pixels, or if it is far away.
        """
        cfg, score, boxes = self.config, answer.confidence.double().cpu(), xyxy_to_cxcywh(answer.boxes.double().cpu())
        boxes[..., 2:] += 1  # both corners are inside
        sides = boxes[..., 2:]  # (B, N, 2)

        def change(ratio: Tensor) -> Tensor:
            return torch.maximum(ratio, 1 / ratio)

        def extent(sides: Tensor) -> Tensor:
            return (sides + sides.mean(-1, keepdim=True)).prod(-1).sqrt()

        size = size[:, None]
        shape = change(size[..., 0] / size[..., 1] / (sides[..., 0] / sides[..., 1]))
        penalty = torch.exp((1 - shape * change(extent(sides) / extent(size))) * cfg.penalty)  # (B, N)
        hann = torch.hann_window(round(score.shape[1] ** 0.5), periodic=False, dtype=torch.float64)
        response = penalty * score * (1 - cfg.window) + torch.outer(hann, hann).flatten() * cfg.window
        best = response.argmax(1, keepdim=True)
        rate = (penalty * score).gather(1, best) * cfg.rate
        return boxes[torch.arange(len(boxes)), best[:, 0]], rate, response.gather(1, best)[:, 0], response

    def _recall(self, state: DASTMState) -> tuple[Tensor, Tensor | None, Tensor]:
        """What is looked at: features (B, T, h, w, C), which of them are real (B, T) if not all are, and their numbers (B, T)."""
        rows = []
        for held, count, confident in zip(state.held.tolist(), state.count.tolist(), state.confident.tolist(), strict=True):
            frames = sorted(set(held) - {0})
            looked_at = {nearest(frames, f) for f in wanted(count, self.config.segments)}
            rows.append(sorted(looked_at | ({count} if confident else set())))
        longest = max(map(len, rows))
        numbers = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        features = []
        for i, (row, held) in enumerate(zip(numbers.tolist(), state.held.tolist(), strict=True)):
            features += [state.slots[held.index(f) if f else 0][i] for f in row]
        features = torch.stack(features).unflatten(0, numbers.shape)
        known = (numbers > 0).to(features.device)
        return features, None if (numbers > 0).all() else known, numbers

    def _memorise(self, state: DASTMState, frames: list[Tensor]) -> DASTMState:
        """Encode the frames with their boxes, and keep them in place of what can best be missed."""
        cfg = self.config
        crops, scale, origin = self._look(frames, state, cfg.size)
        # the authors count the target as in the middle of the crop, though that was moved to a whole pixel
        middle = (state.centre - origin) * scale[:, None] if cfg.exact else torch.full_like(state.centre, (cfg.size - 1) / 2)
        half = (state.size * scale[:, None] - 1) / 2
        labels = label_map(torch.cat([middle - half, middle + half], 1), cfg.size).to(crops.device)
        features = self.memory(crops, cfg.trim, labels)
        if cfg.attention and cfg.granularity == "frame":
            features, choices = self.attention(features[:, None], draws=self._draws(state.count))
            features = features[:, 0]
            if choices is not None:
                state = replace(state, chosen=state.chosen + choices.weights[:, 0].round().long().cpu())
        features = features.permute(0, 2, 3, 1).contiguous()

        held, slots, places = state.held.tolist(), list(state.slots), []
        for row, count in zip(held, state.count.tolist(), strict=True):
            if 0 in row:
                places.append(row.index(0))
            elif cfg.memory == "unbounded" or len(row) < cfg.capacity:
                places.append(len(row))
            else:
                places.append(row.index(victim([*sorted(row), count], cfg.segments)))
            row += [0] * (max(places) + 1 - len(row))
            row[places[-1]] = count
        width = max(map(len, held))
        slots += [torch.zeros_like(features)] * (width - len(slots))
        for place in set(places):
            mine = torch.tensor([p == place for p in places], device=features.device)[:, None, None, None]
            slots[place] = features if set(places) == {place} else torch.where(mine, features, slots[place])
        held = torch.tensor([row + [0] * (width - len(row)) for row in held])
        return replace(state, held=held, slots=tuple(slots))

    def _draws(self, counts: Tensor) -> Tensor | None:
        """The decisions (B, 1) of a random gate for frames with these numbers, the same in every run; None for other gates."""
        if (self.config.test_gate or self.config.gate) != "random":
            return None
        seeds = (torch.Generator().manual_seed(self.config.seed * 1_000_003 + count) for count in counts.tolist())
        choices = 1 + len(self.config.attention)
        return torch.stack([torch.randint(choices, (1,), generator=seed) for seed in seeds]).to(self.device)

    # ---- costs (DASTM, Table 4) ----

    def profile(self) -> dict:
        """Parameters, multiply-accumulates of a frame with a full memory, and the bytes of weights and of a full state.

        A frame is encoded twice, as query and as memory; of the gate's modules the dearest is counted. STMTrack's paper
        has no such numbers. DASTM's has none for its unconstrained trackers but the peak memory of an RTX 3060 and its
        frames per second; the "34.7 % less overhead" of its abstract is (1.99 - 1.30) / 1.99, so memory. Its baseline is
        STMTrack as published: how much is MobileOne's and how much the attention's merit cannot be told. See `within` for
        the budgets of 8 and 7 GFLOPs.
        """
        cfg, total = self.config, sum(p.numel() for p in self.parameters())
        frames = cfg.capacity if cfg.memory == "bounded" else cfg.segments + 2
        cells = (cells_of(cfg.trunk, cfg.size) - 2 * cfg.trim) ** 2
        return {
            "parameters": total,
            "macs": frame_macs(cfg),
            "weight_bytes": 4 * total,
            "state_bytes": 4 * frames * cfg.width * cells,
            "paper": TABLE_4.get(cfg, {}),
        }

    # ---- training (STMTrack; DASTM, section IV.B) ----

    def loss(self, batch: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        """Losses of a batch: focal + centreness + 3 * IoU. "labels", if there, say which queries show the target;
        "progress", the share of the training that is done, cools the gate."""
        cfg = self.config
        tau = cfg.tau * (cfg.tau_end / cfg.tau) ** float(batch.get("progress", 1.0)) if cfg.tau_end else cfg.tau
        queries = batch["searches"][:, 0]  # (B, 3, S, S)
        truth = _in_pixels(batch["search_boxes"][:, 0], queries.shape[-1])
        shown = batch["labels"][:, 0] > 0 if "labels" in batch else torch.ones_like(truth[:, 0], dtype=torch.bool)
        labels = label_map(_in_pixels(batch["template_boxes"], cfg.size), cfg.size)
        answer, choices = self(batch["templates"], labels, queries, tau)
        losses = detection_losses(answer, self.cells(queries.shape[-1]), truth, shown)
        if cfg.cost_weight and choices is not None:
            costs = torch.tensor([0, *module_macs(cfg).values()], dtype=torch.float32, device=queries.device)
            losses["cost"] = ((choices.probability * costs / costs.max()).sum(-1).mean() - cfg.cost_share).abs()
            losses["loss"] = losses["loss"] + cfg.cost_weight * losses["cost"]
        return losses

    def samples(self) -> SampleSpec:
        """Memory frames and a query in any order, within 50 frames; every third query is of something else.

        The authors also push each window into the frame as far as it fits, and draw its side from U(1 / 1.3, 1.3); here
        the target's size is drawn from U(0.77, 1.3).
        """
        cfg = self.config
        crop = CropSpec(cfg.size, cfg.factor, shift_px=0.2 * cfg.size, scale=0.265)
        rule = FrameRule(min_share=0.01, max_share=0.8, max_aspect=10)
        frames = {"templates": cfg.train_frames, "order": "any", "max_gap": 50, "rule": rule, "negatives": 1 / 3}
        return SampleSpec(template=crop, search=crop, **frames)

    def recipe(self, scale: str) -> list[Stage]:
        """Everything but the trunks' convolutions, then those too. `paper`: by DASTM's paper or by STMTrack's code.

        DASTM: 20 epochs of 30,000 iterations, the rate falling exponentially from 0.005 to 0.0001, the trunk frozen for
        the first 5 epochs. The paper does not say that the trunk learns at a tenth of the rate; STMTrack's does.
        STMTrack: 20 epochs of GOT-10k's 150,000 samples, 0.08 after an epoch's rise, the trunk's Mixed layers learn from
        the 11th epoch on, all of its norms from the first. Its rate falls by half a cosine to 1e-6; here it falls
        exponentially through that cosine's value in the middle.
        """
        cfg, short = self.config, scale in ("tiny", "laptop")
        plain = not cfg.attention  # STMTrack
        sample = self.samples()
        if short or cfg.trunk == "tiny":
            steps, batch = {"tiny": (300, 16), "laptop": (3000, 24), "gpu": (20_000, 64), "paper": (100_000, 64)}[scale]
            rest = {"lr": 2e-3, "lr_end": 1e-5, "warmup": 100, "weight_decay": 1e-4, "clip": 1.0}
            return [Stage("memory", steps=steps, batch=batch, sample=sample, **rest)]
        epoch = 1000 if scale == "gpu" else 150_000 // 32 if plain else 30_000
        first = 10 if plain else 5  # epochs
        rates = (0.08, 0.043, 1e-6) if plain else (0.005, 0.005 * 0.02**0.25, 0.0001)

        body = ("memory.label.*", "memory.neck.*", "query.neck.*", "head.*", *(["attention.*"] if cfg.attention else []))
        norms = ("*.trunk.*.bn.*",) if cfg.trunk == "inception" else ()
        later = ("*.trunk.Mixed_*",) if cfg.trunk == "inception" else ("*.trunk.*",)

        def stage(name: str, epochs: int, trainable: tuple[str, ...], **rest) -> Stage:
            factors = (("*.trunk.*", 0.1),) if any("trunk" in pattern for pattern in trainable) else ()
            shared = {"batch": 32, "sample": sample, "momentum": 0.9, "weight_decay": 1e-4, "rates": factors}
            return Stage(name, steps=epochs * epoch, trainable=trainable, **shared, **rest)

        return [
            stage("frozen trunk", first, (*body, *norms), lr=rates[0], lr_end=rates[1], warmup=epoch if plain else 0),
            stage("all", 20 - first, (*body, *norms, *later), lr=rates[1], lr_end=rates[2]),
        ]


def _in_pixels(boxes: Tensor, size: int) -> Tensor:
    """cxcywh in units of the crop -> xyxy, crop pixels, counted from the middle of the first pixel, both ends inside."""
    boxes = cxcywh_to_xyxy(boxes * size)
    return torch.cat([boxes[..., :2], boxes[..., 2:] - 1], -1)


def targets(cells: Tensor, truth: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """What each cell (N, 2) should say, for true boxes (B, 4) xyxy: is the target here, 1, 0 or -1 (do not ask), and
    centreness (B, N).

    Where a query does not show the target, `shown` (B,), its box is of something similar: the cells in it must say no,
    the others are not asked.
    """
    low, high = cells - truth[:, None, :2], truth[:, None, 2:] - cells  # (B, N, 2)
    inside = (torch.cat([low, high], 2) > 0).all(2)
    product = torch.minimum(low, high).prod(2) / (torch.maximum(low, high).prod(2) + 1e-5)
    centre = torch.where(inside, product.abs().sqrt(), torch.zeros_like(product))
    return torch.where(shown[:, None], inside.long(), inside.long() - 1), centre


def detection_losses(answer: Answer, cells: Tensor, truth: Tensor, shown: Tensor) -> dict[str, Tensor]:
    """STMTrack's losses of B queries, for true boxes (B, 4) xyxy, crop pixels.

    score: focal loss with alpha 0.75 and gamma 2, over the number of cells in the target. centre: cross-entropy less the
    least that can be reached, over the cells with any centreness, of negative queries too. sides: 3 * -log IoU of boxes
    whose ends are inside, over the cells in the target.
    """
    label, centre = targets(cells.float(), truth.float(), shown)
    positive = label == 1
    count = positive.sum().clamp(min=1)
    score, toward = answer.score.float(), torch.where(positive, 0.75, 0.25)
    cross = F.binary_cross_entropy_with_logits(score, positive.float(), reduction="none")
    focal = (toward * (1 - torch.exp(-cross)) ** 2 * cross)[label >= 0].sum() / count

    middle = centre > 0
    aim = centre[middle]
    cross = F.binary_cross_entropy_with_logits(answer.centre.float()[middle], aim, reduction="none")
    least = F.binary_cross_entropy(aim, aim, reduction="none")
    centreness = (cross - least).sum() / middle.sum().clamp(min=1)

    boxes, truth = answer.boxes.float()[positive], truth.float()[:, None].expand_as(answer.boxes)[positive]
    sides, true_sides = (b[:, 2:] - b[:, :2] + 1 for b in (boxes, truth))
    shared = (torch.minimum(boxes[:, 2:], truth[:, 2:]) - torch.maximum(boxes[:, :2], truth[:, :2]) + 1).clamp(min=0).prod(1)
    iou = shared / (sides.prod(1) + true_sides.prod(1) - shared)
    log = -iou.clamp(min=torch.finfo(torch.float32).tiny).log().sum() / count
    parts = {"score": focal, "centre": centreness, "sides": 3 * log}
    return {"loss": sum(parts.values()), **parts, "iou": iou.detach().sum() / count}


def frame_macs(config: DASTMConfig) -> int:
    """Multiply-accumulates of a tracked frame with all the memory frames that may be looked at; of a gate's modules the dearest."""
    looked_at, cells = config.segments + 2, [len(cell_centres(config, size)) for size in (config.size, config.query_size)]
    total = _network_macs(replace(config, attention=(), gate="none", test_gate="", segments=1))
    total += looked_at * 2 * config.width * math.prod(cells)  # the read-out
    costs = [*module_macs(config).values()] or [0]
    strengthened = looked_at if config.granularity == "memory" else 1
    if config.gate == "none":
        return total + strengthened * sum(costs)
    return total + strengthened * ((sum if config.gate == "soft" else max)(costs) + gate_macs(config))


@cache
def _network_macs(config: DASTMConfig) -> int:
    """Of both paths and the head, without the read-out. Counted on tensors without values, so nothing is computed."""
    from trackkit.profiling import macs

    with torch.device("meta"):
        twin = DASTM(config).eval()
        crop, query = (torch.empty(1, 3, size, size, dtype=torch.uint8) for size in (config.size, config.query_size))

        def frame() -> None:
            twin.memory(crop, config.trim, torch.empty(1, config.size, config.size))
            features = twin.query(query, config.query_trim)
            twin.head(torch.cat([features, features], 1))

        return macs(frame)


@cache
def module_macs(config: DASTMConfig) -> dict[str, int]:
    """Multiply-accumulates of each attention module for one memory frame."""
    from trackkit.profiling import macs

    side = cells_of(config.trunk, config.size) - 2 * config.trim
    with torch.device("meta"):
        branches = MemoryAttention(replace(config, gate="none", test_gate="")).eval().branches
        x = torch.empty(1, config.width, side, side)
        return {name: macs(lambda branch=branch: branch(x)) for name, branch in branches.items()}


def gate_macs(config: DASTMConfig) -> int:
    """Multiply-accumulates of a decision."""
    return (config.width + 1 + len(config.attention)) * (config.width // config.gate_reduction)


def within(config: DASTMConfig, macs: int) -> DASTMConfig:
    """The config with fewer memory frames, then fewer modules (the dearest go first), such that a tracked frame costs at
    most `macs`.

    Table 4 has budgets of 8 and 7 GFLOPs and does not say what of. All attention together is less than a thousandth of
    the tracker, so a gate alone can keep no such budget; and only a query of 160 pixels comes near it, as the head costs
    7.4 G multiply-accumulates for one of 289. TrackkitError, with what is needed at least, when the rest costs more.
    """
    plans = [replace(config, segments=count) for count in range(config.segments, 0, -1)]
    dear = sorted(module_macs(config).items(), key=lambda item: -item[1])
    for dropped in range(1, len(dear)):
        plans.append(replace(plans[-1], attention=tuple(n for n in config.attention if n not in dict(dear[:dropped]))))
    costs = []
    for plan in plans:
        costs.append(frame_macs(plan))
        if costs[-1] <= macs:
            return plan
    text = f"no memory is small enough for {macs:,} multiply-accumulates a frame: the least is {min(costs):,}"
    raise TrackkitError(f"{text}; take a smaller query_size or trunk")


TABLE_4 = {  # its first and fourth rows, and Table 2
    DASTMConfig.stmtrack(): {"peak_memory_bytes": 1_240_000_000, "frames_per_second": 37},
    DASTMConfig.sastm(): {"peak_memory_bytes": 1_990_000_000, "frames_per_second": 31},
    DASTMConfig.dastm(): {"peak_memory_bytes": 1_300_000_000, "frames_per_second": 36, "high_computation_share": 0.335},
}  # the last is how often the gate chose the "high-computation mode"; its text calls CBAM that, though coordinate attention costs more
