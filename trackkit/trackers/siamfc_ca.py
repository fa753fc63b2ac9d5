"""SiamFC-CA: SiamFC that slides features of an exemplar which knows the search crop over a search
crop which knows the exemplar.

Xie et al.: "Correlation-Aware Deep Tracking", CVPR 2022, section 5.3 and appendix A.2, replace the
backbone of a Siamese tracker (SiamFC++ there) by a "modified SBT-small" and do not say how it is
modified. Here SiamFC keeps everything but its backbone: the crops are rounded to multiples of the
stride, which stays 8, so responses have 17 x 17 cells as before.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from trackkit.backbones import normalise
from trackkit.errors import Range, check_fields
from trackkit.trackers.sbt import CorrelatedFeatures, SBTConfig
from trackkit.trackers.siamfc import SiamFC, SiamFCConfig, cross_correlation


@dataclass(frozen=True)
class SiamFCCAConfig(SiamFCConfig):
    """SiamFC's numbers with another backbone."""

    exemplar_size: int = 128
    """side of the exemplar, the crop of the target in the first frame; a multiple of the stride"""
    search_size: int = 256  # side of the search crop in tracking; a multiple of the stride
    train_search_size: int = 240  # in training; a multiple of the stride
    channels: tuple[int, ...] = SiamFCConfig.channels  # no effect, see `sbt`
    kernels: tuple[int, ...] = SiamFCConfig.kernels  # no effect, see `sbt`
    groups: tuple[int, ...] = SiamFCConfig.groups  # no effect, see `sbt`
    pools: int = SiamFCConfig.pools  # no effect, see `sbt`
    sbt: str = "small"  # "light", "small", "base" or "tiny", whose backbone it is
    adjust: int = 256  # channels of the features that are compared

    def __post_init__(self):
        check_fields(self, sbt=("light", "small", "base", "tiny"), adjust=Range(1, 4096))
        super().__post_init__()
        for size in (self.exemplar_size, self.search_size, self.train_search_size):
            if size % self.stride:
                raise ValueError(
                    f"crop sizes must be multiples of the stride, {self.stride}; got {size}"
                )

    @classmethod
    def tiny(cls) -> SiamFCCAConfig:
        """With SBT-tiny's backbone."""
        return cls(
            exemplar_size=64,
            search_size=128,
            train_search_size=120,
            sbt="tiny",
            adjust=48,
            response_scale=0.01,
            train_shift=2,
        )

    @property
    def backbone(self) -> SBTConfig:
        return getattr(SBTConfig, self.sbt)()

    @property
    def stride(self) -> int:
        return self.backbone.stride

    def feature_size(self, crop_size: int) -> int:
        return crop_size // self.stride


class SiamFCCA(SiamFC):
    """Features are those of the blocks before the first cross-attention, which an exemplar needs
    only once; the rest is `respond`.
    """

    Config = SiamFCCAConfig

    def add_backbone(self) -> None:
        self.backbone = CorrelatedFeatures(self.config.backbone)
        self.adjust = nn.Conv2d(self.backbone.channels, self.config.adjust, 1)

    def load_pretrained(self) -> bool:
        return self.backbone.load_pretrained()

    def features(self, crops: Tensor) -> Tensor:
        return self.backbone(normalise(crops))

    def respond(self, exemplar: Tensor, search: Tensor) -> Tensor:
        search, exemplar = (self.adjust(image) for image in self.backbone.meet(search, exemplar))
        return cross_correlation(exemplar, search) * self.config.response_scale
