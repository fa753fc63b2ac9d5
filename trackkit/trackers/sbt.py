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
not computed. We depart from theirs in three places: blocks after the last CA run (theirs are
skipped; with the paper's placements there are none), targets that reach outside the crop keep their
positive tokens (`SBTConfig.positives`), and windows are exact if wished (`SBTConfig.exact`).

The backbone (sections 3.1 to 3.3) is `trackkit.trackers.sbt_backbone`, which other trackers use
too; this file has the rest: the heads, tracking, training, and correlation after the backbone for
comparison. How single images prepare the network: `trackkit.trackers.sbt_pretraining`. x is the
search crop, z the template.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.backbones import normalise
from trackkit.boxes import clip_with_margin, cxcywh_to_xyxy, giou
from trackkit.crops import around_box, box_to_frame
from trackkit.heads import MLP, MixHead
from trackkit.sampling import CropSpec, SampleSpec
from trackkit.stages import Stage
from trackkit.trackers.base import Prediction, Tracker
from trackkit.trackers.sbt_backbone import Backbone, Encoded, EoC, initialise

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
    """Numbers of the network, of training and of tracking. Lists have one entry for each stage of
    the backbone.

    Attributes:
        template_size: side of the template crop, pixels; a multiple of the product of `strides`.
        search_size: side of the search crop, pixels; a multiple of the same.
        template_factor: side of the template's window in units of the square root of the target's
            area.
        search_factor: side of the search window in the same units; 5 in the authors' code, 4 in the
            paper.
        dims: channels of each stage.
        heads: of each attention, by stage; they divide `dims`.
        blocks: how many, by stage.
        strides: of the stages' patch embeddings.
        ratios: hidden channels of the MLPs over `dims`. The paper's Table 2 prints 4 everywhere,
            its counts are those of 8, 8, 4.
        reductions: SR, by which each side of the grid of keys is divided. No effect with attention
            "vg" and "sl", nor on SA in "vl".
        cross: which blocks of each stage are CA, counted from 1.
        attention: "srg": all tokens look at the keys of a reduced grid. "vg": of the full one.
            "vl": SA within squares of `local` tokens, CA as "srg". "sl": SA and CA within such
            squares, shifted by half in every second block; the template must be as large as the
            search crop (Table 1).
        local: side of these squares, tokens; it divides every grid. Only with attention "vl" and
            "sl".
        order: "simultaneous": in CA both images look at the other as it was before the block.
            "sequential": the template looks at a search crop that has looked already.
        position: "conditional": a depth-wise convolution in the MLP. "absolute": sines added to the
            first embedding. "relative": a learned bias for each offset between query and key, in SA
            (between two images offsets mean nothing). "none" (Table 1).
        embedding: "conv": overlapping patches. "patches": patches side by side and a linear layer
            (Table 1, both H1 and H2).
        correlation: "embedded": CA in the backbone alone. "depthwise", "cross": also (or only, if
            `cross` is empty) after it, at three `levels`: depth-wise correlation with the middle 7
            x 7 tokens of the template, or a CA block (Table 7).
        levels: these blocks of the last stage, counted from 1. Only with correlation "depthwise"
            and "cross".
        adjust: channels of the levels' responses, which are summed with learned weights. Only with
            correlation "depthwise" and "cross".
        head: "released" as in the authors' code, "eq7" as the paper's Eq. 7 has it, "mlp3" or
            "mlp5", MLPs on each token, which explain the counts in Table 1.
        drop_path: probability of dropping the last block's branches in training, below 1; it rises
            from 0 block by block.
        pretrained_blocks: how many blocks, counted from the first, begin with weights learned on
            single images when there are any (`load_pretrained`); None: all that can (Fig. 8).
        positives: which tokens learn that they belong to a target that reaches outside the crop.
            "clipped": those in its box; or the authors', "wrapped", see `positive_tokens`.
        weights: of the class, the L1 and the GIoU loss. The paper has 12, 7, 5, its code ten times
            as much, which makes no difference to AdamW with clipped gradients.
        background: weight of background tokens in the class loss, where the target's have 1.
        window_influence: share of a cosine window in the score by which a token is chosen, 0 to 1;
            0.49 in the code, 0 in the paper.
        margin: the box keeps at least so many frame pixels inside the frame, and is at least as
            large.
        exact: boxes go into and out of crops by the crops' own geometry; False imitates the
            authors, see `STARKConfig`.
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
    pretrained_blocks: int | None = None
    positives: str = "clipped"
    weights: tuple[float, float, float] = (12.0, 7.0, 5.0)
    background: float = 0.0625
    window_influence: float = 0.49
    margin: float = 10.0
    exact: bool = False

    def __post_init__(self):
        # from a file they come as lists
        object.__setattr__(self, "cross", tuple(tuple(stage) for stage in self.cross))
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} must be one of {', '.join(allowed)}; got {getattr(self, field)!r}"
                )
        stages = len(self.dims)
        for field in ("heads", "blocks", "strides", "ratios", "reductions", "cross"):
            if len(getattr(self, field)) != stages:
                raise ValueError(
                    f"{field} needs one entry for each of the {stages} stages, as dims; got "
                    f"{getattr(self, field)}"
                )
        if any(dim % heads for dim, heads in zip(self.dims, self.heads, strict=True)):
            raise ValueError(f"dims {self.dims} cannot be shared by {self.heads} heads")
        for stage, (cross, blocks) in enumerate(zip(self.cross, self.blocks, strict=True), 1):
            if any(not 1 <= block <= blocks for block in cross):
                raise ValueError(f"stage {stage} has blocks 1 to {blocks}; cross names {cross}")
        if self.template_size % self.stride or self.search_size % self.stride:
            raise ValueError(
                "template_size and search_size must be multiples of the total stride, "
                f"{self.stride}"
            )
        windowed = self.attention in ("vl", "sl")
        for size in (self.template_size, self.search_size):
            for grid, reduction in zip(self.grids(size), self.reductions, strict=True):
                if self.attention != "vg" and grid < reduction:
                    raise ValueError(
                        f"a crop of {size} px gives a grid of {grid}, too small to be reduced by "
                        f"{reduction}"
                    )
                if windowed and grid % self.local:
                    raise ValueError(
                        f"a crop of {size} px gives a grid of {grid}, no multiple of local = "
                        f"{self.local}"
                    )
        if self.attention == "sl" and self.template_size != self.search_size:
            raise ValueError(
                'attention "sl" compares squares of two equal grids: make template_size equal to '
                "search_size"
            )
        if self.correlation == "embedded" and not any(self.cross):
            raise ValueError(
                'without a block in cross, or correlation "depthwise" or "cross", nothing looks at '
                "the template"
            )
        if self.correlation != "embedded" and any(
            not 1 <= level <= self.blocks[-1] for level in self.levels
        ):
            raise ValueError(
                f"the last stage has blocks 1 to {self.blocks[-1]}; levels are {self.levels}"
            )
        if self.correlation == "depthwise" and self.grids(self.template_size)[-1] < 7:
            raise ValueError(
                "depth-wise correlation takes the middle 7 x 7 tokens of the template; make "
                "template_size larger"
            )
        if not 0 <= self.window_influence <= 1:
            raise ValueError("window_influence must be between 0 and 1")

    @classmethod
    def light(cls, **changes) -> SBTConfig:
        """SBT-light (Table 2)."""
        return cls.small(**{"dims": (32, 64, 160), **changes})

    @classmethod
    def small(cls, **changes) -> SBTConfig:
        """SBT-small (Table 2)."""
        return cls(
            **{"blocks": (2, 2, 6), "cross": ((), (), (2, 4, 6)), "levels": (2, 4, 6), **changes}
        )

    @classmethod
    def base(cls, **changes) -> SBTConfig:
        """SBT-base (Table 2)."""
        return cls(**changes)

    @classmethod
    def large(cls, **changes) -> SBTConfig:
        """SBT-large (Table 2)."""
        return cls(
            **{
                "blocks": (3, 4, 18),
                "cross": ((), (), (6, 8, 10, 12, 14, 16, 18)),
                "levels": (14, 16, 18),
                **changes,
            }
        )

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
        """With the fourth stage, and the strides, that serve to learn from single images (section
        5.2).
        """
        last = {
            "dims": 8 * self.dims[-1] // self.heads[-1],
            "heads": 8,
            "blocks": 2,
            "ratios": 4,
            "reductions": 1,
            "cross": (),
        }
        longer = {field: (*getattr(self, field), value) for field, value in last.items()}
        return replace(
            self,
            **longer,
            strides=(4, 2, 2, 2),
            correlation="embedded",
            template_size=224,
            search_size=224,
        )


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
    presets = ("code-got10k", "paper", "paper-got10k", "code", "code-large", "code-got10k-large")

    def __init__(self, config: SBTConfig = SBTConfig()):
        super().__init__(config)
        self.backbone = Backbone(config)
        self.levelwise = Levelwise(config) if config.correlation != "embedded" else None
        width = config.dims[-1] if self.levelwise is None else config.adjust
        tokens = (config.search_size // config.stride) ** 2
        if config.head in ("released", "eq7"):
            heads = [
                MixHead(tokens, width, outputs, literal=config.head == "eq7") for outputs in (2, 4)
            ]
        else:
            heads = [MLP(width, width, outputs, depth=int(config.head[-1])) for outputs in (2, 4)]
        self.class_head, self.box_head = heads

    def load_pretrained(self) -> bool:
        return self.backbone.load_pretrained(self.config.pretrained_blocks)

    # ---- the network (paper, section 3.4) ----

    def encode(self, images: Tensor) -> Encoded:
        """Normalised templates (B, 3, S, S), as far as they do not depend on the search crop."""
        return self.backbone.prepare(self.backbone.alone(images))

    def forward(self, template: Encoded, images: Tensor, maps: bool = False) -> Answer:
        """An encoded template and normalised search crops (B, 3, S, S) -> classes and boxes (Eq.
        6).
        """
        seen = {} if maps else None
        x, z = self.backbone.together(self.backbone.alone(images, seen), template, seen=seen)
        if self.levelwise is None:
            features = self.backbone.norm(x.map)
        else:
            features = self.levelwise(
                [self.backbone.norm(m) for m in x.levels], [self.backbone.norm(m) for m in z.levels]
            )
        features = features.flatten(1, 2)  # (B, N, C)
        return Answer(
            self.class_head(features),
            self.box_head(features).sigmoid(),
            {"features": features} | (seen or {}),
        )

    # ---- tracking (section 6.1, "Testing") ----

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> SBTState:
        cfg = self.config
        frames, boxes = self.checked(frames, boxes_xywh)
        crops, _ = around_box(frames, boxes, cfg.template_factor, cfg.template_size, cfg.exact)
        return SBTState(boxes, self.encode(normalise(crops)))

    def step(
        self, state: SBTState, frames: list[Tensor], maps: bool = False
    ) -> tuple[SBTState, Prediction]:
        cfg, frames, rows = self.config, self.moved(frames), torch.arange(len(frames))
        crops, windows = around_box(
            frames, state.box, cfg.search_factor, cfg.search_size, cfg.exact
        )
        answer = self(state.template, normalise(crops), maps)

        # the best token, where far tokens are less likely
        score = answer.logits.softmax(-1)[..., 0].double().cpu()  # (B, N)
        side = cfg.search_size // cfg.stride
        hann = torch.hann_window(side, periodic=False, dtype=torch.float64)
        blended = (1 - cfg.window_influence) * score + cfg.window_influence * (
            hann[:, None] * hann
        ).flatten()
        best = blended.argmax(1)

        box = box_to_frame(answer.boxes.double().cpu()[rows, best], windows, state.box, cfg.exact)
        # (B, 2): width, height
        sizes = torch.tensor([frame.shape[:0:-1] for frame in frames], dtype=torch.float64)
        box = clip_with_margin(box, sizes, cfg.margin)
        seen = None
        if maps:
            grids = {
                "score": score.unflatten(1, (side, side)),
                "blended": blended.unflatten(1, (side, side)),
            }
            place = {
                "crop": crops,
                "boxes": answer.boxes,
                "window": torch.stack([windows.left, windows.top, windows.side], 1),
            }
            seen = answer.maps | grids | place
        return replace(state, box=box), Prediction(box, score[rows, best], seen)

    # ---- training (section 6.1 and appendix A.1) ----

    def loss(self, batch: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        """Losses of a batch of pairs: each token learns its class, those on the target also the box
        (Eq. 10 and 11).
        """
        template = self.encode(normalise(batch["templates"][:, 0]))
        return self.losses(
            self(template, normalise(batch["searches"][:, 0])), batch["search_boxes"][:, 0]
        )

    def losses(self, answer: Answer, truth: Tensor) -> dict[str, Tensor]:
        """Losses of an answer, given the true boxes (B, 4), cxcywh in units of the crop.

        The paper's Eq. 10 has no weights for the classes and sums; in the code, as here, background
        tokens weigh less, and the box losses are means over the positive tokens of the batch.
        """
        cfg = self.config
        # (B, N)
        positive = positive_tokens(truth, cfg.search_size // cfg.stride, cfg.positives == "wrapped")
        weights = torch.tensor([1.0, cfg.background], device=truth.device).to(answer.logits)
        classes = F.cross_entropy(
            answer.logits.flatten(0, 1), (~positive).long().flatten(), weights
        )
        boxes, wanted = (
            answer.boxes[positive],
            truth[:, None].expand_as(answer.boxes)[positive].to(answer.boxes),
        )
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
            search=CropSpec(
                cfg.search_size,
                cfg.search_factor,
                jitter_size=0.5,
                jitter_centre=4.5 * cfg.search_factor / 5,
                **shared,
            ),
            order="causal",
            max_gap=200,
            flip=0.5,
            flip_each=0.5,
            grey=0.05,
            brightness=0.2,
            masks=True,
        )

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        """One stage of pairs. The scale "paper" follows one of `PRESETS`.

        The short scales are for the tiny network, which starts from nothing: one large rate that
        falls smoothly.
        """
        self.check_preset(preset)
        preset = preset or "code-got10k"
        steps, batch = {
            "tiny": (300, 16),
            "laptop": (3000, 24),
            "gpu": (20_000, 64),
            "paper": (0, 0),
        }[scale]
        if scale in ("tiny", "laptop"):
            rates = {"lr": 1e-3, "lr_end": 1e-5, "warmup": steps // 30, "clip": 1.0}
        else:
            epochs, drops, pairs, size, rate = PRESETS[preset]
            if scale == "paper":
                steps, batch = epochs * (pairs // size), size
            drops = tuple(drop * steps // epochs for drop in drops)
            rates = {"lr": rate, "drops": drops, "rates": (("backbone.*", 0.1),), "clip": 0.1}
        return [
            Stage(
                "pairs", steps=steps, batch=batch, sample=self.samples(), weight_decay=1e-4, **rates
            )
        ]


# epochs, epochs after which the rate falls to a tenth, pairs an epoch, batch, rate of the heads
# (the rest: a tenth)
PRESETS = {
    "paper": (600, (200, 400), 50_000, 160, 1e-4),  # section 6.1: four data sets
    # appendix A.1; its rates contradict those of section 6.1
    "paper-got10k": (100, (30, 50), 50_000, 160, 1e-3),
    "code": (500, (400,), 60_000, 160, 1e-3),  # base
    "code-large": (300, (240,), 60_000, 96, 1e-3),
    "code-got10k": (100, (80,), 60_000, 160, 1e-3),
    "code-got10k-large": (100, (80,), 60_000, 96, 1e-3),
}


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


def positive_tokens(boxes: Tensor, side: int, wrapped: bool = False) -> Tensor:
    """The tokens of a side x side grid that lie on each target: boxes (B, 4) cxcywh, units of the
    crop -> bool (B, side ** 2).

    A token lies on a target if its upper left corner does; a target between the corners has the
    next one. Beyond the border there are no tokens. In the authors' code ("wrapped") a box that
    begins outside counts its first column from the right border, as Python counts -3: mostly it has
    no token at all then, and a box larger than the crop has those in the lower right corner.
    """
    x1, y1, x2, y2 = (cxcywh_to_xyxy(boxes) * side).ceil().long().unbind(-1)
    index, inside = torch.arange(side, device=boxes.device), []
    for first, end in ((y1, y2), (x1, x2)):
        end = torch.where(end == first, first + 1, end)
        if wrapped:
            first, end = (
                torch.where(edge < 0, (edge + side).clamp(min=0), edge) for edge in (first, end)
            )
        inside.append((index >= first[:, None]) & (index < end[:, None]))  # (B, side)
    return (inside[0][:, :, None] & inside[1][:, None]).flatten(1)
