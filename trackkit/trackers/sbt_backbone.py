"""What lies beneath SBT's blocks: maps with channels last, squares for local attention, biases of
logits, attention as two convolutions, weights that were learned on single images, and the checks of
a config. Read `trackkit.trackers.sbt` first.

Maps are (B, H, W, C): a row of C numbers is a token, and convolutions see channels last.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from trackkit.errors import CheckpointError


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of a map with channels last."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def initialise(module: nn.Module) -> None:
    """Random weights of linear layers and convolutions, for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        cells = module.kernel_size[0] * module.kernel_size[1]
        outputs = cells * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / outputs) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def note(seen: dict | None, name: str, x: Tensor | None, share: Tensor | None) -> None:
    """Keep a step's map and its attention, if there are any and somebody collects them."""
    if seen is not None:
        seen |= {} if x is None else {name: x}
        seen |= {} if share is None else {f"{name}.attention": share}


# ---- local attention ----


def squares(x: Tensor, side: int, shift: int = 0) -> Tensor:
    """Cut a map into squares for a local attention: (B, H, W, C) -> (B * n, side, side, C), row by
    row; side 0 leaves it whole.

    With `shift` the map is rolled by so many tokens up and to the left first, so that the squares
    of two layers overlap (Liu et al. 2021, section 3.2).
    """
    if not side:
        return x
    x = x.roll((-shift, -shift), (1, 2)) if shift else x
    return x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(0, 2)


def whole(tokens: Tensor, like: Tensor, side: int, shift: int = 0) -> Tensor:
    """The inverse of `squares`: tokens (B * n, side * side, C) -> a map of the size of `like` (B,
    H, W, C).
    """
    batch, height, width, _ = like.shape
    if not side:
        return tokens.unflatten(1, (height, width))
    x = (
        tokens.view(batch, height // side, width // side, side, side, -1)
        .transpose(2, 3)
        .reshape(*like.shape[:3], -1)
    )
    return x.roll((shift, shift), (1, 2)) if shift else x


def shift_bias(like: Tensor, side: int, shift: int) -> Tensor:
    """Added to the logits within shifted `squares` of a map (B, H, W, C): (B * n, 1, side ** 2,
    side ** 2), 0 or -inf.

    The last squares hold tokens from opposite borders of the map, which must not look at one
    another.
    """
    parts = []
    for length in like.shape[1:3]:
        rolled = torch.arange(length, device=like.device).roll(-shift)
        parts.append((rolled < shift).to(like.dtype))  # 1: came round from the other border
    # (n, side ** 2)
    part = squares((2 * parts[0][:, None] + parts[1])[None, :, :, None], side).flatten(1)
    apart = torch.zeros(
        len(part), 1, side * side, side * side, dtype=like.dtype, device=like.device
    )
    apart = apart.masked_fill((part[:, :, None] != part[:, None, :])[:, None], -math.inf)
    return apart.repeat(len(like), 1, 1, 1)


def offset_bias(offsets: Tensor, side: int, reduction: int) -> Tensor:
    """Added to the logits for relative positions: a number for each head and each offset between
    query and key, (heads, 2 R - 1, 2 R - 1), looked up for side x side queries and their keys on
    every `reduction`-th row and column -> (1, heads, side ** 2, (side / reduction) ** 2).
    """
    steps = torch.arange(side, device=offsets.device)
    # (side, side / reduction), counted from the table's middle
    apart = steps[:, None] - reduction * steps[: side // reduction] + offsets.shape[-1] // 2
    found = offsets[:, apart[:, None, :, None], apart[None, :, None, :]]
    return found.flatten(3).flatten(1, 2)[None]


# ---- attention as convolutions (section 5.1) ----


def dynamic_convolutions(
    normed: Tensor, kv: tuple[Tensor, Tensor], query: nn.Linear, proj: nn.Linear
) -> Tensor:
    """Attention of a map (B, H, W, C) to keys and values (B, heads, K, d), as two 1 x 1
    convolutions whose kernels the other image makes, with a softmax between them (Eq. 8).

    Keys take in the query's projection and values the output's. (Eq. 8 lets the second kernel
    depend on x; it does not.)
    """
    (k, v), tokens = kv, normed.flatten(1, 2)  # (B, N, C)
    k, split = k * k.shape[-1] ** -0.5, (k.shape[1], -1)
    # W1(z), b1(z): (B, heads * K, C) and (B, 1, heads * K)
    first = (k @ query.weight.unflatten(0, split)).flatten(1, 2)
    bias = (k @ query.bias.view(*split, 1)).flatten(1)[:, None]
    # W2(z): (B, heads * K, C)
    second = (v @ proj.weight.unflatten(1, split).permute(1, 2, 0)).flatten(1, 2)
    share = torch.baddbmm(bias, tokens, first.transpose(1, 2)).unflatten(-1, split).softmax(-1)
    return torch.baddbmm(proj.bias, share.flatten(2), second).view_as(normed)


# ---- weights learned on single images ----


def load_blocks(backbone: nn.Module, weights: dict[str, Tensor], blocks: int | None = None) -> None:
    """Start a `Backbone` from weights learned on single images: all blocks that there are, or only
    the first `blocks` (Fig. 8).

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
    firsts = [name for name in chosen if name.endswith("blocks.0.")]
    parts = chosen + [name.replace("blocks.0", "embed") for name in firsts]
    parts += [f"stages.{last}.norm."] if names[-1] in chosen else []
    own = backbone.state_dict()
    wanted = {key: value for key, value in own.items() if key.startswith(tuple(parts))}
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
    norm = r"^(backbone\.)?norm(\d)\."
    key = re.sub(norm, lambda m: f"{m[1] or ''}stages.{int(m[2]) - 1}.norm.", key)
    key = key.replace(".downsample.", ".embed.")
    key = re.sub(r"\.mlp\.dwconv\.(dwconv\.)?", ".mlp.position.", key)
    key = key.replace(".attn.sr.", ".reduce.").replace(".attn.norm.", ".reduce_norm.")
    return key.replace(".attn.", ".")


# ---- which numbers of an `SBTConfig` go together; ValueError says what does not ----


def check_stages(config: Any) -> None:
    """Each stage has all its numbers, and they fit together."""
    stages = len(config.dims)
    for field in ("heads", "blocks", "strides", "ratios", "reductions", "cross"):
        if len(getattr(config, field)) != stages:
            raise ValueError(
                f"{field} needs one entry for each of the {stages} stages, as dims; got "
                f"{getattr(config, field)}"
            )
    if any(dim % heads for dim, heads in zip(config.dims, config.heads, strict=True)):
        raise ValueError(f"dims {config.dims} cannot be shared by {config.heads} heads")
    for stage, (cross, blocks) in enumerate(zip(config.cross, config.blocks, strict=True), 1):
        if any(block not in range(1, blocks + 1) for block in cross):
            raise ValueError(f"stage {stage} has blocks 1 to {blocks}; cross names {cross}")


def check_grids(config: Any) -> None:
    """Crops give grids that can be reduced and cut into squares."""
    if config.template_size % config.stride or config.search_size % config.stride:
        raise ValueError(
            f"template_size and search_size must be multiples of the total stride, {config.stride}"
        )
    windowed = config.attention in ("vl", "sl")
    for size in (config.template_size, config.search_size):
        for grid, reduction in zip(config.grids(size), config.reductions, strict=True):
            gives = f"a crop of {size} px gives a grid of {grid}"
            if config.attention != "vg" and grid < reduction:
                raise ValueError(f"{gives}, too small to be reduced by {reduction}")
            if windowed and grid % config.local:
                raise ValueError(f"{gives}, no multiple of local = {config.local}")
    if config.attention == "sl" and config.template_size != config.search_size:
        raise ValueError(
            'attention "sl" compares squares of two equal grids: make template_size equal to '
            "search_size"
        )


def check_meeting(config: Any) -> None:
    """The images meet somewhere."""
    if config.correlation == "embedded" and not any(config.cross):
        raise ValueError(
            'without a block in cross, or correlation "depthwise" or "cross", nothing looks at '
            "the template"
        )
    last = config.blocks[-1]
    if config.correlation != "embedded" and any(
        level not in range(1, last + 1) for level in config.levels
    ):
        raise ValueError(f"the last stage has blocks 1 to {last}; levels are {config.levels}")
    if config.correlation == "depthwise" and config.grids(config.template_size)[-1] < 7:
        raise ValueError(
            "depth-wise correlation takes the middle 7 x 7 tokens of the template; make "
            "template_size larger"
        )
