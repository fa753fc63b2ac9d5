"""OSTrack: one transformer from pixels to box, which drops the search tokens that nobody asks for.

Ye, Chang, Ma, Shan, Chen: "Joint Feature Learning and Relation Modeling for Tracking: A One-Stream
Framework", ECCV 2022. A plain vision transformer reads the patches of template and search region as
one row of tokens, so features and relation are learned in the same layers. On the way it removes
background: search tokens that the middle of the template hardly looks at.

Network and tracking are those of the authors' code (botaoye/OSTrack), whose checkpoints load by
`trackkit.official`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit import vit
from trackkit.attention import xavier
from trackkit.backbones import normalise
from trackkit.boxes import (
    bias_of,
    clip_with_margin,
    cxcywh_to_xyxy,
    follow_size,
    without_bias,
    xywh_to_cxcywh,
)
from trackkit.checkpoints import load_strictly
from trackkit.crops import CropSpec, Windows, frame_sizes
from trackkit.devices import constant, to_host
from trackkit.errors import Range, check_fields
from trackkit.frames import SampleSpec
from trackkit.heads import CenterHead, hann_window
from trackkit.losses import focal_loss, gaussian_target, localisation
from trackkit.stages import HOLD_AND_FALL, Stage
from trackkit.trackers.base import Prediction, Tracker


@dataclass(frozen=True)
class OSTrackConfig:
    """Numbers of the network, of tracking and of training; those of OSTrack-384 if not given."""

    template_size: int = 192  # side of the template crop, pixels; a multiple of the stem's stride
    search_size: int = 384  # side of the search crop, pixels; a multiple of the stem's stride
    template_factor: float = 2.0  # side of the template's window, in square roots of target areas
    search_factor: float = 5.0  # side of the search window in the same units
    train_factor: float | None = None  # the same in training; None: as in tracking
    stem: str = "patch"
    """"patch", a token is a linear map of 16 x 16 pixels; or "conv", a small convolutional network
    of stride 8, with which a transformer learns from little data."""
    width: int = 768  # channels of the transformer; a multiple of 4 and of heads
    depth: int = 12  # blocks of the transformer
    heads: int = 12  # of each attention
    drop_path: float = 0.1  # probability of dropping the last block's branches in training, below 1
    head_channels: int = 256  # of the first convolution of the head's towers
    keep_ratio: float = 0.7  # share of the search tokens that each pruning keeps; 1 prunes nothing
    prune_blocks: tuple[int, ...] = (3, 6, 9)
    """Blocks that prune, counted from 0, each between its attention and its MLP."""
    pruning_rows: str = "point"
    """The template tokens that decide: "point", one in the middle; "square", the four around the
    middle; "all"; or "box", those inside the target's box."""
    margin: float = 10.0
    """The box keeps at least so many frame pixels inside the frame, and is at least as large."""
    exact: bool = False  # boxes go in and out of crops exactly; False imitates the authors, `crops`
    first_look: bool = False
    """What the network's answer is off by in the first frame, where the truth is known, is taken
    off all later ones: boxes of real targets are drawn by many habits (not in the paper)."""
    size_rate: float = 1.0  # share of a change of size that is followed, see `boxes.follow_size`
    search_jitter: tuple[float, float] = (4.5, 0.5)  # how far training's is off, centre and size
    template_jitter: tuple[float, float] = (0.0, 0.0)  # the same of its template
    epochs: int = 300
    """Of 60,000 samples each, the training at the scale paper. Shorter ones are parted in as many
    epochs, so that keep_start and keep_ramp give the same schedule, compressed."""
    keep_start: int = 20  # nothing is pruned before this epoch, counted from 1
    keep_ramp: int = 80  # epochs from then on in which the keep ratio falls from 1 to keep_ratio
    learning_rate: float = 4e-4
    """Of the head, for batches of 128, and in proportion for others, at the scales gpu and paper;
    tiny and laptop have rates of their own."""
    backbone_rate: float = 0.1  # factor on learning_rate for all but the head

    def __post_init__(self):
        size, factor = Range(1, 4096), Range(0, 100, above=True)
        check_fields(
            self, template_size=size, search_size=size, template_factor=factor,
            search_factor=factor, stem=("patch", "conv"), width=size, depth=size, heads=size,
            drop_path=Range(0, 1, below=True), head_channels=Range(8, 4096),
            keep_ratio=Range(0, 1, above=True), pruning_rows=("point", "square", "all", "box"),
            margin=Range(0, 4096), size_rate=Range(0, 1), search_jitter=Range(0, 100),
            template_jitter=Range(0, 100),
            epochs=Range(1, 100_000), keep_start=Range(0, 100_000), keep_ramp=Range(0, 100_000),
            learning_rate=Range(0, 10, above=True), backbone_rate=Range(0, 1000, above=True),
        )  # fmt: skip
        check_fields(self, prune_blocks=Range(0, self.depth - 1))
        if self.train_factor is not None:
            check_fields(self, train_factor=factor)
        if self.template_size % self.stride or self.search_size % self.stride:
            raise ValueError(f"the sizes of crops must be multiples of the stride, {self.stride}")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of 4 and of {self.heads}")

    @staticmethod
    def ostrack_256(**changes) -> OSTrackConfig:
        """OSTrack-256."""
        return OSTrackConfig(**{**SIZE_256, **changes})

    @staticmethod
    def ostrack_384(**changes) -> OSTrackConfig:
        """OSTrack-384."""
        return OSTrackConfig(**changes)

    @classmethod
    def tiny(cls, **changes):
        """A hundredth of the weights: learns from scratch on a laptop's CPU."""
        small = {
            "template_size": 48, "search_size": 96, "template_factor": 1.5, "search_factor": 2.5,
            "stem": "conv", "width": 64, "depth": 4, "heads": 4, "drop_path": 0.0,
            "head_channels": 64, "prune_blocks": (1, 2), "margin": 4.0, "exact": True,
            "first_look": True, "size_rate": 0.15, "train_factor": 3.0,
            "search_jitter": (2.7, 0.4), "template_jitter": (0.2, 0.1),
        }  # fmt: skip
        return cls(**{**small, **changes})

    @property
    def stride(self) -> int:
        """Crop pixels from one token to the next."""
        return vit.stride_of(self.stem)

    @property
    def grid(self) -> int:
        """Search tokens along each axis."""
        return self.search_size // self.stride

    @property
    def template_grid(self) -> int:
        """Template tokens along each axis."""
        return self.template_size // self.stride


SIZE_256 = {  # the smaller of the two that were released
    "template_size": 128, "search_size": 256, "search_factor": 4.0, "search_jitter": (3.0, 0.25)
}  # fmt: skip


@dataclass(frozen=True)
class Template:
    """The target, as the transformer's first block sees it."""

    tokens: Tensor  # (B, n, D): patches with their positions
    boxes: Tensor  # (B, K, 4), K = 1 in OSTrack: where the target is, cxcywh, units of the crop


@dataclass(frozen=True)
class Answer:
    """What the network says of B search crops, on a grid of g x g cells."""

    score: Tensor  # (B, g, g): is the target's centre here, 0..1
    offset: Tensor  # (B, 2, g, g): how far from the cell the centre is, in cells
    size: Tensor  # (B, 2, g, g): width and height of the box, in units of the crop
    kept: list[Tensor]  # the cells (B, n) whose tokens are left after each pruning, the best first
    # with `maps`: how much the deciding template tokens look at each cell, (B, g, g) in each block
    focus: list[Tensor]


@dataclass(frozen=True)
class OSTrackState:
    """What OSTrack remembers of B sequences."""

    box: Tensor  # (B, 4) xywh, frame pixels, float64
    template: Template  # of the first frame
    bias: Tensor | None  # (B, 4), see `first_look`; None without it


class OSTrack(Tracker):
    """The network, the way it tracks and the way it learns."""

    Config = OSTrackConfig

    def __init__(self, config: OSTrackConfig | None = None):
        super().__init__(config or self.Config())
        cfg = self.config
        self.embed = vit.patch_embedding(cfg.stem, cfg.width)
        self.position_z = vit.learned_position(cfg.template_grid, cfg.width)
        self.position_x = vit.learned_position(cfg.grid, cfg.width)
        self.blocks = vit.blocks(cfg.width, cfg.depth, cfg.heads, 4 * cfg.width, cfg.drop_path)
        self.norm = nn.LayerNorm(cfg.width, eps=1e-6)
        self.head = CenterHead(cfg.width, cfg.head_channels)
        xavier(self.blocks)
        xavier(self.head)
        if cfg.stem == "conv":
            vit.start_as_lookup(self.blocks, self.position_z, self.position_x)
            nn.init.constant_(self.head.score[-1].bias, -4.0)  # few cells are a centre

    def load_pretrained(self) -> bool:
        """Start the transformer as the authors do, from ViT-B as a masked autoencoder; see
        `Tracker.load_pretrained`. The tiny one starts from the features of matching-tiny.
        """
        if self.config.stem == "conv":
            vit.load_stem(self.embed)
            return True
        weights = vit.mae_weights(self.config.stem, self.config.width)
        if weights is not None:
            self.start_from(weights)
        return weights is not None

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take the transformer from a ViT's weights (the entry "model" of
        `mae_pretrain_vit_base.pth`, or timm's).

        Its table of positions, bicubically resized, is where both of ours begin. Raises
        CheckpointError if it does not fit.
        """
        weights, head = vit.renamed(weights), "head."
        own = {k: v for k, v in self.state_dict().items() if k.startswith(head) or k in weights}
        own |= {k: weights[k] for k in own if not k.startswith(head)}
        own["position_z"] = vit.resized_position(weights, self.config.template_grid)
        own["position_x"] = vit.resized_position(weights, self.config.grid)
        load_strictly(self, own, "the pretrained transformer")

    # ---- the network: joint feature learning and relation modeling ----

    def tokens(self, images: Tensor, position: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> patches with their positions, row by row (B, n, D)."""
        return self.embed(images).flatten(2).transpose(1, 2) + position

    def forward(
        self, template: Template, search: Tensor, keep: float | None = None, maps: bool = False
    ) -> Answer:
        """A template and search tokens (B, N, D) -> maps on the search grid.

        `keep` replaces the config's ratio. Attention is full, so the template sees the search
        region and is encoded anew in every frame; only its first tokens can be remembered.
        """
        cfg, grid = self.config, self.config.grid
        batch, cells, width = search.shape
        keep = cfg.keep_ratio if keep is None else keep
        x = torch.cat([template.tokens, search], 1)  # [H_z; H_x], (B, n + N, D)
        known = x.shape[1] - cells  # template tokens, which always stay
        rows, weights = self.deciding_tokens(template)
        # where each search token came from
        cell = torch.arange(cells, device=x.device).expand(batch, -1)
        kept, focus = [], []
        for index, block in enumerate(self.blocks):
            q, k, v = block.project(x)
            # softmax([Q_z; Q_x] [K_z; K_x]^T / sqrt(d)) [V_z; V_x]
            x = block.gather(x, F.scaled_dot_product_attention(q, k, v))
            count = math.ceil(keep * cell.shape[1])
            prune = index in cfg.prune_blocks and count < cell.shape[1]
            if prune or maps:
                score = self.pruning_score(q, k, known, rows, weights)
            if maps:
                looks = score.new_zeros(batch, cells).scatter(1, cell, score)
                focus.append(looks.unflatten(1, (grid, grid)))
            if prune:
                x, order = eliminate(x, score, known, count)
                cell = cell.gather(1, order)
                kept.append(cell)
            x = block.think(x)
        x = self.norm(x)[:, known:]
        # removed tokens leave zeros behind
        found = x.new_zeros(batch, cells, width).scatter(1, cell[..., None].expand_as(x), x)
        score, offset, size = self.head(found.transpose(1, 2).unflatten(2, (grid, grid)))
        return Answer(score, offset, size, kept, focus)

    # ---- early candidate elimination ----

    def deciding_tokens(self, template: Template) -> tuple[Tensor, Tensor | None]:
        """The template tokens that decide: their indices (R,), and their weights (B, R) or None if
        all count alike.
        """
        rule, grid = self.config.pruning_rows, self.config.template_grid
        rows = constant(template_rows, rule, grid, device=self.device)
        if rule != "box":
            return rows, None
        inside = cells_in(template.boxes, grid).flatten(1).float()
        return rows, inside / inside.sum(1, keepdim=True)

    @torch.no_grad()
    def pruning_score(
        self, q: Tensor, k: Tensor, known: int, rows: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """How much the template tokens `rows` (R,) look at each search token, the mean over rows
        and heads: (B, N).

        q and k (B, H, T, D / H) have `known` template tokens, then N search tokens. `weights`
        (B, R) make it a weighted mean. The rows alone are computed: full attention stays fused.
        """
        logits = q[:, :, rows] @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, R, T)
        share = self.attention_to_search(logits, known).mean(1)
        if weights is not None:
            share = share * weights[..., None] * len(rows)  # the mean divides by it
        return share.mean(1)

    def attention_to_search(self, logits: Tensor, known: int) -> Tensor:
        """What part of its looks a template token gives to each search token: (B, H, R, T) ->
        (B, H, R, N). They are those of the layer's own attention, shared with template tokens.
        """
        return logits.softmax(-1)[..., known:]

    # ---- tracking ----

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> OSTrackState:
        frames, boxes = self.checked(frames, boxes_xywh)
        template = self.make_template(frames, boxes)
        bias = (
            bias_of(self.look(template, frames, boxes)[0], boxes)
            if self.config.first_look
            else None
        )
        return OSTrackState(boxes, template, bias)

    def make_template(self, frames: list[Tensor], boxes: Tensor) -> Template:
        """The template of each frame: crop, patches and positions are made once, here."""
        return self.cropped(frames, boxes, self.template_crop)

    def cropped(self, frames: list[Tensor], boxes: Tensor, spec: CropSpec) -> Template:
        crops, windows = spec.around(frames, boxes)
        place = xywh_to_cxcywh(windows.to_crop(boxes)).float() / windows.size
        tokens = self.tokens(normalise(crops), self.position_z)
        return Template(tokens, place[:, None].to(tokens.device))

    def template_of(self, state: OSTrackState) -> Template:
        """The template that the search region is read with."""
        return state.template

    def step(
        self, state: OSTrackState, frames: list[Tensor], maps: bool = False
    ) -> tuple[OSTrackState, Prediction]:
        cfg, frames = self.config, self.moved(frames)
        box, score, shown = self.look(self.template_of(state), frames, state.box, maps)
        box = without_bias(box, state.bias)
        box = follow_size(state.box, box, cfg.size_rate)
        box = clip_with_margin(box, frame_sizes(frames), cfg.margin)
        return replace(state, box=box), Prediction(box, score, shown)

    def look(
        self, template: Template, frames: list[Tensor], boxes: Tensor, maps: bool = False
    ) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
        """Where the network sees the targets in the surroundings of boxes (B, 4): boxes in the
        frame, their scores (B,), and maps if asked for.
        """
        crops, windows = self.search_crop.around(frames, boxes)
        answer = self(template, self.tokens(normalise(crops), self.position_x), maps=maps)
        # the window prefers small motion
        window = constant(hann_window, self.config.grid, "open", device=self.device)
        response = answer.score * window.to(answer.score)
        # the score is the one without the window
        found, score = to_host(box_at(response, answer), answer.score.flatten(1).amax(1))
        shown = self._maps(answer, response, crops, windows) if maps else None
        return self.search_crop.to_frame(found, windows, boxes), score, shown

    def _maps(
        self, answer: Answer, response: Tensor, crops: Tensor, windows: Windows
    ) -> dict[str, Tensor]:
        shown = {"crop": crops, "window": windows.rows, "response": response}
        shown |= {"score": answer.score, "offset": answer.offset, "size": answer.size}
        shown["focus"] = torch.stack(answer.focus, 1)  # (B, blocks, g, g)
        none = torch.zeros_like(answer.score, dtype=torch.bool)
        kept = [none.flatten(1).scatter(1, cell, True).view_as(none) for cell in answer.kept]
        return shown | ({"kept": torch.stack(kept, 1)} if kept else {})  # (B, prunings, g, g)

    # ---- training ----

    def loss(self, batch: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        """Losses of a batch. "progress", the share of the training that is done, sets the keep
        ratio; without it, the last.
        """
        cfg, template = self.config, self.sampled(batch)  # first, for the stem's running statistics
        search = self.tokens(normalise(batch["searches"][:, 0]), self.position_x)
        epoch = 1 + int(float(batch.get("progress", 1.0)) * cfg.epochs)
        answer = self(template, search, keep=self.keep_at(epoch))

        truth = batch["search_boxes"][:, 0]
        focal = focal_loss(answer.score, gaussian_target(truth, cfg.grid))
        # at the network's own peak, so only there offset and size learn
        boxes = cxcywh_to_xyxy(box_at(answer.score, answer))
        giou, l1 = localisation(boxes, cxcywh_to_xyxy(truth).clamp(0, 1))
        return {"loss": focal + 2 * giou + 5 * l1, "focal": focal, "giou": giou, "l1": l1}

    def sampled(self, batch: dict[str, Tensor]) -> Template:
        """The template of a batch from `sampling`."""
        crops, boxes = batch["templates"][:, 0], batch["template_boxes"]
        return Template(self.tokens(normalise(crops), self.position_z), boxes)

    def keep_at(self, epoch: int) -> float:
        """Keep ratio of a training epoch, counted from 1: all tokens, then half a cosine down to
        the config's ratio.
        """
        cfg = self.config
        if epoch < cfg.keep_start:
            return 1.0
        if epoch >= cfg.keep_start + cfg.keep_ramp:
            return cfg.keep_ratio
        fall = (1 + math.cos(math.pi * (epoch - cfg.keep_start) / cfg.keep_ramp)) / 2
        return cfg.keep_ratio + (1 - cfg.keep_ratio) * fall

    def samples(self) -> SampleSpec:
        """A pair forward in time; for the tiny network a near one, not mirrored to each other."""
        short = self.config.stem == "conv"
        z, x = self.config.template_jitter, self.config.search_jitter
        return SampleSpec(
            template=replace(self.template_crop, jitter_centre=z[0], jitter_size=z[1]),
            search=replace(
                self.search_crop,
                factor=self.config.train_factor or self.config.search_factor,
                jitter_centre=x[0],
                jitter_size=x[1],
            ),
            order="causal",
            max_gap=40 if short else 200,
            flip=0.5,
            flip_each=0.0 if short else 0.5,
            grey=0.05,
            brightness=0.2,
            masks=True,  # only so that crops without anything in them are drawn again
        )

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        """One stage. `paper`: `epochs` of 60,000 samples in batches of 128, the rate falling to a
        tenth after four fifths. The short scales are for the tiny network, which starts from
        nothing: larger rates that fall smoothly.
        """
        self.check_preset(preset)
        cfg, full = self.config, (self.config.epochs * 468, 128)
        steps, batch = {
            "tiny": (300, 16), "laptop": (5000, 16), "gpu": (20_000, 64), "paper": full,
        }[scale]  # fmt: skip
        if scale in ("tiny", "laptop"):
            rates = {"lr": 1e-3, "lr_end": 1e-5, "cosine": HOLD_AND_FALL, "warmup": 30, "clip": 1.0}
        else:
            rates = {"lr": cfg.learning_rate * batch / 128, "drops": (steps * 4 // 5,), "clip": 0.1}
            rates |= {"rates": (("head.*", 1.0), ("*", cfg.backbone_rate))}
        return [Stage("boxes", steps, batch, self.samples(), weight_decay=1e-4, **rates)]


# ---- which tokens decide, and which go ----


def template_rows(rule: str, grid: int) -> Tensor:
    """Which of a template's grid x grid tokens decide on pruning: indices, int64.

    "point" is the one at or just above and left of the middle: (3, 3) of 8 x 8 cells.
    """
    if rule in ("all", "box"):  # a box weighs them, see `cells_in`
        return torch.arange(grid * grid)
    low, high = (grid - 1) // 2, grid // 2 if rule == "square" else (grid - 1) // 2
    middle = torch.arange(low, high + 1)
    return (middle[:, None] * grid + middle).flatten()


def cells_in(boxes: Tensor, grid: int) -> Tensor:
    """Cells whose middle lies in a box: (..., 4) cxcywh in units of the crop -> bool (..., grid *
    grid).

    A box narrower than a cell is widened to one, so there is always a cell.
    """
    middles = (torch.arange(grid, device=boxes.device) + 0.5) / grid
    x, y = (
        (middles - boxes[..., i, None]).abs() <= boxes[..., i + 2, None].clamp(min=1 / grid) / 2
        for i in (0, 1)
    )  # (..., grid)
    return (y[..., :, None] & x[..., None, :]).flatten(-2)


def eliminate(x: Tensor, score: Tensor, known: int, count: int) -> tuple[Tensor, Tensor]:
    """Keep the `count` search tokens of the highest score (B, N), and the `known` tokens before
    them.

    Each sample of x (B, known + N, D) loses its own. Returns the tokens (B, known + count, D) and
    which were kept (B, count), both with the highest score first.
    """
    order = score.argsort(1, descending=True)[:, :count]
    kept = x[:, known:].gather(1, order[..., None].expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, :known], kept], 1), order


# ---- from maps to boxes ----


def box_at(peak: Tensor, answer: Answer) -> Tensor:
    """The box (B, 4), cxcywh in units of the crop, at the highest cell of `peak` (B, g, g).

    Cell k stands for the position k / g; the target is the rounded centre, so the offset to learn
    is in -0.5..0.5.
    """
    grid = peak.shape[-1]
    best = peak.flatten(1).argmax(1)
    offset, size = (
        t.flatten(2).gather(2, best[:, None, None].expand(-1, 2, 1))[..., 0]
        for t in (answer.offset, answer.size)
    )
    cell = torch.stack([best % grid, best // grid], 1)
    return torch.cat([(cell + offset) / grid, size], 1)
