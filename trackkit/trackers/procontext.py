"""ProContEXT: OSTrack that sees more of the target's context, in space and in time.

Lan, Cheng, He, Li, Luo, Bao, Xiang, Geng, Xie: "ProContEXT: Exploring Progressive Context
Transformer for Tracking", ICASSP 2023. The patches: templates at several scales; a second, dynamic
group of them, of the last frame that was due for it and confident; and pruning that asks all of
them. With one scale and no dynamic group it is OSTrack, bit for bit and with the same weights:

    ProContEXTConfig(extra_factors=(), dynamic=False)

Eq. 1 is in `OSTrack.forward`; Eq. 2 to 6 are OSTrack's too: `gaussian_target`, `focal_loss`,
`box_at`, the sum in `OSTrack.loss`, the score in `OSTrack.step`.

The checkpoints of the authors' code (jp-lan/ProContEXT) load by `trackkit.official`. Where their
paper differs, `ProContEXTConfig.paper()` follows the paper. We differ from the code in two places:
a new sequence starts with its own templates (theirs keeps those of the first sequence that a
tracker object saw), and pruning by the target's box uses each template's own (theirs, that of the
first scale for all).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trackkit.backbones import normalise
from trackkit.errors import Range, check_fields
from trackkit.frames import SampleSpec
from trackkit.stages import Stage
from trackkit.trackers.base import Prediction, put
from trackkit.trackers.ostrack import SIZE_256, OSTrack, OSTrackConfig, OSTrackState, Template


@dataclass(frozen=True)
class ProContEXTConfig(OSTrackConfig):
    """OSTrack's numbers and those of the patches; those of ProContEXT-384 if not given. The rows of
    the paper's Tables 2 to 4 are `extra_factors`, `dynamic` and `keep_ratio`.
    """

    extra_factors: tuple[float, ...] = (4.0,)
    """One more template of the same frame for each: the sides of their windows, in the units of
    template_factor. With template_factor they are the paper's K (Table
    2)."""
    dynamic: bool = True  # a second group of templates, see update_interval (Table 3)
    pruning_softmax: str = "all"
    """"all", pruning reads the layer's own attention, shared among template and search tokens (the
    code); or "search", a softmax over the search tokens alone (the paper)."""
    update_interval: int = 100
    """Every so many frames, if the score exceeds update_threshold, the frame makes the new dynamic
    templates. The code: 100. The paper's Algorithm 1: 1. No effect without dynamic."""
    update_threshold: float = 0.7
    """Of the score, 0 to 1; 0.7 in code and paper. No effect without dynamic."""

    def __post_init__(self):
        super().__post_init__()
        check_fields(
            self,
            extra_factors=Range(0, 100, above=True),
            dynamic=(False, True),
            pruning_softmax=("all", "search"),
            update_interval=Range(1),
            update_threshold=Range(0, 1),
        )

    @staticmethod
    def procontext_256(**changes) -> ProContEXTConfig:
        """The smaller ProContEXT of the ablations; its search factor is the paper's, its jitter
        OSTrack-256's, as none is given.
        """
        return ProContEXTConfig(**{**SIZE_256, "epochs": 100, "keep_ramp": 50, **changes})

    @staticmethod
    def procontext_384(**changes) -> ProContEXTConfig:
        """ProContEXT as released."""
        return ProContEXTConfig(**changes)

    @staticmethod
    def paper(**changes) -> ProContEXTConfig:
        """ProContEXT-384 by the text of its paper. Neither jitter has figures there: the search's
        is that of OSTrack-256, which has this factor; the templates' is ours. What stays the
        code's: a Hann window weighs the score before Eq. 4, and tokens are pruned inside the 4th,
        7th and 10th block, behind their attention (the paper: before the block).
        """
        text = {"search_factor": 4.0, "pruning_softmax": "search", "update_interval": 1}
        text |= {"search_jitter": (3.0, 0.25)}
        training = {"template_jitter": (0.0, 0.1), "learning_rate": 1e-4, "backbone_rate": 1.0}
        return ProContEXTConfig(**{**text, **training, **changes})

    @classmethod
    def tiny(cls, **changes) -> ProContEXTConfig:
        """OSTrack's tiny network, renewed every 10 frames at most: short videos have no 100th."""
        return super().tiny(**{"update_interval": 10, "extra_factors": (3.0,), **changes})

    @property
    def template_factors(self) -> tuple[float, ...]:
        """The paper's K: the scales of the templates of a frame."""
        return (self.template_factor, *self.extra_factors)


@dataclass(frozen=True)
class ProContEXTState(OSTrackState):
    """What ProContEXT remembers of B sequences; `template` holds the static group, S."""

    frame: Tensor  # (B,) int64, frames since the first
    dynamic: Template | None  # D, see `update_interval`


class ProContEXT(OSTrack):
    """OSTrack with more templates: wherever it has one, this has K, or 2 K with the dynamic ones,
    one behind the other: tokens (B, K * n, D) and boxes (B, K, 4).
    """

    Config = ProContEXTConfig

    def load_pretrained(self) -> bool:
        """As OSTrack's; the tiny one is ostrack-tiny to begin with."""
        if self.config.stem == "conv":
            return self.inherit("ostrack-tiny")
        return super().load_pretrained()

    # ---- the network (section 2.1) ----

    def deciding_tokens(self, template: Template) -> tuple[Tensor, Tensor | None]:
        """All templates, static and dynamic, decide: the same tokens of each."""
        rows, weights = super().deciding_tokens(template)
        first = torch.arange(template.boxes.shape[1], device=rows.device)
        start = first * self.config.template_grid**2  # index of each template's first token
        return (start[:, None] + rows).flatten(), weights

    def attention_to_search(self, logits: Tensor, known: int) -> Tensor:
        """omega of "Token Pruning". "search": softmax(Q_s K_x^T / sqrt(d)), and Q_d alike, so each
        row sums to 1 over the search tokens (the paper). "all": the layer's own attention, so a
        token that looks mostly at templates counts less (the code). phi is then a mean, not a sum:
        the same ranking.
        """
        if self.config.pruning_softmax == "search":
            return logits[..., known:].softmax(-1)
        return super().attention_to_search(logits, known)

    # ---- tracking (Algorithm 1) ----

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> ProContEXTState:
        first = super().start(frames, boxes_xywh)
        count = torch.zeros(len(frames), dtype=torch.long)
        dynamic = first.template if self.config.dynamic else None  # line 5: D = S
        return ProContEXTState(**vars(first), frame=count, dynamic=dynamic)

    def make_template(self, frames: list[Tensor], boxes: Tensor) -> Template:
        """crop(I, b, K) of lines 5 and 11: the templates of each frame at each scale."""
        specs = [replace(self.template_crop, factor=k) for k in self.config.template_factors]
        return joined([self.cropped(frames, boxes, spec) for spec in specs])

    def template_of(self, state: ProContEXTState) -> Template:
        """[Z_s; Z_d], which [..; Z_x] follows in Eq. 1."""
        static, dynamic = state.template, state.dynamic
        return static if dynamic is None else joined([static, dynamic])

    def step(
        self, state: ProContEXTState, frames: list[Tensor], maps: bool = False
    ) -> tuple[ProContEXTState, Prediction]:
        cfg, frames = self.config, self.moved(frames)
        state, found = super().step(state, frames, maps)  # lines 8 and 9
        count = state.frame + 1
        state = replace(state, frame=count)
        due = (count % cfg.update_interval == 0) & cfg.dynamic
        due = due & (found.score > cfg.update_threshold)  # line 10: score > tau
        if due.any():
            rows = due.nonzero()[:, 0].tolist()
            new = self.make_template([frames[i] for i in rows], found.box[rows])
            state = replace(state, dynamic=put(state.dynamic, rows, new))  # line 11
        return state, replace(found, maps=found.maps | {"updated": due}) if maps else found

    # ---- training (section 2.2) ----

    def sampled(self, batch: dict[str, Tensor]) -> Template:
        """As the sampler makes them, all frames (first, dynamic) come at the first scale, then at
        the next; as tracking has them, all scales of the first frame, then all of the dynamic one.
        """
        frames, groups = 2 if self.config.dynamic else 1, []
        crops = batch["templates"].unflatten(1, (-1, frames))  # (B, K, frames, 3, S, S)
        boxes = batch["template_boxes"].unflatten(1, (-1, frames))
        for i in range(frames):
            # (B * K, n, D)
            tokens = self.tokens(normalise(crops[:, :, i]).flatten(0, 1), self.position_z)
            tokens = tokens.unflatten(0, crops.shape[:2]).flatten(1, 2)
            groups.append(Template(tokens, boxes[:, :, i]))
        return joined(groups)

    def samples(self) -> SampleSpec:
        """First template and search region from anywhere, the dynamic frame near the search."""
        spec = replace(super().samples(), template_factors=self.config.template_factors)
        return replace(spec, templates=2, order="trident") if self.config.dynamic else spec

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        """OSTrack's; the tiny network, which can track already, learns for less than half as long
        and at a third of the rate on a laptop.
        """
        stages = super().recipe(scale, preset)
        if scale == "laptop":
            stages = [replace(stage.resized(2000), lr=3e-4) for stage in stages]
        return stages


def joined(templates: list[Template]) -> Template:
    """Templates of the same targets, one behind the other."""
    return Template(
        torch.cat([template.tokens for template in templates], 1),
        torch.cat([template.boxes for template in templates], 1),
    )
