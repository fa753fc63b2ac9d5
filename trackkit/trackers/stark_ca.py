"""STARK-CA: STARK-S whose search and template features know of one another before they are tokens.

Xie et al.: "Correlation-Aware Deep Tracking", CVPR 2022, section 5.3, replace STARK's backbone by
SBT's. Its total stride, 16, is that of the backbone that it replaces, all else is STARK's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from trackkit.trackers.sbt import CorrelatedFeatures, SBTConfig
from trackkit.trackers.stark import STARK, Answer, STARKConfig, Tokens


@dataclass(frozen=True)
class STARKCAConfig(STARKConfig):
    """STARK's numbers with another backbone."""

    backbone: str = "sbt-small"
    """"sbt-small" (stride 16), or "sbt-tiny" (stride 8)"""
    dynamic: bool = False  # must be: the search crop is joined with one template
    score: bool = False  # the score head

    strides: ClassVar = {"sbt-small": 16, "sbt-tiny": 8}

    def __post_init__(self):
        super().__post_init__()
        if self.dynamic:
            raise ValueError("STARK-CA joins the search crop with one template: dynamic = False")

    @classmethod
    def tiny(cls, **changes) -> STARKCAConfig:
        """With SBT-tiny's backbone."""
        return super().tiny(**{"backbone": "sbt-tiny", **changes})


class STARKCA(STARK):
    """Features are those of the blocks before the first cross-attention, which a template needs
    only once; `forward` does the rest for a pair.
    """

    Config = STARKCAConfig

    def make_backbone(self) -> nn.Module:
        tiny = self.config.backbone == "sbt-tiny"
        return CorrelatedFeatures(SBTConfig.tiny() if tiny else SBTConfig.small(strides=(4, 2, 2)))

    def load_pretrained(self) -> bool:
        return self.backbone.load_pretrained()

    def features(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    def forward(self, templates: list[Tokens], search: Tokens, *rest, **named) -> Answer:
        sides = [int(t.features.shape[1] ** 0.5) for t in (search, templates[0])]
        maps = (
            t.features.transpose(1, 2).unflatten(2, (side, side))
            for t, side in zip((search, templates[0]), sides, strict=True)
        )
        x, z = (self.bottleneck(m).flatten(2).transpose(1, 2) for m in self.backbone.meet(*maps))
        joined = [replace(templates[0], features=z)], replace(search, features=x)
        return super().forward(*joined, *rest, **named)
