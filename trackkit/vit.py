"""The plain vision transformer: what OSTrack and MixViT are made of (Dosovitskiy et al. 2021).

A crop is cut into patches, each patch becomes a token with a position, and blocks let tokens look
at one another. The parameters have timm's names, so a masked autoencoder's weights fit.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.attention import DropPath, sine_position
from trackkit.backbones import SmallNet, timm_weights
from trackkit.errors import CheckpointError

PATCH = 16  # pixels along a side of a patch of the papers' networks


def stride_of(stem: str) -> int:
    """Crop pixels from one token to the next, see `patch_embedding`."""
    return PATCH if stem == "patch" else SmallNet.stride


def patch_embedding(stem: str, width: int) -> nn.Module:
    """Images (B, 3, S, S) -> (B, width, S / stride, S / stride).

    Stem "patch": a token is a linear map of 16 x 16 pixels. "conv": a small convolutional network
    of stride 8, with which a transformer learns from little data.
    """
    if stem == "patch":
        return nn.Conv2d(3, width, PATCH, PATCH)
    net = SmallNet()
    return nn.Sequential(net, nn.Conv2d(net.channels, width, 1))


def load_stem(embed: nn.Sequential) -> None:
    """Give a patch embedding "conv" the features of matching-tiny."""
    embed[0].load_pretrained(embed[1])


class VitAttention(nn.Module):
    """The attention of a plain vision transformer (Dosovitskiy et al. 2021), in two halves.

    Trackers differ in what happens between them: who may look at whom, what is cached, what is done
    to the map. The parameters have timm's names.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T, D) -> queries, keys and values, each (B, H, T, D / H)."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, mixed: Tensor) -> Tensor:
        """What the heads have gathered, (B, H, T, D / H) -> tokens (B, T, D)."""
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU, linear: (B, T, D) -> (B, T, D). The parameters have timm's names."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A block of the transformer, in three steps: what is between them, who looks at whom and who
    stays, is the tracker's.

        q, k, v = block.project(x)
        x = block.gather(x, attention(q, k, v))
        x = block.think(x)
    """

    def __init__(self, width: int, heads: int, hidden: int, drop_path: float):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), VitAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, hidden)
        self.drop_path = DropPath(drop_path)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T, D) -> queries, keys and values, each (B, H, T, D / H)."""
        return self.attn.split(self.norm1(x))

    def gather(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Tokens (B, T, D) and what their heads have gathered (B, H, T, D / H) -> tokens."""
        return x + self.drop_path(self.attn.merge(mixed))

    def think(self, x: Tensor) -> Tensor:
        """Each token by itself: (B, T, D) -> (B, T, D)."""
        return x + self.drop_path(self.mlp(self.norm2(x)))


def blocks(width: int, depth: int, heads: int, hidden: int, drop_path: float) -> nn.ModuleList:
    """`depth` blocks; the probability of dropping a branch rises from 0 to `drop_path`."""
    rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
    return nn.ModuleList(Block(width, heads, hidden, rate) for rate in rates)


@torch.no_grad()
def start_as_lookup(
    blocks: nn.ModuleList, template_position: Tensor, search_position: Tensor
) -> None:
    """Let attention begin as a lookup: each token gathers from the tokens of the other crop that
    resemble it. Not in the papers, whose networks begin from a trained transformer; without it,
    ours do not find out in an hour that there is something to compare.

    Each head sees a random part of the token, and keys, values and queries are that part. The
    positions (1, n, D) and (1, N, D), changed in place, lie apart along one direction, along which
    queries are mirrored: what is alike in the *other* crop is the most similar. Template tokens
    say where they are, so a search token learns which place of the template it has found.
    """
    width = search_position.shape[-1]
    apart = F.normalize(torch.randn(width), dim=0)
    mark = 0.5 * math.sqrt(width) * apart
    template_position.mul_(0.5).add_(mark)
    search_position.copy_(0.02 * torch.randn_like(search_position) - mark)
    mirror = torch.eye(width) - 2 * torch.outer(apart, apart)
    for block in blocks:
        part = torch.linalg.qr(torch.randn(width, width))[0]
        sharp = 1.4 * part  # so that of 180 tokens a few count
        block.attn.qkv.weight.copy_(torch.cat([sharp @ mirror, sharp, part]))
        block.attn.proj.weight.copy_(0.5 * part.T)
        nn.init.zeros_(block.attn.qkv.bias)
        nn.init.zeros_(block.attn.proj.bias)
        block.mlp.fc2.weight.mul_(0.5)


def sincos_position(grid: int, width: int) -> Tensor:
    """Fixed positions of grid x grid tokens, row by row: (1, grid * grid, width).

    Half of the channels tell the column, the other half the row; of each half, first all sines,
    then all cosines, of wavelengths from 2 pi to 20,000 pi.
    """
    quarter = width // 4
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * 10_000 ** (
        -torch.arange(quarter, dtype=torch.float64) / quarter
    )
    wave = torch.cat([angle.sin(), angle.cos()], 1).float()  # (grid, width / 2)
    column, row = wave.expand(grid, -1, -1), wave[:, None].expand(-1, grid, -1)
    return torch.cat([column, row], 2).flatten(0, 1)[None]


def learned_position(grid: int, width: int) -> nn.Parameter:
    """A learned table of positions (1, grid * grid, width) that begins as sines."""
    return nn.Parameter(sine_position(torch.zeros(1, grid, grid, dtype=torch.bool), width))


def mae_weights(stem: str, width: int) -> dict[str, Tensor] | None:
    """The masked autoencoder that the papers start from, by timm's names; None if there is none for
    this width or stem. From timm's cache or, once, the network; TrackkitError if neither has it.
    """
    names = {768: "vit_base_patch16_224.mae", 1024: "vit_large_patch16_224.mae"}
    return timm_weights(names[width]) if stem == "patch" and width in names else None


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's entries (the authors' or timm's) by our names."""
    return {key.replace("patch_embed.proj.", "embed."): value for key, value in weights.items()}


def resized_position(weights: dict[str, Tensor], grid: int) -> Tensor:
    """A ViT's table of positions, bicubically resized to grid x grid cells: (1, grid * grid,
    width).

    Raises CheckpointError if there is none in `weights`.
    """
    if "pos_embed" not in weights:
        raise CheckpointError(
            "the pretrained transformer has no entry pos_embed; give the weights of a plain ViT"
        )
    table = weights["pos_embed"][:, 1:].transpose(1, 2)  # without the class token's
    table = table.unflatten(2, (math.isqrt(table.shape[2]), -1))
    table = F.interpolate(table, (grid, grid), mode="bicubic", align_corners=False)
    return table.flatten(2).transpose(1, 2)
