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
from trackkit.trackers.base import Tracker
from trackkit.trackers.sbt import CorrelatedFeatures, SBTConfig
from trackkit.trackers.siamfc import SiamFC, SiamFCConfig, cross_correlation


@dataclass(frozen=True)
class SiamFCCAConfig(SiamFCConfig):
    """SiamFC's numbers with another backbone; `channels`, `kernels`, `groups` and `pools` do not
    count here.

    Attributes:
        exemplar_size: side of the exemplar, the crop of the target in the first frame; a multiple
            of the backbone's stride.
        search_size: side of the search crop in tracking; a multiple of the stride.
        train_search_size: side of the search crop in training; a multiple of the stride.
        channels: no effect, see `sbt`.
        kernels: no effect, see `sbt`.
        groups: no effect, see `sbt`.
        pools: no effect, see `sbt`.
        sbt: "light", "small", "base" or "tiny", whose backbone it is.
        adjust: channels of the features that are compared.
    """

    exemplar_size: int = 128
    search_size: int = 256
    train_search_size: int = 240
    sbt: str = "small"
    adjust: int = 256

    def __post_init__(self):
        if self.sbt not in ("light", "small", "base", "tiny"):
            raise ValueError(f"sbt must be light, small, base or tiny; got {self.sbt!r}")
        for size in (self.exemplar_size, self.search_size, self.train_search_size):
            if size % self.stride:
                raise ValueError(
                    f"crop sizes must be multiples of the stride, {self.stride}; got {size}"
                )
        super().__post_init__()

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

    def __init__(self, config: SiamFCCAConfig = SiamFCCAConfig()):
        Tracker.__init__(self, config)
        self.backbone = CorrelatedFeatures(config.backbone)
        self.adjust = nn.Conv2d(self.backbone.channels, config.adjust, 1)

    def load_pretrained(self) -> bool:
        return self.backbone.load_pretrained()

    def features(self, crops: Tensor) -> Tensor:
        return self.backbone(normalise(crops))

    def respond(self, exemplar: Tensor, search: Tensor) -> Tensor:
        search, exemplar = (self.adjust(image) for image in self.backbone.meet(search, exemplar))
        return cross_correlation(exemplar, search) * self.config.response_scale
