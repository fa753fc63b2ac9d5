"""DASTM: STMTrack whose memory frames decide how they are to be strengthened.

Zhou, Xie, Xu: "Dynamic Attention Mechanism in Spatiotemporal Memory Networks for Object Tracking".
MobileOne encodes the frames, and a module of channel and spatial attention strengthens the features
of each memory frame before they are kept: SE, coordinate attention or CBAM, chosen by a gate that
looks at the frame (DASTM), or all three (SASTM). All else is STMTrack's.

There is no code of DASTM. Where its paper is silent we follow STMTrack, and DyFPN, which it names
as the model of its gate; each such choice is a field of the config.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.attention import CBAM, SE, CoordinateAttention
from trackkit.backbones import MobileOne
from trackkit.crops import CropSpec
from trackkit.errors import Range, check_fields
from trackkit.stages import Stage
from trackkit.trackers.base import Prediction
from trackkit.trackers.stmtrack import Answer, STMTrack, STMTrackConfig, STMTrackState

MODULES = {"se": SE, "ca": CoordinateAttention, "cbam": CBAM}  # Table 1


@dataclass(frozen=True)
class DASTMConfig(STMTrackConfig):
    """STMTrack's numbers, and those of the attention; the defaults are DASTM."""

    trunks = (*STMTrackConfig.trunks, *(f"mobileone_s{i}" for i in range(5)))

    trunk: str = "mobileone_s1"
    """"mobileone_s0" to "_s4" (the paper does not say which), "inception" (STMTrack) or "tiny"."""
    trunk_stage: int = 3  # of MobileOne, 3 or 2, both at stride 8; no effect with other trunks
    query_size: int = 289
    """Side of the crops of queries in tracking, pixels; at least 33. (The paper tracks with 160 and
    does not say how. Here the target is as large as in memory frames, so a smaller query shows
    less.)"""
    trim: int = 6  # cells that are cut off on each side of the trunk's output for crops of `size`
    query_trim: int = 6  # the same for queries; it must equal `trim` if the sizes are equal
    epoch_steps: int = 30_000
    """Steps of each of 20 epochs, at the scales that have epochs; the paper's are six times
    STMTrack's."""
    attention: tuple[str, ...] = tuple(MODULES)
    """Modules for the memory, out of "se", "ca" and "cbam". Table 1: subsets without a gate, as
    sastm(attention=("se", "ca")); with none it is STMTrack."""
    gate: str = "hard"
    """"none" (all modules, as `static` says), "hard" (one module or none, learned straight through
    a Gumbel softmax), "soft" (a weighted sum, as Eq. 2 is written), "random" (Table 3)."""
    test_gate: str = ""
    """Another gate for tracking: "hard", "soft" or "random" (Table 3); "" for the same."""
    seed: int = 0  # of a random gate's decisions in tracking; no effect with other gates
    static: str = "mean"
    """"mean" or "sum" of the modules' outputs, without a gate. The sum of n makes
    the read-out's logits n times as large; Table 1's "cumulative" may mean it."""
    tau: float = 1.0
    """Temperature (Eq. 2), above 0: of a soft gate's weights, of the expected cost, and of a hard
    gate's gradient. Which branch a hard gate takes does not depend on it. Only with a gate."""
    tau_end: float = 0.0
    """What the temperature falls to, geometrically, in the stage in which all learns; 0 leaves it
    at `tau`."""
    gate_reduction: int = 4  # d, the gate's hidden layer has width / d units; 1 to `width`
    gate_bias: tuple[float, float] = (0.0, 0.0)  # initial, of none and of each module
    granularity: str = "frame"
    """"frame", a decision for each memory frame when it is stored; "memory", one for all the frames
    that are looked at, made anew at each look."""
    cost_weight: float = 0.0
    """Adds cost_weight * |expected cost - `cost_share`| to the loss (after DyFPN); only with a
    gate."""
    cost_share: float = 0.3  # wanted cost of the choice in units of the dearest module's, 0 to 1

    def __post_init__(self):
        super().__post_init__()
        check_fields(
            self, trunk_stage=(2, 3), query_size=Range(1, 4096), query_trim=Range(0, 4096),
            attention=tuple(MODULES), gate=("none", "hard", "soft", "random"), tau_end=Range(0,
            1000),
            test_gate=("", "hard", "soft", "random"), seed=Range(0, 2**32), static=("mean", "sum"),
            tau=Range(0, 1000, above=True), gate_reduction=Range(1, self.width),
            cost_weight=Range(0, 1000),
            gate_bias=Range(-1000, 1000), granularity=("frame", "memory"), cost_share=Range(0, 1),
        )  # fmt: skip
        if len(set(self.attention)) < len(self.attention):
            raise ValueError(f"attention must name each module at most once; got {self.attention}")
        if self.gate != "none" and not self.attention:
            raise ValueError('a gate needs attention modules to choose from; else make it "none"')
        if self.gate == "none" and self.test_gate:
            raise ValueError("test_gate replaces a gate, and there is none")
        if self.gate == "none" and self.cost_weight:
            raise ValueError("cost_weight weighs a gate's choices, and there is no gate; make it 0")
        if self.size == self.query_size and self.trim != self.query_trim:
            raise ValueError(
                "memory and query crops are of one size, so trim and query_trim must be equal; "
                f"got {self.trim}, {self.query_trim}"
            )
        self.check_crop(self.query_size)

    def trim_of(self, size: int) -> int:
        return self.trim if size == self.size else self.query_trim

    @classmethod
    def sastm(cls, **changes) -> DASTMConfig:
        """All modules for all frames (Table 2)."""
        return cls(**{"gate": "none", **changes})

    @classmethod
    def tiny(cls, **changes) -> DASTMConfig:
        return super().tiny(**{"query_size": 97, "query_trim": 1, **changes})


# ---- attention for memory frames (section III.B) ----


class Gate(nn.Module):
    """Which module a frame needs (Eq. 1): (B, C, h, w) -> logits (B, N), of which the first is to
    use none. The paper has four outputs in its text and N = 3 in Eq. 2; to decide whether a module
    is needed at all takes four.
    """

    def __init__(self, channels: int, choices: int, reduction: int, bias: tuple[float, float]):
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, choices)
        with torch.no_grad():
            self.fc2.bias.copy_(torch.tensor([bias[0], *[bias[1]] * (choices - 1)]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x.mean((2, 3)))))  # Eq. 1: W2 relu(W1 P(x) + b1) + b2


@dataclass(frozen=True)
class Choices:
    """What the gate said of B x T memory frames; the first of the N choices is to use no module."""

    probability: Tensor  # (B, T, N), Eq. 2
    weights: Tensor  # (B, T, N), what was used


class MemoryAttention(nn.Module):
    """The dynamic attention block, or its static relatives (Fig. 2)."""

    def __init__(self, config: DASTMConfig):
        super().__init__()
        self.config = cfg = config
        self.branches = nn.ModuleDict(
            {name: kind(cfg.width) for name, kind in MODULES.items() if name in cfg.attention}
        )
        if cfg.gate != "none":
            self.gate = Gate(cfg.width, 1 + len(self.branches), cfg.gate_reduction, cfg.gate_bias)

    @property
    def kind(self) -> str:
        """The gate that counts now, in training or in tracking."""
        cfg = self.config
        return cfg.gate if self.training else cfg.test_gate or cfg.gate

    def forward(
        self, x: Tensor, known: Tensor | None = None, draws: Tensor | None = None, tau: float = 0.0
    ) -> tuple[Tensor, Choices | None]:
        """Memory frames' features (B, T, C, h, w) -> strengthened, and what the gate said. `known`
        (B, T) bool marks real frames; `draws` (B, 1) int64 are a random gate's decisions.
        """
        frames = x.flatten(0, 1)  # (B * T, C, h, w)
        if self.config.gate == "none":  # SASTM
            share = 1 / len(self.branches) if self.config.static == "mean" else 1.0
            return sum(branch(frames) * share for branch in self.branches.values()).view_as(x), None
        logits = self.gate(frames).float().unflatten(0, x.shape[:2])  # (B, T, N)
        if self.config.granularity == "memory":  # (B, 1, N): all frames there decide together
            real = torch.ones_like(logits[..., :1])
            real = real if known is None else known[..., None].to(logits)
            logits = (logits * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        choices = self.chosen(logits, draws, tau or self.config.tau)
        choices = Choices(*(t.expand(-1, x.shape[1], -1) for t in vars(choices).values()))
        # a GPU would wait to be told which frames chose what, for longer than all modules take
        waits = frames.device.type != "cpu"
        mix = self.mixed if self.kind == "soft" or self.training or waits else self.routed
        return mix(frames, choices.weights.flatten(0, 1).to(x)).view_as(x), choices

    def chosen(self, logits: Tensor, draws: Tensor | None, tau: float) -> Choices:
        """From the gate's logits (B, T, N)."""
        probability = (logits / tau).softmax(-1)  # Eq. 2
        if self.kind == "soft":
            return Choices(probability, probability)
        if self.kind == "hard" and self.training:
            # one-hot, drawn by softmax(logits) whatever tau is: tau shapes the gradient alone
            return Choices(probability, F.gumbel_softmax(logits, tau, hard=True))
        if self.kind == "hard":
            draws = logits.argmax(-1)
        elif draws is None:
            draws = torch.randint(logits.shape[-1], logits.shape[:2], device=logits.device)
        return Choices(probability, F.one_hot(draws, logits.shape[-1]).to(logits))

    def mixed(self, frames: Tensor, weights: Tensor) -> Tensor:
        """All choices' outputs, weighted: (M, C, h, w) and (M, N) -> (M, C, h, w)."""
        outputs = [frames, *(branch(frames) for branch in self.branches.values())]
        shares = weights[..., None, None, None].unbind(1)
        return sum(share * y for share, y in zip(shares, outputs, strict=True))

    def routed(self, frames: Tensor, weights: Tensor) -> Tensor:
        """The same for one-hot weights: each module runs on the frames that have chosen it only."""
        chosen, made = weights.argmax(1), frames
        for number, branch in enumerate(self.branches.values(), 1):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                made = made.index_copy(0, rows, branch(frames[rows]))
        return made


# ---- the tracker ----


@dataclass(frozen=True)
class DASTMAnswer(Answer):
    choices: Choices | None


@dataclass(frozen=True)
class DASTMState(STMTrackState):
    chosen: Tensor  # (B, N) int64, on the tracker's device, how often the gate has chosen what


class DASTM(STMTrack):
    """Attention comes in where memory frames are encoded in training (`forward`), and in tracking
    where they are stored (`_stored`) or looked at (`_recalled`), as `granularity` says.
    """

    Config = DASTMConfig

    def new_trunk(self) -> nn.Module:
        cfg = self.config
        if cfg.trunk in STMTrackConfig.trunks:
            return super().new_trunk()
        return MobileOne(cfg.trunk, cfg.trunk_stage)

    def add_encoders(self) -> None:
        super().add_encoders()
        if self.config.attention:
            self.attention = MemoryAttention(self.config)

    def load_pretrained(self) -> bool:
        """As STMTrack's; the tiny one is stmtrack-tiny to begin with."""
        if self.config.trunk == "tiny":
            return self.inherit("stmtrack-tiny")
        return super().load_pretrained()

    @property
    def search_crop(self) -> CropSpec:
        cfg = self.config
        return CropSpec(cfg.query_size, cfg.factor * cfg.query_size / cfg.size)

    def forward(
        self, memories: Tensor, foreground: Tensor, queries: Tensor, tau: float = 0.0
    ) -> DASTMAnswer:
        """As STMTrack's, with the gate at the temperature `tau`; 0 for the config's."""
        memory, choices = self.encoded(memories, foreground), None
        if self.config.attention:
            memory, choices = self.attention(memory, tau=tau)
        memory = memory.permute(0, 1, 3, 4, 2)
        answer = self.answer(self.query(queries), memory, queries.shape[-1])
        return DASTMAnswer(**vars(answer), choices=choices)

    # ---- tracking ----

    def _first(self, frames: list[Tensor], boxes: Tensor) -> DASTMState:
        choices = 1 + len(self.config.attention)
        none = torch.zeros(len(frames), choices, dtype=torch.long, device=self.device)
        return DASTMState(**vars(super()._first(frames, boxes)), chosen=none)

    def step(
        self, state: DASTMState, frames: list[Tensor], maps: bool = False
    ) -> tuple[DASTMState, Prediction]:
        state, prediction = super().step(state, frames, maps)
        if maps:
            prediction.maps["chosen"] = state.chosen
        return state, prediction

    def _stored(self, state: DASTMState, features: Tensor) -> DASTMState:
        if self.config.attention and self.config.granularity == "frame":
            features, state = self._strengthened(features[:, None], state)
            features = features[:, 0]
        return super()._stored(state, features)

    def _recalled(
        self, state: DASTMState, numbers: Tensor
    ) -> tuple[Tensor, Tensor | None, DASTMState]:
        past, known, state = super()._recalled(state, numbers)
        if self.config.attention and self.config.granularity == "memory":
            past, state = self._strengthened(past.permute(0, 1, 4, 2, 3), state, known)
            past = past.permute(0, 1, 3, 4, 2)
        return past, known, state

    def _strengthened(
        self, features: Tensor, state: DASTMState, known: Tensor | None = None
    ) -> tuple[Tensor, DASTMState]:
        """Features (B, T, C, h, w) after the attention, and the gate's decisions counted."""
        features, choices = self.attention(features, known, self._draws(state.count))
        if choices is not None:
            weights = choices.weights[:, 0]
            once = F.one_hot(weights.argmax(1), weights.shape[1])
            state = replace(state, chosen=state.chosen + once)
        return features, state

    def _draws(self, counts: Tensor) -> Tensor | None:
        """The decisions (B, 1) of a random gate for frames with these numbers, the same in every
        run; None for other gates.
        """
        if self.attention.kind != "random":
            return None
        first, choices = self.config.seed * 1_000_003, 1 + len(self.config.attention)
        seeds = (torch.Generator().manual_seed(first + count) for count in counts.tolist())
        draws = [torch.randint(choices, (1,), generator=seed) for seed in seeds]
        return torch.stack(draws).to(self.device)

    # ---- training (section IV.B) ----

    def loss(self, batch: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        """STMTrack's losses, and that of the expected cost. A stage of the kind "cooling" takes the
        gate's temperature from tau to tau_end.
        """
        cfg, tau = self.config, self.config.tau
        if kind == "cooling" and cfg.tau_end:
            tau *= (cfg.tau_end / tau) ** float(batch["progress"])
        answer = self(*self.inputs(batch), tau)
        parts = self.judged(answer, batch)
        if cfg.cost_weight:
            # multiply-accumulates of each choice for a memory frame
            cells, branches = cfg.cells(cfg.size), self.attention.branches.values()
            macs = [0, *(branch.macs(cells, cells) for branch in branches)]
            costs = torch.tensor(macs, dtype=torch.float32, device=self.device)
            expected = (answer.choices.probability * costs / costs.max()).sum(-1).mean()
            parts["cost"] = (expected - cfg.cost_share).abs()
            parts["loss"] = parts["loss"] + cfg.cost_weight * parts["cost"]
        return parts

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        """20 epochs, the rate falling exponentially from 0.005 to 0.0001, the trunks frozen for the
        first 5. The paper does not say that the trunks learn at a tenth of the rate; STMTrack's do.
        Without `load_pretrained` there is nothing to keep frozen, and all learns at once. The tiny
        network, which can track already, learns for half as long as stmtrack-tiny on a laptop, at a
        third of the rate.
        """
        cfg = self.config
        if scale in ("tiny", "laptop") or cfg.trunk == "tiny":
            stages = [replace(stage, loss="cooling") for stage in super().recipe(scale, preset)]
            if scale == "laptop":
                stages = [replace(stage.resized(2500), lr=3e-4) for stage in stages]
            return stages
        self.check_preset(preset)
        epoch, middle = self.epoch(scale), 0.005 * 0.02**0.25
        if not self.pretrained:
            rest = {"lr": 0.005, "lr_end": 0.0001, "warmup": epoch, "clip": 1.0, "loss": "cooling"}
            return [self.stage("all", 20 * epoch, **rest)]
        first, later, tenth = self.fresh, ("*.trunk.*",), (("*.trunk.*", 0.1),)
        one = {"lr": 0.005, "lr_end": middle}
        if cfg.attention:
            first = (*first, "attention.*")
        if cfg.trunk == "inception":  # whose norms learn from the first, as in STMTrack
            first, later, one["rates"] = (*first, *self.norms), self.later, tenth
        two = {"lr": middle, "lr_end": 0.0001, "trainable": (*first, *later), "rates": tenth}
        return [
            self.stage("frozen trunk", 5 * epoch, trainable=first, **one),
            self.stage("all", 15 * epoch, loss="cooling", **two),
        ]
