"""STARK: correlation becomes attention, and the box is read from where attention puts its corners.

Yan, Peng, Fu, Wang, Lu: "Learning Spatio-Temporal Transformer for Visual Tracking", ICCV 2021. The
features of the template(s) and of the search crop become one row of tokens; an encoder lets every
token look at every other, a decoder asks one question ("where is it?"), and a head turns the answer
into two maps of corners. STARK-S knows the first frame only. STARK-ST also has a dynamic template
of a later frame, and a score head that says when a frame is fit to become it.

The networks, the training and the tracking are those of the authors' code (researchmm/Stark), whose
checkpoints load by `trackkit.official`. `STARKConfig.exact` switches between its coordinate habits
and exact ones; see there. What the paper tried and dropped (Table 7) is in `stark_variants`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.attention import DecoderLayer, EncoderLayer, LearnedPosition, sine_position
from trackkit.backbones import ResNet, SmallNet, normalise
from trackkit.boxes import clip_with_margin, cxcywh_to_xyxy, xyxy_to_cxcywh
from trackkit.crops import CropSpec, Windows, frame_sizes, outside
from trackkit.devices import to_host
from trackkit.errors import Range, check_fields
from trackkit.frames import FrameRule, SampleSpec
from trackkit.heads import MLP, CornerHead, soft_argmax
from trackkit.losses import localisation, place_cross_entropy
from trackkit.stages import Stage
from trackkit.trackers.base import Prediction, Tracker, put


@dataclass(frozen=True)
class STARKConfig:
    """Numbers of the network, of training and of tracking; the rows of Table 6 are fields."""

    backbone: str = "resnet50"
    """"resnet50", "resnet101" (stage 4, stride 16), or "tiny" (stride 8, from scratch)."""
    template_size: int = 128  # side of the template crops, pixels; a multiple of the stride
    search_size: int = 320  # side of the search crop, pixels; a multiple of the stride
    template_factor: float = 2.0  # side of a template's window, in units of sqrt(target's area)
    search_factor: float = 5.0  # side of the search window in the same units
    width: int = 256  # channels of the tokens; a multiple of 4 and of `heads`
    heads: int = 8  # of each attention
    feedforward: int = 2048  # hidden width of the layers' feed-forward part
    encoder_layers: int = 6  # 0 leaves the encoder out (Table 6)
    decoder_layers: int = 6  # 0 leaves it out, and the query itself is the answer (Table 6)
    dropout: float = 0.1  # probability of it in the transformer
    pre_norm: bool = False  # normalise before each step of a layer instead of after it
    position: str = "sine"  # "sine", "none" (Table 6) or "learned"
    head: str = "corner"  # "corner", or "mlp" straight from the decoder (Table 6)
    head_channels: int = 256  # of the corner head's first convolution; no effect with head "mlp"
    dynamic: bool = True  # a second template (STARK-ST), or not (STARK-S)
    score: bool = True  # the score head (Table 6)
    update_interval: int = 200
    """every so many frames, a frame may become the dynamic template; no effect without `dynamic`"""
    update_threshold: float = 0.5
    """it does if its score, 0 to 1, exceeds this; without a score head it always does"""
    margin: float = 10.0
    """the box keeps at least so many frame pixels inside the frame, and is at least as large"""
    exact: bool = False
    """boxes go into and out of crops by the crops' own geometry. The authors ignore on the way out
    that windows are snapped to whole pixels, learn targets shifted by half a crop pixel, drop the
    frame's last row and column, and drop the GIoU loss of a batch in which any box is inside out;
    False does as they do"""
    from_scratch: bool = False
    """aids for a network that starts from nothing and sees a thousandth of the samples, not in the
    paper: a learned embedding tells template tokens from search tokens; attention starts as a
    lookup of what is alike (keys start equal to queries, the decoder's values pass unchanged); the
    corner maps also learn by cross-entropy"""

    strides: ClassVar = {"resnet50": 16, "resnet101": 16, "tiny": 8}  # of the backbones

    def __post_init__(self):
        size, layers, factor = Range(1, 4096), Range(0, 100), Range(0, 100, above=True)
        check_fields(
            self, backbone=tuple(self.strides), template_size=size, search_size=size,
            template_factor=factor, search_factor=factor, width=size, heads=size, feedforward=size,
            encoder_layers=layers, decoder_layers=layers, dropout=Range(0, 1),
            position=("sine", "learned", "none"), head=("corner", "mlp"),
            head_channels=Range(8, 4096), update_interval=Range(1), update_threshold=Range(0, 1),
            margin=Range(0, 4096),
        )  # fmt: skip
        stride = self.strides[self.backbone]
        if self.template_size % stride or self.search_size % stride:
            sizes = "template_size and search_size"
            raise ValueError(f"{sizes} must be multiples of the backbone's stride, {stride}")
        if self.width % 4 or self.width % self.heads:
            must = f"must be a multiple of 4 and of the {self.heads} heads"
            raise ValueError(f"a width of {self.width} {must}")

    @classmethod
    def s50(cls, **changes) -> STARKConfig:
        """STARK-S50: the first frame only."""
        return cls(**{"dynamic": False, "score": False, **changes})

    @classmethod
    def st50(cls, **changes) -> STARKConfig:
        """STARK-ST50: with a dynamic template and a score head."""
        return cls(**changes)

    @classmethod
    def st101(cls, **changes) -> STARKConfig:
        """STARK-ST101."""
        return cls(**{"backbone": "resnet101", **changes})

    @classmethod
    def tiny(cls, **changes) -> STARKConfig:
        """STARK-ST with a hundredth of the weights: learns from scratch on a laptop's CPU."""
        small = {
            "backbone": "tiny", "template_size": 48, "search_size": 96, "template_factor": 1.5,
            "search_factor": 3.0, "width": 64, "heads": 4, "feedforward": 128, "encoder_layers": 2,
            "decoder_layers": 2, "dropout": 0.0, "head_channels": 64, "pre_norm": True,
            "update_interval": 10, "margin": 4.0, "exact": True, "from_scratch": True,
        }  # fmt: skip
        return cls(**{**small, **changes})


@dataclass(frozen=True)
class Tokens:
    """A crop's features as tokens, row by row."""

    features: Tensor  # (B, N, D)
    position: Tensor  # (B, N, D)
    ignore: Tensor  # (B, N) bool, on the CPU in tracking: cells outside the frame

    def each(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        return Tokens(change(self.features), change(self.position), change(self.ignore))


@dataclass(frozen=True)
class Answer:
    """What the network says of B search crops; it asks Q = 1 question about each."""

    boxes: Tensor  # (B, Q, 4), cxcywh, units of the crop
    logits: Tensor | None  # (B, Q), of the score head
    decoded: Tensor  # (B, Q, D), the decoder's output
    corners: tuple[Tensor, Tensor] | None  # 2 x (B, Q, s, s) logits
    maps: dict[str, Tensor] | None = None  # when asked for


@dataclass(frozen=True)
class STARKState:
    """What STARK remembers of B sequences."""

    box: Tensor  # (B, 4) xywh, frame pixels, float64
    frame: Tensor  # (B,) int64, frames since the first
    template: Tokens  # of the first frame: encoded once
    dynamic: Tokens | None  # of the last confident frame; None in STARK-S

    @property
    def templates(self) -> list[Tokens]:
        return [self.template] if self.dynamic is None else [self.template, self.dynamic]


class STARK(Tracker):
    """The network and the way it tracks."""

    Config = STARKConfig

    def __init__(self, config: STARKConfig | None = None):
        cfg = config or self.Config()
        super().__init__(cfg)
        self.backbone = self.make_backbone()
        self.bottleneck = nn.Conv2d(self.backbone.channels, cfg.width, 1)
        sizes = cfg.width, cfg.heads, cfg.feedforward, cfg.dropout, cfg.pre_norm
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.layers = nn.ModuleList(EncoderLayer(*sizes) for _ in range(cfg.encoder_layers))
        self.encoder.norm = nn.LayerNorm(cfg.width) if cfg.pre_norm else nn.Identity()
        self.decoder.layers = nn.ModuleList(DecoderLayer(*sizes) for _ in range(cfg.decoder_layers))
        self.decoder.norm = nn.LayerNorm(cfg.width) if cfg.decoder_layers else nn.Identity()
        self.query = self.make_query()
        if cfg.position == "learned":
            self.position = LearnedPosition(cfg.width)
        self.add_heads()
        if cfg.from_scratch:
            self.segment = nn.Embedding(2, cfg.width)  # template, search
            self._start_as_lookup()

    def make_backbone(self) -> nn.Module:
        name = self.config.backbone
        return SmallNet() if name == "tiny" else ResNet(name)

    def make_query(self) -> nn.Embedding | None:
        """The question, learned (section 3.1, "Decoder")."""
        return nn.Embedding(1, self.config.width)

    def add_heads(self) -> None:
        width, channels = self.config.width, self.config.head_channels
        corner = self.config.head == "corner"
        self.box_head = CornerHead(width, channels) if corner else MLP(width, width, 4)
        if self.config.score:
            self.score_head = MLP(width, width, 1)

    def load_pretrained(self) -> bool:
        if not isinstance(self.backbone, ResNet):
            return False
        self.backbone.load_pretrained()
        return True

    # ---- the network (paper, sections 3.1 and 3.2) ----

    def encode(self, images: Tensor, mask: Tensor) -> Tokens:
        """Backbone, bottleneck and positions (not the encoder) of normalised images (B, 3, S, S)
        with their mask (B, S, S) bool, True outside the frame.
        """
        features = self.features(images).flatten(2).transpose(1, 2)  # (B, N, D)
        stride = self.backbone.stride
        cells = mask[:, ::stride, ::stride]  # (B, s, s): the value at each cell's first pixel
        if self.config.position == "sine":
            position = sine_position(cells.to(features.device), self.config.width).to(features)
        elif self.config.position == "learned":
            position = self.position(cells)
        else:
            position = features.new_zeros(*features.shape[:2], self.config.width)
        return Tokens(features, position, cells.flatten(1))

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D, s, s)."""
        return self.bottleneck(self.backbone(images))

    def forward(
        self, templates: list[Tokens], search: Tokens, query: Tensor | None = None, maps=False
    ) -> Answer:
        """Boxes and scores; `query` (B, Q, D) stands in for the learned one."""
        seen = {} if maps else None
        templates, search = self.marked(templates, search)
        tokens = concat([*templates, search])  # templates first, the search crop last
        memory = self.run_encoder(tokens, seen)
        if query is None:
            query = self.query.weight.repeat(len(memory), 1, 1)
        decoded = self.run_decoder(torch.zeros_like(query), query, memory, tokens, seen)
        return self.answer(memory, search, decoded, seen)

    def run_encoder(self, tokens: Tokens, seen: dict | None, name: str = "encoder") -> Tensor:
        """The encoder, where every token looks at every token -> (B, T, D)."""
        x, ignore = tokens.features, _needed(tokens.ignore, tokens.features)
        for index, layer in enumerate(self.encoder.layers):
            x, share = layer(x, tokens.position, ignore, seen is not None)
            if seen is not None:
                seen[f"{name}_{index}"] = share
        return self.encoder.norm(x)

    def run_decoder(
        self, x: Tensor, query: Tensor, memory: Tensor, tokens: Tokens, seen: dict | None
    ) -> Tensor:
        """The decoder: queries, content x, gather from the memory of `tokens` -> (B, Q, D)."""
        ignore = _needed(tokens.ignore, memory)
        for index, layer in enumerate(self.decoder.layers):
            x, share = layer(x, query, memory, tokens.position, ignore, seen is not None)
            if seen is not None:
                seen[f"decoder_{index}"] = share
        return self.decoder.norm(x) if self.decoder.layers else query

    def answer(self, memory: Tensor, search: Tokens, decoded: Tensor, seen: dict | None) -> Answer:
        """The heads (section 3.1, "Head", and section 3.2)."""
        cells = search.features.shape[1]
        boxes, corners = self.locate(memory[:, -cells:], decoded, seen)
        logits = self.score_head(decoded)[..., 0] if self.config.score else None
        if seen is not None:
            seen["memory"] = memory
        return Answer(boxes, logits, decoded, corners, seen)

    def locate(self, memory: Tensor, decoded: Tensor, seen: dict | None = None):
        """Search tokens of the memory (B, N, D) and decoder outputs (B, Q, D) -> boxes (B, Q, 4)
        and corner logits or None.

        Each search token is weighted by its similarity to the answer, then the corner maps'
        expectations are the box (Eq. 1 and Fig. 3).
        """
        if self.config.head == "mlp":
            return self.box_head(decoded).float().sigmoid(), None
        batch, queries, _ = decoded.shape
        size = int(memory.shape[1] ** 0.5)
        similarity = decoded @ memory.transpose(1, 2)  # (B, Q, N): a plain dot product
        if seen is not None:
            seen["similarity"] = similarity.detach()
        weighted = similarity[..., None] * memory[:, None]  # (B, Q, N, D)
        grid = weighted.flatten(0, 1).transpose(1, 2).unflatten(2, (size, size))  # (B * Q, D, s, s)
        corners = self.box_head(grid)
        boxes = xyxy_to_cxcywh(torch.cat([soft_argmax(corner) for corner in corners], 1))
        logits = tuple(corner.view(batch, queries, size, size) for corner in corners)
        return boxes.view(batch, queries, 4), logits

    # ---- from_scratch: not in the paper ----

    @torch.no_grad()
    def _start_as_lookup(self) -> None:
        """Tokens look at what resembles them first, and the query repeats what it sees."""
        width = self.config.width
        for layer in self.encoder.layers:
            queries, keys, _ = layer.self_attn.in_proj_weight.split(width)
            # a dot product of equal tokens stands out among those of random ones
            keys.copy_(queries.mul_(1.5))
        for layer in self.decoder.layers:
            nn.init.eye_(layer.cross_attn.in_proj_weight[2 * width :])
            nn.init.eye_(layer.cross_attn.out_proj.weight)

    def marked(self, templates: list[Tokens], search: Tokens) -> tuple[list[Tokens], Tokens]:
        """Tokens that say which of the two they are of."""
        if not self.config.from_scratch:
            return templates, search
        marks = self.segment.weight
        marked = [replace(t, position=t.position + marks[0]) for t in templates]
        return marked, replace(search, position=search.position + marks[1])

    # ---- tracking (section 3.2, "Inference") ----

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> STARKState:
        frames, boxes = self.checked(frames, boxes_xywh)
        template = self._look(frames, boxes, self.template_crop)[0]
        count = torch.zeros(len(frames), dtype=torch.long)
        return STARKState(boxes, count, template, template if self.config.dynamic else None)

    def step(
        self, state: STARKState, frames: list[Tensor], maps: bool = False
    ) -> tuple[STARKState, Prediction]:
        frames = self.moved(frames)

        # 1. where is it, around its last box
        search, windows, crops = self._look(frames, state.box, self.search_crop)
        answer = self.ask(state, search, maps)
        boxes, score = self.choose(answer)
        box = self.search_crop.to_frame(boxes, windows, state.box)
        box = clip_with_margin(box, frame_sizes(frames), self.config.margin)

        # 2. is this frame fit to be remembered
        state = replace(state, box=box, frame=state.frame + 1)
        state, updated = self.remember(state, frames, answer, score)

        seen = None
        if maps:
            seen = {**answer.maps, "crop": crops, "updated": updated, "window": windows.rows}
            shares = [c.flatten(2).softmax(-1).view_as(c) for c in answer.corners or ()]
            seen |= zip(("top_left", "bottom_right"), shares, strict=False)  # the MLP has none
        return state, Prediction(box, score, seen)

    def _look(
        self, frames: list[Tensor], boxes: Tensor, crop: CropSpec
    ) -> tuple[Tokens, Windows, Tensor]:
        """Tokens of the surroundings of each box, their windows, and the crops (B, 3, S, S)."""
        crops, windows = crop.around(frames, boxes)
        lost = 0 if crop.exact else 1  # of the frame, at its right and lower border
        mask = outside(windows, (frame_sizes(frames) - lost).tolist())
        return self.encode(normalise(crops), mask), windows, crops

    def ask(self, state: STARKState, search: Tokens, maps: bool) -> Answer:
        return self(state.templates, search, None, maps)

    def choose(self, answer: Answer) -> tuple[Tensor, Tensor]:
        """One box (B, 4), cxcywh, and its confidence (B,) for each search crop, on the CPU."""
        if answer.logits is not None:
            score = answer.logits.amax(1).sigmoid()
        elif answer.corners is None:
            score = torch.ones_like(answer.boxes[:, 0, 0])
        else:  # no score head: how sure the corner maps are of themselves
            score = sum(c.mean(1).flatten(1).softmax(1).amax(1) for c in answer.corners) / 2
        boxes, score = to_host(answer.boxes, score)
        # of several questions the mean, as in the authors' code
        return boxes.mean(1), score

    def remember(
        self, state: STARKState, frames: list[Tensor], answer: Answer, score: Tensor
    ) -> tuple[STARKState, Tensor]:
        """Every `update_interval` frames, a frame with a score above the threshold becomes the
        dynamic template; also of which sequences it did, (B,) bool.
        """
        cfg = self.config
        confident = (score > cfg.update_threshold) | (not cfg.score)
        due = (state.frame % cfg.update_interval == 0) & confident & (state.dynamic is not None)
        if due.any():
            state = replace(state, dynamic=self._renewed(state.dynamic, frames, state.box, due))
        return state, due

    def _renewed(self, dynamic: Tokens, frames: list[Tensor], boxes: Tensor, due: Tensor) -> Tokens:
        """The dynamic templates, where `due` (B,) those of this frame."""
        rows = due.nonzero()[:, 0].tolist()
        new = self._look([frames[i] for i in rows], boxes[rows], self.template_crop)[0]
        return put(dynamic, rows, new)

    # ---- training (sections 3.1 and 3.2, "Training and Inference") ----

    def loss(self, batch: dict[str, Tensor], kind: str = "box") -> dict[str, Tensor]:
        """Losses of a batch: kind "box" (Eq. 2) or "score" (Eq. 3)."""
        search, template = (
            self.encode(normalise(batch[crops].flatten(0, 1)), batch[masks].flatten(0, 1))
            for crops, masks in (("searches", "search_masks"), ("templates", "template_masks"))
        )
        count = batch["templates"].shape[1]
        templates = [template.each(lambda t, i=i: t[i::count]) for i in range(count)]
        truth = batch["search_boxes"].flatten(0, 1)
        labels = batch["labels"].flatten() if "labels" in batch else truth.new_ones(len(truth))
        return self.compare(templates, search, truth, labels, kind)

    def compare(
        self, templates: list[Tokens], search: Tokens, truth: Tensor, labels: Tensor, kind: str
    ) -> dict[str, Tensor]:
        """Losses of N searches of each sample, which have the same templates."""
        count = len(search.features) // len(templates[0].features)
        if count > 1:
            templates = [z.each(lambda t: t.repeat_interleave(count, 0)) for z in templates]
        return self.losses(self(templates, search), truth, labels, kind)

    def losses(self, answer: Answer, truth: Tensor, labels: Tensor, kind: str) -> dict[str, Tensor]:
        """`truth` (B, 4) cxcywh; `labels` (B,) are 1 where the target is in the crop, else 0."""
        if kind == "score":  # Eq. 3, whose minus the paper leaves out
            wanted = labels[:, None].expand_as(answer.logits)
            return {"loss": F.binary_cross_entropy_with_logits(answer.logits, wanted)}
        boxes, corners = answer.boxes, answer.corners
        truth = cxcywh_to_xyxy(truth)[:, None].clamp(0, 1).expand_as(boxes)
        there = (labels > 0)[:, None]  # else there is nothing to locate
        exact = self.config.exact
        giou, l1 = localisation(cxcywh_to_xyxy(boxes), truth, keep_degenerate=exact, counted=there)
        losses = {"loss": 2 * giou + 5 * l1, "giou": giou, "l1": l1}  # Eq. 2
        if self.config.from_scratch and corners:
            places = truth.unflatten(-1, (2, 2)).unbind(-2)  # (B, Q, 2), 2 corners
            pairs = zip(corners, places, strict=True)
            losses["corner"] = sum(place_cross_entropy(c, p, there) for c, p in pairs) / 2
            losses["loss"] = losses["loss"] + losses["corner"]
        return losses

    def samples(self, negatives: float = 0.0) -> SampleSpec:
        """STARK-S: a pair forward in time. STARK-ST: first template and search anywhere, the
        dynamic template on the first's side of the search. A network that starts from scratch gets
        four searches a sample, less far off and in any order.
        """
        scratch, templates = self.config.from_scratch, 2 if self.config.dynamic else 1
        searches, order = (4, "any") if scratch else (1, "trident" if templates > 1 else "causal")
        size, centre = (0.2, 1.2) if scratch else (0.5, 4.5)
        return SampleSpec(
            template=self.template_crop,
            search=replace(self.search_crop, jitter_size=size, jitter_centre=centre),
            templates=templates,
            searches=searches,
            order=order,
            max_gap=200,
            rule=FrameRule(min_frames=20, min_usable=2 * (templates + searches) + 1),
            flip=0.5,
            flip_each=0.0 if scratch else 0.5,
            grey=0.05,
            brightness=0.2,
            masks=True,
            negatives=negatives,
        )

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        """Localisation, then the score head alone. `paper`: 500 and 50 epochs of 60,000 samples in
        batches of 128.

        The short scales are for the tiny network, which starts from nothing: larger rates that fall
        smoothly.
        """
        self.check_preset(preset)
        first, second, batch = {
            "tiny": (150, 30, 8),
            "laptop": (2000, 200, 8),
            "gpu": (20_000, 2_000, 64),
            "paper": (500 * 468, 50 * 468, 128),
        }[scale]
        short = scale in ("tiny", "laptop")

        lr, clip = (1.5e-3, 1.0) if short else (1e-4, 0.1)

        def stage(name: str, steps: int, **rest) -> Stage:
            fall = {"drops": (steps * 4 // 5,)}
            if short:
                fall = {"lr_end": 3e-5, "warmup": 30 if scale == "laptop" else 5}
            return Stage(name, steps, batch, lr=lr, clip=clip, weight_decay=1e-4, **fall, **rest)

        # all but the score head and the frozen start of a ResNet
        names = [name.split(".") for name, _ in self.named_parameters()]
        parts = dict.fromkeys(".".join(n[: 2 if n[0] == "backbone" else 1]) for n in names)
        fixed = "score_head", "backbone.conv1", "backbone.layer1"
        body = tuple(f"{part}.*" for part in parts if part not in fixed)
        box = {"sample": self.samples(), "trainable": body, "loss": "box"}
        rates = () if short else (("backbone.*", 0.1),)
        stages = [stage("localisation", first, rates=rates, **box)]
        if self.config.score:
            score = {"sample": self.samples(0.5), "trainable": ("score_head.*",), "loss": "score"}
            stages.append(stage("score", second, **score))
        return stages


def concat(parts: list[Tokens]) -> Tokens:
    """Several crops' tokens as one row of tokens."""
    alike = zip(*(vars(part).values() for part in parts), strict=True)
    return Tokens(*(torch.cat(tensors, 1) for tensors in alike))


def _needed(ignore: Tensor, like: Tensor) -> Tensor | None:
    """A mask on the device of `like`, or None if it is known to hide nothing."""
    if ignore.device.type == "cpu" and not ignore.any():
        return None
    return ignore.to(like.device)
