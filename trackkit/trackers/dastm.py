"""STMTrack: a memory of past frames in place of a template. DASTM: the memory decides how to look
at each of them.

Fu, Liu, Fu, Wang: "STMTrack: Template-Free Visual Tracking with Space-Time Memory Networks", CVPR
2021. Past frames are encoded with a map of where the target was, and kept. Each cell of the present
frame (query) gathers from all cells of the memory what resembles it, and a head says for each cell
whether the target is there and how far its sides are.

Zhou, Xie, Xu: "Dynamic Attention Mechanism in Spatiotemporal Memory Networks for Object Tracking"
(DASTM). MobileOne encodes the frames, and a module of channel and spatial attention strengthens the
features of each memory frame before they are kept: SE, coordinate attention or CBAM, chosen by a
gate that looks at the frame (DASTM), or all three (SASTM).

STMTrack is that of the authors' code (fzh0917/STMTrack), whose checkpoints load by
`trackkit.official`; two of its faults are not kept: its label map wraps around where a box is
larger than the crop, and its memory grows without end. There is no code of DASTM. Where its paper
is silent we follow STMTrack, and DyFPN, which it names as the model of its gate; each such choice
is a field of the config.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.attention import CBAM, SE, CoordinateAttention
from trackkit.backbones import Inception, MobileOne, SmallTrunk
from trackkit.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from trackkit.crops import Windows, cut, mean_colour, warped
from trackkit.frames import FrameRule
from trackkit.heads import SidesHead
from trackkit.losses import detection_losses
from trackkit.memory import Memory
from trackkit.sampling import CropSpec, SampleSpec
from trackkit.stages import Stage
from trackkit.trackers.base import Prediction, Tracker

MODULES = ("se", "ca", "cbam")  # Table 1


@dataclass(frozen=True)
class DASTMConfig:
    """Numbers of the network, of training and of tracking; the defaults are DASTM.

    Attributes:
        trunk: "mobileone_s0" to "_s4", "inception" (STMTrack) or "tiny". The paper does not say
            which MobileOne.
        trunk_stage: stage of MobileOne whose output is used, 3 or 2; both are at stride 8 here. No
            effect with other trunks.
        size: side of the crops of memory frames, and of all crops in training, pixels; at least 33.
        factor: side of the memory's windows in units of the square root of the target's area.
        query_size: side of the crops of queries in tracking, pixels; at least 33. (The paper tracks
            with 160 and does not say how. Here the target is as large as in memory frames, so a
            smaller query shows less.)
        trim: cells that are cut off on each side of the trunk's output for crops of `size`.
        query_trim: the same for queries of another size; equal to `trim` if `query_size` is `size`.
        width: channels of memory and query; at least 16.
        head_width: channels of the head's towers.
        head_layers: convolutions in each of the head's towers.
        attention: modules for the memory, out of "se", "ca" and "cbam"; none is STMTrack.
        gate: "none" (all modules, as `static` says), "hard" (one module or none, learned straight
            through a Gumbel softmax), "soft" (a weighted sum, as Eq. 2 is written), "random" (Table
            3).
        test_gate: another gate for tracking, "hard", "soft" or "random"; "" for the same. Only with
            a gate.
        seed: of a random gate's decisions in tracking; no effect with other gates.
        static: "mean" or "sum" of the modules' outputs. A sum triples the logits of the read-out.
            Only with gate "none".
        tau: temperature of the gate (Eq. 2), above 0; no effect with gate "none".
        tau_end: what the temperature falls to in training, geometrically, in the stage in which all
            learns; 0 leaves it at `tau`. No effect with gate "none".
        gate_reduction: d, the gate's hidden layer has `width` / d units; 1 to `width`.
        gate_bias: the gate's first biases, of "none" and of each module.
        granularity: "frame", a decision for each memory frame when it is stored; "memory", one for
            all the frames that are looked at, made anew at each look.
        cost_weight: adds cost_weight * |expected cost - `cost_share`| to the loss (after DyFPN); 0
            adds nothing. Only with a gate.
        cost_share: the wanted cost of the gate's choice, in units of the dearest module's, 0 to 1;
            no effect if `cost_weight` is 0.
        memory: "bounded" to `capacity` frames (`trackkit.memory`) or "unbounded", the authors'
            rule.
        capacity: frames that are kept, at least `segments` + 2; no effect with memory "unbounded".
        segments: the stored frames are parted in so many, of each of which the middle is looked at,
            and the first of all.
        confidence: the latest frame is looked at too if its score exceeded this, 0 to 1.
        train_frames: memory frames of a training sample.
        epoch_steps: steps of an epoch, of which there are 20; 30,000 in the paper, which is six
            times STMTrack's. Only at the scale paper, and not with trunk "tiny".
        rate: how much of a change the box's size follows, 0 to 1, times the cell's score.
        window: share of a cosine window in the score by which a cell is chosen, 0 to 1.
        penalty: strength of the penalty on changes of size and shape, 0 for none (`_choose`).
        min_size: least width and height of a box, frame pixels.
        exact: boxes go into and out of crops by the crops' own geometry (`crops.Windows`). The
            authors' crop (`crops.warped`) ignores on the way out that windows are snapped to whole
            pixels; False does as they do.
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
    epoch_steps: int = 30_000
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
                raise ValueError(
                    f"{field} must be one of {', '.join(map(str, allowed))}; got "
                    f"{getattr(self, field)!r}"
                )
        if sorted(set(self.attention) & set(MODULES)) != sorted(self.attention):
            raise ValueError(
                f"attention must name each of {', '.join(MODULES)} at most once; got "
                f"{self.attention}"
            )
        if self.gate != "none" and not self.attention:
            raise ValueError(
                'a gate needs attention modules to choose from; without them gate must be "none"'
            )
        if self.test_gate and self.gate == "none":
            raise ValueError("test_gate replaces a gate, and there is none")
        if self.cost_weight and self.gate == "none":
            raise ValueError(
                "cost_weight weighs the cost of a gate's choices, and there is no gate; make it 0"
            )
        if (
            min(self.segments, self.train_frames, self.head_layers, self.epoch_steps) < 1
            or self.capacity < self.segments + 2
        ):
            raise ValueError(
                "need segments, train_frames, head_layers, epoch_steps >= 1, and a capacity of at "
                "least segments + 2"
            )
        if (
            min(self.tau, self.factor) <= 0
            or self.tau_end < 0
            or not 1 <= self.gate_reduction <= self.width
            or self.width < 16
        ):
            raise ValueError(
                "tau and factor must be above 0, tau_end not below; width at least 16, "
                "gate_reduction between 1 and it"
            )
        if self.size == self.query_size and self.trim != self.query_trim:
            raise ValueError(
                "memory and query crops are of one size, so trim and query_trim must be equal; "
                f"got {self.trim}, {self.query_trim}"
            )
        for size, trim in ((self.size, self.trim), (self.query_size, self.query_trim)):
            if size < 33 or cells_of(self.trunk, size) - 2 * trim < 1:
                raise ValueError(
                    f"a crop of {size} px leaves no cells when {trim} are cut off on each side"
                )

    @classmethod
    def stmtrack(cls, **changes) -> DASTMConfig:
        """STMTrack with the numbers for GOT-10k, LaSOT and TrackingNet; those for others are in
        `STMTRACK_SEARCHED`.
        """
        plain = {
            "trunk": "inception",
            "trim": 4,
            "query_trim": 4,
            "attention": (),
            "gate": "none",
            "epoch_steps": 150_000 // 32,
        }
        return cls(**{**plain, **changes})

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


# ---- the network (STMTrack) ----


def cells_of(trunk: str, size: int) -> int:
    """Cells along each side of the trunk's output for a crop of `size` pixels: 33 for 289 in
    Inception, 37 in the others.
    """
    if trunk == "inception":
        for kernel, stride in ((3, 2), (3, 1), (3, 2), (3, 1), (3, 2)):
            size = (size - kernel) // stride + 1
        return size
    return (size + 7) // 8


def cell_centres(config: DASTMConfig, size: int) -> Tensor:
    """Where the cells of a query crop of `size` are: x and y (N, 2), crop pixels, row by row. For
    289: 25 x 25 of them, at 48, 56, ... 240.

    STMTrack counts 25 cells around the middle, although Inception's layers without padding see 3
    pixels further up and left; the network learns that. Padded layers see cell k at pixel 8 k,
    which for 289 is the same 25 cells.
    """
    trim, first = (
        config.trim if size == config.size else config.query_trim,
        16 if config.trunk == "inception" else 0,
    )
    at = first + 8 * torch.arange(trim, cells_of(config.trunk, size) - trim)
    return torch.stack([at.repeat(len(at)), at.repeat_interleave(len(at))], 1)


def label_map(boxes_xyxy: Tensor, size: int) -> Tensor:
    """1 in the pixels of each box, cut to integers, both ends included, else 0: (..., 4) crop
    pixels -> (..., size, size).
    """
    steps = torch.arange(size, device=boxes_xyxy.device)
    low, high = boxes_xyxy.trunc()[..., None, None, :2], boxes_xyxy.trunc()[..., None, None, 2:]
    # (..., 1, size)
    inside = [(steps >= low[..., axis]) & (steps <= high[..., axis]) for axis in (0, 1)]
    return (inside[1].transpose(-1, -2) & inside[0]).float()


class Path(nn.Module):
    """Trunk and neck, of memory frames or of query frames: crops, RGB, 0..255 -> (B, C, h, w).

    A memory frame comes with its label map, 1 where the target is, which is added behind the
    trunk's stem.
    """

    def __init__(self, config: DASTMConfig, memory: bool):
        super().__init__()
        own = {"tiny": SmallTrunk, "inception": Inception}.get(config.trunk)
        self.trunk = own() if own else MobileOne(config.trunk, config.trunk_stage)
        if memory:
            self.label = nn.Conv2d(
                1, self.trunk.stem_channels, 3, 2, self.trunk.stem_padding, bias=False
            )
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


def read(
    query: Tensor, memory: Tensor, known: Tensor | None = None, maps: bool = False
) -> tuple[Tensor, Tensor | None]:
    """What each query cell (B, Q, C) finds in the memory (B, M, C): (B, Q, C), and with `maps`
    where, (B, Q, M).

    The memory is key and value at once, nothing is projected, and the order of its frames does not
    matter. Q and M need not be equal. `known` (B, M) bool: which cells count.
    """
    allowed = None if known is None else known[:, None]  # (B, 1, M)
    if not maps:
        q, m = query[:, None], memory[:, None]  # one head
        return F.scaled_dot_product_attention(
            q, m, m, None if allowed is None else allowed[:, None]
        )[:, 0], None
    logits = query @ memory.transpose(1, 2) / query.shape[-1] ** 0.5
    weights = (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).softmax(-1)
    return weights @ memory, weights


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


# ---- attention for memory frames (DASTM, section III.B) ----


class Gate(nn.Module):
    """Which module a frame needs (Eq. 1): (B, C, h, w) -> logits (B, choices), of which the first
    is to use none.

    The paper has four outputs in its text and N = 3 in Eq. 2; to decide whether a module is needed
    at all takes four.
    """

    def __init__(self, channels: int, choices: int, reduction: int, bias: tuple[float, float]):
        super().__init__()
        self.fc1, self.fc2 = (
            nn.Linear(channels, channels // reduction),
            nn.Linear(channels // reduction, choices),
        )
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
    """The dynamic attention block, or its static relatives (Fig. 2): features of memory frames,
    strengthened.
    """

    def __init__(self, config: DASTMConfig):
        super().__init__()
        self.config = cfg = config
        kinds = {"se": SE, "ca": CoordinateAttention, "cbam": CBAM}
        self.branches = nn.ModuleDict(
            {name: kinds[name](cfg.width) for name in MODULES if name in cfg.attention}
        )
        if cfg.gate != "none":
            self.gate = Gate(cfg.width, 1 + len(self.branches), cfg.gate_reduction, cfg.gate_bias)

    def forward(
        self, x: Tensor, known: Tensor | None = None, draws: Tensor | None = None, tau: float = 0.0
    ) -> tuple[Tensor, Choices | None]:
        """Features (B, T, C, h, w) -> the same, and what the gate said.

        `known` (B, T) bool marks real frames. `draws` (B, 1) int64 are the decisions of a random
        gate in tracking.
        """
        cfg, batch, count = self.config, *x.shape[:2]
        frames = x.flatten(0, 1)  # (B * T, C, h, w)
        if cfg.gate == "none":
            share = 1 / len(self.branches) if cfg.static == "mean" else 1.0
            return sum(branch(frames) * share for branch in self.branches.values()).view_as(x), None
        tau, kind = tau or cfg.tau, cfg.gate if self.training else cfg.test_gate or cfg.gate
        logits = self.gate(frames).float().unflatten(0, (batch, count))  # Eq. 1
        if cfg.granularity == "memory":  # (B, 1, N): all frames that are there decide together
            real = (
                torch.ones_like(logits[..., :1]) if known is None else known[..., None].to(logits)
            )
            logits = (logits * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        probability = weights = (logits / tau).softmax(-1)  # Eq. 2
        # one-hot, drawn by these probabilities, with the gradient of a softmax
        if kind == "hard" and self.training:
            weights = F.gumbel_softmax(logits, tau, hard=True)
        elif kind != "soft":
            drawn = (
                torch.randint(logits.shape[-1], logits.shape[:2], device=x.device)
                if draws is None
                else draws
            )
            weights = F.one_hot(
                drawn if kind == "random" else logits.argmax(-1), logits.shape[-1]
            ).to(logits)
        choices = Choices(probability.expand(-1, count, -1), weights.expand(-1, count, -1))
        mix = self.mixed if kind == "soft" or self.training else self.routed
        return mix(frames, choices.weights.flatten(0, 1).to(x)).view_as(x), choices

    def mixed(self, frames: Tensor, weights: Tensor) -> Tensor:
        """All choices' outputs, weighted: (M, C, h, w) and (M, N) -> (M, C, h, w)."""
        outputs = [frames, *(branch(frames) for branch in self.branches.values())]
        return sum(
            w[:, None, None, None] * y for w, y in zip(weights.unbind(1), outputs, strict=True)
        )

    def routed(self, frames: Tensor, weights: Tensor) -> Tensor:
        """The same for one-hot weights: each module runs on the frames that have chosen it, and
        only on those.
        """
        chosen, made = weights.argmax(1), frames
        for number, branch in enumerate(self.branches.values(), 1):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                made = made.index_copy(0, rows, branch(frames[rows]))
        return made


# ---- the tracker ----


@dataclass(frozen=True)
class DASTMState:
    """What the tracker remembers of B sequences."""

    centre: Tensor  # (B, 2), x and y, frame pixels, float64
    size: Tensor  # (B, 2), width and height, frame pixels, float64
    fill: Tensor  # (B, 3), mean colour of the first frame, shown outside of every frame
    count: Tensor  # (B,) int64, frames seen
    confident: Tensor  # (B,) bool, whether the latest frame is worth a look
    memory: Memory  # features (B, h, w, C) of past frames
    chosen: Tensor  # (B, N) int64, how often the gate has chosen what

    def fitted(self, other: DASTMState) -> DASTMState:
        """The same with as many slots as `other` at least; for `trackers.join`."""
        return replace(self, memory=self.memory.fitted(other.memory))


class DASTM(Tracker):
    """The network and the way it tracks."""

    Config = DASTMConfig

    def __init__(self, config: DASTMConfig = DASTMConfig()):
        super().__init__(config)
        self.pretrained = False
        self.memory, self.query = Path(config, memory=True), Path(config, memory=False)
        if config.attention:
            self.attention = MemoryAttention(config)
        self.head = SidesHead(2 * config.width, config.head_width, config.head_layers)
        if config.trunk == "tiny":
            self._start_as_lookup()

    def load_pretrained(self) -> bool:
        """Start both trunks from ImageNet's weights; see `Tracker.load_pretrained`."""
        if self.config.trunk == "tiny":
            return False
        for path in (self.memory, self.query):
            path.trunk.load_pretrained()
        self.pretrained = True
        return True

    @torch.no_grad()
    def _start_as_lookup(self) -> None:
        """First weights for a short training, not in the papers: both paths begin alike, so that a
        query cell finds in the memory what resembles it; and the head begins with few cells in the
        target (in STMTrack's head, the norm behind the bias that was to say so removes it).
        """
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

    def answer(
        self,
        query: Tensor,
        memory: Tensor,
        size: int,
        known: Tensor | None = None,
        maps: bool = False,
    ) -> Answer:
        """Features of queries (B, C, h, w) from crops of `size` and of memories (B, T, h', w', C),
        `known` (B, T) -> boxes.
        """
        tokens = memory.flatten(1, 3)  # (B, M, C)
        if known is not None:
            known = known.repeat_interleave(tokens.shape[1] // memory.shape[1], 1)
        found, weights = read(query.flatten(2).transpose(1, 2), tokens, known, maps)
        found = found.transpose(1, 2).unflatten(2, query.shape[2:])
        score, centre, distances = self.head(torch.cat([found, query], 1))
        cells, (low, high) = self.cells(size), (8 * distances).split(2, 2)
        return Answer(score, centre, torch.cat([cells - low, cells + high], 2), weights)

    def forward(
        self, memories: Tensor, labels: Tensor, queries: Tensor, tau: float = 0.0
    ) -> tuple[Answer, Choices | None]:
        """Crops (B, T, 3, S, S) with their label maps (B, T, S, S), and crops (B, 3, S', S')."""
        size = queries.shape[-1]
        memory = self.memory(
            memories.flatten(0, 1), self.config.trim, labels.flatten(0, 1)
        ).unflatten(0, memories.shape[:2])
        choices = None
        if self.config.attention:
            memory, choices = self.attention(memory, tau=tau)
        return self.answer(
            self.query(queries, self._trim(size)), memory.permute(0, 1, 3, 4, 2), size
        ), choices

    # ---- tracking (STMTrack) ----

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> DASTMState:
        frames, boxes = self.checked(frames, boxes_xywh)
        batch, half = len(frames), boxes[:, 2:] / 2 if self.config.exact else (boxes[:, 2:] - 1) / 2
        state = DASTMState(
            centre=boxes[:, :2] + half,
            size=boxes[:, 2:],
            fill=torch.stack([mean_colour(frame) for frame in frames]),
            count=torch.ones(batch, dtype=torch.long),
            confident=torch.zeros(batch, dtype=torch.bool),
            memory=Memory(torch.zeros(batch, 0, dtype=torch.long)),
            chosen=torch.zeros(batch, 1 + len(self.config.attention), dtype=torch.long),
        )
        return self._memorise(state, frames)

    def step(
        self, state: DASTMState, frames: list[Tensor], maps: bool = False
    ) -> tuple[DASTMState, Prediction]:
        cfg, frames = self.config, self.moved(frames)

        # 1. the past, and the surroundings of the last position
        numbers = state.memory.looked_at(state.count, state.confident, cfg.segments)  # (B, T)
        past, known = state.memory.recalled(numbers)  # (B, T, h, w, C)
        if cfg.attention and cfg.granularity == "memory":
            past, state = self._strengthened(past.permute(0, 1, 4, 2, 3), state, known)
            past = past.permute(0, 1, 3, 4, 2)
        crops, scale, origin = self._look(frames, state, cfg.query_size)
        answer = self.answer(
            self.query(crops, self._trim(cfg.query_size)), past, cfg.query_size, known, maps
        )

        # 2. the best cell's box
        box, rate, score, response = self._choose(answer, state.size * scale[:, None])
        centre = origin + box[:, :2] / scale[:, None]
        size = state.size * (1 - rate) + box[:, 2:] / scale[:, None] * rate
        # (B, 2): width, height
        limit = torch.tensor([frame.shape[:0:-1] for frame in frames], dtype=torch.float64)
        centre, size = (
            torch.minimum(centre.clamp(min=0), limit),
            torch.minimum(size.clamp(min=cfg.min_size), limit),
        )

        # 3. remember this frame
        state = replace(
            state, centre=centre, size=size, count=state.count + 1, confident=score > cfg.confidence
        )
        state = self._memorise(state, frames)
        half = size / 2 if cfg.exact else (size - 1) / 2
        seen = None
        if maps:
            grid = [round(answer.score.shape[1] ** 0.5)] * 2
            seen = {
                "crop": crops,
                "score": answer.score.sigmoid().unflatten(1, grid),
                "centre": answer.centre.sigmoid().unflatten(1, grid),
                "response": response.to(answer.score).unflatten(1, grid),
                "read": answer.weights.unflatten(2, past.shape[1:4]),  # (B, N, T, h, w)
                "memory": numbers,  # (B, T), the frames looked at, from 1; 0 for none
                "chosen": state.chosen,
                "window": torch.cat([origin, (cfg.query_size / scale)[:, None]], 1),
            }
        return state, Prediction(torch.cat([centre - half, size], 1), score, seen)

    def _look(
        self, frames: list[Tensor], state: DASTMState, size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Crops around the targets, crop pixels per frame pixel (B,), and where the middle of crop
        pixel 0 is in the frame (B, 2).
        """
        side = self.config.factor * size / self.config.size * state.size.prod(1).sqrt()
        if self.config.exact:
            windows = Windows.around(state.centre, side, size)
            corner = torch.stack([windows.left, windows.top], 1)
            return (
                cut(frames, windows, state.fill),
                windows.scale,
                corner + 0.5 / windows.scale[:, None],
            )
        crops, scale = warped(frames, state.centre, side, size, state.fill)
        return crops, scale, state.centre - size // 2 / scale[:, None]

    def _choose(self, answer: Answer, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best box (B, 4) cxcywh, crop pixels, how far to follow its size (B, 1), its score
        (B,), the response (B, N).

        A box counts for less if its size or shape differs from the last one, (B, 2) crop pixels, or
        if it is far away.
        """
        cfg, score, boxes = (
            self.config,
            answer.confidence.double().cpu(),
            xyxy_to_cxcywh(answer.boxes.double().cpu()),
        )
        boxes[..., 2:] += 1  # both corners are inside
        sides = boxes[..., 2:]  # (B, N, 2)

        def change(ratio: Tensor) -> Tensor:
            return torch.maximum(ratio, 1 / ratio)

        def extent(sides: Tensor) -> Tensor:
            return (sides + sides.mean(-1, keepdim=True)).prod(-1).sqrt()

        size = size[:, None]
        shape = change(size[..., 0] / size[..., 1] / (sides[..., 0] / sides[..., 1]))
        # (B, N)
        penalty = torch.exp((1 - shape * change(extent(sides) / extent(size))) * cfg.penalty)
        hann = torch.hann_window(round(score.shape[1] ** 0.5), periodic=False, dtype=torch.float64)
        response = (
            penalty * score * (1 - cfg.window) + torch.outer(hann, hann).flatten() * cfg.window
        )
        best = response.argmax(1, keepdim=True)
        rate = (penalty * score).gather(1, best) * cfg.rate
        return (
            boxes[torch.arange(len(boxes)), best[:, 0]],
            rate,
            response.gather(1, best)[:, 0],
            response,
        )

    def _memorise(self, state: DASTMState, frames: list[Tensor]) -> DASTMState:
        """Encode the frames with their boxes, and keep them in place of what can best be missed."""
        cfg = self.config
        crops, scale, origin = self._look(frames, state, cfg.size)
        # the authors count the target as in the middle of the crop, though that was moved to a
        # whole pixel
        middle = (
            (state.centre - origin) * scale[:, None]
            if cfg.exact
            else torch.full_like(state.centre, (cfg.size - 1) / 2)
        )
        half = (state.size * scale[:, None] - 1) / 2
        labels = label_map(torch.cat([middle - half, middle + half], 1), cfg.size).to(crops.device)
        features = self.memory(crops, cfg.trim, labels)[:, None]  # (B, 1, C, h, w)
        if cfg.attention and cfg.granularity == "frame":
            features, state = self._strengthened(features, state)
        features = features[:, 0].permute(0, 2, 3, 1).contiguous()
        capacity = cfg.capacity if cfg.memory == "bounded" else None
        return replace(
            state, memory=state.memory.stored(features, state.count, cfg.segments, capacity)
        )

    def _strengthened(
        self, features: Tensor, state: DASTMState, known: Tensor | None = None
    ) -> tuple[Tensor, DASTMState]:
        """Features (B, T, C, h, w) after the attention, and the state with the gate's decisions
        counted.
        """
        features, choices = self.attention(features, known, self._draws(state.count))
        if choices is not None:
            weights = choices.weights[:, 0]
            state = replace(
                state, chosen=state.chosen + F.one_hot(weights.argmax(1), weights.shape[1]).cpu()
            )
        return features, state

    def _draws(self, counts: Tensor) -> Tensor | None:
        """The decisions (B, 1) of a random gate for frames with these numbers, the same in every
        run; None for other gates.
        """
        if (self.config.test_gate or self.config.gate) != "random":
            return None
        seeds = (
            torch.Generator().manual_seed(self.config.seed * 1_000_003 + count)
            for count in counts.tolist()
        )
        choices = 1 + len(self.config.attention)
        return torch.stack([torch.randint(choices, (1,), generator=seed) for seed in seeds]).to(
            self.device
        )

    # ---- costs (DASTM, Table 4) ----

    # ---- training (STMTrack; DASTM, section IV.B) ----

    def loss(self, batch: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        """Losses of a batch: focal + centreness + 3 * IoU. "labels", if there, say which queries
        show the target. A stage of the kind "cooling" takes the gate's temperature from tau to
        tau_end.
        """
        cfg, tau = self.config, self.config.tau
        if kind == "cooling" and cfg.tau_end:
            tau *= (cfg.tau_end / tau) ** float(batch["progress"])
        queries = batch["searches"][:, 0]  # (B, 3, S, S)
        truth = _in_pixels(batch["search_boxes"][:, 0], queries.shape[-1])
        shown = (
            batch["labels"][:, 0] > 0
            if "labels" in batch
            else torch.ones_like(truth[:, 0], dtype=torch.bool)
        )
        labels = label_map(_in_pixels(batch["template_boxes"], cfg.size), cfg.size)
        answer, choices = self(batch["templates"], labels, queries, tau)
        losses = detection_losses(
            answer.score, answer.centre, answer.boxes, self.cells(queries.shape[-1]), truth, shown
        )
        if cfg.cost_weight and choices is not None:
            # multiply-accumulates of each choice for a memory frame of h x w cells
            cells = cells_of(cfg.trunk, cfg.size) - 2 * cfg.trim
            macs = [branch.macs(cells, cells) for branch in self.attention.branches.values()]
            costs = torch.tensor([0, *macs], dtype=torch.float32, device=queries.device)
            losses["cost"] = (
                (choices.probability * costs / costs.max()).sum(-1).mean() - cfg.cost_share
            ).abs()
            losses["loss"] = losses["loss"] + cfg.cost_weight * losses["cost"]
        return losses

    def samples(self) -> SampleSpec:
        """Memory frames and a query in any order, within 50 frames; every third query is of
        something else.

        The authors also push each window into the frame as far as it fits, and draw its side from
        U(1 / 1.3, 1.3); here the target's size is drawn from U(0.735, 1.265). Their boxes cover
        0.001 to 0.6 of the frame's area; here sides are limited.
        """
        cfg = self.config
        crop = CropSpec(cfg.size, cfg.factor, shift_px=0.2 * cfg.size, scale=0.265)
        rule = FrameRule(min_share=0.01, max_share=0.8, max_aspect=10)
        frames = {
            "templates": cfg.train_frames,
            "order": "any",
            "max_gap": 50,
            "rule": rule,
            "negatives": 1 / 3,
        }
        return SampleSpec(template=crop, search=crop, **frames)

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        """Everything but the trunks' convolutions, then those too. `paper`: by DASTM's paper or by
        STMTrack's code.

        DASTM: 20 epochs, the rate falling exponentially from 0.005 to 0.0001, the trunk frozen for
        the first 5. The paper does not say that the trunk learns at a tenth of the rate; STMTrack's
        does. STMTrack: 20 epochs of GOT-10k's 150,000 samples, 0.08 after an epoch's rise, then
        half a cosine down to 1e-6; the trunk's Mixed layers learn from the 11th epoch on, all of
        its norms from the first. Without `load_pretrained` there is nothing to keep frozen, and all
        learns at once.
        """
        self.check_preset(preset)
        cfg, sample = self.config, self.samples()
        plain = not cfg.attention  # STMTrack
        if scale in ("tiny", "laptop") or cfg.trunk == "tiny":
            steps, batch = {
                "tiny": (300, 16),
                "laptop": (3000, 24),
                "gpu": (20_000, 64),
                "paper": (100_000, 64),
            }[scale]
            rest = {
                "lr": 2e-3,
                "lr_end": 1e-5,
                "warmup": steps // 30,
                "weight_decay": 1e-4,
                "clip": 1.0,
            }
            return [
                Stage("memory", steps=steps, batch=batch, sample=sample, loss="cooling", **rest)
            ]
        epoch, first = 1000 if scale == "gpu" else cfg.epoch_steps, 10 if plain else 5  # epochs
        if plain:
            begin, end = (
                {"lr": 0.08, "lr_end": 1e-6, "cosine": part}
                for part in ((-1 / 19, 9 / 19), (9 / 19, 1.0))
            )
            begin["warmup"] = epoch
        else:
            middle = 0.005 * 0.02**0.25
            begin, end = {"lr": 0.005, "lr_end": middle}, {"lr": middle, "lr_end": 0.0001}

        body = (
            "memory.label.*",
            "memory.neck.*",
            "query.neck.*",
            "head.*",
            *(["attention.*"] if cfg.attention else []),
        )
        norms = ("*.trunk.*.bn.*",) if cfg.trunk == "inception" else ()
        later = ("*.trunk.Mixed_*",) if cfg.trunk == "inception" else ("*.trunk.*",)

        tenth = (("*.trunk.*", 0.1),)
        shared = {"batch": 32, "sample": sample, "momentum": 0.9, "weight_decay": 1e-4}
        if not self.pretrained:
            whole = {**begin, "lr_end": end["lr_end"], "clip": 1.0} | (
                {"cosine": (-1 / 19, 1.0)} if plain else {"warmup": epoch}
            )
            return [Stage("all", steps=20 * epoch, loss="cooling", **whole, **shared)]
        return [
            Stage(
                "frozen trunk",
                steps=first * epoch,
                trainable=(*body, *norms),
                rates=tenth if norms else (),
                **begin,
                **shared,
            ),
            Stage(
                "all",
                steps=(20 - first) * epoch,
                trainable=(*body, *norms, *later),
                rates=tenth,
                loss="cooling",
                **end,
                **shared,
            ),
        ]


def _in_pixels(boxes: Tensor, size: int) -> Tensor:
    """cxcywh in units of the crop -> xyxy, crop pixels, counted from the middle of the first pixel,
    both ends inside.
    """
    boxes = cxcywh_to_xyxy(boxes * size)
    return torch.cat([boxes[..., :2], boxes[..., 2:] - 1], -1)
