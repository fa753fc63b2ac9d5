"""Extract-or-Correlation blocks: the backbone of SBT, in which two images meet.

Xie et al.: "Correlation-Aware Deep Tracking", CVPR 2022, sections 3.1 to 3.3. A block lets tokens
look at tokens: those of their own image (self-attention, SA) or those of the other
(cross-attention, CA). Both have the same layers and the same weights for search crop and template;
only who is asked differs.

Maps are (B, H, W, C): a row of C numbers is a token, and convolutions see channels last. N = H * W;
K keys, fewer than tokens by SR ** 2, where SR is the spatial reduction. x is the search crop, z the
template.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.attention import DropPath, shift_bias, sine_position, squares, whole

if TYPE_CHECKING:
    from trackkit.trackers.sbt import SBTConfig


class PatchEmbedding(nn.Module):
    """Fewer, richer tokens: (B, H, W, C) -> (B, H / stride, W / stride, D) (Eq. 1)."""

    def __init__(self, config: SBTConfig, stage: int):
        super().__init__()
        inputs = config.dims[stage - 1] if stage else 3
        stride, width, overlap = (
            config.strides[stage],
            config.dims[stage],
            config.embedding == "conv",
        )
        kernel = (3 if stage else 7) if overlap else stride
        self.proj = nn.Conv2d(inputs, width, kernel, stride, kernel // 2 if overlap else 0)
        self.norm = nn.LayerNorm(width)
        self.absolute = config.position == "absolute" and stage == 0

    def forward(self, x: Tensor, weights: bool = False) -> tuple[Tensor, None]:
        x = self.norm(_convolve(self.proj, x))
        if self.absolute:
            inside = torch.zeros(x.shape[:3], dtype=torch.bool, device=x.device)
            x = x + sine_position(inside, x.shape[-1]).to(x).view_as(x)
        return x, None


class ConvMlp(nn.Module):
    """Linear, 3 x 3 depth-wise convolution, GELU, linear (section 3.3).

    The convolution pads with zeros, so tokens learn how far the border is: a position encoding that
    fits every size.
    """

    def __init__(self, width: int, hidden: int, conditional: bool):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.position = (
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden) if conditional else None
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if self.position is not None:
            hidden = _convolve(self.position, hidden)
        # in place: fresh memory for large maps costs a CPU time
        gelu = F.gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_
        return self.fc2(gelu(hidden))


Prepared = tuple[Tensor | None, tuple[Tensor, Tensor]]  # queries, (keys, values)


class EoC(nn.Module):
    """Extract-or-Correlation block (section 3.2, Fig. 3b): SA with `forward`, CA with `cross`, by
    the same layers.
    """

    def __init__(self, config: SBTConfig, stage: int, block: int, drop: float):
        super().__init__()
        width, self.heads = config.dims[stage], config.heads[stage]
        crossed = block + 1 in config.cross[stage]
        windowed = config.attention == "sl" or (config.attention == "vl" and not crossed)
        reduction = 1 if windowed or config.attention == "vg" else config.reductions[stage]
        self.local = config.local if windowed else 0
        self.shift = self.local // 2 if config.attention == "sl" and block % 2 else 0
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.q, self.kv, self.proj = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.reduce = nn.Conv2d(width, width, reduction, reduction) if reduction > 1 else None
        self.reduce_norm = nn.LayerNorm(width) if reduction > 1 else None
        self.mlp = ConvMlp(width, config.ratios[stage] * width, config.position == "conditional")
        self.drop_path = DropPath(drop)
        self.sequential, self.offsets = config.order == "sequential", None
        if config.position == "relative" and not crossed:
            reach = self.local or config.grids(max(config.search_size, config.template_size))[stage]
            self.offsets = nn.Parameter(torch.zeros(self.heads, 2 * reach - 1, 2 * reach - 1))
            nn.init.trunc_normal_(self.offsets, std=0.02)

    def forward(self, x: Tensor, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """SA: (B, H, W, C) -> the same, and with `weights` how much each token looked at each key,
        (B, heads, N, K) (Eq. 4).
        """
        normed = self.norm1(x)
        change, share = self.look(normed, self.offer(normed), weights, own=True)
        return self.absorb(x, change), share

    def cross(
        self,
        x: Tensor,
        z: Tensor,
        prepared: Prepared | None = None,
        renew: bool = True,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """CA: maps x and z -> the same, each having looked at the other, and x's share (Eq. 5).

        `prepared` is z's part if it was computed before. Without `renew` z stays as it is.
        """
        if prepared is None or (renew and prepared[0] is None):
            prepared = self.prepare(z, renew)
        q_z, kv_z = prepared
        normed = self.norm1(x)
        change, share = self.look(normed, kv_z, weights)
        new = self.absorb(x, change)
        if renew:
            kv_x = self.offer(self.norm1(new) if self.sequential else normed)
            z = self.absorb(z, self.attend(q_z, kv_x, z)[0])
        return new, z, share

    def prepare(self, z: Tensor, ask: bool = True) -> Prepared:
        """What `cross` needs of a map z whatever x is: its queries, if it is to `ask`, and its keys
        and values.
        """
        normed = self.norm1(z)
        return self.ask(normed) if ask else None, self.offer(normed)

    def ask(self, normed: Tensor) -> Tensor:
        """Queries (G, heads, N, d) of a normed map, all its tokens; G is B, times the squares of a
        local attention (Eq. 2).
        """
        return self._heads(self.q(squares(normed, self.local, self.shift).flatten(1, 2)))

    def offer(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (G, heads, K, d) of a normed map, on a grid SR times coarser (Eq. 2)."""
        if self.reduce is not None:
            normed = self.reduce_norm(_convolve(self.reduce, normed))
        k, v = self.kv(squares(normed, self.local, self.shift).flatten(1, 2)).chunk(2, -1)
        return self._heads(k), self._heads(v)

    def look(
        self, normed: Tensor, kv: tuple[Tensor, Tensor], weights: bool = False, own: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """What a normed map gains from keys and values, those of itself if `own`: (B, H, W, C), and
        its share.
        """
        keys = self.heads * kv[0].shape[2]
        plain = (
            weights or torch.is_grad_enabled() or self.local or (own and self.offsets is not None)
        )
        if not plain and keys <= normed.shape[-1]:  # then this takes fewer multiplications
            return self.convolve(normed, kv), None
        return self.attend(self.ask(normed), kv, normed, weights, own)

    def attend(
        self,
        q: Tensor,
        kv: tuple[Tensor, Tensor],
        like: Tensor,
        weights: bool = False,
        own: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries gather the values whose keys resemble them (Eq. 3) -> a map of the size of
        `like`, and the share.
        """
        k, v = kv
        bias = self._bias(like, own)
        if weights:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            share = (scores if bias is None else scores + bias).softmax(-1)
            mixed = share @ v
        else:
            share, mixed = None, F.scaled_dot_product_attention(q, k, v, bias)
        return self.proj(
            whole(mixed.transpose(1, 2).flatten(2), like, self.local, self.shift)
        ), share

    def convolve(self, normed: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        """The same as two 1 x 1 convolutions whose kernels the other image makes, with a softmax
        between them (Eq. 8).

        Keys take in the query's projection and values the output's. (Eq. 8 lets the second kernel
        depend on x; it does not.)
        """
        (k, v), tokens = kv, normed.flatten(1, 2)  # (B, N, C)
        k = k * k.shape[-1] ** -0.5
        # W1(z): (B, heads * K, C)
        first = (k @ self.q.weight.unflatten(0, (self.heads, -1))).flatten(1, 2)
        bias = (k @ self.q.bias.view(self.heads, -1, 1)).flatten(1)[:, None]  # (B, 1, heads * K)
        # W2(z): (B, heads * K, C)
        second = (v @ self.proj.weight.unflatten(1, (self.heads, -1)).permute(1, 2, 0)).flatten(
            1, 2
        )
        share = (
            torch.baddbmm(bias, tokens, first.transpose(1, 2))
            .unflatten(-1, (self.heads, -1))
            .softmax(-1)
        )
        return torch.baddbmm(self.proj.bias, share.flatten(2), second).view_as(normed)

    def absorb(self, x: Tensor, change: Tensor) -> Tensor:
        """Add what was gathered, then think (Eq. 4 and 5)."""
        x = x + self.drop_path(change)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _bias(self, like: Tensor, own: bool) -> Tensor | None:
        """What is added to the logits: for relative positions, and between parts of a square that a
        shift brought together.
        """
        bias = None
        if own and self.offsets is not None:
            side, sr = (
                self.local or like.shape[1],
                1 if self.reduce is None else self.reduce.stride[0],
            )
            steps = torch.arange(side, device=like.device)
            # (side, side / SR)
            apart = steps[:, None] - sr * steps[: side // sr] + self.offsets.shape[-1] // 2
            bias = (
                self.offsets[:, apart[:, None, :, None], apart[None, :, None, :]]
                .flatten(3)
                .flatten(1, 2)[None]
            )
        if self.shift:
            apart = shift_bias(like, self.local, self.shift)
            bias = apart if bias is None else apart + bias
        return bias


class BackboneStage(nn.Module):
    """A patch embedding, blocks of one width, and a norm where the stage's output is used."""

    def __init__(self, config: SBTConfig, stage: int, norm: bool):
        super().__init__()
        total, before = sum(config.blocks), sum(config.blocks[:stage])
        drops = [
            config.drop_path * (before + b) / max(total - 1, 1) for b in range(config.blocks[stage])
        ]
        self.embed = PatchEmbedding(config, stage)
        self.blocks = nn.ModuleList(
            EoC(config, stage, block, drop) for block, drop in enumerate(drops)
        )
        self.norm = nn.LayerNorm(config.dims[stage], eps=1e-6) if norm else None


@dataclass(frozen=True)
class Encoded:
    """An image on its way through the backbone."""

    map: Tensor  # (B, H, W, C)
    levels: tuple[Tensor, ...] = ()  # maps after the blocks `config.levels`, as far as it has come
    prepared: Prepared | None = None  # of a template: its part in the first CA block


class Backbone(nn.Module):
    """The single branch: `alone` up to the first CA block, then two images `together` (Fig. 3a)."""

    def __init__(self, config: SBTConfig):
        super().__init__()
        self.config, self.cross, last = config, config.cross, len(config.dims)
        self.stages = nn.ModuleList(
            BackboneStage(config, i, norm=i == last - 1) for i in range(last)
        )
        self.levels = {
            f"stage{last}.block{level}"
            for level in config.levels
            if config.correlation != "embedded"
        }
        names = [(name, crossed) for name, _, crossed in self.steps()]
        self.first = next((i for i, (_, crossed) in enumerate(names) if crossed), len(names))
        # the template's map changes in every block, but is read only by CA blocks (as it was after
        # the step before) and by `levels`: the last step whose template map anybody reads
        read = [i - 1 for i, (_, crossed) in enumerate(names) if crossed]
        self.read = max(read + [i for i, (name, _) in enumerate(names) if name in self.levels])
        self.channels, self.stride = config.dims[-1], config.stride
        self.apply(initialise)
        # as the maps: kernels need not be turned in every frame
        self.to(memory_format=torch.channels_last)

    def load_pretrained(self, blocks: int | None = None) -> bool:
        """Start from PVTv2's ImageNet weights, see `trackkit.trackers.sbt_pretraining`; False if
        there are none for these blocks.
        """
        from trackkit import pretraining

        weights = pretraining.imagenet(self.config)
        if weights is not None:
            pretraining.load_pretrained(self, weights, blocks)
        return weights is not None

    @property
    def norm(self) -> nn.LayerNorm:
        """Of the output."""
        return self.stages[-1].norm

    def steps(self) -> list[tuple[str, nn.Module, bool]]:
        """Name, layer, and whether it is CA, in the order in which they run."""
        found = []
        for s, stage in enumerate(self.stages):
            found.append((f"stage{s + 1}.embed", stage.embed, False))
            found += [
                (f"stage{s + 1}.block{b}", block, b in self.cross[s])
                for b, block in enumerate(stage.blocks, 1)
            ]
        return found

    def alone(self, images: Tensor, seen: dict | None = None) -> Encoded:
        """Normalised images (B, 3, S, S) up to the first CA block. `seen` collects each step's map
        and attention.
        """
        x, levels = images.permute(0, 2, 3, 1), ()
        for name, layer, _ in self.steps()[: self.first]:
            x, share = layer(x, seen is not None)
            levels += (x,) if name in self.levels else ()
            _note(seen, name, x, share)
        return Encoded(x, levels)

    def prepare(self, z: Encoded) -> Encoded:
        """A template with its part in the first CA block, which is the same for every search
        crop.
        """
        block = self.steps()[self.first][1] if self.first < len(self.steps()) else None
        # the squares of a local attention are no entries of a batch
        if block is None or block.local:
            return z
        return replace(z, prepared=block.prepare(z.map, ask=self.first <= self.read))

    def together(
        self, x: Encoded, z: Encoded, both: bool = False, seen: dict | None = None
    ) -> tuple[Encoded, Encoded]:
        """The rest: both images have been `alone`, and now meet in the CA blocks.

        The template's map ends where nobody reads it any more, or with `both` at the end as well.
        """
        weights, (x, x_levels), (z, z_levels, prepared) = (
            seen is not None,
            (x.map, x.levels),
            (z.map, z.levels, z.prepared),
        )
        for index, (name, layer, crossed) in enumerate(self.steps()):
            if index < self.first:
                continue
            renew = both or index <= self.read
            if crossed:
                x, z, share = layer.cross(
                    x, z, prepared if index == self.first else None, renew, weights
                )
            else:
                x, share = layer(x, weights)
                z = layer(z)[0] if renew else z
            if name in self.levels:
                x_levels, z_levels = (*x_levels, x), (*z_levels, z)
            _note(seen, name, x, share)
            _note(seen, f"{name}.template", z if renew else None, None)
        return Encoded(x, x_levels), Encoded(z, z_levels)


class CorrelatedFeatures(Backbone):
    """The backbone for a tracker that compares features itself (section 5.3), as maps (B, C, H, W).

    Called with images it goes up to the first CA block, for templates and search crops alike, so a
    template's map can be kept; `meet` does the rest for a pair.
    """

    def forward(self, images: Tensor) -> Tensor:
        return self.alone(images).map.permute(0, 3, 1, 2)

    def meet(self, search: Tensor, template: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of B pairs as they come from `forward` -> maps that know of one another."""
        pair = self.together(
            *(Encoded(image.permute(0, 2, 3, 1)) for image in (search, template)), both=True
        )
        return tuple(self.norm(image.map).permute(0, 3, 1, 2) for image in pair)


def _note(seen: dict | None, name: str, x: Tensor | None, share: Tensor | None) -> None:
    if seen is not None:
        seen |= {} if x is None else {name: x}
        seen |= {} if share is None else {f"{name}.attention": share}


def _convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of a map with channels last."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def initialise(module: nn.Module) -> None:
    """Random weights of linear layers and convolutions, for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        outputs = (
            module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        )
        nn.init.normal_(module.weight, std=(2 / outputs) ** 0.5)
        nn.init.zeros_(module.bias)
