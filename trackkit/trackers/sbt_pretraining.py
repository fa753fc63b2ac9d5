"""What SBT's backbone learns from single images before it tracks: the classifier, and the transfer
of its weights.

    weights = imagenet(tracker.config)                          # or the state dict of a
    `Classifier` load_pretrained(tracker.backbone, weights, blocks=5)

Because CA has no parameters of its own, everything that tracks can be learned from unpaired images
(section 6.1).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from trackkit.backbones import timm_weights
from trackkit.errors import CheckpointError
from trackkit.trackers.sbt import SBTConfig
from trackkit.trackers.sbt_backbone import Backbone, BackboneStage, initialise


class Classifier(nn.Module):
    """The four-stage form: (B, 3, S, S), normalised -> (B, classes) logits (section 5.2 and Table
    2). Every block is SA.
    """

    def __init__(self, config: SBTConfig = SBTConfig(), classes: int = 1000):
        super().__init__()
        config = config.pretraining()
        self.stages = nn.ModuleList(
            BackboneStage(config, i, norm=True) for i in range(len(config.dims))
        )
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


def imagenet(config: SBTConfig) -> dict[str, Tensor] | None:
    """Entries of the PVTv2 that SBT's authors start from, by timm's names; None if it does not fit
    the config's blocks.

    They take pvt_v2_b3 for base and large; small's blocks are among its own too. For light, whose
    authors' weights are not public, it is pvt_v2_b0, which has a third of the blocks of the last
    stage. From timm's cache or the network; TrackkitError if neither has them.
    """
    layout = (
        config.heads,
        config.ratios,
        config.reductions,
        config.attention,
        config.position,
        config.embedding,
    )
    name = {(64, 128, 320): "pvt_v2_b3", (32, 64, 160): "pvt_v2_b0"}.get(config.dims)
    if name is None or layout != ((1, 2, 5), (8, 8, 4), (8, 4, 2), "srg", "conditional", "conv"):
        return None
    return timm_weights(name)


def load_pretrained(
    backbone: Backbone, weights: dict[str, Tensor], blocks: int | None = None
) -> None:
    """Start from weights learned on single images: all blocks that there are, or only the first
    `blocks` (Fig. 8).

    `weights` are the state dict of a `Classifier`, or of a PVTv2 of the same widths, whose blocks
    are EoC blocks; the names of its authors and of timm are understood. The patch embedding of a
    stage comes with its first block, the last norm with the last block. What there is beyond that
    is left aside: later blocks and stages, the classifier.

    Raises CheckpointError that names the first entries that are missing or of another size; nothing
    is loaded then. With `blocks` None a stage may have fewer blocks in `weights` than here: the
    others keep their random weights.
    """
    last = len(backbone.stages) - 1
    names = [
        f"stages.{s}.blocks.{b}."
        for s, stage in enumerate(backbone.stages)
        for b in range(len(stage.blocks))
    ]
    if blocks is not None and not 0 <= blocks <= len(names):
        raise CheckpointError(
            f"the backbone has {len(names)} blocks; cannot load the first {blocks}"
        )
    found = {pvt_name(key): value for key, value in weights.items()}
    there = [name for name in names if any(key.startswith(name) for key in found)]
    chosen = (there or names) if blocks is None else names[:blocks]
    parts = chosen + [
        name.replace("blocks.0", "embed") for name in chosen if name.endswith("blocks.0.")
    ]
    parts += [f"stages.{last}.norm."] if names[-1] in chosen else []
    wanted = {
        key: value for key, value in backbone.state_dict().items() if key.startswith(tuple(parts))
    }
    odd = []
    for key, value in wanted.items():
        if key not in found:
            odd.append(f"{key} is missing")
        elif found[key].shape != value.shape:
            odd.append(f"{key} is {tuple(found[key].shape)} instead of {tuple(value.shape)}")
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise CheckpointError(
            f"the weights do not fit {len(chosen)} of the {len(names)} blocks: "
            f"{'; '.join(odd[:3])}{more}"
        )
    backbone.load_state_dict({key: found[key] for key in wanted}, strict=False)


def pvt_name(key: str) -> str:
    """Our name for a backbone entry of SBT's authors, of PVTv2's authors, or of timm's PVTv2."""
    key = re.sub(r"\bpatch_embed(\d?)\.", lambda m: f"stages.{int(m[1] or 1) - 1}.embed.", key)
    key = re.sub(r"\bblock(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
    key = re.sub(
        r"^(backbone\.)?norm(\d)\.", lambda m: f"{m[1] or ''}stages.{int(m[2]) - 1}.norm.", key
    )
    key = re.sub(
        r"\.mlp\.dwconv\.(dwconv\.)?", ".mlp.position.", key.replace(".downsample.", ".embed.")
    )
    return (
        key.replace(".attn.sr.", ".reduce.")
        .replace(".attn.norm.", ".reduce_norm.")
        .replace(".attn.", ".")
    )
