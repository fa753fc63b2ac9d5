"""What SBT's backbone learns from single images before it tracks: the classifier (section 5.2).

    load_blocks(tracker.backbone, classifier.state_dict(), blocks=5)    # of `sbt_backbone`

Because CA has no parameters of its own, everything that tracks can be learned from unpaired images
(section 6.1).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from trackkit.trackers.sbt import BackboneStage, SBTConfig
from trackkit.trackers.sbt_backbone import initialise


def four_stages(config: SBTConfig) -> SBTConfig:
    """A tracker's config with the fourth stage, and the strides, that serve to learn from single
    images.
    """
    last = {"dims": 8 * config.dims[-1] // config.heads[-1], "heads": 8, "blocks": 2}
    last |= {"ratios": 4, "reductions": 1, "cross": ()}
    longer = {field: (*getattr(config, field), value) for field, value in last.items()}
    size = {"template_size": 224, "search_size": 224}
    return replace(config, **longer, **size, strides=(4, 2, 2, 2), correlation="embedded")


class Classifier(nn.Module):
    """The four-stage form: (B, 3, S, S), normalised -> (B, classes) logits (Table 2). Every block
    is SA.
    """

    def __init__(self, config: SBTConfig = SBTConfig(), classes: int = 1000):
        super().__init__()
        config = four_stages(config)
        stages = range(len(config.dims))
        self.stages = nn.ModuleList(BackboneStage(config, i, norm=True) for i in stages)
        self.head = nn.Linear(config.dims[-1], classes)
        self.apply(initialise)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 2, 3, 1)
        for stage in self.stages:
            for layer in (stage.embed, *stage.blocks):
                x, _ = layer(x)
            x = stage.norm(x)
        return self.head(x.mean((1, 2)))
