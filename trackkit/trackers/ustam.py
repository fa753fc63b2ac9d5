"""USTAM: what the last frame's attention found tells this frame's where to look.

Anonymous authors: "USTAM: Unified Spatio-Temporal Attention MixFormer for Visual Object Tracking"
(under review). Its ancestor is MixViT, the plain-transformer form of MixFormer (Cui, Jiang, Wang,
Wu: "MixFormer: End-to-End Tracking with Iterative Mixed Attention", CVPR 2022). Patches of two
templates and of the search crop are one row of tokens in a vision transformer, so features are
extracted and compared in the same step, and a corner head reads the box from the search tokens.
USTAM patches two blocks of it: in the last one it sharpens the attention map (spatial attention),
and the first one of the next frame is multiplied by that map (temporal attention). Without both it
is MixViT, bit for bit.

MixViT is the network of the authors' code (MCG-NJU/MixFormer), whose checkpoints load by
`trackkit.official`. USTAM has no code. Where its paper leaves something open, this is one
definition of it, and the alternatives are fields of the config.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit import vit
from trackkit.backbones import normalise
from trackkit.boxes import clip_with_margin, cxcywh_to_xyxy, xyxy_to_cxcywh
from trackkit.checkpoints import load_strictly
from trackkit.crops import around_box, box_to_frame
from trackkit.errors import TrackkitError
from trackkit.frames import FrameRule
from trackkit.heads import CornerHead, PyramidCornerHead, soft_argmax
from trackkit.losses import ciou, localisation
from trackkit.sampling import CropSpec, SampleSpec
from trackkit.stages import Stage
from trackkit.trackers.base import Prediction, Tracker


@dataclass(frozen=True)
class USTAMConfig:
    """Numbers of the network, of training and of tracking; Table 4's rows are `spatial` and
    `temporal`.

    Attributes:
        template_size: side of the template crops, pixels; a multiple of the stem's stride.
        search_size: side of the search crop, pixels (Tables 3 and 5: 288 or 384); a multiple of the
            stem's stride.
        template_factor: side of a template's window in units of the square root of the target's
            area.
        search_factor: side of the search window in tracking, in the same units. The paper says
            "twice the width and height" of it too; but 288 / 128 = 4.5 / 2 shows target and
            template at the same scale, and in a window of 2 a target that moves by half its size is
            lost.
        train_factor: side of the search window in training, in the same units.
        stem: "patch", one linear map of 16 x 16 pixels, or "conv", a small network of stride 8 that
            trains from scratch.
        width: channels of the vision transformer; a multiple of 4 and of `heads`.
        depth: blocks of the transformer, at least 2.
        heads: of each attention.
        hidden: hidden channels of the blocks' MLPs.
        drop_path: probability of dropping the last block's branches in training, below 1; it rises
            from 0 block by block.
        templates: 2, or 1 (then no online template; the paper's MACs fit two).
        head: "pyramid" or "corner", see `trackkit.heads`.
        head_channels: of the first convolution of either head; a multiple of 8.
        spatial: the last block's attention map is sharpened (Eq. 5, 6).
        temporal: the first block's is multiplied by the last frame's (Eq. 3, 4).
        residual: what the spatial layer's output is added to: the attention "map", or Eq. 6's
            "relative" map, which takes one number from all of it. The paper's text names the input
            of the module, which is the map. No effect without `spatial`.
        mean: Eq. 6's means are over each "column" (its formula: the attention that a token
            receives) or each "row" (its text). No effect with `residual` "map" and `carried`
            "enhanced", as softmax does not see what is subtracted everywhere.
        carried: the map that goes to the next frame: "enhanced", the one that the last block uses,
            or "relative". No effect without `temporal`.
        align: "none": cell i of the last search crop counts as cell i of this one (nothing in the
            paper says otherwise), or "warp": the map is moved to where this crop's cells were. Only
            in tracking, and with `temporal`.
        forget: in training, how often, 0 to 1, the second frame of a clip sees no last map, as a
            first frame does. Only with `temporal`.
        update_interval: every so many frames the second template is cut anew, as MixViT's tracker
            does (200 on GOT-10k and LaSOT, 25 on TrackingNet); 0: never, as it must be with one
            template. The paper mentions no update.
        margin: the box keeps at least so many frame pixels inside the frame, and is at least as
            large.
        exact: boxes go into and out of crops by the crops' own geometry; False: with the authors'
            habits, see `STARKConfig`.
    """

    template_size: int = 128
    search_size: int = 288
    template_factor: float = 2.0
    search_factor: float = 4.5
    train_factor: float = 4.5
    stem: str = "patch"
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    drop_path: float = 0.1
    templates: int = 2
    head: str = "pyramid"
    head_channels: int = 384
    spatial: bool = True
    temporal: bool = True
    residual: str = "map"
    mean: str = "column"
    carried: str = "enhanced"
    align: str = "none"
    forget: float = 0.3
    update_interval: int = 0
    margin: float = 10.0
    exact: bool = False

    def __post_init__(self):
        choices = {
            "stem": ("patch", "conv"),
            "templates": (1, 2),
            "head": ("pyramid", "corner"),
            "residual": ("map", "relative"),
            "mean": ("column", "row"),
            "carried": ("enhanced", "relative"),
            "align": ("none", "warp"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} must be one of {', '.join(map(str, allowed))}; got "
                    f"{getattr(self, field)!r}"
                )
        if self.template_size % self.stride or self.search_size % self.stride:
            raise ValueError(
                "template_size and search_size must be multiples of the stem's stride, "
                f"{self.stride}"
            )
        if self.width % 4 or self.width % self.heads or self.head_channels % 8:
            raise ValueError("width must be a multiple of 4 and of heads, head_channels of 8")
        if self.depth < 2 or self.update_interval < 0 or not 0 <= self.forget <= 1:
            raise ValueError(
                "need a first and a last block, an update_interval from 0 on, and forget from 0 to "
                "1"
            )
        if self.update_interval and self.templates == 1:
            raise ValueError("with one template there is none to update: update_interval must be 0")

    @property
    def stride(self) -> int:
        """Crop pixels from one token to the next."""
        return vit.stride_of(self.stem)

    @property
    def grid(self) -> int:
        """Search tokens along each axis; the spatial layer ties a network to it."""
        return self.search_size // self.stride

    @classmethod
    def mixvit_b288(cls, **changes) -> USTAMConfig:
        """MixViT-B, as its authors track on GOT-10k."""
        return cls(**{"spatial": False, "temporal": False, "update_interval": 200, **changes})

    @classmethod
    def mixvit_l384(cls, **changes) -> USTAMConfig:
        """MixViT-L; the authors track in a larger window than they train in."""
        return cls(
            **{
                **LARGE,
                "spatial": False,
                "temporal": False,
                "update_interval": 200,
                "search_factor": 5.0,
                **changes,
            }
        )

    @classmethod
    def ustam_b288(cls, **changes) -> USTAMConfig:
        """USTAM-Base."""
        return cls(**changes)

    @classmethod
    def ustam_b384(cls, **changes) -> USTAMConfig:
        """USTAM-Base with a larger search crop (Tables 3 and 5); Table 1 gives all of Base the same
        template.
        """
        return cls(**{"search_size": 384, **changes})

    @classmethod
    def ustam_l384(cls, **changes) -> USTAMConfig:
        """USTAM-Large."""
        return cls(**{**LARGE, **changes})

    @classmethod
    def tiny(cls, **changes) -> USTAMConfig:
        """USTAM with a hundredth of the weights: learns from scratch on a laptop's CPU."""
        small = {
            "template_size": 48, "search_size": 96, "search_factor": 4.0, "train_factor": 4.0, "stem": "conv",
            "width": 64, "depth": 4, "heads": 4, "hidden": 128, "drop_path": 0.0, "head_channels": 64, "margin": 4.0,
            "exact": True,
        }  # fmt: skip
        return cls(**{**small, **changes})


LARGE = {
    "template_size": 192,
    "search_size": 384,
    "width": 1024,
    "depth": 24,
    "heads": 16,
    "hidden": 4096,
}


@dataclass(frozen=True)
class Memory:
    """What the search tokens need of the templates, whose tokens never look at them: computed
    once.
    """

    keys: Tensor  # (B, L, H, T, d): of each of the L blocks, T tokens of all templates
    values: Tensor  # (B, L, H, T, d)

    def __getitem__(self, block: int) -> tuple[Tensor, Tensor]:
        return self.keys[:, block], self.values[:, block]


@dataclass(frozen=True)
class Answer:
    """What the network says of B search crops of n tokens."""

    boxes: Tensor  # (B, 4), cxcywh, units of the crop
    corners: tuple[Tensor, Tensor]  # 2 x (B, s, s) logits
    tokens: Tensor  # (B, n, D), after the last block
    carried: Tensor | None  # (B, H, n, n): the map for the next frame
    maps: dict[str, Tensor]


@dataclass(frozen=True)
class USTAMState:
    """What USTAM remembers of B sequences."""

    box: Tensor  # (B, 4) xywh, frame pixels, float64
    frame: Tensor  # (B,) int64, frames since the first
    memory: Memory
    # (B, T / 2, D), tokens of the first template, to be joined by a new second one
    first: Tensor | None
    carried: Tensor | None  # (B, H, n, n), 0 before the first tracked frame
    window: Tensor | None  # (B, 3) int64, left, top and side of the crop which that map is of


class SpatialAttention(nn.Module):
    """What is added to the search part of the last block's map (paper, section 3.2): (B, H, n, n)
    -> (B, H, n, n).

    One layer n -> n, shared by the heads, reads each row (the parameters and MACs of Table 4 fit
    nothing else). It starts at zero, so that with `residual` "map" training starts from a working
    MixViT.
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


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """How much each query (B, H, Q, d) looks at each key (B, H, T, d): (B, H, Q, T), rows sum to 1
    (Eq. 3, 5).
    """
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)


def relative(share: Tensor, mean: str) -> Tensor:
    """A map (B, H, n, n) less its largest column (or row) mean, one number for each head and image
    (Eq. 6).
    """
    means = share.mean(-2 if mean == "column" else -1)
    return share - means.amax(-1)[..., None, None]


class USTAM(Tracker):
    """The network and the way it tracks; MixViT when `spatial` and `temporal` are off."""

    Config = USTAMConfig
    presets = ("paper", "code")

    def __init__(self, config: USTAMConfig = USTAMConfig()):
        super().__init__(config)
        cfg = config
        self.embed = vit.patch_embedding(cfg.stem, cfg.width)
        self.register_buffer(
            "position_t", vit.sincos_position(cfg.template_size // cfg.stride, cfg.width)
        )
        self.register_buffer("position_s", vit.sincos_position(cfg.grid, cfg.width))
        self.blocks = vit.blocks(cfg.width, cfg.depth, cfg.heads, cfg.hidden, cfg.drop_path)
        if cfg.spatial:
            self.spatial_attention = SpatialAttention(cfg.grid**2, cfg.residual, cfg.mean)
        self.box_head = {"pyramid": PyramidCornerHead, "corner": CornerHead}[cfg.head](
            cfg.width, cfg.head_channels
        )
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def load_pretrained(self) -> bool:
        """Start the transformer as the authors do, from a masked autoencoder; see
        `Tracker.load_pretrained`.
        """
        weights = vit.mae_weights(self.config.stem, self.config.width)
        if weights is not None:
            self.start_from(weights)
        return weights is not None

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take the transformer of a ViT (the entry "model" of `mae_pretrain_vit_base.pth`, or
        timm's), or all of a MixViT.

        What those do not have, such as the spatial layer, stays. Raises CheckpointError if the
        transformer does not fit.
        """
        weights, taken = vit.renamed(weights), {}
        for key, value in self.state_dict().items():
            if key in weights and not key.startswith("position_"):
                taken[key] = weights[key]
            elif not key.startswith(("embed.", "blocks.")):
                taken[key] = value
        load_strictly(self, taken, "the pretrained network")

    # ---- the network (paper, sections 3.1 and 3.2) ----

    def tokens(self, images: Tensor, position: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> tokens (B, T, D), row by row."""
        return self.embed(images).flatten(2).transpose(1, 2) + position

    def remember(self, x: Tensor) -> tuple[Memory, Tensor]:
        """Tokens (B, T, D) of all templates -> keys and values of each block, and the tokens after
        the last.

        Templates look at templates only (Eq. 2, left), so nothing of this depends on the search
        crop.
        """
        keys, values = [], []
        for block in self.blocks:
            q, k, v = block.project(x)
            keys.append(k)
            values.append(v)
            x = block.think(block.gather(x, F.scaled_dot_product_attention(q, k, v)))
        return Memory(torch.stack(keys, 1), torch.stack(values, 1)), x

    def forward(
        self, memory: Memory, search: Tensor, carried: Tensor | None = None, maps: bool = False
    ) -> Answer:
        """The templates' memory, search tokens (B, n, D) and the last frame's map (B, H, n, n) ->
        boxes and this frame's map.

        The patches are additions to what the fused kernel gathers, which never forms a map. So with
        no last map, or one of zeros, and a spatial layer of zeros, all results are MixViT's to the
        last bit.
        """
        cfg, seen, x, n = self.config, {}, search, search.shape[1]
        last, kept = cfg.depth - 1, None
        for i, block in enumerate(self.blocks):
            q, *own = block.project(x)  # (B, H, n, d)
            # Eq. 1: (B, H, T + n, d)
            k, v = (torch.cat(pair, 2) for pair in zip(memory[i], own, strict=True))
            mixed = F.scaled_dot_product_attention(q, k, v)  # Eq. 2, right
            if i == 0 and carried is not None and cfg.temporal:
                share = attention_map(q, k)[..., -n:]  # Eq. 3; the search tokens' part
                more = share * carried
                mixed = mixed + more @ own[1]  # Eq. 4: (G P + G) V
                if maps:
                    seen |= {"carried": carried, "temporal": share + more}
            if i == last and (cfg.spatial or cfg.temporal):
                share = attention_map(q, k)[..., -n:]  # Eq. 5
                kept = share
                if cfg.spatial:
                    more = self.spatial_attention(share)  # Eq. 6 and what follows it
                    mixed = mixed + more @ own[1]
                    kept = share + more
                if cfg.carried == "relative":
                    kept = relative(share, cfg.mean)
                if maps:
                    seen["enhanced"] = kept
            if maps:
                seen[f"attention_{i}"] = attention_map(q, k)  # (B, H, n, T + n), before the patches
            x = block.think(block.gather(x, mixed))
        boxes, corners = self.locate(x)
        return Answer(boxes, corners, x, kept if cfg.temporal else None, seen)

    def locate(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Search tokens (B, n, D) -> boxes (B, 4), cxcywh in units of the crop, and two maps of
        corner logits.
        """
        grid = tokens.transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid))
        corners = self.box_head(grid)
        return xyxy_to_cxcywh(torch.cat([soft_argmax(corner) for corner in corners], 1)), corners

    # ---- tracking (section 3.3) ----

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> USTAMState:
        cfg = self.config
        frames, boxes = self.checked(frames, boxes_xywh)
        first = self._template(frames, boxes)
        memory, _ = self.remember(first.repeat(1, cfg.templates, 1))
        empty = (
            torch.zeros(len(frames), cfg.heads, cfg.grid**2, cfg.grid**2, device=self.device)
            if cfg.temporal
            else None
        )
        return USTAMState(
            box=boxes,
            frame=torch.zeros(len(frames), dtype=torch.long),
            memory=memory,
            first=first if cfg.update_interval else None,
            carried=empty,
            window=torch.tensor([[0, 0, 1]]).repeat(len(frames), 1)
            if cfg.temporal and cfg.align == "warp"
            else None,
        )

    def step(
        self, state: USTAMState, frames: list[Tensor], maps: bool = False
    ) -> tuple[USTAMState, Prediction]:
        cfg, frames = self.config, self.moved(frames)

        # 1. where is it, around its last box
        crops, windows = around_box(
            frames, state.box, cfg.search_factor, cfg.search_size, cfg.exact
        )
        window, carried = torch.stack([windows.left, windows.top, windows.side], 1), state.carried
        if state.window is not None:
            carried = warped(carried, state.window, window)
        answer = self(state.memory, self.tokens(normalise(crops), self.position_s), carried, maps)
        box = box_to_frame(answer.boxes.double().cpu(), windows, state.box, cfg.exact)
        # (B, 2): width, height
        sizes = torch.tensor([frame.shape[:0:-1] for frame in frames], dtype=torch.float64)
        box = clip_with_margin(box, sizes, cfg.margin)

        # 2. what the next frame gets
        count = state.frame + 1
        due = (
            (count % cfg.update_interval == 0)
            if cfg.update_interval
            else torch.zeros(len(box), dtype=torch.bool)
        )
        memory = self._renewed(state, frames, box, due) if due.any() else state.memory
        state = replace(state, box=box, frame=count, memory=memory, carried=answer.carried)
        if state.window is not None:
            state = replace(state, window=window)

        # 3. how sure the corner maps are of themselves; there is no score head (MixFormer's belongs
        # to another training stage)
        peaks = [corner.flatten(1).softmax(1) for corner in answer.corners]
        score = (sum(peak.amax(1) for peak in peaks) / 2).double().cpu()
        seen = None
        if maps:
            seen = {**answer.maps, "crop": crops, "window": window, "updated": due}
            seen |= {
                n: p.view_as(c)
                for n, p, c in zip(("top_left", "bottom_right"), peaks, answer.corners, strict=True)
            }
        return state, Prediction(box, score, seen)

    def _template(self, frames: list[Tensor], boxes: Tensor) -> Tensor:
        """Tokens (B, T, D) of one template around each box."""
        cfg = self.config
        crops, _ = around_box(frames, boxes, cfg.template_factor, cfg.template_size, cfg.exact)
        return self.tokens(normalise(crops), self.position_t)

    def _renewed(
        self, state: USTAMState, frames: list[Tensor], boxes: Tensor, due: Tensor
    ) -> Memory:
        """The memory, anew with the second template from this frame for the sequences that are
        `due` (B,).
        """
        which = due.nonzero()[:, 0].tolist()
        second = self._template([frames[i] for i in which], boxes[which])
        new, _ = self.remember(torch.cat([state.first[which], second], 1))
        keys, values = state.memory.keys.clone(), state.memory.values.clone()
        keys[which], values[which] = new.keys, new.values
        return Memory(keys, values)

    # ---- training (section 3.3) ----

    def loss(self, batch: dict[str, Tensor], kind: str = "giou") -> dict[str, Tensor]:
        """5 L1 + 2 times the overlap loss, kind "giou" (Eq. 7, whose 1 and 0.4 are the same ratio)
        or "ciou" (MixViT's code).

        The searches of a sample follow one another: each sees the map of the one before, which gets
        no gradient from it.
        """
        cfg, crops = self.config, normalise(batch["templates"])  # (B, T, 3, S, S)
        tokens = self.tokens(crops.flatten(0, 1), self.position_t)
        memory, _ = self.remember(tokens.unflatten(0, crops.shape[:2]).flatten(1, 2))
        carried, parts = None, []
        for i in range(batch["searches"].shape[1]):
            search = self.tokens(normalise(batch["searches"][:, i]), self.position_s)
            answer = self(memory, search, carried)
            parts.append(losses(answer.boxes, batch["search_boxes"][:, i], kind))
            if cfg.temporal:
                kept = torch.rand(len(search), 1, 1, 1, device=search.device) >= cfg.forget
                carried = answer.carried.detach() * kept
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    def samples(self) -> SampleSpec:
        """Templates, then one search, or for temporal attention two of neighbouring frames, from
        almost the same window.
        """
        cfg, shared = self.config, {"fill": 0, "exact": self.config.exact}
        searches, shift = (2, cfg.stride / 2) if cfg.temporal else (1, 0.0)
        return SampleSpec(
            template=CropSpec(cfg.template_size, cfg.template_factor, **shared),
            search=CropSpec(
                cfg.search_size,
                cfg.train_factor,
                jitter_size=0.5,
                jitter_centre=cfg.train_factor,
                shift_px=shift,
                **shared,
            ),
            templates=cfg.templates,
            searches=searches,
            same_window=cfg.temporal,
            order="clip" if cfg.temporal else "forward",
            max_gap=400,
            rule=FrameRule(min_frames=20, min_usable=2 * (cfg.templates + searches) + 1),
            flip=0.5,
            # a map of a mirrored crop would tell the wrong places
            flip_each=0.0 if cfg.temporal else 0.5,
            grey=0.05,
            brightness=0.2,
            masks=True,
        )

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        """One stage. At `paper`: 500 epochs of 60,000 samples, the rate falls to a tenth after 400.

        `preset` "paper" is Table 1 of USTAM (rate 1e-4, GIoU; its batch is not given), "code"
        MixViT's (4e-4 for the head and a tenth of it for the rest, CIoU, batches of 256; Large:
        288, its first six blocks frozen). None: each its own. The short scales are for the tiny
        network, which starts from nothing.
        """
        self.check_preset(preset)
        cfg = self.config
        preset = preset or ("paper" if cfg.spatial or cfg.temporal else "code")
        large = cfg.depth == 24 and preset == "code"
        batch = {"tiny": 16, "laptop": 24, "gpu": 64, "paper": 288 if large else 256}[scale]
        steps = {"tiny": 300, "laptop": 3000, "gpu": 20_000, "paper": 500 * (60_000 // batch)}[
            scale
        ]
        rest: dict = (
            {"lr": 4e-4, "rates": (("embed.*", 0.1), ("blocks.*", 0.1))}
            if preset == "code"
            else {"lr": 1e-4}
        )
        rest |= {"drops": (steps * 4 // 5,), "clip": 0.1}
        if scale in ("tiny", "laptop"):
            rest = {"lr": 1e-3, "lr_end": 1e-5, "warmup": steps // 30, "clip": 1.0}
        if large and scale in ("gpu", "paper"):
            learning = [f"blocks.{i}.*" for i in range(6, cfg.depth)] + ["box_head.*"]
            rest["trainable"] = (
                (*learning, "spatial_attention.*") if cfg.spatial else tuple(learning)
            )
            rest["rates"] = (("blocks.*", 0.1),)
        loss = "giou" if preset == "paper" else "ciou"
        return [
            Stage(
                "box",
                steps=steps,
                batch=batch,
                sample=self.samples(),
                weight_decay=1e-4,
                loss=loss,
                **rest,
            )
        ]


def losses(boxes: Tensor, truth: Tensor, kind: str) -> dict[str, Tensor]:
    """Boxes and true boxes (B, 4), cxcywh in units of the crop -> the loss and its two parts; the
    truth is cut at the crop.
    """
    boxes, truth = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth).clamp(0, 1)
    overlap, l1 = localisation(boxes, truth)
    if kind == "ciou":
        overlap = (1 - ciou(boxes, truth)).mean()
    elif kind != "giou":
        raise TrackkitError(f"no loss is called {kind!r}; there are giou and ciou")
    return {"loss": 5 * l1 + 2 * overlap, kind: overlap, "l1": l1}


def warped(maps: Tensor, before: Tensor, now: Tensor) -> Tensor:
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
        # in cells of `before`
        place = (middle - before[:, axis, None]) / before[:, 2:] * grid - 0.5
        parts.append((1 - (place[..., None] - cell).abs()).clamp(min=0).to(maps))  # (B, g, g)
    # (B, H, row, column, row, column)
    out = maps.unflatten(3, (grid, grid)).unflatten(2, (grid, grid))
    for dim, part in zip((2, 3, 4, 5), parts * 2, strict=True):
        out = (out.movedim(dim, -1) @ part[:, None, None, None].transpose(-1, -2)).movedim(-1, dim)
    return out.flatten(4).flatten(2, 3)
