"""USTAM: what the last frame's attention found tells this frame's where to look.

Anonymous authors: "USTAM: Unified Spatio-Temporal Attention MixFormer for Visual Object Tracking"
(under review). It is MixViT with two patches: the attention map of the last block is sharpened
(spatial attention), and that of the next frame's first block is multiplied by it (temporal
attention). What they do to attention is in `USTAM.mix`; `start`, `answer_and_carry` and
`for_next_search` carry the map from frame to frame. With `spatial` and `temporal` off and the same
numbers it is MixViT, bit for bit.

There is no code of the authors. Where the paper leaves something open, this is one definition of
it, and the alternatives are fields of the config.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from trackkit.crops import Windows
from trackkit.errors import Range, check_fields
from trackkit.frames import SampleSpec
from trackkit.stages import Stage
from trackkit.trackers.mixvit import Answer, MixViT, MixViTConfig, MixViTState, attention_map


@dataclass(frozen=True)
class USTAMConfig(MixViTConfig):
    """MixViT's numbers and the patches; Table 4's rows are `spatial` and `temporal`.

    The paper says that the search window is "twice the width and height" of the box. Here it is
    MixViT's 4.5, with which target and template of Base-288 have one scale: from a window of 2 a
    target is gone as soon as it moves by more than half its size.
    """

    update_interval: int = 0
    """As MixViT's; 0: never, as the paper mentions no update. There are two templates all the same,
    both of the first frame: the MACs of Table 4 are counted with two."""
    spatial: bool = True  # the last block's attention map is sharpened (Eq. 5, 6)
    temporal: bool = True  # the first block's is multiplied by the last frame's (Eq. 3, 4)
    residual: str = "map"
    """What the spatial layer's output is added to. The text has "residual connection to map G_sp",
    which is Eq. 6's map: `relative`. The default, `map`, is the attention map itself: with a layer
    of zeros the network is then exactly MixViT."""
    mean: str = "column"
    """Eq. 6's means are over each `column` (its formula) or `row` (its text). No effect with
    `residual` map and `carried` enhanced: softmax does not see what is subtracted everywhere."""
    carried: str = "enhanced"
    """What Eq. 4 multiplies by in the next frame. Its symbol, G_sp, is Eq. 6's map: `relative`. Its
    words, the last block's map, may also mean the one that block uses: `enhanced`."""
    align: str = "none"
    """In tracking. `none`: cell i of the last search crop counts as cell i of this one (nothing in
    the paper says otherwise), or `warp`: the map is moved to where this crop's cells were, as in
    training, whose two searches share a window."""
    forget: float = 0.3
    """In training, how often the second frame of a clip sees no last map, as a first frame does."""

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, spatial=(True, False), temporal=(True, False), forget=Range(0, 1))
        check_fields(self, residual=("map", "relative"), mean=("column", "row"))
        check_fields(self, carried=("enhanced", "relative"), align=("none", "warp"))
        if self.depth < 2:
            raise ValueError("need a first and a last block: depth must be at least 2")

    @classmethod
    def b384(cls, **changes) -> Self:
        """Base with a search crop of 384 (Tables 3, 5) and Base's template of 128 (Table 1)."""
        return cls(**{"search_size": 384, **changes})

    @classmethod
    def l384(cls, **changes) -> Self:
        """Large; its window is as large in tracking as in training."""
        return super().l384(**{"search_factor": 4.5, **changes})


@dataclass(frozen=True)
class USTAMState(MixViTState):
    """What USTAM remembers of B sequences."""

    carried: Tensor | None  # (B, H, n, n), the last frame's, for Eq. 4; 0 before it
    window: Tensor | None  # (B, 3) int64, left, top and side of the crop which that map is of


def relative(share: Tensor, mean: str) -> Tensor:
    """Eq. 6: a map (B, H, n, n) less its largest column (or row) mean, a number for each head."""
    means = share.mean(-2 if mean == "column" else -1)
    return share - means.amax(-1)[..., None, None]


class SpatialAttention(nn.Module):
    """What is added to the search part of the last block's map (section 3.2): (B, H, n, n) -> (B,
    H, n, n).

    One layer n -> n, shared by the heads (Table 4: n^2 parameters, H n^3 MACs). That it and the
    softmax run along rows is our reading. It starts at zero, so that with `residual` "map" training
    starts from a working MixViT. It ties the network to one search size.
    """

    def __init__(self, tokens: int, residual: str, mean: str):
        super().__init__()
        self.fc, self.residual, self.mean = nn.Linear(tokens, tokens), residual, mean
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, share: Tensor) -> Tensor:
        shifted = relative(share, self.mean)  # Eq. 6
        more = self.fc(shifted.softmax(-1))
        return more if self.residual == "map" else more + (shifted - share)


class USTAM(MixViT):
    """MixViT with spatial and temporal attention."""

    Config = USTAMConfig

    def load_pretrained(self) -> bool:
        """As MixViT's; the tiny one is mixvit-tiny to begin with."""
        if self.config.stem == "conv":
            return self.inherit("mixvit-tiny")
        return super().load_pretrained()

    def add_layers(self) -> None:
        cfg = self.config
        if cfg.spatial:
            self.spatial_attention = SpatialAttention(cfg.grid**2, cfg.residual, cfg.mean)

    def mix(
        self, block: int, q: Tensor, k: Tensor, v: Tensor, own: Tensor, notes: dict[str, Tensor]
    ) -> Tensor:
        """What the search tokens gather: Eq. 2, and in the first and last block what the patches
        add to it, so that a last map or (with `residual` "map") a spatial layer of zeros changes no
        bit.

        The notes have the last frame's map "carried", if there is one, and get the map of the first
        block, "temporal", and that of the last for the next frame, "enhanced": (B, H, n, n).
        """
        cfg, n = self.config, q.shape[2]
        mixed = super().mix(block, q, k, v, own, notes)  # Eq. 2
        if block == 0 and "carried" in notes:
            share = attention_map(q, k)[..., -n:]  # Eq. 3: G, its search tokens' part
            more = share * notes["carried"]  # Eq. 4: (G G_sp + G) V
            notes["temporal"] = share + more
            mixed = mixed + more @ own
        if block == cfg.depth - 1 and (cfg.spatial or cfg.temporal):
            share = kept = attention_map(q, k)[..., -n:]  # Eq. 5: G_f, its search tokens' part
            if cfg.spatial:
                more = self.spatial_attention(share)  # Eq. 6 and what follows it
                kept = share + more
                mixed = mixed + more @ own
            notes["enhanced"] = relative(share, cfg.mean) if cfg.carried == "relative" else kept
        return mixed

    # ---- the carried map, in tracking and in training (section 3.3) ----

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> USTAMState:
        cfg, state = self.config, super().start(frames, boxes_xywh)
        batch, n, carried, window = len(frames), self.config.grid**2, None, None
        if cfg.temporal:
            carried = torch.zeros(batch, cfg.heads, n, n, device=self.device)
        if cfg.temporal and cfg.align == "warp":
            window = torch.tensor([[0, 0, 1]]).repeat(batch, 1)  # any: the first map is 0
        return USTAMState(**vars(state), carried=carried, window=window)

    def answer_and_carry(
        self, state: USTAMState, search: Tensor, windows: Windows, maps: bool
    ) -> tuple[Answer, USTAMState]:
        carried, window = state.carried, state.window
        if carried is None:
            return super().answer_and_carry(state, search, windows, maps)
        if window is not None:
            carried, window = realigned(carried, window, windows.rows), windows.rows
        answer = self(state.cache, search, {"carried": carried}, maps)
        return answer, replace(state, carried=answer.notes["enhanced"], window=window)

    def for_next_search(self, answer: Answer) -> dict[str, Tensor]:
        """The map, which gets no gradient from the next search and is sometimes forgotten."""
        if not self.config.temporal:
            return {}
        carried = answer.notes["enhanced"].detach()
        kept = torch.rand(len(carried), 1, 1, 1, device=carried.device) >= self.config.forget
        return {"carried": carried * kept}

    def samples(self) -> SampleSpec:
        """For temporal attention, two searches of neighbouring frames, from almost the same window
        and mirrored alike: a map of a mirrored crop would tell the wrong places.
        """
        cfg, spec = self.config, super().samples()
        if not cfg.temporal:
            return spec
        return replace(
            spec,
            search=replace(spec.search, shift_px=cfg.stride / 2),
            searches=2,
            same_window=True,
            order="clip",
            rule=replace(spec.rule, min_usable=2 * (cfg.templates + 2) + 1),
            flip_each=0.0,
        )

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        """MixViT's, by default with `preset` "paper": USTAM's Table 1 has the same rates, its Eq. 7
        the same losses (1 and 0.4 are in the ratio of 5 and 2). Its batch and the number of epochs
        are not given; 500 are MixViT's. (Eq. 8 divides by an intersection where GIoU has a union.)
        The tiny network, which can track already, learns for half as long as mixvit-tiny on a
        laptop, all of it at a third of the rate.
        """
        patched = self.config.spatial or self.config.temporal
        stages = super().recipe(scale, preset or ("paper" if patched else "code"))
        if scale == "laptop":
            stages = [replace(stage.resized(1500), lr=3e-4, rates=()) for stage in stages]
        return stages


def realigned(maps: Tensor, before: Tensor, now: Tensor) -> Tensor:
    """Maps (B, H, n, n) between the cells of windows `before` as maps between the cells of windows
    `now`.

    Windows (B, 3) are left, top and side in frame pixels. W P W^T, where W mixes the four cells of
    `before` around the middle of each cell of `now`, bilinearly; what lies outside `before` is 0. W
    is a product of an x and a y part.
    """
    grid = round(maps.shape[-1] ** 0.5)
    before, now = before.double(), now.double()
    cell = torch.arange(grid, dtype=torch.float64)
    parts = []
    for axis in (1, 0):  # rows, then columns
        middle = now[:, axis, None] + (cell + 0.5) * now[:, 2:] / grid  # (B, g), frame pixels
        # each middle in cells of `before`
        place = (middle - before[:, axis, None]) / before[:, 2:] * grid - 0.5
        parts.append((1 - (place[..., None] - cell).abs()).clamp(min=0).to(maps))  # (B, g, g)
    # (B, H, row, column, row, column)
    out = maps.unflatten(3, (grid, grid)).unflatten(2, (grid, grid))
    for dim, part in zip((2, 3, 4, 5), parts * 2, strict=True):
        out = (out.movedim(dim, -1) @ part[:, None, None, None].transpose(-1, -2)).movedim(-1, dim)
    return out.flatten(4).flatten(2, 3)
