"""SBT: correlation moves into the backbone, and nothing is left to do after it but read the box.

Xie, Wang, Wang, Cao, Yang, Zeng: "Correlation-Aware Deep Tracking", CVPR 2022. Siamese trackers and STARK look at the
template and at the search crop separately and compare the features afterwards. SBT sends both through one backbone of
Extract-or-Correlation blocks: most blocks let an image look at itself (self-attention, SA), some let each image look at
the other (cross-attention, CA), all with the same weights. What comes out for the search crop already knows the target; two
small heads say for each of its tokens whether it belongs to the target, and where the target's box is.

The networks, the training and the tracking are those of the authors' code (phiphiphi31/SBT), whose checkpoints load by
`trackkit.official`. We depart from it in five places. Two compute the same with less: the template goes through the
blocks before the first CA only once, and what nobody reads of it after the last one is not computed. Blocks after the
last CA run (theirs are skipped; with the paper's placements there are none). Targets that reach outside the crop keep
their positive tokens (`positives`), and windows are exact if wished (`exact`).

Maps are (B, H, W, C): a row of C numbers is a token, and convolutions see channels last. x is the search crop, z the
template. SR is the side by which spatial reduction divides the grid of keys.
"""
from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.attention import DropPath, shift_bias, sine_position, squares, whole
from trackkit.backbones import normalise
from trackkit.boxes import clip_with_margin, cxcywh_to_xyxy, giou
from trackkit.crops import around_box, box_to_frame
from trackkit.errors import CheckpointError
from trackkit.heads import MLP, MixHead
from trackkit.sampling import CropSpec, SampleSpec
from trackkit.trackers.base import Prediction, Tracker
from trackkit.training import Stage

CHOICES = {
    "attention": ("srg", "vg", "vl", "sl"),
    "order": ("simultaneous", "sequential"),
    "position": ("conditional", "absolute", "relative", "none"),
    "embedding": ("conv", "patches"),
    "correlation": ("embedded", "depthwise", "cross"),
    "head": ("released", "eq7", "mlp3", "mlp5"),
    "positives": ("clipped", "wrapped"),
}


@dataclass(frozen=True)
class SBTConfig:
    """Numbers of the network, of training and of tracking. Lists have one entry for each stage of the backbone.

    Attributes:
        template_size, search_size: sides of the crops, pixels. template_factor, search_factor: sides of their windows in
            units of the square root of the target's area. The paper says 4 for the search, its code 5.
        dims, heads, blocks: channels, attention heads and blocks. strides: of the patch embeddings. ratios: hidden channels
            of the MLPs over `dims` (the paper's Table 2 prints 4 everywhere, but its counts are those of 8, 8, 4).
            reductions: SR.
        cross: the blocks that are CA, counted from 1, for each stage.
        attention: Table 1. "srg": all tokens look at all keys of a reduced grid. "vg": no reduction. "vl": SA within squares
            of `local` tokens, CA as "srg". "sl": SA and CA within such squares, shifted by half in every second block; the
            template must be as large as the search crop. local: side of the squares, tokens.
        order: "simultaneous": both images look at the other as it was before the block. "sequential": the template looks at
            a search crop that has looked already.
        position: Table 1. "conditional": a depth-wise convolution in the MLP. "absolute": sines added to the first embedding.
            "relative": a learned bias for each offset between query and key, in SA (between two images offsets mean
            nothing). "none".
        embedding: Table 1. "conv": overlapping patches. "patches": patches side by side and a linear layer (H1 and H2 there).
        correlation: Table 7. "embedded": the backbone's CA alone. "depthwise", "cross": also (or, without any `cross`, only)
            after it, at three `levels`, blocks of the last stage: depth-wise correlation with the middle 7 x 7 tokens of
            the template, or a CA block each. adjust: channels of these responses, which are summed with learned weights.
        head: "released" in the authors' code, "eq7" as the paper's Eq. 7 has it, or MLPs of 3 or 5 layers on each token,
            which explain the counts in Table 1.
        drop_path: probability of dropping the last block's branches in training; it rises from 0 block by block.
        positives: which tokens are told that they belong to a target that reaches outside the crop. "clipped": those in its
            box. "wrapped": the authors', see `positive_tokens`.
        weights: of the class, the L1 and the GIoU loss. The paper has 12, 7, 5; its code ten times as much, which with AdamW
            and clipped gradients is the same.
        background: weight of background tokens in the class loss.
        window_influence: share of a cosine window in the score by which a token is chosen; 0.49 in the code, 0 in the paper.
        margin: the box keeps at least so many frame pixels inside the frame, and is at least as large.
        exact: see `StarkConfig.exact`.
    """

    template_size: int = 128
    search_size: int = 256
    template_factor: float = 2.0
    search_factor: float = 5.0
    dims: tuple[int, ...] = (64, 128, 320)
    heads: tuple[int, ...] = (1, 2, 5)
    blocks: tuple[int, ...] = (3, 4, 10)
    strides: tuple[int, ...] = (4, 2, 1)
    ratios: tuple[int, ...] = (8, 8, 4)
    reductions: tuple[int, ...] = (8, 4, 2)
    cross: tuple[tuple[int, ...], ...] = ((), (), (2, 4, 6, 8, 10))
    attention: str = "srg"
    local: int = 8
    order: str = "simultaneous"
    position: str = "conditional"
    embedding: str = "conv"
    correlation: str = "embedded"
    levels: tuple[int, ...] = (6, 8, 10)
    adjust: int = 256
    head: str = "released"
    drop_path: float = 0.1
    positives: str = "clipped"
    weights: tuple[float, float, float] = (12.0, 7.0, 5.0)
    background: float = 0.0625
    window_influence: float = 0.49
    margin: float = 10.0
    exact: bool = False

    def __post_init__(self):
        object.__setattr__(self, "cross", tuple(tuple(stage) for stage in self.cross))  # from a file they come as lists
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}; got {getattr(self, field)!r}")
        stages = len(self.dims)
        for field in ("heads", "blocks", "strides", "ratios", "reductions", "cross"):
            if len(getattr(self, field)) != stages:
                raise ValueError(f"{field} needs one entry for each of the {stages} stages, as dims; got {getattr(self, field)}")
        if any(dim % heads for dim, heads in zip(self.dims, self.heads, strict=True)):
            raise ValueError(f"dims {self.dims} cannot be shared by {self.heads} heads")
        for stage, (cross, blocks) in enumerate(zip(self.cross, self.blocks, strict=True), 1):
            if any(not 1 <= block <= blocks for block in cross):
                raise ValueError(f"stage {stage} has blocks 1 to {blocks}; cross names {cross}")
        if self.template_size % self.stride or self.search_size % self.stride:
            raise ValueError(f"template_size and search_size must be multiples of the total stride, {self.stride}")
        windowed = self.attention in ("vl", "sl")
        for size in (self.template_size, self.search_size):
            for grid, reduction in zip(self.grids(size), self.reductions, strict=True):
                if self.attention != "vg" and grid < reduction:
                    raise ValueError(f"a crop of {size} px gives a grid of {grid}, too small to be reduced by {reduction}")
                if windowed and grid % self.local:
                    raise ValueError(f"a crop of {size} px gives a grid of {grid}, no multiple of local = {self.local}")
        if self.attention == "sl" and self.template_size != self.search_size:
            raise ValueError('attention "sl" compares squares of two equal grids: make template_size equal to search_size')
        if self.correlation == "embedded" and not any(self.cross):
            raise ValueError('without a block in cross, or correlation "depthwise" or "cross", nothing looks at the template')
        if self.correlation != "embedded" and any(not 1 <= level <= self.blocks[-1] for level in self.levels):
            raise ValueError(f"the last stage has blocks 1 to {self.blocks[-1]}; levels are {self.levels}")
        if not 0 <= self.window_influence <= 1:
            raise ValueError("window_influence must be between 0 and 1")

    @classmethod
    def light(cls, **changes) -> SBTConfig:
        """SBT-light (Table 2)."""
        return cls.small(**{"dims": (32, 64, 160), **changes})

    @classmethod
    def small(cls, **changes) -> SBTConfig:
        """SBT-small (Table 2)."""
        return cls(**{"blocks": (2, 2, 6), "cross": ((), (), (2, 4, 6)), "levels": (2, 4, 6), **changes})

    @classmethod
    def base(cls, **changes) -> SBTConfig:
        """SBT-base (Table 2)."""
        return cls(**changes)

    @classmethod
    def large(cls, **changes) -> SBTConfig:
        """SBT-large (Table 2)."""
        return cls(**{"blocks": (3, 4, 18), "cross": ((), (), (6, 8, 10, 12, 14, 16, 18)), "levels": (14, 16, 18), **changes})

    @classmethod
    def tiny(cls, **changes) -> SBTConfig:
        """SBT with a hundredth of the weights: learns from scratch on a laptop's CPU."""
        small = {
            "template_size": 64, "search_size": 128, "search_factor": 4.0, "dims": (16, 32, 64), "heads": (1, 2, 4),
            "blocks": (1, 1, 4), "ratios": (4, 4, 4), "cross": ((), (), (2, 4)), "levels": (2, 3, 4), "adjust": 64,
            "drop_path": 0.0, "margin": 4.0, "exact": True,
        }  # fmt: skip
        return cls(**{**small, **changes})

    @property
    def stride(self) -> int:
        """Crop pixels from one token of the output to the next."""
        return prod(self.strides)

    def grids(self, size: int) -> list[int]:
        """Side of the token grid in each stage for a crop of `size` pixels: 64, 32, 32 for 256."""
        return [size // prod(self.strides[: i + 1]) for i in range(len(self.strides))]

    def pretraining(self) -> SBTConfig:
        """With the fourth stage, and the strides, that serve to learn from single images (section 5.2)."""
        last = {"dims": 8 * self.dims[-1] // self.heads[-1], "heads": 8, "blocks": 2, "ratios": 4, "reductions": 1, "cross": ()}
        longer = {field: (*getattr(self, field), value) for field, value in last.items()}
        return replace(self, **longer, strides=(4, 2, 2, 2), correlation="embedded", template_size=224, search_size=224)


# ---- the backbone (paper, sections 3.1 to 3.3) ----


class PatchEmbedding(nn.Module):
    """Fewer, richer tokens: (B, H, W, C) -> (B, H / stride, W / stride, D) (Eq. 1)."""

    def __init__(self, config: SBTConfig, stage: int):
        super().__init__()
        inputs = config.dims[stage - 1] if stage else 3
        stride, width, overlap = config.strides[stage], config.dims[stage], config.embedding == "conv"
        kernel = (3 if stage else 7) if overlap else stride
        self.proj = nn.Conv2d(inputs, width, kernel, stride, kernel // 2 if overlap else 0)
        self.norm = nn.LayerNorm(width)
        self.absolute = config.position == "absolute" and stage == 0

    def forward(self, x: Tensor, weights: bool = False) -> tuple[Tensor, None]:
        x = self.norm(_convolve(self.proj, x))
        if self.absolute:
            inside = torch.zeros(x.shape[:3], dtype=torch.bool, device=x.device)
            x = x + sine_position(inside, x.shape[-1]).to(x).view_as(x)
        return x, None


class ConvMlp(nn.Module):
    """Linear, 3 x 3 depth-wise convolution, GELU, linear (section 3.3).

    The convolution pads with zeros, so tokens learn how far the border is: a position encoding that fits every size.
    """

    def __init__(self, width: int, hidden: int, conditional: bool):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.position = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden) if conditional else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.position is not None:
            x = _convolve(self.position, x)
        return self.fc2(F.gelu(x))


Prepared = tuple[Tensor | None, tuple[Tensor, Tensor]]  # queries, (keys, values)


class EoC(nn.Module):
    """Extract-or-Correlation block (section 3.2, Fig. 3b): SA with `forward`, CA with `cross`, by the same layers."""

    def __init__(self, config: SBTConfig, stage: int, block: int, drop: float):
        super().__init__()
        width, self.heads = config.dims[stage], config.heads[stage]
        crossed = block + 1 in config.cross[stage]
        windowed = config.attention == "sl" or (config.attention == "vl" and not crossed)
        reduction = 1 if windowed or config.attention == "vg" else config.reductions[stage]
        self.local = config.local if windowed else 0
        self.shift = self.local // 2 if config.attention == "sl" and block % 2 else 0
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.reduce = nn.Conv2d(width, width, reduction, reduction) if reduction > 1 else None
        self.reduce_norm = nn.LayerNorm(width) if reduction > 1 else None
        self.mlp = ConvMlp(width, config.ratios[stage] * width, config.position == "conditional")
        self.drop_path = DropPath(drop)
        self.sequential, self.offsets = config.order == "sequential", None
        if config.position == "relative" and not crossed:
            reach = self.local or config.grids(max(config.search_size, config.template_size))[stage]
            self.offsets = nn.Parameter(torch.zeros(self.heads, 2 * reach - 1, 2 * reach - 1))
            nn.init.trunc_normal_(self.offsets, std=0.02)

    def forward(self, x: Tensor, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """SA: (B, H, W, C) -> the same, and with `weights` how much each token looked at each key, (B, heads, N, K) (Eq. 4)."""
        normed = self.norm1(x)
        mixed, share = self.attend(self.ask(normed), self.offer(normed), x, weights, own=True)
        return self.absorb(x, mixed), share

    def cross(
        self, x: Tensor, z: Tensor, prepared: Prepared | None = None, renew: bool = True, weights: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """CA: maps x and z -> the same, each having looked at the other, and x's share (Eq. 5).

        `prepared` is z's part if it was computed before. Without `renew` z stays as it is.
        """
        q_z, kv_z = self.prepare(z, renew) if prepared is None else prepared
        normed = self.norm1(x)
        mixed, share = self.attend(self.ask(normed), kv_z, x, weights)
        new = self.absorb(x, mixed)
        if renew:
            kv_x = self.offer(self.norm1(new) if self.sequential else normed)
            z = self.absorb(z, self.attend(q_z, kv_x, z)[0])
        return new, z, share

    def prepare(self, z: Tensor, ask: bool = True) -> Prepared:
        """What `cross` needs of a map z whatever x is: its queries, if it is to `ask`, and its keys and values."""
        normed = self.norm1(z)
        return self.ask(normed) if ask else None, self.offer(normed)

    def ask(self, normed: Tensor) -> Tensor:
        """Queries (G, heads, N, d) of a normed map, all its tokens; G is B, times the squares of a local attention (Eq. 2)."""
        return self._heads(self.q(squares(normed, self.local, self.shift).flatten(1, 2)))

    def offer(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (G, heads, K, d) of a normed map, on a grid SR times coarser (Eq. 2)."""
        if self.reduce is not None:
            normed = self.reduce_norm(_convolve(self.reduce, normed))
        k, v = self.kv(squares(normed, self.local, self.shift).flatten(1, 2)).chunk(2, -1)
        return self._heads(k), self._heads(v)

    def attend(
        self, q: Tensor, kv: tuple[Tensor, Tensor], like: Tensor, weights: bool = False, own: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Queries gather the values whose keys resemble them -> map of the size of `like` (Eq. 3). `own`: of their own image."""
        k, v = kv
        bias = self._bias(like, own)
        if weights:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            share = (scores if bias is None else scores + bias).softmax(-1)
            mixed = share @ v
        else:
            share, mixed = None, F.scaled_dot_product_attention(q, k, v, bias)
        return whole(mixed.transpose(1, 2).flatten(2), like, self.local, self.shift), share

    def absorb(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add what was gathered, then think (Eq. 4 and 5)."""
        x = x + self.drop_path(self.proj(mixed))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _bias(self, like: Tensor, own: bool) -> Tensor | None:
        """What is added to the logits: for relative positions, and between parts of a square that a shift brought together."""
        bias = None
        if own and self.offsets is not None:
            side, sr = self.local or like.shape[1], 1 if self.reduce is None else self.reduce.stride[0]
            steps = torch.arange(side, device=like.device)
            apart = steps[:, None] - sr * steps[: side // sr] + self.offsets.shape[-1] // 2  # (side, side / SR)
            bias = self.offsets[:, apart[:, None, :, None], apart[None, :, None, :]].flatten(3).flatten(1, 2)[None]
        if self.shift:
            apart = shift_bias(like, self.local, self.shift)
            bias = apart if bias is None else apart + bias
        return bias


def _convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of a map with channels last."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class BackboneStage(nn.Module):
    """A patch embedding, blocks of one width, and a norm where the stage's output is used."""

    def __init__(self, config: SBTConfig, stage: int, norm: bool):
        super().__init__()
        total, before = sum(config.blocks), sum(config.blocks[:stage])
        drops = [config.drop_path * (before + b) / max(total - 1, 1) for b in range(config.blocks[stage])]
        self.embed = PatchEmbedding(config, stage)
        self.blocks = nn.ModuleList(EoC(config, stage, block, drop) for block, drop in enumerate(drops))
        self.norm = nn.LayerNorm(config.dims[stage], eps=1e-6) if norm else None


@dataclass(frozen=True)
class Encoded:
    """An image on its way through the backbone."""

    map: Tensor  # (B, H, W, C)
    levels: tuple[Tensor, ...] = ()  # maps after the blocks `config.levels`, as far as it has come
    prepared: Prepared | None = None  # of a template: its part in the first CA block


class Backbone(nn.Module):
    """The single branch: `alone` up to the first CA block, then two images `together` (Fig. 3a)."""

    def __init__(self, config: SBTConfig):
        super().__init__()
        self.cross, last = config.cross, len(config.dims)
        self.stages = nn.ModuleList(BackboneStage(config, i, norm=i == last - 1) for i in range(last))
        self.levels = {f"stage{last}.block{level}" for level in config.levels if config.correlation != "embedded"}
        names = [(name, crossed) for name, _, crossed in self.steps()]
        self.first = next((i for i, (_, crossed) in enumerate(names) if crossed), len(names))
        # the last step whose template map anybody reads
        read = [i - 1 for i, (_, crossed) in enumerate(names) if crossed]
        self.read = max(read + [i for i, (name, _) in enumerate(names) if name in self.levels])
        self.channels, self.stride = config.dims[-1], config.stride
        self.apply(_initialise)

    @property
    def norm(self) -> nn.LayerNorm:
        """Of the output."""
        return self.stages[-1].norm

    def steps(self) -> list[tuple[str, nn.Module, bool]]:
        """Name, layer, and whether it is CA, in the order in which they run."""
        found = []
        for s, stage in enumerate(self.stages):
            found.append((f"stage{s + 1}.embed", stage.embed, False))
            found += [(f"stage{s + 1}.block{b}", block, b in self.cross[s]) for b, block in enumerate(stage.blocks, 1)]
        return found

    def alone(self, images: Tensor, seen: dict | None = None) -> Encoded:
        """Normalised images (B, 3, S, S) up to the first CA block. `seen` collects each step's map and attention."""
        x, levels = images.permute(0, 2, 3, 1), ()
        for name, layer, _ in self.steps()[: self.first]:
            x, share = layer(x, seen is not None)
            levels += (x,) if name in self.levels else ()
            _note(seen, name, x, share)
        return Encoded(x, levels)

    def prepare(self, z: Encoded) -> Encoded:
        """A template with its part in the first CA block, which is the same for every search crop."""
        if self.first == len(self.steps()):
            return z
        return replace(z, prepared=self.steps()[self.first][1].prepare(z.map, ask=self.first <= self.read))

    def together(self, x: Encoded, z: Encoded, both: bool = False, seen: dict | None = None) -> tuple[Encoded, Encoded]:
        """The rest: both images have been `alone`, and now meet in the CA blocks.

        The template's map ends where nobody reads it any more, or with `both` at the end as well.
        """
        weights, (x, x_levels), (z, z_levels, prepared) = seen is not None, (x.map, x.levels), (z.map, z.levels, z.prepared)
        for index, (name, layer, crossed) in enumerate(self.steps()):
            if index < self.first:
                continue
            renew = both or index <= self.read
            if crossed:
                x, z, share = layer.cross(x, z, prepared if index == self.first else None, renew, weights)
            else:
                x, share = layer(x, weights)
                z = layer(z)[0] if renew else z
            if name in self.levels:
                x_levels, z_levels = (*x_levels, x), (*z_levels, z)
            _note(seen, name, x, share)
            _note(seen, f"{name}.template", z if renew else None, None)
        return Encoded(x, x_levels), Encoded(z, z_levels)

    def load_pretrained(self, weights: dict[str, Tensor], blocks: int | None = None) -> None:
        """Start from weights learned on single images (section 6.1, and Fig. 8): all blocks, or only the first `blocks`.

        `weights` are the state dict of a `Classifier`, or of a PVTv2 of the same widths, whose blocks are EoC blocks: its
        authors' files (which SBT's authors take, pvt_v2_b3) and timm's are understood. The patch embedding of a stage comes with
        its first block, the last norm with the last block. What goes beyond that is left aside: later stages, the classifier.

        Raises CheckpointError that names the first entries that are missing or of another size; nothing is loaded then.
        """
        total = sum(len(stage.blocks) for stage in self.stages)
        if blocks is not None and not 0 <= blocks <= total:
            raise CheckpointError(f"the backbone has {total} blocks; cannot load the first {blocks}")
        names = [f"stages.{s}.blocks.{b}." for s, stage in enumerate(self.stages) for b in range(len(stage.blocks))]
        chosen = tuple(names[:blocks])
        chosen += tuple(name.replace("blocks.0", "embed") for name in chosen if name.endswith("blocks.0."))
        chosen += (f"stages.{len(self.stages) - 1}.norm.",) if len(chosen) and names[-1] in chosen else ()
        found = {pvt_name(key): value for key, value in weights.items()}
        wanted = {key: value for key, value in self.state_dict().items() if key.startswith(chosen)} if chosen else {}
        odd = [f"{key} {tuple(found[key].shape) if key in found else 'is missing'}, needed {tuple(value.shape)}"
               for key, value in wanted.items() if key not in found or found[key].shape != value.shape]  # fmt: skip
        if odd:
            raise CheckpointError(f"these weights do not fit the first {blocks or total} blocks: {'; '.join(odd[:3])} ({len(odd)} in all)")
        self.load_state_dict({key: found[key].float() for key in wanted}, strict=False)


class Classifier(nn.Module):
    """The four-stage form that learns from single images: (B, 3, S, S), normalised -> (B, classes) logits (section 5.2).

    Every block is SA. `Backbone.load_pretrained` takes over what it has learned.
    """

    def __init__(self, config: SBTConfig = SBTConfig(), classes: int = 1000):
        super().__init__()
        config = config.pretraining()
        self.stages = nn.ModuleList(BackboneStage(config, i, norm=True) for i in range(len(config.dims)))
        self.head = nn.Linear(config.dims[-1], classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 2, 3, 1)
        for stage in self.stages:
            for layer in (stage.embed, *stage.blocks):
                x, _ = layer(x)
            x = stage.norm(x)
        return self.head(x.mean((1, 2)))


def pvt_name(key: str) -> str:
    """Our name for a backbone entry of SBT's authors, of PVTv2's authors, or of timm's PVTv2."""
    key = re.sub(r"\bpatch_embed(\d?)\.", lambda m: f"stages.{int(m[1] or 1) - 1}.embed.", key)
    key = re.sub(r"\bblock(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
    key = re.sub(r"^(backbone\.)?norm(\d)\.", lambda m: f"{m[1] or ''}stages.{int(m[2]) - 1}.norm.", key)
    key = re.sub(r"\.mlp\.dwconv\.(dwconv\.)?", ".mlp.position.", key.replace(".downsample.", ".embed."))
    return key.replace(".attn.sr.", ".reduce.").replace(".attn.norm.", ".reduce_norm.").replace(".attn.", ".")


def _note(seen: dict | None, name: str, x: Tensor | None, share: Tensor | None) -> None:
    if seen is not None:
        seen |= {} if x is None else {name: x}
        seen |= {} if share is None else {f"{name}.attention": share}


def _convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of a map with channels last."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        outputs = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / outputs) ** 0.5)
        nn.init.zeros_(module.bias)


# ---- the tracker ----


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


class SBT(Tracker):
    """The network and the way it tracks."""

    Config = SBTConfig

    def __init__(self, config: SBTConfig = SBTConfig()):
        super().__init__(config)
        self.backbone = Backbone(config)
        self.levelwise = Levelwise(config) if config.correlation != "embedded" else None
        width = config.dims[-1] if self.levelwise is None else config.adjust
        tokens = (config.search_size // config.stride) ** 2
        if config.head in ("released", "eq7"):
            heads = [MixHead(tokens, width, outputs, literal=config.head == "eq7") for outputs in (2, 4)]
        else:
            heads = [MLP(width, width, outputs, depth=int(config.head[-1])) for outputs in (2, 4)]
        self.class_head, self.box_head = heads

    # ---- the network (paper, section 3.4) ----

    def encode(self, images: Tensor) -> Encoded:
        """Normalised templates (B, 3, S, S), as far as they do not depend on the search crop."""
        return self.backbone.prepare(self.backbone.alone(images))

    def forward(self, template: Encoded, images: Tensor, maps: bool = False) -> Answer:
        """An encoded template and normalised search crops (B, 3, S, S) -> classes and boxes (Eq. 6)."""
        seen = {} if maps else None
        x, z = self.backbone.together(self.backbone.alone(images, seen), template, seen=seen)
        if self.levelwise is None:
            features = self.backbone.norm(x.map)
        else:
            features = self.levelwise([self.backbone.norm(m) for m in x.levels], [self.backbone.norm(m) for m in z.levels])
        features = features.flatten(1, 2)  # (B, N, C)
        return Answer(self.class_head(features), self.box_head(features).sigmoid(), {"features": features} | (seen or {}))

    # ---- tracking (section 6.1, "Testing") ----

    @torch.no_grad()
    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> SBTState:
        cfg = self.config
        frames, boxes = self.checked(frames, boxes_xywh)
        crops, _ = around_box(frames, boxes, cfg.template_factor, cfg.template_size, cfg.exact)
        return SBTState(boxes, self.encode(normalise(crops)))

    @torch.no_grad()
    def step(self, state: SBTState, frames: list[Tensor], maps: bool = False) -> tuple[SBTState, Prediction]:
        cfg, frames, rows = self.config, self.moved(frames), torch.arange(len(frames))
        crops, windows = around_box(frames, state.box, cfg.search_factor, cfg.search_size, cfg.exact)
        answer = self(state.template, normalise(crops), maps)

        # the best token, where far tokens are less likely
        score = answer.logits.softmax(-1)[..., 0].double().cpu()  # (B, N)
        side = cfg.search_size // cfg.stride
        hann = torch.hann_window(side, periodic=False, dtype=torch.float64)
        blended = (1 - cfg.window_influence) * score + cfg.window_influence * (hann[:, None] * hann).flatten()
        best = blended.argmax(1)

        box = box_to_frame(answer.boxes.double().cpu()[rows, best], windows, state.box, cfg.exact)
        sizes = torch.tensor([frame.shape[:0:-1] for frame in frames], dtype=torch.float64)  # (B, 2): width, height
        box = clip_with_margin(box, sizes, cfg.margin)
        seen = None
        if maps:
            grids = {"score": score.unflatten(1, (side, side)), "blended": blended.unflatten(1, (side, side))}
            place = {"crop": crops, "boxes": answer.boxes, "window": torch.stack([windows.left, windows.top, windows.side], 1)}
            seen = answer.maps | grids | place
        return replace(state, box=box), Prediction(box, score[rows, best], seen)

    # ---- training (section 6.1 and appendix A.1) ----

    def loss(self, batch: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        """Losses of a batch of pairs: each token learns its class, those on the target also the box (Eq. 10 and 11)."""
        template = self.encode(normalise(batch["templates"][:, 0]))
        return self.losses(self(template, normalise(batch["searches"][:, 0])), batch["search_boxes"][:, 0])

    def losses(self, answer: Answer, truth: Tensor) -> dict[str, Tensor]:
        """Losses of an answer, given the true boxes (B, 4), cxcywh in units of the crop.

        The paper's Eq. 10 has no weights for the classes and sums; in the code, as here, background tokens weigh less, and the
        box losses are means over the positive tokens of the batch.
        """
        cfg = self.config
        positive = positive_tokens(truth, cfg.search_size // cfg.stride, cfg.positives == "wrapped")  # (B, N)
        weights = torch.tensor([1.0, cfg.background], device=truth.device).to(answer.logits)
        classes = F.cross_entropy(answer.logits.flatten(0, 1), (~positive).long().flatten(), weights)
        boxes, wanted = answer.boxes[positive], truth[:, None].expand_as(answer.boxes)[positive].to(answer.boxes)
        count = positive.sum().clamp(min=1)
        l1 = (boxes - wanted).abs().sum() / count
        overlap = (1 - giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))).sum() / count
        total = cfg.weights[0] * classes + cfg.weights[1] * l1 + cfg.weights[2] * overlap
        return {"loss": total, "class": classes, "l1": l1, "giou": overlap}

    def samples(self) -> SampleSpec:
        """Pairs forward in time, at most 200 frames apart."""
        cfg = self.config
        shared = {"fill": 0, "exact": cfg.exact}
        return SampleSpec(
            template=CropSpec(cfg.template_size, cfg.template_factor, **shared),
            search=CropSpec(cfg.search_size, cfg.search_factor, jitter_size=0.5, jitter_centre=4.5 * cfg.search_factor / 5, **shared),
            order="causal",
            max_gap=200,
            flip=0.5,
            flip_each=0.5,
            grey=0.05,
            brightness=0.2,
            masks=True,
        )

    def recipe(self, scale: str, preset: str = "code-got10k") -> list[Stage]:
        """One stage of pairs. The scale "paper" follows one of `PRESETS`.

        The short scales are for the tiny network, which starts from nothing: one large rate that falls smoothly.
        """
        steps, batch = {"tiny": (300, 16), "laptop": (3000, 24), "gpu": (20_000, 64), "paper": (0, 0)}[scale]
        if scale in ("tiny", "laptop"):
            rates = {"lr": 1e-3, "lr_end": 1e-5, "warmup": 100, "clip": 1.0}
        else:
            epochs, drops, pairs, size, rate = PRESETS[preset]
            if scale == "paper":
                steps, batch = epochs * (pairs // size), size
            drops = tuple(drop * steps // epochs for drop in drops)
            rates = {"lr": rate, "drops": drops, "rates": (("backbone.*", 0.1),), "clip": 0.1}
        return [Stage("pairs", steps=steps, batch=batch, sample=self.samples(), weight_decay=1e-4, **rates)]

    def profile(self) -> dict:
        """Parameters and multiply-accumulates by the rule that gives the paper's Table 2: what its counter knew.

        It knew convolutions (with their biases, one operation an output) and linear layers, so no layer norm and no product
        inside attention; and it ran the whole network on a pair, template and all. Table 2 has two misprints: light's
        figures stand in each other's place, and base's 21.27 M should be 21.97 M.
        """
        with torch.device("meta"):
            twin, (z, x) = SBT(self.config).eval(), (torch.empty(1, 3, s, s) for s in (self.config.template_size, self.config.search_size))
        layers, macs = [m for m in twin.modules() if isinstance(m, (nn.Conv2d, nn.Linear))], 0

        def count(layer: nn.Module, _, output: Tensor) -> None:
            nonlocal macs
            macs += output.numel() * layer.weight[0].numel()
            macs += output.numel() if isinstance(layer, nn.Conv2d) else 0

        for layer in layers:
            layer.register_forward_hook(count)
        with torch.no_grad():
            x, z = twin.backbone.together(twin.backbone.alone(x), twin.encode(z), both=True)
            features = x.map if twin.levelwise is None else twin.levelwise(x.levels, z.levels)
            for head in (twin.class_head, twin.box_head):
                head(features.flatten(1, 2))
        parameters = sum(p.numel() for layer in layers for p in layer.parameters())
        return {"parameters": parameters, "macs": macs, "paper": TABLE_2.get(self.config, {})}


TABLE_2 = {
    SBTConfig.light(): {"parameters": 3_030_000, "macs": 3_810_000_000, "note": "printed in each other's place"},
    SBTConfig.small(): {"parameters": 13_800_000, "macs": 11_920_000_000},
    SBTConfig.base(): {"parameters": 21_270_000, "macs": 19_270_000_000, "note": "21.27 M is a misprint of 21.97 M"},
    SBTConfig.large(): {"parameters": 35_200_000, "macs": 31_460_000_000},
}  # the paper says FLOPs and counts multiply-accumulates

PRESETS = {  # epochs, epochs after which the rate falls to a tenth, pairs an epoch, batch, rate of the heads (the rest: a tenth)
    "paper": (600, (200, 400), 50_000, 160, 1e-4),  # section 6.1: four data sets
    "paper-got10k": (100, (30, 50), 50_000, 160, 1e-3),  # appendix A.1; its rates contradict those of section 6.1
    "code": (500, (400,), 60_000, 160, 1e-3),  # base
    "code-large": (300, (240,), 60_000, 96, 1e-3),
    "code-got10k": (100, (80,), 60_000, 160, 1e-3),
    "code-got10k-large": (100, (80,), 60_000, 96, 1e-3),
}


class Levelwise(nn.Module):
    """Correlation after the backbone, at several levels, as Siamese trackers do it (Table 7 and Fig. 9b).

    Maps of x and z at each level, L x (B, H, W, C) and L x (B, h, w, C) -> (B, H, W, adjust).
    """

    def __init__(self, config: SBTConfig):
        super().__init__()
        width, self.crossed = config.dims[-1], config.correlation == "cross"
        self.adjust = nn.ModuleList(nn.Linear(width, config.adjust) for _ in config.levels)
        self.share = nn.Parameter(torch.zeros(len(config.levels)))
        marked = replace(config, cross=(*config.cross[:-1], (1,)))
        self.blocks = nn.ModuleList(EoC(marked, len(config.dims) - 1, 0, 0.0) for _ in config.levels if self.crossed)
        self.apply(_initialise)

    def forward(self, x: list[Tensor], z: list[Tensor]) -> Tensor:
        responses = []
        for level, adjust in enumerate(self.adjust):
            if self.crossed:
                responses.append(adjust(self.blocks[level].cross(x[level], z[level], renew=False)[0]))
            else:
                responses.append(depthwise_correlation(adjust(x[level]), adjust(z[level])))
        return torch.einsum("l,lbhwc->bhwc", self.share.softmax(0), torch.stack(responses))


def depthwise_correlation(x: Tensor, z: Tensor) -> Tensor:
    """Slide the middle 7 x 7 tokens of z over x, channel by channel: (B, H, W, C), (B, h, w, C) -> (B, H, W, C)."""
    top, left = (z.shape[1] - 7) // 2, (z.shape[2] - 7) // 2
    kernel = z[:, top : top + 7, left : left + 7].permute(0, 3, 1, 2).flatten(0, 1)[:, None]  # (B * C, 1, 7, 7)
    images = x.permute(0, 3, 1, 2)
    response = F.conv2d(images.reshape(1, -1, *images.shape[2:]), kernel, padding=3, groups=len(kernel))
    return response.view_as(images).permute(0, 2, 3, 1) / 49


def positive_tokens(boxes: Tensor, side: int, wrapped: bool = False) -> Tensor:
    """The tokens of a side x side grid that lie on each target: boxes (B, 4) cxcywh, units of the crop -> bool (B, side ** 2).

    A token lies on a target if its upper left corner does; a target between the corners has the next one. Beyond the
    border there are no tokens. In the authors' code ("wrapped") a box that begins outside counts its first column from the
    right border, as Python counts -3: mostly it has no token at all then, and a box larger than the crop has those in the
    lower right corner.
    """
    x1, y1, x2, y2 = (cxcywh_to_xyxy(boxes) * side).ceil().long().unbind(-1)
    index, inside = torch.arange(side, device=boxes.device), []
    for first, end in ((y1, y2), (x1, x2)):
        end = torch.where(end == first, first + 1, end)
        if wrapped:
            first, end = (torch.where(edge < 0, (edge + side).clamp(min=0), edge) for edge in (first, end))
        inside.append((index >= first[:, None]) & (index < end[:, None]))  # (B, side)
    return (inside[0][:, :, None] & inside[1][:, None]).flatten(1)
