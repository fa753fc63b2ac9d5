"""OSTrack and ProContEXT: one transformer from pixels to box, which drops the search tokens that
nobody asks for.

Lan, Cheng, He, Li, Luo, Bao, Xiang, Geng, Xie: "ProContEXT: Exploring Progressive Context
Transformer for Tracking", ICASSP 2023, built on OSTrack (Ye, Chang, Ma, Shan, Chen: "Joint Feature
Learning and Relation Modeling for Tracking: A One-Stream Framework", ECCV 2022). A plain vision
transformer reads the patches of template and search crop as one row of tokens, so features and
relation are learned in the same layers. On the way it removes background: search tokens that the
middle of the template hardly looks at. ProContEXT adds templates: of two scales, and of the present
beside the first frame.

    ProContEXTConfig.procontext_256(template_factors=(2.0,), dynamic=False)    # is OSTrack: same
    network, same weights

Networks and tracking are those of the authors' code (botaoye/OSTrack, jp-lan/ProContEXT), whose
checkpoints load by `trackkit.official`. Where their paper differs, `ProContEXTConfig.paper()`
follows the paper. We differ from the code in two places: a new sequence starts with its own
templates (theirs keeps those of the first sequence that a tracker object saw), and pruning by the
target's box uses each template's own (theirs, that of the first scale for all).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit import vit
from trackkit.attention import xavier
from trackkit.backbones import SmallNet, normalise
from trackkit.boxes import clip_with_margin, cxcywh_to_xyxy, xywh_to_cxcywh
from trackkit.checkpoints import load_strictly
from trackkit.crops import Windows, around_box, box_to_frame
from trackkit.errors import Range, check_fields
from trackkit.heads import CenterHead, hann_window
from trackkit.losses import focal_loss, gaussian_target, localisation
from trackkit.sampling import CropSpec, SampleSpec
from trackkit.stages import Stage
from trackkit.trackers.base import Prediction, Tracker


@dataclass(frozen=True)
class ProContEXTConfig:
    """Numbers of the network, of tracking and of training; every row of the paper's Tables 2 to 4
    is a field.

    Attributes:
        template_size: side of the template crops, pixels; a multiple of `patch`.
        search_size: side of the search crop, pixels; a multiple of `patch`.
        template_factors: sides of the templates' windows in units of the square root of the
            target's area, above 0; one template for each factor (the paper's K, Table 2).
        search_factor: side of the search window in the same units.
        dynamic: a second group of templates, of the last confident frame (Table 3).
        stem: "patch", a token is a linear map of `patch` x `patch` pixels; or "conv", a small
            convolutional network of stride 8, with which a transformer learns from little data.
        patch: side of a token's patch, pixels; 8 with stem "conv".
        width: channels of the transformer; a multiple of 4 and of `heads`.
        depth: blocks of the transformer.
        heads: of each attention.
        drop_path: probability of dropping the last block's branches in training, below 1; it rises
            from 0 block by block.
        head_channels: of the first convolution of the head's towers.
        keep_ratio: share of the search tokens that stay at each pruning (the paper's rho, Table 4),
            above 0; 1 prunes nothing.
        prune_blocks: blocks that prune, counted from 0, each between its attention and its MLP.
        pruning_rows: the template tokens that decide: "point", one in the middle of each template;
            "square", the four around the middle; "all"; or "box", those inside the target's box.
        pruning_softmax: "all", the decision is read from the layer's own attention, shared among
            template and search tokens (the code); or "search", from a softmax over the search
            tokens alone (the paper).
        update_interval: every so many frames, if the score exceeds `update_threshold`, the frame
            makes the new dynamic templates. The code: 100. The paper's Algorithm 1: 1. No effect
            without `dynamic`.
        update_threshold: of the score, 0 to 1; 0.7 in code and paper. No effect without `dynamic`.
        margin: the box keeps at least so many frame pixels inside the frame, and is at least as
            large.
        exact: boxes go into and out of crops by the crops' own geometry; False imitates the
            authors, see `STARKConfig`.
        search_jitter: how far off the training's search crops are, in centre and size
            (`sampling.CropSpec`).
        template_jitter: the same of the training's templates.
        epochs: of 60,000 samples each, the length of training at the scale paper. Shorter trainings
            are parted in as many epochs, so that `keep_start` and `keep_ramp` give the same
            schedule, compressed.
        keep_start: nothing is pruned before this epoch, counted from 1.
        keep_ramp: epochs from then on in which the keep ratio falls from 1 to `keep_ratio`.
        learning_rate: of the head, for batches of 128, and in proportion for others. Only at the
            scales gpu and paper; tiny and laptop have rates of their own.
        backbone_rate: factor on `learning_rate` for all but the head. Only at the scales gpu and
            paper.
    """

    template_size: int = 192
    search_size: int = 384
    template_factors: tuple[float, ...] = (2.0, 4.0)
    search_factor: float = 5.0
    dynamic: bool = True
    stem: str = "patch"
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    drop_path: float = 0.1
    head_channels: int = 256
    keep_ratio: float = 0.7
    prune_blocks: tuple[int, ...] = (3, 6, 9)
    pruning_rows: str = "point"
    pruning_softmax: str = "all"
    update_interval: int = 100
    update_threshold: float = 0.7
    margin: float = 10.0
    exact: bool = False
    search_jitter: tuple[float, float] = (4.5, 0.5)
    template_jitter: tuple[float, float] = (0.0, 0.0)
    epochs: int = 300
    keep_start: int = 20
    keep_ramp: int = 80
    learning_rate: float = 4e-4
    backbone_rate: float = 0.1

    def __post_init__(self):
        size, factor, epochs = Range(1, 4096), Range(0, 100, above=True), Range(0, 100_000)
        check_fields(
            self, template_size=size, search_size=size, template_factors=factor,
            search_factor=factor, stem=("patch", "conv"), patch=size, width=size,
            depth=Range(1, 100), heads=size, drop_path=Range(0, 1, below=True),
            head_channels=Range(8, 4096), keep_ratio=Range(0, 1, above=True),
            prune_blocks=Range(0, 99), pruning_rows=("point", "square", "all", "box"),
            pruning_softmax=("all", "search"), update_interval=Range(1),
            update_threshold=Range(0, 1), margin=Range(0, 4096), search_jitter=Range(0, 100),
            template_jitter=Range(0, 100), epochs=Range(1, 100_000), keep_start=epochs,
            keep_ramp=epochs, learning_rate=Range(0, 10, above=True),
            backbone_rate=Range(0, 1000, above=True),
        )  # fmt: skip
        if self.stem == "conv" and self.patch != SmallNet.stride:
            raise ValueError(f'stem "conv" has patches of {SmallNet.stride}, not {self.patch}')
        if self.template_size % self.patch or self.search_size % self.patch:
            raise ValueError(
                f"template_size and search_size must be multiples of patch, {self.patch}"
            )
        if self.width % 4 or self.width % self.heads:
            raise ValueError(
                f"a width of {self.width} must be a multiple of 4 and of the {self.heads} heads"
            )
        pairs = {len(self.search_jitter), len(self.template_jitter)} == {2}
        if not (self.template_factors and pairs):
            raise ValueError("template_factors needs at least one factor, a jitter two numbers")
        if any(index >= self.depth for index in self.prune_blocks):
            raise ValueError(
                f"prune_blocks {self.prune_blocks}: there are only blocks 0 to {self.depth - 1}"
            )

    @classmethod
    def ostrack_256(cls, **changes) -> ProContEXTConfig:
        """OSTrack-256: one template of the first frame."""
        return cls.procontext_256(
            **{
                "template_factors": (2.0,),
                "dynamic": False,
                "epochs": 300,
                "keep_ramp": 80,
                **changes,
            }
        )

    @classmethod
    def ostrack_384(cls, **changes) -> ProContEXTConfig:
        """OSTrack-384."""
        return cls(**{"template_factors": (2.0,), "dynamic": False, **changes})

    @classmethod
    def procontext_256(cls, **changes) -> ProContEXTConfig:
        """The smaller ProContEXT of the ablations; its search factor is the paper's, its jitter
        OSTrack-256's, as none is given.
        """
        small = {
            "template_size": 128,
            "search_size": 256,
            "search_factor": 4.0,
            "search_jitter": (3.0, 0.25),
        }
        return cls(**{**small, "epochs": 100, "keep_ramp": 50, **changes})

    @classmethod
    def procontext_384(cls, **changes) -> ProContEXTConfig:
        """ProContEXT as released."""
        return cls(**changes)

    @classmethod
    def paper(cls, **changes) -> ProContEXTConfig:
        """ProContEXT-384 by the text of its paper. The templates' jitter has no figures there; this
        one is ours.
        """
        text = {"search_factor": 4.0, "pruning_softmax": "search", "update_interval": 1}
        return cls(
            **{
                **text,
                "template_jitter": (0.0, 0.1),
                "learning_rate": 1e-4,
                "backbone_rate": 1.0,
                **changes,
            }
        )

    @classmethod
    def tiny(cls, **changes) -> ProContEXTConfig:
        """ProContEXT with a hundredth of the weights: learns from scratch on a laptop's CPU."""
        small = {
            "template_size": 48, "search_size": 96, "search_factor": 4.0, "stem": "conv", "patch": 8,
            "width": 64, "depth": 4, "heads": 4, "drop_path": 0.0, "head_channels": 64, "prune_blocks": (1, 2),
            "update_interval": 10, "margin": 4.0, "exact": True, "search_jitter": (3.0, 0.25),
        }  # fmt: skip
        return cls(**{**small, **changes})

    @property
    def grid(self) -> int:
        """Search tokens along each axis."""
        return self.search_size // self.patch


@dataclass(frozen=True)
class Templates:
    """A group of templates, one for each factor, as the transformer's first block sees them."""

    tokens: Tensor  # (B, K * n, D): patches with their positions
    boxes: Tensor  # (B, K, 4): where the target is in each crop, cxcywh in units of the crop


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
class ProContEXTState:
    """What ProContEXT remembers of B sequences."""

    box: Tensor  # (B, 4) xywh, frame pixels, float64
    frame: Tensor  # (B,) int64, frames since the first
    static: Templates  # of the first frame
    dynamic: Templates | None  # of the last confident frame


class ProContEXT(Tracker):
    """The network and the way it tracks."""

    Config = ProContEXTConfig

    def __init__(self, config: ProContEXTConfig = ProContEXTConfig()):
        super().__init__(config)
        cfg = config
        self.embed = vit.patch_embedding(cfg.stem, cfg.width)
        # shared by all templates
        self.position_z = vit.learned_position(cfg.template_size // cfg.patch, cfg.width)
        self.position_x = vit.learned_position(cfg.grid, cfg.width)
        self.blocks = vit.blocks(cfg.width, cfg.depth, cfg.heads, 4 * cfg.width, cfg.drop_path)
        self.norm = nn.LayerNorm(cfg.width, eps=1e-6)
        self.head = CenterHead(cfg.width, cfg.head_channels)
        xavier(self.blocks)
        xavier(self.head)

    def load_pretrained(self) -> bool:
        """Start the transformer as the authors do, from ViT-B as a masked autoencoder; see
        `Tracker.load_pretrained`.
        """
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
        weights, cfg = vit.renamed(weights), self.config
        own = {
            name: value if name.startswith("head.") else weights[name]
            for name, value in self.state_dict().items()
            if name.startswith("head.") or name in weights
        }
        own["position_z"] = vit.resized_position(weights, cfg.template_size // cfg.patch)
        own["position_x"] = vit.resized_position(weights, cfg.grid)
        load_strictly(self, own, "the pretrained transformer")

    # ---- the network (paper, section 2.1) ----

    def tokens(self, images: Tensor, position: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> patches with their positions, row by row (B, n, D)."""
        return self.embed(images).flatten(2).transpose(1, 2) + position

    def forward(
        self,
        templates: list[Templates],
        search: Tensor,
        keep: float | None = None,
        maps: bool = False,
    ) -> Answer:
        """Groups of templates (static, dynamic) and search tokens (B, N, D) -> maps on the search
        grid.

        `keep` replaces the config's ratio. Attention is full, so templates see the search crop and
        are encoded anew in every frame; only their first tokens can be remembered.
        """
        cfg, grid = self.config, self.config.grid
        batch, cells, width = search.shape
        keep = cfg.keep_ratio if keep is None else keep
        x = torch.cat([*(group.tokens for group in templates), search], 1)  # [Z_s; Z_d; Z_x]
        known = x.shape[1] - cells  # template tokens, which always stay
        asking = self._asking(templates)
        # where each search token came from
        cell = torch.arange(cells, device=x.device).expand(batch, -1)
        kept, focus = [], []
        for index, block in enumerate(self.blocks):
            q, k, v = block.project(x)
            x = block.gather(x, F.scaled_dot_product_attention(q, k, v))  # Eq. 1
            count = math.ceil(keep * cell.shape[1])
            prune = index in cfg.prune_blocks and count < cell.shape[1]
            if prune or maps:
                score = pruning_score(q, k, known, *asking, cfg.pruning_softmax)
            if maps:
                focus.append(
                    score.new_zeros(batch, cells).scatter(1, cell, score).unflatten(1, (grid, grid))
                )
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

    def _asking(self, templates: list[Templates]) -> tuple[Tensor, Tensor | None]:
        """The template tokens that decide on pruning, their indices (R,), and if not all alike
        their weights (B, R).
        """
        cfg, device = self.config, self.device
        rows = template_rows(cfg.pruning_rows, cfg.template_size // cfg.patch).to(device)
        count = sum(group.boxes.shape[1] for group in templates)
        first = torch.arange(count, device=device) * (cfg.template_size // cfg.patch) ** 2
        indices = (first[:, None] + rows).flatten()
        if cfg.pruning_rows != "box":
            return indices, None
        boxes = torch.cat([group.boxes for group in templates], 1).to(device)  # (B, K, 4)
        inside = cells_in(boxes, cfg.template_size // cfg.patch).flatten(1).float()
        return indices, inside / inside.sum(1, keepdim=True)

    # ---- tracking (Algorithm 1) ----

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> ProContEXTState:
        frames, boxes = self.checked(frames, boxes_xywh)
        static = self._remember(frames, boxes)
        return ProContEXTState(
            boxes,
            torch.zeros(len(frames), dtype=torch.long),
            static,
            static if self.config.dynamic else None,
        )

    def step(
        self, state: ProContEXTState, frames: list[Tensor], maps: bool = False
    ) -> tuple[ProContEXTState, Prediction]:
        cfg, frames = self.config, self.moved(frames)

        # 1. where is it, around its last box (lines 8 and 9)
        crops, windows = around_box(
            frames, state.box, cfg.search_factor, cfg.search_size, cfg.exact
        )
        groups = [state.static, state.dynamic] if cfg.dynamic else [state.static]
        answer = self(groups, self.tokens(normalise(crops), self.position_x), maps=maps)
        response = answer.score * hann_window(cfg.grid, "open").to(
            answer.score
        )  # prefers small motion
        box = box_to_frame(box_at(response, answer).double().cpu(), windows, state.box, cfg.exact)
        # (B, 2): width, height
        sizes = torch.tensor([frame.shape[:0:-1] for frame in frames], dtype=torch.float64)
        box = clip_with_margin(box, sizes, cfg.margin)
        score = answer.score.flatten(1).amax(1).double().cpu()  # Eq. 6, without the window

        # 2. is this frame fit to be remembered (lines 10 to 12)
        count = state.frame + 1
        due = (count % cfg.update_interval == 0) & (score > cfg.update_threshold) & cfg.dynamic
        state = replace(state, box=box, frame=count)
        if due.any():
            which = due.nonzero()[:, 0]
            new, old = (
                self._remember([frames[i] for i in which.tolist()], box[which]),
                state.dynamic,
            )
            tokens = old.tokens.index_copy(0, which.to(old.tokens.device), new.tokens)
            state = replace(
                state, dynamic=Templates(tokens, old.boxes.index_copy(0, which, new.boxes))
            )
        return state, Prediction(
            box, score, self._maps(answer, response, crops, windows, due) if maps else None
        )

    def _remember(self, frames: list[Tensor], boxes: Tensor) -> Templates:
        """Templates of each frame at each factor. Crops, patches and positions are made once,
        here.
        """
        tokens, places = [], []
        for factor in self.config.template_factors:
            crops, windows = around_box(
                frames, boxes, factor, self.config.template_size, self.config.exact
            )
            tokens.append(self.tokens(normalise(crops), self.position_z))
            places.append(xywh_to_cxcywh(windows.to_crop(boxes)).float() / windows.size)
        return Templates(torch.cat(tokens, 1), torch.stack(places, 1))

    def _maps(
        self, answer: Answer, response: Tensor, crops: Tensor, windows: Windows, due: Tensor
    ) -> dict[str, Tensor]:
        grid = self.config.grid
        kept = [
            torch.zeros_like(answer.score, dtype=torch.bool).flatten(1).scatter(1, cell, True)
            for cell in answer.kept
        ]
        shown = {
            "crop": crops,
            "score": answer.score,
            "response": response,
            "offset": answer.offset,
            "size": answer.size,
            "focus": torch.stack(answer.focus, 1),  # (B, blocks, g, g)
            "updated": due,
            "window": torch.stack([windows.left, windows.top, windows.side], 1),
        }
        # (B, prunings, g, g)
        return shown | ({"kept": torch.stack(kept, 1).unflatten(2, (grid, grid))} if kept else {})

    # ---- training (section 2.2) ----

    def loss(self, batch: dict[str, Tensor], kind: str = "") -> dict[str, Tensor]:
        """Losses of a batch (Eq. 5). "progress", the share of the training that is done, sets the
        keep ratio; without it, the last.

        Templates come as the sampler makes them: all frames (first, dynamic) at the first factor,
        then at the next.
        """
        cfg = self.config
        frames = 2 if cfg.dynamic else 1
        crops, places = (
            batch["templates"].unflatten(1, (-1, frames)),
            batch["template_boxes"].unflatten(1, (-1, frames)),
        )
        templates = []
        for i in range(frames):
            # (B * K, n, D)
            tokens = self.tokens(normalise(crops[:, :, i]).flatten(0, 1), self.position_z)
            templates.append(Templates(tokens.reshape(len(crops), -1, cfg.width), places[:, :, i]))
        search = self.tokens(normalise(batch["searches"][:, 0]), self.position_x)
        epoch = 1 + int(float(batch.get("progress", 1.0)) * cfg.epochs)
        answer = self(templates, search, keep=self.keep_at(epoch))

        truth = batch["search_boxes"][:, 0]
        focal = focal_loss(answer.score, gaussian_target(truth, cfg.grid))
        # at the network's own peak, so only there offset and size learn
        boxes = cxcywh_to_xyxy(box_at(answer.score, answer))
        giou, l1 = localisation(boxes, cxcywh_to_xyxy(truth).clamp(0, 1))
        return {"loss": focal + 2 * giou + 5 * l1, "focal": focal, "giou": giou, "l1": l1}

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
        """OSTrack: a pair forward in time. ProContEXT: first template and search anywhere, the
        dynamic frame near the search.
        """
        cfg = self.config

        def crop(size: int, factor: float, jitter: tuple[float, float]) -> CropSpec:
            return CropSpec(
                size,
                factor,
                jitter_centre=jitter[0],
                jitter_size=jitter[1],
                fill=0,
                exact=cfg.exact,
            )

        return SampleSpec(
            template=crop(cfg.template_size, cfg.template_factors[0], cfg.template_jitter),
            template_factors=cfg.template_factors,
            search=crop(cfg.search_size, cfg.search_factor, cfg.search_jitter),
            templates=2 if cfg.dynamic else 1,
            order="trident" if cfg.dynamic else "causal",
            max_gap=200,
            flip=0.5,
            flip_each=0.5,
            grey=0.05,
            brightness=0.2,
            masks=True,  # only so that crops without anything in them are drawn again
        )

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        """One stage. `paper`: `epochs` of 60,000 samples in batches of 128, the rate falling to a
        tenth after four fifths.

        The short scales are for the tiny network, which starts from nothing: larger rates that fall
        smoothly.
        """
        self.check_preset(preset)
        cfg = self.config
        steps, batch = {
            "tiny": (300, 16),
            "laptop": (3000, 24),
            "gpu": (20_000, 64),
            "paper": (cfg.epochs * 468, 128),
        }[scale]
        if scale in ("tiny", "laptop"):
            rates = {"lr": 1e-3, "lr_end": 1e-5, "warmup": steps // 30, "clip": 1.0}
        else:
            rates = {"lr": cfg.learning_rate * batch / 128, "drops": (steps * 4 // 5,), "clip": 0.1}
            rates |= {"rates": (("head.*", 1.0), ("*", cfg.backbone_rate))}
        return [
            Stage(
                "boxes", steps=steps, batch=batch, sample=self.samples(), weight_decay=1e-4, **rates
            )
        ]


# ---- token pruning (section 2.1, "Token Pruning") ----


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


@torch.no_grad()
def pruning_score(
    q: Tensor,
    k: Tensor,
    known: int,
    rows: Tensor,
    weights: Tensor | None = None,
    softmax: str = "all",
) -> Tensor:
    """How much the template tokens `rows` (R,) look at each search token, the mean over rows and
    heads: (B, N).

    q and k (B, H, T, D / H) have `known` template tokens, then N search tokens. `weights` (B, R)
    make it a weighted mean. With softmax "search" each row's looks at search tokens sum to 1 (omega
    in section 2.1); with "all", which the code has, a row that is busy with templates counts less.
    The rows alone are computed: full attention stays fused.
    """
    logits = q[:, :, rows] @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, R, T)
    share = logits.softmax(-1)[..., known:] if softmax == "all" else logits[..., known:].softmax(-1)
    # the mean divides by it
    share = share.mean(1) if weights is None else share.mean(1) * weights[..., None] * len(rows)
    return share.mean(1)


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
    """The box (B, 4), cxcywh in units of the crop, at the highest cell of `peak` (B, g, g) (Eq. 4).

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
