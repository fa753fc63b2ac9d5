"""Attention, encoder and decoder layers, and what tells tokens apart: their positions.

A token is a row of a (B, T, D) tensor. Notation: B batch, T tokens, Q queries, D width, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention: each query gathers the values whose keys resemble it.

    softmax(q k^T / sqrt(D / H)) v, for each of H heads on its own share of the width (Vaswani et
    al. 2017, Eq. 1). The parameters have the names and the layout of `torch.nn.MultiheadAttention`:
    queries, keys, values stacked.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be shared by {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ignore: Tensor | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query (B, Q, D), key and value (B, T, D), ignore (B, T) bool, True for tokens nobody may
        look at.

        Returns (B, Q, D) and, with `weights`, how much each query looked at each token, (B, H, Q,
        T), rows summing to 1; otherwise None, and the kernel never forms that matrix.
        """
        width = query.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key:  # one product for both
            q, k = F.linear(query, weight[: 2 * width], bias[: 2 * width]).chunk(2, -1)
        else:
            q = F.linear(query, weight[:width], bias[:width])
            k = F.linear(key, weight[width : 2 * width], bias[width : 2 * width])
        v = F.linear(value, weight[2 * width :], bias[2 * width :])
        # (B, H, Q or T, D / H)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        allowed = None if ignore is None else ~ignore[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        if weights:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            if allowed is not None:
                scores = scores.masked_fill(~allowed, -math.inf)
            share = scores.softmax(-1)
            mixed = F.dropout(share, dropout) @ v
        else:
            share = None
            mixed = F.scaled_dot_product_attention(q, k, v, allowed, dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), share


class EncoderLayer(nn.Module):
    """Tokens look at one another, then each thinks for itself: (B, T, D) -> (B, T, D).

    Positions are added to queries and keys and never to values, so they steer who looks where
    without becoming part of what is seen (Carion et al. 2020). `pre_norm` normalises before each
    step instead of after it.
    """

    def __init__(
        self, width: int, heads: int, feedforward: int, dropout: float = 0.1, pre_norm: bool = False
    ):
        super().__init__()
        self.self_attn = Attention(width, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout, self.pre_norm = nn.Dropout(dropout), pre_norm
        xavier(self)

    def forward(
        self, x: Tensor, position: Tensor, ignore: Tensor | None = None, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        pre = self.pre_norm
        y = self.norm1(x) if pre else x
        at = y + position
        change, share = self.self_attn(at, at, y, ignore, weights)
        x = x + self.dropout(change)
        x = x if pre else self.norm1(x)
        y = self.norm2(x) if pre else x
        x = x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(y), inplace=True))))
        return x if pre else self.norm2(x), share


class DecoderLayer(nn.Module):
    """Queries look at one another, then at the memory: (B, Q, D) and (B, T, D) -> (B, Q, D)."""

    def __init__(
        self, width: int, heads: int, feedforward: int, dropout: float = 0.1, pre_norm: bool = False
    ):
        super().__init__()
        self.self_attn, self.cross_attn = (
            Attention(width, heads, dropout),
            Attention(width, heads, dropout),
        )
        self.linear1, self.linear2 = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout, self.pre_norm = nn.Dropout(dropout), pre_norm
        self.shortcut = True  # few queries may look by `look_by_few`
        xavier(self)

    def forward(
        self,
        x: Tensor,
        query: Tensor,
        memory: Tensor,
        position: Tensor,
        ignore: Tensor | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`query` (B, Q, D) is to the queries what `position` (B, T, D) is to the memory: added
        where looks are aimed.
        """
        pre = self.pre_norm
        y = self.norm1(x) if pre else x
        at = y + query
        x = x + self.dropout(self.self_attn(at, at, y)[0])
        x = x if pre else self.norm1(x)
        y = self.norm2(x) if pre else x
        look = y + query, memory + position, memory, ignore
        few = self.cross_attn.heads * x.shape[1] < x.shape[2]
        if self.shortcut and few and not (weights or torch.is_grad_enabled()):
            change, share = look_by_few(self.cross_attn, *look), None
        else:
            change, share = self.cross_attn(*look, weights)
        x = x + self.dropout(change)
        x = x if pre else self.norm2(x)
        y = self.norm3(x) if pre else x
        x = x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(y), inplace=True))))
        return x if pre else self.norm3(x), share


def look_by_few(
    layer: Attention, query: Tensor, key: Tensor, value: Tensor, ignore: Tensor | None = None
) -> Tensor:
    """What `layer(query, key, value, ignore)` returns first, in another order, which is quicker for
    few queries.

    q . (W k + b) = (W^T q) . k + q . b: instead of T keys the queries of each head are projected,
    and q . b changes nothing in a softmax over keys. Likewise a mixture of values is projected, not
    T values; its shares sum to 1, so the bias stays as it is.
    """
    (w_q, w_k, w_v), (b_q, _, b_v) = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    heads = (layer.heads, -1)
    # (B, H, Q, D)
    aimed = torch.einsum(
        "bqhd,hdc->bhqc", F.linear(query, w_q, b_q).unflatten(-1, heads), w_k.unflatten(0, heads)
    )
    # (B, H, Q, T)
    scores = aimed @ key[:, None].transpose(-1, -2) * (layer.heads / query.shape[-1]) ** 0.5
    if ignore is not None:
        # finite, even if all are to be ignored
        scores = scores.masked_fill(ignore[:, None, None], torch.finfo(scores.dtype).min)
    mixed = scores.softmax(-1) @ value[:, None]  # (B, H, Q, D)
    return layer.out_proj(
        torch.einsum("bhqc,hdc->bqhd", mixed, w_v.unflatten(0, heads)).flatten(2) + b_v
    )


def sine_position(outside: Tensor, width: int) -> Tensor:
    """Position embedding without parameters: cells outside the frame, bool (B, h, w) -> (B, h * w,
    width).

    Cells inside are counted 1, 2, ... along each axis and the count is stretched to end at 2 pi, so
    small and large grids share one scale. Half of the channels tell y, the other half x; of each
    half, even channels are sines and odd ones cosines of the count divided by wavelengths from 1 to
    10,000 (Carion et al. 2020, after Vaswani et al. 2017).
    """
    inside = (~outside).float()
    half = width // 2
    index = torch.arange(half, device=outside.device)
    wavelength = 10_000 ** (2 * (index // 2) / half)
    parts = []
    for axis in (1, 2):  # y, then x
        count = inside.cumsum(axis)
        last = count.narrow(axis, count.shape[axis] - 1, 1)
        angle = (count / (last + 1e-6) * (2 * math.pi))[..., None] / wavelength  # (B, h, w, half)
        parts.append(torch.where(index % 2 == 0, angle.sin(), angle.cos()))
    return torch.cat(parts, -1).flatten(1, 2)


class LearnedPosition(nn.Module):
    """Position embedding from two learned tables, one row of each for a column and a row: up to 50
    x 50 cells.
    """

    def __init__(self, width: int):
        super().__init__()
        self.column, self.row = nn.Embedding(50, width // 2), nn.Embedding(50, width // 2)
        nn.init.uniform_(self.column.weight)
        nn.init.uniform_(self.row.weight)

    def forward(self, outside: Tensor) -> Tensor:
        """Only the shape of `outside` (B, h, w) counts -> (B, h * w, width)."""
        batch, height, width = outside.shape
        x = self.column.weight[:width].expand(height, -1, -1)
        y = self.row.weight[:height, None].expand(-1, width, -1)
        return torch.cat([x, y], -1).flatten(0, 1).expand(batch, -1, -1)


def xavier(module: nn.Module) -> None:
    """Xavier-uniform weights wherever a parameter has more than one dimension (the transformer's
    usual start).
    """
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)


class DropPath(nn.Module):
    """In training, drops a residual branch for a whole sample with probability `rate` (Huang et al.
    2016).
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


class SE(nn.Module):
    """Squeeze and excitation (Hu et al. 2018): channels are weighted by what the mean over all
    cells says.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = channels // reduction
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(),
            nn.Linear(hidden, channels, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates for one map of height x width cells."""
        return sum(layer.weight.numel() for layer in (self.fc[0], self.fc[2]))


class CoordinateAttention(nn.Module):
    """Coordinate attention (Hou et al. 2021): a weight for each channel and row, and one for each
    channel and column.
    """

    def __init__(self, channels: int, reduction: int = 32):
        super().__init__()
        hidden = max(8, channels // reduction)
        self.conv1, self.bn1 = nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden)
        self.conv_h, self.conv_w = nn.Conv2d(hidden, channels, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        # (B, C, h + w, 1): rows, then columns
        lines = torch.cat([x.mean(3), x.mean(2)], 2)[..., None]
        rows, columns = F.hardswish(self.bn1(self.conv1(lines))).split([height, width], 2)
        return x * self.conv_h(rows).sigmoid() * self.conv_w(columns).sigmoid().transpose(2, 3)

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates for one map of height x width cells."""
        first, row, column = (c.weight.numel() for c in (self.conv1, self.conv_h, self.conv_w))
        return first * (height + width) + row * height + column * width


class CBAM(nn.Module):
    """Convolutional block attention (Woo et al. 2018): a weight for each channel, then one for each
    cell.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = channels // reduction
        self.channel = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1, momentum=0.01)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = (
            x
            * (self.channel(x.mean((2, 3))) + self.channel(x.amax((2, 3)))).sigmoid()[
                :, :, None, None
            ]
        )
        return x * self.spatial(torch.stack([x.amax(1), x.mean(1)], 1)).sigmoid()

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates for one map of height x width cells."""
        shared = sum(layer.weight.numel() for layer in (self.channel[0], self.channel[2]))
        return 2 * shared + self.spatial[0].weight.numel() * height * width
