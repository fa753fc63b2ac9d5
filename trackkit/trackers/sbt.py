"""SBT: correlation moves into the backbone, and nothing is left to do after it but read the box.

Xie, Wang, Wang, Cao, Yang, Zeng: "Correlation-Aware Deep Tracking", CVPR 2022. Siamese trackers and
STARK look at the template and at the search crop separately and compare the features afterwards.
SBT sends both through one backbone of Extract-or-Correlation blocks: most blocks let an image look
at itself (self-attention, SA), some let each image look at the other (cross-attention, CA), all
with the same weights. What comes out for the search crop already knows the target; two small heads
say for each of its tokens whether it belongs to the target, and where the target's box is.

The networks, the training and the tracking are those of the authors' code (phiphiphi31/SBT), whose
checkpoints load by `trackkit.official`. Our code computes the same with less: the template goes
through the blocks before the first CA only once, and what nobody reads of it after the last one is
not computed. We depart from theirs in four places: blocks after the last CA run (theirs are
skipped; with the paper's placements there are none), targets that reach outside the crop keep their
positive tokens (`SBTConfig.positives`), losses are weighted as in the paper (`SBTConfig.weights`),
and crop windows are exact if wished (`SBTConfig.exact`).

This file follows the paper's sections: 3.1 patch embedding, 3.2 the block, 3.3 position, Fig. 3 the
single branch, 3.4 heads, 6.1 tracking and training; at its end what the paper compares with (Table
7) and offers to other trackers (5.3). What lies beneath: `trackkit.trackers.sbt_backbone`. How
single images prepare the network: `trackkit.trackers.sbt_pretraining`.

x is the search crop, z the template. Maps are (B, H, W, C): a row of C numbers is a token. N = H *
W tokens; K keys, fewer than tokens by SR ** 2, where SR is the spatial reduction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit import vit
from trackkit.attention import DropPath, sine_position
from trackkit.backbones import normalise, timm_weights
from trackkit.boxes import (
    bias_of,
    clip_with_margin,
    cxcywh_to_xyxy,
    follow_size,
    giou,
    without_bias,
)
from trackkit.crops import frame_sizes
from trackkit.devices import constant, to_host
from trackkit.errors import Range, check_fields
from trackkit.frames import SampleSpec
from trackkit.heads import MLP, MixHead, hann_window
from trackkit.losses import mean_of
from trackkit.stages import HOLD_AND_FALL, Stage
from trackkit.trackers.base import Prediction, Tracker
from trackkit.trackers.sbt_backbone import (
    check_grids,
    check_meeting,
    check_stages,
    convolve,
    dynamic_convolutions,
    initialise,
    load_blocks,
    note,
    offset_bias,
    shift_bias,
    squares,
    whole,
)


@dataclass(frozen=True)
class SBTConfig:
    """Numbers of the network, of training and of tracking. Lists have one entry for each stage of
    the backbone.
    """

    template_size: int = 128  # side of the template crop, pixels; a multiple of the total stride
    search_size: int = 256  # side of the search crop, pixels; a multiple of the same
    template_factor: float = 2.0  # side of the template's window over sqrt(target's area)
    search_factor: float = 5.0  # the same of the search window; 5 in the code, 4 in the paper
    train_factor: float | None = None  # the same in training; None: as in tracking

    dims: tuple[int, ...] = (64, 128, 320)  # channels of each stage
    heads: tuple[int, ...] = (1, 2, 5)  # of each stage's attentions; they divide `dims`
    blocks: tuple[int, ...] = (3, 4, 10)  # number of blocks of each stage
    strides: tuple[int, ...] = (4, 2, 1)  # of the stages' patch embeddings
    ratios: tuple[int, ...] = (8, 8, 4)
    """Hidden channels of the MLPs over `dims`. Table 2 prints 4 and counts with 8, 8, 4."""
    reductions: tuple[int, ...] = (8, 4, 2)
    """SR, by which each side of the grid of keys is divided; of no effect within squares and with
    attention "vg"."""
    cross: tuple[tuple[int, ...], ...] = ((), (), (2, 4, 6, 8, 10))
    """Which blocks of each stage are CA, counted from 1."""

    attention: str = "srg"
    """Table 1. "srg": all tokens look at the keys of a reduced grid. "vg": of the full one. "vl":
    SA within squares of `local` tokens, CA as "srg". "sl": SA and CA within such squares, shifted
    by half in every second block; the template must be as large as the search crop."""
    local: int = 8  # side of the squares of "vl" and "sl", tokens; divides every grid
    order: str = "simultaneous"
    """"simultaneous": in CA both images look at the other as it was before the block. "sequential":
    the template looks at a search crop that has looked already."""
    position: str = "conditional"
    """Table 1. "conditional": a depth-wise convolution in the MLP. "absolute": sines added to the
    first embedding. "relative": a learned bias for each offset between query and key, in SA
    (between two images offsets mean nothing). "none"."""
    embedding: str = "conv"
    """Table 1. "conv": overlapping patches. "patches": side by side (both H1 and H2). "net" (not in
    the paper): for the first stage a small convolutional network of stride 8, with which the rest
    learns from little data; for the others as "conv"."""
    head: str = "released"
    """"released" as in the authors' code, "eq7" as the paper has it, "mlp3" or "mlp5", MLPs on each
    token, which explain the counts in Table 1."""

    anchored: bool = False
    """A token's box begins at the token's own place, in the size that targets have, and the head
    says by how much it differs, in logits (not in the paper: learns from less data)."""

    drop_path: float = 0.1
    """Probability of dropping the last block's branches in training; it rises from 0 block by
    block."""
    pretrained_blocks: int | None = None
    """How many blocks, counted from the first, begin with weights learned on single images when
    there are any; None: all that can (Fig. 8)."""
    positives: str = "clipped"
    """Which tokens learn that they belong to a target that reaches outside the crop. "clipped":
    those in its box; or the authors', "wrapped", see `positive_tokens`."""
    weights: tuple[float, float, float] = (12.0, 7.0, 5.0)
    """Of the class, the L1 and the GIoU loss. The paper's; its code has ten times as much, which
    hardly matters to AdamW with clipped gradients."""
    background: float = 0.0625
    """Weight of background tokens in the class loss, where the target's have 1."""

    window_influence: float = 0.49
    """Share of a cosine window in the score by which a token is chosen; 0.49 in the code, 0 in the
    paper."""
    margin: float = 10.0  # pixels of the box that stay in the frame at least; its smallest side
    exact: bool = False
    """Boxes go into and out of crops by the crops' own geometry; False imitates the authors, see
    `STARKConfig`."""
    first_look: bool = False  # see `OSTrackConfig.first_look`; not in the paper
    size_rate: float = 1.0  # share of a change of size that is followed, see `boxes.follow_size`

    correlation: str = "embedded"
    """Table 7, without its DCF and ResNet rows. "embedded": CA in the backbone alone (row 7, with
    `cross` ((), (), (6, 8, 10))). "depthwise", "cross": also after it (row 8), or only, if all of
    `cross` is empty (rows 4, 5); see `Levelwise`."""
    levels: tuple[int, ...] = (6, 8, 10)
    """With correlation after the backbone: behind these blocks of the last stage, from 1."""
    adjust: int = 256  # with correlation after the backbone: channels of the levels' responses

    def __post_init__(self):
        # from a file they come as lists
        object.__setattr__(self, "cross", tuple(tuple(stage) for stage in self.cross))
        size, count, weight = Range(1, 4096), Range(1, 64), Range(0, 4096)
        check_fields(
            self,
            attention=("srg", "vg", "vl", "sl"),
            order=("simultaneous", "sequential"),
            position=("conditional", "absolute", "relative", "none"),
            embedding=("conv", "patches", "net"),
            head=("released", "eq7", "mlp3", "mlp5"),
            positives=("clipped", "wrapped"),
            correlation=("embedded", "depthwise", "cross"),
            **dict.fromkeys(("template_size", "search_size", "dims", "local", "adjust"), size),
            **dict.fromkeys(
                ("heads", "blocks", "strides", "ratios", "reductions", "levels"), count
            ),
            cross=count,
            **dict.fromkeys(("template_factor", "search_factor"), Range(0, 100, above=True)),
            **dict.fromkeys(("weights", "background", "margin"), weight),
            drop_path=Range(0, 1, below=True),
            window_influence=Range(0, 1),
            first_look=(True, False),
            size_rate=Range(0, 1),
            anchored=(True, False),
        )
        if self.train_factor is not None:
            check_fields(self, train_factor=Range(0, 100, above=True))
        if self.pretrained_blocks is not None:
            check_fields(self, pretrained_blocks=Range(0))
        check_stages(self)
        check_grids(self)
        check_meeting(self)

    @classmethod
    def light(cls, **changes) -> SBTConfig:
        """SBT-light (Table 2)."""
        return cls.small(**{"dims": (32, 64, 160), **changes})

    @classmethod
    def small(cls, **changes) -> SBTConfig:
        """SBT-small (Table 2)."""
        small = {"blocks": (2, 2, 6), "cross": ((), (), (2, 4, 6)), "levels": (2, 4, 6)}
        return cls(**{**small, **changes})

    @classmethod
    def base(cls, **changes) -> SBTConfig:
        """SBT-base (Table 2)."""
        return cls(**changes)

    @classmethod
    def large(cls, **changes) -> SBTConfig:
        """SBT-large (Table 2)."""
        cross = (), (), (6, 8, 10, 12, 14, 16, 18)
        large = {"blocks": (3, 4, 18), "cross": cross, "levels": (14, 16, 18)}
        return cls(**{**large, **changes})

    @classmethod
    def tiny(cls, **changes) -> SBTConfig:
        """SBT with a hundredth of the weights: learns from scratch on a laptop's CPU. Its stages
        are as SBT's second and third, behind a network that has learned to match.
        """
        tiny = {
            "template_size": 48, "search_size": 96, "template_factor": 1.5, "search_factor": 2.5,
            "train_factor": 3.0, "embedding": "net", "dims": (64, 64), "heads": (4, 4),
            "blocks": (1, 4), "strides": (8, 1), "ratios": (4, 4), "reductions": (2, 1),
            "cross": ((), (2, 4)), "levels": (2, 3, 4), "adjust": 64, "drop_path": 0.0,
            "head": "mlp3", "anchored": True, "margin": 4.0, "exact": True,
            "first_look": True, "size_rate": 0.15,
        }  # fmt: skip
        return cls(**{**tiny, **changes})

    @property
    def stride(self) -> int:
        """Crop pixels from one token of the output to the next."""
        return prod(self.strides)

    def grids(self, size: int) -> list[int]:
        """Side of the token grid in each stage for a crop of `size` pixels: 64, 32, 32 for 256."""
        return [size // prod(self.strides[: i + 1]) for i in range(len(self.strides))]


# ---- section 3.1: patch embedding ----


class PatchEmbedding(nn.Module):
    """Fewer, richer tokens: (B, H, W, C) -> (B, H / stride, W / stride, D)."""

    def __init__(self, config: SBTConfig, stage: int):
        super().__init__()
        inputs = config.dims[stage - 1] if stage else 3
        stride, width = config.strides[stage], config.dims[stage]
        overlap = config.embedding != "patches"
        kernel = (3 if stage else 7) if overlap else stride
        self.proj = nn.Conv2d(inputs, width, kernel, stride, kernel // 2 if overlap else 0)
        if config.embedding == "net" and stage == 0:
            self.proj = vit.patch_embedding("conv", width)
        self.norm = nn.LayerNorm(width)
        self.absolute = config.position == "absolute" and stage == 0

    def forward(self, x: Tensor, weights: bool = False) -> tuple[Tensor, None]:
        x = self.norm(convolve(self.proj, x))  # Eq. 1
        if self.absolute:
            inside = torch.zeros(x.shape[:3], dtype=torch.bool, device=x.device)
            x = x + sine_position(inside, x.shape[-1]).to(x).view_as(x)
        return x, None


# ---- section 3.2: the Extract-or-Correlation block ----


Prepared = tuple[Tensor | None, tuple[Tensor, Tensor]]  # queries, (keys, values)


class EoC(nn.Module):
    """Extract-or-Correlation block (Fig. 3b and c): SA with `forward`, CA with `cross`, by the same
    layers. Only who is looked at differs.
    """

    def __init__(self, config: SBTConfig, stage: int, block: int, drop: float):
        super().__init__()
        width, self.heads = config.dims[stage], config.heads[stage]
        crossed = block + 1 in config.cross[stage]
        windowed = config.attention == "sl" or (config.attention == "vl" and not crossed)
        reduction = 1 if windowed or config.attention == "vg" else config.reductions[stage]
        self.local = config.local if windowed else 0
        self.shift = self.local // 2 if config.attention == "sl" and block % 2 else 0
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.reduce = nn.Conv2d(width, width, reduction, reduction) if reduction > 1 else None
        self.reduce_norm = nn.LayerNorm(width) if reduction > 1 else None
        self.mlp = ConvMlp(width, config.ratios[stage] * width, config.position == "conditional")
        self.drop_path = DropPath(drop)
        self.sequential, self.offsets = config.order == "sequential", None
        if config.position == "relative" and not crossed:
            reach = self.local or config.grids(max(config.search_size, config.template_size))[stage]
            self.offsets = nn.Parameter(torch.zeros(self.heads, 2 * reach - 1, 2 * reach - 1))
            nn.init.trunc_normal_(self.offsets, std=0.02)

    def queries(self, normed: Tensor) -> Tensor:
        """q of Eq. 2, of all tokens of a normed map: (G, heads, N, d). G is B, times the squares of
        a local attention.
        """
        return self._heads(self.q(squares(normed, self.local, self.shift).flatten(1, 2)))

    def keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of Eq. 2, of a normed map on a grid SR times coarser: (G, heads, K, d) each."""
        if self.reduce is not None:
            normed = self.reduce_norm(convolve(self.reduce, normed))
        k, v = self.kv(squares(normed, self.local, self.shift).flatten(1, 2)).chunk(2, -1)
        return self._heads(k), self._heads(v)

    def attend(
        self,
        q: Tensor,
        kv: tuple[Tensor, Tensor],
        like: Tensor,
        weights: bool = False,
        own: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries gather the values whose keys resemble them -> a map of the size of `like`, and
        with `weights` how much each token looked at each key, (G, heads, N, K).
        """
        (k, v), bias = kv, self._bias(like, own)
        if weights:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            share = (scores if bias is None else scores + bias).softmax(-1)
            mixed = share @ v  # Eq. 3
        else:  # the same, and that matrix is never formed
            share, mixed = None, F.scaled_dot_product_attention(q, k, v, bias)
        mixed = whole(mixed.transpose(1, 2).flatten(2), like, self.local, self.shift)
        return self.proj(mixed), share

    def forward(self, x: Tensor, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """SA: (B, H, W, C) -> the same, and with `weights` the share of `attend`."""
        normed = self.norm1(x)
        change, share = self._look(normed, self.keys_values(normed), weights, own=True)
        return self.absorb(x, change), share  # Eq. 4

    def cross(
        self,
        x: Tensor,
        z: Tensor,
        prepared: Prepared | None = None,
        renew: bool = True,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """CA: maps x and z -> the same, each having looked at the other, and x's share.

        `prepared` is z's part if it was computed before. Without `renew` z stays as it is.
        """
        if prepared is None or (renew and prepared[0] is None):
            prepared = self.prepare(z, renew)
        q_z, kv_z = prepared
        normed = self.norm1(x)
        change, share = self._look(normed, kv_z, weights)
        new = self.absorb(x, change)  # Eq. 5, x looks at z
        if renew:
            kv_x = self.keys_values(self.norm1(new) if self.sequential else normed)
            z = self.absorb(z, self.attend(q_z, kv_x, z)[0])  # Eq. 5, z looks at x
        return new, z, share

    def prepare(self, z: Tensor, ask: bool = True) -> Prepared:
        """What `cross` needs of a map z whatever x is: its queries, if it is to `ask`, and its keys
        and values.
        """
        normed = self.norm1(z)
        return self.queries(normed) if ask else None, self.keys_values(normed)

    def absorb(self, x: Tensor, change: Tensor) -> Tensor:
        """Add what was gathered (Eq. 4 and 5), then each token thinks for itself (Fig. 3b)."""
        x = x + self.drop_path(change)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _look(
        self, normed: Tensor, kv: tuple[Tensor, Tensor], weights: bool, own: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """`attend` for the queries of a normed map; `own` if keys and values are its own too."""
        few = self.heads * kv[0].shape[2] <= normed.shape[-1]
        biased = self.local or (own and self.offsets is not None)
        if few and not (biased or weights or torch.is_grad_enabled()):  # fewer multiplications
            return dynamic_convolutions(normed, kv, self.q, self.proj), None
        return self.attend(self.queries(normed), kv, normed, weights, own)

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _bias(self, like: Tensor, own: bool) -> Tensor | None:
        """What is added to the logits: for relative positions, and between parts of a square that a
        shift brought together.
        """
        bias = None
        if own and self.offsets is not None:
            reduction = 1 if self.reduce is None else self.reduce.stride[0]
            bias = offset_bias(self.offsets, self.local or like.shape[1], reduction)
        if self.shift:
            apart = shift_bias(like, self.local, self.shift)
            bias = apart if bias is None else apart + bias
        return bias


# ---- section 3.3: position ----


class ConvMlp(nn.Module):
    """Linear, 3 x 3 depth-wise convolution if `conditional`, GELU, linear, for (B, H, W, C).

    The convolution pads with zeros, so tokens learn how far the border is: a position encoding that
    fits every size.
    """

    def __init__(self, width: int, hidden: int, conditional: bool):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.position = None
        if conditional:
            self.position = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if self.position is not None:
            hidden = convolve(self.position, hidden)
        # in place: fresh memory for large maps costs a CPU time
        gelu = F.gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_
        return self.fc2(gelu(hidden))


# ---- the single branch (Fig. 3a) ----


class BackboneStage(nn.Module):
    """A patch embedding, blocks of one width, and a norm where the stage's output is used."""

    def __init__(self, config: SBTConfig, stage: int, norm: bool):
        super().__init__()
        total, before = sum(config.blocks), sum(config.blocks[:stage])
        self.embed = PatchEmbedding(config, stage)
        self.blocks = nn.ModuleList(
            EoC(config, stage, block, config.drop_path * (before + block) / max(total - 1, 1))
            for block in range(config.blocks[stage])
        )
        self.norm = nn.LayerNorm(config.dims[stage], eps=1e-6) if norm else None


@dataclass(frozen=True)
class Encoded:
    """An image on its way through the backbone."""

    map: Tensor  # (B, H, W, C)
    levels: tuple[Tensor, ...] = ()  # maps for `Levelwise`, as far as it has come
    prepared: Prepared | None = None  # of a template: its part in the first CA block


class Backbone(nn.Module):
    """Two images are `alone` until the first CA block, and `together` from there on."""

    def __init__(self, config: SBTConfig):
        super().__init__()
        self.config, last = config, len(config.dims) - 1
        self.channels, self.stride = config.dims[-1], config.stride
        stages = range(last + 1)
        self.stages = nn.ModuleList(BackboneStage(config, i, norm=i == last) for i in stages)
        after = config.levels if config.correlation != "embedded" else ()
        self.levels = {f"stage{last + 1}.block{level}" for level in after}
        steps = self.steps()
        crossed = [i for i, (_, _, cross) in enumerate(steps) if cross]
        self.first_cross = min(crossed, default=len(steps))
        # the template's map changes in every block, but is read only by CA blocks (as it was after
        # the step before) and by `levels`: the last step whose template map anybody reads
        at_levels = [i for i, (name, _, _) in enumerate(steps) if name in self.levels]
        self.last_read = max([i - 1 for i in crossed] + at_levels)
        self.apply(initialise)
        if config.embedding == "net":
            self.start_as_lookup()
        # as the maps: kernels need not be turned in every frame
        self.to(memory_format=torch.channels_last)

    @property
    def norm(self) -> nn.LayerNorm:
        """Of the output."""
        return self.stages[-1].norm

    def steps(self) -> list[tuple[str, nn.Module, bool]]:
        """Name, layer, and whether it is CA, in the order in which they run."""
        found = []
        for s, (stage, cross) in enumerate(zip(self.stages, self.config.cross, strict=True), 1):
            found.append((f"stage{s}.embed", stage.embed, False))
            for b, block in enumerate(stage.blocks, 1):
                found.append((f"stage{s}.block{b}", block, b in cross))
        return found

    def alone(self, images: Tensor, seen: dict | None = None) -> Encoded:
        """Normalised images (B, 3, S, S) up to the first CA block. `seen` collects each step's map
        and attention.
        """
        x, levels = images.permute(0, 2, 3, 1), ()
        for name, layer, _ in self.steps()[: self.first_cross]:
            x, share = layer(x, seen is not None)
            levels += (x,) if name in self.levels else ()
            note(seen, name, x, share)
        return Encoded(x, levels)

    def prepare(self, z: Encoded) -> Encoded:
        """A template with its part in the first CA block, which is the same for every search
        crop.
        """
        block = next((layer for _, layer, crossed in self.steps() if crossed), None)
        # the squares of a local attention are no entries of a batch
        if block is None or block.local:
            return z
        return replace(z, prepared=block.prepare(z.map, ask=self.first_cross <= self.last_read))

    def together(
        self, x: Encoded, z: Encoded, both: bool = False, seen: dict | None = None
    ) -> tuple[Encoded, Encoded]:
        """The rest: both images have been `alone`, and now meet in the CA blocks.

        The template's map ends where nobody reads it any more, or with `both` at the end as well.
        """
        weights, prepared = seen is not None, z.prepared  # that of the first CA block alone
        (x, x_levels), (z, z_levels) = (x.map, x.levels), (z.map, z.levels)
        for index, (name, layer, crossed) in list(enumerate(self.steps()))[self.first_cross :]:
            renew = both or index <= self.last_read
            if crossed:
                x, z, share = layer.cross(x, z, prepared, renew, weights)
                prepared = None
            else:
                x, share = layer(x, weights)
                z = layer(z)[0] if renew else z
            if name in self.levels:
                x_levels, z_levels = (*x_levels, x), (*z_levels, z)
            note(seen, name, x, share)
            note(seen, f"{name}.template", z if renew else None, None)
        return Encoded(x, x_levels), Encoded(z, z_levels)

    def load_pretrained(self, blocks: int | None = None) -> bool:
        """Start from the PVTv2 with ImageNet weights that SBT's authors start from, see
        `load_blocks`; False if none has these blocks.

        They take pvt_v2_b3 for base and large; small's blocks are among its own too. For light,
        whose authors' weights are not public, it is pvt_v2_b0, which has a third of the blocks of
        the last stage. From timm's cache or the network; TrackkitError if neither has them. The
        tiny one starts from the features of matching-tiny.
        """
        cfg = self.config
        if cfg.embedding == "net":
            vit.load_stem(self.stages[0].embed.proj)
            return True
        name = {(64, 128, 320): "pvt_v2_b3", (32, 64, 160): "pvt_v2_b0"}.get(cfg.dims)
        sizes = cfg.heads, cfg.ratios, cfg.reductions
        kinds = cfg.attention, cfg.position, cfg.embedding
        fits = (sizes, kinds) == (
            ((1, 2, 5), (8, 8, 4), (8, 4, 2)),
            ("srg", "conditional", "conv"),
        )
        if name is None or not fits:
            return False
        load_blocks(self, timm_weights(name), blocks)
        return True

    @torch.no_grad()
    def start_as_lookup(self) -> None:
        """Let attention begin as a lookup of what is alike, see `vit.start_as_lookup`; what stands
        between two such lookups begins as hardly anything.
        """
        for stage, width in zip(self.stages, self.config.dims, strict=True):
            if stage is not self.stages[0]:
                nn.init.dirac_(stage.embed.proj.weight)
            for block in stage.blocks:
                part = torch.linalg.qr(torch.randn(width, width))[0]
                block.q.weight.copy_(1.4 * part)
                block.kv.weight.copy_(torch.cat([1.4 * part, part]))
                block.proj.weight.copy_(0.5 * part.T)
                block.mlp.fc2.weight.mul_(0.5)
                if block.reduce is not None:  # the mean of the cells that become one
                    nn.init.zeros_(block.reduce.weight)
                    size = block.reduce.kernel_size[0]
                    block.reduce.weight.diagonal(dim1=0, dim2=1).fill_(size**-2)


# ---- section 3.4: heads, and the tracker ----


def head(config: SBTConfig, width: int, outputs: int) -> nn.Module:
    """Tokens of the search crop (B, N, width) -> (B, N, outputs); Eq. 7 is in `MixHead`."""
    if config.head.startswith("mlp"):
        return MLP(width, width, outputs, depth=int(config.head[-1]))
    tokens = (config.search_size // config.stride) ** 2
    return MixHead(tokens, width, outputs, literal=config.head == "eq7")


# epochs, epochs after which the rate falls to a tenth, pairs an epoch, batch, rate of the heads
# (the rest: a tenth). The first is the choice where none is made.
PRESETS = {
    "code-got10k": (100, (80,), 60_000, 160, 1e-3),
    "paper": (600, (200, 400), 50_000, 160, 1e-4),  # section 6.1: four data sets
    # appendix A.1; its rates contradict those of section 6.1
    "paper-got10k": (100, (30, 50), 50_000, 160, 1e-3),
    "code": (500, (400,), 60_000, 160, 1e-3),  # base
    "code-large": (300, (240,), 60_000, 96, 1e-3),
    "code-got10k-large": (100, (80,), 60_000, 96, 1e-3),
}


@dataclass(frozen=True)
class Answer:
    """What the network says of each token of B search crops."""

    logits: Tensor  # (B, N, 2): target, background
    boxes: Tensor  # (B, N, 4), cxcywh, units of the crop
    maps: dict[str, Tensor]


@dataclass(frozen=True)
class SBTState:
    """What SBT remembers of B sequences. The template is never updated."""

    box: Tensor  # (B, 4) xywh, frame pixels, float64
    template: Encoded  # up to the first CA block
    bias: Tensor | None  # (B, 4), see `SBTConfig.first_look`; None without it


class SBT(Tracker):
    """The network and the way it tracks."""

    Config = SBTConfig
    presets = tuple(PRESETS)

    def __init__(self, config: SBTConfig = SBTConfig()):
        super().__init__(config)
        self.backbone = Backbone(config)
        self.levelwise = Levelwise(config) if config.correlation != "embedded" else None
        width = config.dims[-1] if self.levelwise is None else config.adjust
        self.class_head, self.box_head = (head(config, width, outputs) for outputs in (2, 4))

    def load_pretrained(self) -> bool:
        return self.backbone.load_pretrained(self.config.pretrained_blocks)

    def encode(self, images: Tensor) -> Encoded:
        """Normalised templates (B, 3, S, S), as far as they do not depend on the search crop."""
        return self.backbone.prepare(self.backbone.alone(images))

    def forward(self, template: Encoded, images: Tensor, maps: bool = False) -> Answer:
        """An encoded template and normalised search crops (B, 3, S, S) -> classes and boxes (Eq.
        6).
        """
        seen = {} if maps else None
        x, z = self.backbone.together(self.backbone.alone(images, seen), template, seen=seen)
        features = self.features(x, z).flatten(1, 2)  # (B, N, C)
        logits, boxes = self.class_head(features), self.box_head(features)
        if self.config.anchored:
            size = 1 / (self.config.train_factor or self.config.search_factor)
            side = self.config.search_size // self.config.stride
            boxes = boxes + constant(anchors, side, size, device=boxes.device)
        boxes = boxes.sigmoid()
        return Answer(logits, boxes, {"features": features} | (seen or {}))

    def features(self, x: Encoded, z: Encoded) -> Tensor:
        """What the heads read, a map of the search crop: correlation has already happened."""
        norm = self.backbone.norm
        if self.levelwise is None:
            return norm(x.map)
        return self.levelwise([norm(level) for level in x.levels], [norm(v) for v in z.levels])

    # ---- tracking (section 6.1, "Testing") ----

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> SBTState:
        frames, boxes = self.checked(frames, boxes_xywh)
        crops, _ = self.template_crop.around(frames, boxes)
        template, bias = self.encode(normalise(crops)), None
        if self.config.first_look:
            bias = bias_of(self.look(template, frames, boxes)[0], boxes)
        return SBTState(boxes, template, bias)

    def step(
        self, state: SBTState, frames: list[Tensor], maps: bool = False
    ) -> tuple[SBTState, Prediction]:
        cfg, frames = self.config, self.moved(frames)
        box, score, seen = self.look(state.template, frames, state.box, maps)
        box = follow_size(state.box, without_bias(box, state.bias), cfg.size_rate)
        box = clip_with_margin(box, frame_sizes(frames), cfg.margin)
        return replace(state, box=box), Prediction(box, score, seen)

    def look(
        self, template: Encoded, frames: list[Tensor], boxes: Tensor, maps: bool = False
    ) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
        """Where the network sees the targets in the surroundings of boxes (B, 4): boxes in the
        frame, their scores (B,), and maps if asked for.
        """
        cfg, rows = self.config, torch.arange(len(frames))
        crops, windows = self.search_crop.around(frames, boxes)
        answer = self(template, normalise(crops), maps)

        # the best token, where far tokens are less likely
        score, found = to_host(answer.logits.softmax(-1)[..., 0], answer.boxes)  # (B, N), (B, N, 4)
        side = cfg.search_size // cfg.stride
        near = constant(hann_window, side, "zero", torch.float64, device=score.device).flatten()
        blended = (1 - cfg.window_influence) * score + cfg.window_influence * near
        best = blended.argmax(1)

        box = self.search_crop.to_frame(found[rows, best], windows, boxes)
        seen = None
        if maps:
            grids = {"score": score, "blended": blended}
            seen = answer.maps | {
                key: grid.unflatten(1, (side, side)) for key, grid in grids.items()
            }
            seen |= {"crop": crops, "boxes": answer.boxes, "window": windows.rows}
        return box, score[rows, best], seen

    # ---- training (section 6.1 and appendix A.1) ----

    def loss(self, batch: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        """Losses of a batch of pairs: each token learns its class, those on the target also the
        box.
        """
        template = self.encode(normalise(batch["templates"][:, 0]))
        answer = self(template, normalise(batch["searches"][:, 0]))
        return self.compare(answer, batch["search_boxes"][:, 0])

    def compare(self, answer: Answer, truth: Tensor) -> dict[str, Tensor]:
        """Losses of an answer, given the true boxes (B, 4), cxcywh in units of the crop.

        The paper's Eq. 10 has no weights for the classes and sums; in the code, as here, background
        tokens weigh less, and the box losses are means over the positive tokens of the batch.
        """
        cfg, side = self.config, self.config.search_size // self.config.stride
        positive = positive_tokens(truth, side, cfg.positives == "wrapped")  # (B, N)
        weights = answer.logits.new_ones(2)
        weights[1:] = cfg.background
        labels = (~positive).long().flatten()
        classes = F.cross_entropy(answer.logits.flatten(0, 1), labels, weights)  # Eq. 10
        wanted = truth[:, None].expand_as(answer.boxes).to(answer.boxes)
        # tokens off the target answer the truth, which has no gradient
        boxes = torch.where(positive[..., None], answer.boxes, wanted)
        l1 = mean_of((boxes - wanted).abs().sum(-1), positive)
        overlap = mean_of(1 - giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted)), positive)
        total = cfg.weights[0] * classes + cfg.weights[1] * l1 + cfg.weights[2] * overlap  # Eq. 11
        return {"loss": total, "class": classes, "l1": l1, "giou": overlap}

    def samples(self) -> SampleSpec:
        """Pairs forward in time, at most 200 frames apart; for the tiny network near ones, not
        mirrored to each other.
        """
        factor, short = (
            self.config.train_factor or self.config.search_factor,
            self.config.embedding == "net",
        )
        jitter = {"jitter_size": 0.4 if short else 0.5, "jitter_centre": 4.5 * factor / 5}
        z = {"jitter_centre": 0.2, "jitter_size": 0.1} if short else {}
        return SampleSpec(
            template=replace(self.template_crop, **z),
            search=replace(self.search_crop, factor=factor, **jitter),
            order="causal",
            max_gap=40 if short else 200,
            flip=0.5,
            flip_each=0.0 if short else 0.5,
            grey=0.05,
            brightness=0.2,
            masks=True,
        )

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        """One stage of pairs. The scales "gpu" and "paper" follow one of `PRESETS`.

        The short scales are for the tiny network, which starts from nothing: one large rate that
        falls smoothly.
        """
        self.check_preset(preset)
        epochs, drops, pairs, size, rate = PRESETS[preset or self.presets[0]]
        steps, batch = {
            "tiny": (300, 16),
            "laptop": (6000, 16),
            "gpu": (20_000, 64),
            "paper": (epochs * (pairs // size), size),
        }[scale]
        if scale in ("tiny", "laptop"):
            rates = {"lr": 1e-3, "lr_end": 1e-5, "cosine": HOLD_AND_FALL, "warmup": 30, "clip": 1.0}
        else:
            drops = tuple(drop * steps // epochs for drop in drops)
            rates = {"lr": rate, "drops": drops, "rates": (("backbone.*", 0.1),), "clip": 0.1}
        return [Stage("pairs", steps, batch, self.samples(), weight_decay=1e-4, **rates)]


def anchors(side: int, size: float) -> Tensor:
    """Boxes in the middles of side x side tokens, row by row, as logits: (N, 4), the sigmoid of
    which is cxcywh in units of the crop.
    """
    middles = (torch.arange(side) + 0.5) / side
    at = torch.cartesian_prod(middles, middles).flip(1)
    return torch.cat([at, torch.full_like(at, size)], 1).logit()


def positive_tokens(boxes: Tensor, side: int, wrapped: bool = False) -> Tensor:
    """The tokens of a side x side grid that lie on each target: boxes (B, 4) cxcywh, units of the
    crop -> bool (B, side ** 2).

    A token lies on a target if its upper left corner does; a target between the corners has the
    next one. Beyond the border there are no tokens. In the authors' code ("wrapped") a box that
    begins outside counts its first column from the right border, as Python counts -3: mostly it has
    no token at all then, and a box larger than the crop has those in the lower right corner.
    """
    # float32 numbers, computed with in float64, as the authors do: an edge that falls on a corner
    # would else land on its other side
    x1, y1, x2, y2 = (cxcywh_to_xyxy(boxes.float().double()) * side).ceil().long().unbind(-1)
    index, inside = torch.arange(side, device=boxes.device), []
    for first, end in ((y1, y2), (x1, x2)):
        end = torch.where(end == first, first + 1, end)
        if wrapped:
            first, end = (
                torch.where(edge < 0, (edge + side).clamp(min=0), edge) for edge in (first, end)
            )
        inside.append((index >= first[:, None]) & (index < end[:, None]))  # (B, side)
    return (inside[0][:, :, None] & inside[1][:, None]).flatten(1)


# ---- correlation after the backbone, for comparison (Table 7) ----


class Levelwise(nn.Module):
    """Correlation after the backbone, at several levels, as Siamese trackers do it (Table 7 and
    Fig. 9b).

    Maps of x and z at each level, L x (B, H, W, C) and L x (B, h, w, C) -> (B, H, W, adjust).
    """

    def __init__(self, config: SBTConfig):
        super().__init__()
        width, self.crossed = config.dims[-1], config.correlation == "cross"
        self.adjust = nn.ModuleList(nn.Linear(width, config.adjust) for _ in config.levels)
        self.mix = nn.Parameter(torch.zeros(len(config.levels)))
        # so that the blocks below, each a first one, are CA blocks
        marked = replace(config, cross=(*config.cross[:-1], (1,)))
        self.blocks = nn.ModuleList(
            EoC(marked, len(config.dims) - 1, 0, 0.0) for _ in config.levels if self.crossed
        )
        self.apply(initialise)

    def forward(self, x: list[Tensor], z: list[Tensor]) -> Tensor:
        responses = []
        for level, adjust in enumerate(self.adjust):
            if self.crossed:
                responses.append(
                    adjust(self.blocks[level].cross(x[level], z[level], renew=False)[0])
                )
            else:
                responses.append(depthwise_correlation(adjust(x[level]), adjust(z[level])))
        return torch.einsum("l,lbhwc->bhwc", self.mix.softmax(0), torch.stack(responses))


def depthwise_correlation(x: Tensor, z: Tensor) -> Tensor:
    """Slide the middle 7 x 7 tokens of z over x, channel by channel: (B, H, W, C), (B, h, w, C) ->
    (B, H, W, C).

    The mean of the products, where SiamRPN++ takes their sum and normalises later.
    """
    top, left = (z.shape[1] - 7) // 2, (z.shape[2] - 7) // 2
    # (B * C, 1, 7, 7)
    kernel = z[:, top : top + 7, left : left + 7].permute(0, 3, 1, 2).flatten(0, 1)[:, None]
    images = x.permute(0, 3, 1, 2)
    response = F.conv2d(
        images.reshape(1, -1, *images.shape[2:]), kernel, padding=3, groups=len(kernel)
    )
    return response.view_as(images).permute(0, 2, 3, 1) / 49


# ---- section 5.3: the backbone for other trackers ----


class CorrelatedFeatures(Backbone):
    """The backbone for a tracker that compares features itself, as maps (B, C, H, W).

    Called with images it goes up to the first CA block, for templates and search crops alike, so a
    template's map can be kept; `meet` does the rest for a pair.
    """

    def forward(self, images: Tensor) -> Tensor:
        return self.alone(images).map.permute(0, 3, 1, 2)

    def meet(self, search: Tensor, template: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of B pairs as they come from `forward` -> maps that know of one another."""
        x, z = (Encoded(image.permute(0, 2, 3, 1)) for image in (search, template))
        pair = self.together(x, z, both=True)
        return tuple(self.norm(image.map).permute(0, 3, 1, 2) for image in pair)
