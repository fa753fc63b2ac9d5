"""MixViT: templates and search region are one row of tokens, so features are extracted and compared
in the same step.

Cui, Jiang, Wu, Wang: "MixFormer: End-to-End Tracking with Iterative Mixed Attention" (CVPR 2022;
its longer version, arXiv 2302.02814, has this plain-transformer form). In each block of a vision
transformer the search tokens look at the templates and at themselves, the templates at themselves
only; a corner head reads the box from the search tokens. As templates never see the search region,
their keys and values are computed once.

The network is that of the authors' code (MCG-NJU/MixFormer), whose checkpoints load by
`trackkit.official`; the score branch of its second training stage is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit import vit
from trackkit.backbones import normalise
from trackkit.boxes import (
    bias_of,
    clip_with_margin,
    cxcywh_to_xyxy,
    follow_size,
    without_bias,
    xyxy_to_cxcywh,
)
from trackkit.checkpoints import load_strictly
from trackkit.crops import Windows, frame_sizes
from trackkit.devices import to_host
from trackkit.errors import Range, TrackkitError, check_fields
from trackkit.frames import FrameRule, SampleSpec
from trackkit.heads import CornerHead, PyramidCornerHead, soft_argmax
from trackkit.losses import ciou, localisation, place_cross_entropy
from trackkit.stages import HOLD_AND_FALL, Stage
from trackkit.trackers.base import Prediction, Tracker, put


@dataclass(frozen=True)
class MixViTConfig:
    """Numbers of the network, of training and of tracking."""

    template_size: int = 128
    """Side of the template crops, pixels; a multiple of the stem's stride."""
    search_size: int = 288
    """Side of the search crop, pixels; a multiple of the stem's stride."""
    template_factor: float = 2.0
    """Side of a template's window in units of the square root of the target's area."""
    search_factor: float = 4.5
    """Side of the search window in tracking, in the same units."""
    train_factor: float = 4.5
    """Side of the search window in training, in the same units."""
    stem: str = "patch"
    """`patch`, a linear map of 16 x 16 pixels, or `conv`, a small network of stride 8 that trains
    from scratch."""
    width: int = 768
    """Channels of the transformer; a multiple of 4 and of `heads`."""
    depth: int = 12  # blocks of the transformer
    heads: int = 12  # of each attention
    hidden: int = 3072  # hidden channels of the blocks' MLPs
    drop_path: float = 0.1
    """Probability of dropping the last block's branches in training; it rises from 0 block by
    block."""
    templates: int = 2  # 2, or 1: then no online template
    head: str = "pyramid"  # `pyramid` or `corner`, see `trackkit.heads`
    head_channels: int = 384  # of either head's first convolution; a multiple of 8
    update_interval: int = 200
    """Every so many frames the second template is cut anew (authors: 200 on GOT-10k and LaSOT, 25
    on TrackingNet); 0: never, as it must be with one template."""
    margin: float = 10.0
    """The box keeps at least so many frame pixels inside the frame, and is at least as large."""
    exact: bool = False
    """Boxes go into and out of crops by the crops' own geometry; False: with the authors' habits,
    see `trackkit.crops`."""
    first_look: bool = False  # see `OSTrackConfig.first_look`; not in the paper
    size_rate: float = 1.0  # share of a change of size that is followed, see `boxes.follow_size`

    def __post_init__(self):
        size, factor = Range(1, 4096), Range(0, 100, above=True)
        check_fields(self, template_size=size, search_size=size, width=size, head_channels=size)
        check_fields(self, template_factor=factor, search_factor=factor, train_factor=factor)
        check_fields(self, depth=Range(1, 100), heads=size, hidden=Range(1, 16_384))
        check_fields(
            self, stem=("patch", "conv"), head=("pyramid", "corner"), templates=Range(1, 2)
        )
        check_fields(self, drop_path=Range(0, 1, below=True), margin=Range(0, 4096))
        check_fields(self, update_interval=Range(0), exact=(True, False))
        check_fields(self, first_look=(True, False), size_rate=Range(0, 1))
        if self.template_size % self.stride or self.search_size % self.stride:
            sizes = "template_size and search_size must be multiples of the stem's stride"
            raise ValueError(f"{sizes}, {self.stride}")
        if self.width % 4 or self.width % self.heads or self.head_channels % 8:
            raise ValueError("width must be a multiple of 4 and of heads, head_channels of 8")
        if self.update_interval and self.templates == 1:
            raise ValueError("with one template there is none to update: update_interval must be 0")

    @property
    def stride(self) -> int:
        """Crop pixels from one token to the next."""
        return vit.stride_of(self.stem)

    @property
    def grid(self) -> int:
        """Search tokens along each axis."""
        return self.search_size // self.stride

    @classmethod
    def b288(cls, **changes) -> Self:
        """Base, as the authors track on GOT-10k."""
        return cls(**changes)

    @classmethod
    def l384(cls, **changes) -> Self:
        """Large; the authors track in a larger window than they train in."""
        large = {
            "template_size": 192, "search_size": 384, "search_factor": 5.0,
            "width": 1024, "depth": 24, "heads": 16, "hidden": 4096,
        }  # fmt: skip
        return cls(**{**large, **changes})

    @classmethod
    def tiny(cls, **changes) -> Self:
        """A hundredth of the weights: OSTrack's tiny transformer, for a laptop's CPU."""
        small = {
            "template_size": 48, "search_size": 96, "template_factor": 1.5, "search_factor": 2.5,
            "train_factor": 3.0, "stem": "conv", "width": 64, "depth": 4, "heads": 4,
            "hidden": 256, "drop_path": 0.0, "head_channels": 64, "margin": 4.0, "exact": True,
            "first_look": True, "size_rate": 0.15,
        }  # fmt: skip
        return cls(**{**small, **changes})


@dataclass(frozen=True)
class TemplateCache:
    """What the search tokens need of the templates: of each of the L blocks, keys and values of the
    T tokens of all templates.
    """

    keys: Tensor  # (B, L, H, T, d)
    values: Tensor  # (B, L, H, T, d)

    def __getitem__(self, block: int) -> tuple[Tensor, Tensor]:
        return self.keys[:, block], self.values[:, block]


@dataclass(frozen=True)
class Answer:
    """What the network says of B search crops of n tokens."""

    boxes: Tensor  # (B, 4), cxcywh, units of the crop
    corners: tuple[Tensor, Tensor]  # 2 x (B, s, s) logits
    tokens: Tensor  # (B, n, D), after the last block
    notes: dict[str, Tensor]  # what `mix` was told and has noted, and attention maps when asked for


@dataclass(frozen=True)
class MixViTState:
    """What MixViT remembers of B sequences."""

    box: Tensor  # (B, 4) xywh, frame pixels, float64
    frame: Tensor  # (B,) int64, frames since the first
    cache: TemplateCache
    # (B, T / 2, D), tokens of the first template, to be joined by a new second one
    first: Tensor | None
    bias: Tensor | None  # (B, 4), see `MixViTConfig.first_look`; None without it


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """How much each query (B, H, Q, d) looks at each key (B, H, T, d): (B, H, Q, T), rows sum to
    1.
    """
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)


class MixViT(Tracker):
    """The network and the way it tracks.

    A descendant changes what the search tokens gather (`mix`) and what one search tells the next,
    in tracking (`answer_and_carry`) and in training (`for_next_search`).
    """

    Config = MixViTConfig
    presets = ("paper", "code")

    def __init__(self, config: MixViTConfig | None = None):
        cfg = config or self.Config()
        super().__init__(cfg)
        template_grid = cfg.template_size // cfg.stride
        self.embed = vit.patch_embedding(cfg.stem, cfg.width)
        self.register_buffer("position_t", vit.sincos_position(template_grid, cfg.width))
        self.register_buffer("position_s", vit.sincos_position(cfg.grid, cfg.width))
        self.blocks = vit.blocks(cfg.width, cfg.depth, cfg.heads, cfg.hidden, cfg.drop_path)
        self.add_layers()
        head = {"pyramid": PyramidCornerHead, "corner": CornerHead}[cfg.head]
        self.box_head = head(cfg.width, cfg.head_channels)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def add_layers(self) -> None:
        """For a descendant's own layers, whose weights are drawn before the head's."""

    def load_pretrained(self) -> bool:
        """Start the transformer as the authors do, from a masked autoencoder; see
        `Tracker.load_pretrained`. The tiny one starts from that of ostrack-tiny, positions and all.
        """
        if self.config.stem == "conv":
            positions = {"position_z": "position_t", "position_x": "position_s"}
            return self.inherit("ostrack-tiny", positions)
        weights = vit.mae_weights(self.config.stem, self.config.width)
        if weights is not None:
            self.start_from(weights)
        return weights is not None

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take the transformer of a ViT (the entry "model" of `mae_pretrain_vit_base.pth`, or
        timm's), or all of a MixViT. What those do not have stays.

        Raises CheckpointError if the transformer does not fit.
        """
        weights, taken = vit.renamed(weights), {}
        for key, value in self.state_dict().items():
            if key in weights and not key.startswith("position_"):
                taken[key] = weights[key]
            elif not key.startswith(("embed.", "blocks.")):
                taken[key] = value
        load_strictly(self, taken, "the pretrained network")

    # ---- the network: tokens, mixed attention, head ----

    def tokens(self, images: Tensor, position: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> tokens (B, T, D), row by row."""
        return self.embed(images).flatten(2).transpose(1, 2) + position

    def encode(self, x: Tensor) -> tuple[TemplateCache, Tensor]:
        """Tokens (B, T, D) of all templates -> keys and values of each block, and the tokens after
        the last.

        Templates look at templates only, softmax(Q_t K_t^T / sqrt(d)) V_t, so nothing of this
        depends on the search crop ("asymmetric" mixed attention).
        """
        keys, values = [], []
        for block in self.blocks:
            q, k, v = block.project(x)
            keys.append(k)
            values.append(v)
            x = block.think(block.gather(x, F.scaled_dot_product_attention(q, k, v)))
        return TemplateCache(torch.stack(keys, 1), torch.stack(values, 1)), x

    def forward(
        self,
        cache: TemplateCache,
        search: Tensor,
        told: dict[str, Tensor] | None = None,
        maps: bool = False,
    ) -> Answer:
        """The templates' cache, search tokens (B, n, D) and what `mix` is told -> boxes.

        With `maps` the notes have each block's attention, "attention_0" ...: (B, H, n, T + n), as
        it is without what a descendant does to it.
        """
        x, notes = search, dict(told or {})
        for i, block in enumerate(self.blocks):
            q, *own = block.project(x)  # (B, H, n, d)
            # K_m, V_m: (B, H, T + n, d), the templates' and the search tokens' own
            k, v = (torch.cat(pair, 2) for pair in zip(cache[i], own, strict=True))
            x = block.think(block.gather(x, self.mix(i, q, k, v, own[1], notes)))
            if maps:
                notes[f"attention_{i}"] = attention_map(q, k)
        boxes, corners = self.locate(x)
        return Answer(boxes, corners, x, notes)

    def mix(
        self, block: int, q: Tensor, k: Tensor, v: Tensor, own: Tensor, notes: dict[str, Tensor]
    ) -> Tensor:
        """What the search tokens gather in a block, softmax(Q_s K_m^T / sqrt(d)) V_m: (B, H, n, d).

        The fused kernel never forms a map. `own` (B, H, n, d) are the last n of the values;
        `notes`, which go from block to block, are for descendants.
        """
        return F.scaled_dot_product_attention(q, k, v)

    def locate(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Search tokens (B, n, D) -> boxes (B, 4), cxcywh in units of the crop, and two maps of
        corner logits.
        """
        grid = tokens.transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid))
        corners = self.box_head(grid)
        return xyxy_to_cxcywh(torch.cat([soft_argmax(corner) for corner in corners], 1)), corners

    # ---- tracking ----

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> MixViTState:
        cfg = self.config
        frames, boxes = self.checked(frames, boxes_xywh)
        first = self._template(frames, boxes)
        cache, _ = self.encode(first.repeat(1, cfg.templates, 1))
        count, bias = torch.zeros(len(frames), dtype=torch.long), None
        if cfg.first_look:
            crops, windows = self.search_crop.around(frames, boxes)
            answer = self(cache, self.tokens(normalise(crops), self.position_s))
            (found,) = to_host(answer.boxes)
            bias = bias_of(self.search_crop.to_frame(found, windows, boxes), boxes)
        return MixViTState(boxes, count, cache, first if cfg.update_interval else None, bias)

    def step(
        self, state: MixViTState, frames: list[Tensor], maps: bool = False
    ) -> tuple[MixViTState, Prediction]:
        cfg, frames = self.config, self.moved(frames)

        # 1. where is it, around its last box
        crops, windows = self.search_crop.around(frames, state.box)
        search = self.tokens(normalise(crops), self.position_s)
        answer, state = self.answer_and_carry(state, search, windows, maps)
        # how sure the corner maps are of themselves, as there is no score head
        peaks = [corner.flatten(1).softmax(1) for corner in answer.corners]
        boxes, score = to_host(answer.boxes, sum(peak.amax(1) for peak in peaks) / 2)
        box = self.search_crop.to_frame(boxes, windows, state.box)
        box = follow_size(state.box, without_bias(box, state.bias), cfg.size_rate)
        box = clip_with_margin(box, frame_sizes(frames), cfg.margin)

        # 2. is it time for a new second template
        count = state.frame + 1
        due = torch.zeros(len(box), dtype=torch.bool)
        if cfg.update_interval:
            due = count % cfg.update_interval == 0
        cache = self._renewed(state, frames, box, due) if due.any() else state.cache
        state = replace(state, box=box, frame=count, cache=cache)

        seen = None
        if maps:
            top_left, bottom_right = (p.view_as(answer.corners[0]) for p in peaks)
            seen = {**answer.notes, "top_left": top_left, "bottom_right": bottom_right}
            seen |= {"crop": crops, "window": windows.rows, "updated": due}
        return state, Prediction(box, score, seen)

    def answer_and_carry(
        self, state: MixViTState, search: Tensor, windows: Windows, maps: bool
    ) -> tuple[Answer, MixViTState]:
        """The network's answer for search tokens (B, n, D) of these windows, and the state after
        it.
        """
        return self(state.cache, search, maps=maps), state

    def _template(self, frames: list[Tensor], boxes: Tensor) -> Tensor:
        """Tokens (B, T, D) of one template around each box."""
        crops, _ = self.template_crop.around(frames, boxes)
        return self.tokens(normalise(crops), self.position_t)

    def _renewed(
        self, state: MixViTState, frames: list[Tensor], boxes: Tensor, due: Tensor
    ) -> TemplateCache:
        """The cache, anew with the second template from this frame for the sequences that are `due`
        (B,).
        """
        rows = due.nonzero()[:, 0].tolist()
        second = self._template([frames[i] for i in rows], boxes[rows])
        new, _ = self.encode(torch.cat([state.first[rows], second], 1))
        return put(state.cache, rows, new)

    # ---- training ----

    def loss(self, batch: dict[str, Tensor], kind: str = "giou") -> dict[str, Tensor]:
        """5 L1 + 2 times the overlap loss, mean over the searches; see `box_losses` for `kind`. The
        tiny network's corner maps also learn by cross-entropy, which needs less data.
        """
        crops = normalise(batch["templates"])  # (B, T, 3, S, S)
        tokens = self.tokens(crops.flatten(0, 1), self.position_t)
        cache, _ = self.encode(tokens.unflatten(0, crops.shape[:2]).flatten(1, 2))
        parts, told = [], {}
        for i in range(batch["searches"].shape[1]):
            search = self.tokens(normalise(batch["searches"][:, i]), self.position_s)
            answer = self(cache, search, told)
            truth = batch["search_boxes"][:, i]
            parts.append(box_losses(answer.boxes, truth, kind))
            if self.config.stem == "conv":
                places = cxcywh_to_xyxy(truth).clamp(0, 1).split(2, 1)
                corner = sum(map(place_cross_entropy, answer.corners, places)) / 2
                parts[-1] |= {"loss": parts[-1]["loss"] + corner, "corner": corner}
            told = self.for_next_search(answer)
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    def for_next_search(self, answer: Answer) -> dict[str, Tensor]:
        """What the next search of the same samples is told of this one's answer."""
        return {}

    def samples(self) -> SampleSpec:
        """Templates, then one search; for the tiny network near ones, not mirrored to each
        other.
        """
        cfg, jitter = self.config, {"jitter_size": 0.5, "jitter_centre": self.config.train_factor}
        short = cfg.stem == "conv"
        z = {"jitter_centre": 0.2, "jitter_size": 0.1} if short else {}
        return SampleSpec(
            template=replace(self.template_crop, **z),
            search=replace(self.search_crop, factor=cfg.train_factor, **jitter),
            templates=cfg.templates,
            max_gap=40 if short else 400,
            rule=FrameRule(min_frames=20, min_usable=2 * (cfg.templates + 1) + 1),
            flip=0.5,
            flip_each=0.0 if short else 0.5,
            grey=0.05,
            brightness=0.2,
            masks=True,
        )

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        """One stage. At `paper`: 500 epochs of 60,000 samples, the rate falls to a tenth after 400.

        `preset` "code" (or none) is the authors' code: CIoU, 4e-4 for the head and a tenth of it
        for the rest, batches of 256; Large: 288, its first six blocks frozen. "paper": GIoU, 1e-4
        for all. The short scales are for the tiny network, most of which can already track.
        """
        self.check_preset(preset)
        cfg, code = self.config, preset != "paper"
        large = cfg.depth == 24 and code
        batch = {"tiny": 16, "laptop": 16, "gpu": 64, "paper": 288 if large else 256}[scale]
        lengths = {"tiny": 300, "laptop": 3000, "gpu": 20_000, "paper": 500 * (60_000 // batch)}
        steps = lengths[scale]
        rest: dict = {"lr": 1e-4, "drops": (steps * 4 // 5,), "clip": 0.1}
        if code:
            rest |= {"lr": 4e-4, "rates": (("embed.*", 0.1), ("blocks.*", 0.1))}
        if scale in ("tiny", "laptop"):
            rest = {"lr": 1e-3, "lr_end": 1e-5, "cosine": HOLD_AND_FALL, "warmup": 30, "clip": 1.0}
            rest["rates"] = (("box_head.*", 1.0), ("*", 0.3))
        elif large:
            blocks = [f"blocks.{i}" for i in range(6, cfg.depth)]
            others = [name for name, _ in self.named_children() if name not in ("embed", "blocks")]
            rest["trainable"] = tuple(f"{name}.*" for name in blocks + others)
            rest["rates"] = (("blocks.*", 0.1),)
        loss, sample = "ciou" if code else "giou", self.samples()
        return [Stage("box", steps, batch, sample, weight_decay=1e-4, loss=loss, **rest)]


def box_losses(boxes: Tensor, truth: Tensor, kind: str) -> dict[str, Tensor]:
    """Boxes and true boxes (B, 4), cxcywh in units of the crop -> the loss and its two parts; the
    truth is cut at the crop.

    The overlap loss is of `kind` "giou" (the paper's) or "ciou" (the code's); TrackkitError for
    another.
    """
    boxes, truth = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth).clamp(0, 1)
    overlap, l1 = localisation(boxes, truth)
    if kind == "ciou":
        overlap = (1 - ciou(boxes, truth)).mean()
    elif kind != "giou":
        raise TrackkitError(f"no loss is called {kind!r}; there are giou and ciou")
    return {"loss": 5 * l1 + 2 * overlap, kind: overlap, "l1": l1}
