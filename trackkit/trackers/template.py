"""A tracker to copy and to change: docs/your_own_tracker.md walks through it.

One stream: the tokens of the template (the target in the first frame) and of the search region
(around its last box) form one row, in which each looks at all others. A head then reads from the
search tokens where the target's two corners are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit import vit
from trackkit.attention import xavier
from trackkit.backbones import normalise
from trackkit.boxes import clip_with_margin, cxcywh_to_xyxy, xyxy_to_cxcywh
from trackkit.crops import CropSpec, frame_sizes
from trackkit.devices import to_host
from trackkit.errors import Range, check_fields
from trackkit.frames import SampleSpec
from trackkit.heads import CornerHead, soft_argmax
from trackkit.losses import localisation, place_cross_entropy
from trackkit.stages import Stage
from trackkit.trackers.base import Prediction, Tracker


@dataclass(frozen=True)
class MyTrackerConfig:
    depth: int = 2  # blocks of the transformer
    width: int = 64  # channels of a token, a multiple of 16
    search_factor: float = 4.0  # side of the search region, in sides of the target

    def __post_init__(self):
        widths = tuple(range(16, 1025, 16))
        check_fields(self, depth=Range(0, 64), width=widths, search_factor=Range(1, 16))


@dataclass(frozen=True)
class MyTrackerState:
    box: Tensor  # (B, 4) xywh, frame pixels, float64: where the targets were last
    template: Tensor  # (B, n, D), tokens of the first frame


class MyTracker(Tracker):
    Config = MyTrackerConfig
    template_crop = CropSpec(48, factor=2.0)  # twice the target, as 48 x 48 pixels

    @property
    def search_crop(self) -> CropSpec:
        return CropSpec(96, self.config.search_factor)

    def __init__(self, config: MyTrackerConfig = MyTrackerConfig()):
        super().__init__(config)
        self.embed = vit.patch_embedding("conv", config.width)  # a token for 8 x 8 pixels
        self.template_position = vit.learned_position(48 // 8, config.width)
        self.search_position = vit.learned_position(96 // 8, config.width)
        self.blocks = vit.blocks(config.width, config.depth, 4, 4 * config.width, drop_path=0.0)
        self.norm, self.head = nn.LayerNorm(config.width), CornerHead(config.width, config.width)
        xavier(self.blocks)
        xavier(self.head)

    def tokens(self, crops: Tensor, position: Tensor) -> Tensor:  # uint8 (B, 3, S, S) -> (B, n, D)
        return self.embed(normalise(crops)).flatten(2).transpose(1, 2) + position

    def forward(self, template: Tensor, crops: Tensor) -> tuple[list[Tensor], Tensor]:
        """Template tokens and search crops -> logits of where the corners are, 2 x (B, 12, 12), and
        the box between them (B, 4), xyxy in units of the crop.
        """
        x = torch.cat([template, self.tokens(crops, self.search_position)], 1)
        for block in self.blocks:
            x = block.gather(x, F.scaled_dot_product_attention(*block.project(x)))
            x = block.think(x)
        found = self.norm(x)[:, template.shape[1] :].transpose(1, 2).unflatten(2, (12, 12))
        corners = self.head(found)
        return corners, torch.cat([soft_argmax(logits) for logits in corners], 1)

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> MyTrackerState:
        frames, boxes = self.checked(frames, boxes_xywh)
        crops, _ = self.template_crop.around(frames, boxes)
        return MyTrackerState(boxes, self.tokens(crops, self.template_position))

    def step(self, state: MyTrackerState, frames: list[Tensor], maps: bool = False):
        frames = self.moved(frames)
        crops, windows = self.search_crop.around(frames, state.box)
        corners, found = self(state.template, crops)
        score = corners[0].flatten(1).softmax(1).amax(1)  # how sure it is of the first corner
        found, score = to_host(xyxy_to_cxcywh(found), score)
        box = self.search_crop.to_frame(found, windows, state.box)
        box = clip_with_margin(box, frame_sizes(frames), margin=4)
        seen = {"crop": crops, "top_left": corners[0], "bottom_right": corners[1]}
        prediction = Prediction(box, score, seen if maps else None)
        return replace(state, box=box), prediction

    def loss(self, batch: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        template = self.tokens(batch["templates"][:, 0], self.template_position)
        corners, found = self(template, batch["searches"][:, 0])
        truth = cxcywh_to_xyxy(batch["search_boxes"][:, 0]).clamp(0, 1)
        corner = sum(map(place_cross_entropy, corners, truth.split(2, 1))) / 2
        giou, l1 = localisation(found, truth)
        return {"loss": corner + 2 * giou + 5 * l1, "corner": corner, "giou": giou, "l1": l1}

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        self.check_preset(preset)
        sizes = {"tiny": (300, 16), "laptop": (3000, 24), "gpu": (20_000, 64), "paper": (10**5, 64)}
        steps, batch = sizes[scale]
        search = replace(self.search_crop, jitter_centre=3.0, jitter_size=0.25)
        sample = SampleSpec(self.template_crop, search, flip=0.5, brightness=0.2)
        rates = {"lr": 2e-3, "lr_end": 1e-5, "warmup": steps // 30, "clip": 1.0}
        return [Stage("boxes", steps, batch, sample, **rates)]
