"""STARK: correlation becomes attention, and the box is read from where attention puts its corners.

Yan, Peng, Fu, Wang, Lu: "Learning Spatio-Temporal Transformer for Visual Tracking", ICCV 2021. The
features of the template(s) and of the search crop become one row of tokens; an encoder lets every
token look at every other, a decoder asks one question ("where is it?"), and a head turns the answer
into two maps of corners. STARK-S knows the first frame only. STARK-ST also has a dynamic template
of a later frame, and a score head that says when a frame is fit to become it.

The networks, the training and the tracking are those of the authors' code (researchmm/Stark), whose
checkpoints load by `trackkit.official`. `STARKConfig.exact` switches between its coordinate habits
and exact ones; see there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.attention import DecoderLayer, EncoderLayer, LearnedPosition, sine_position
from trackkit.backbones import ResNet, SmallNet, normalise
from trackkit.boxes import clip_with_margin, cxcywh_to_xyxy, giou, xyxy_to_cxcywh
from trackkit.crops import Windows, around_box, box_to_frame, outside
from trackkit.frames import FrameRule
from trackkit.heads import MLP, CornerHead, soft_argmax
from trackkit.losses import localisation, place_cross_entropy
from trackkit.sampling import CropSpec, SampleSpec
from trackkit.stages import Stage
from trackkit.trackers.base import Prediction, Tracker, take
from trackkit.trackers.sbt import CorrelatedFeatures, SBTConfig


@dataclass(frozen=True)
class STARKConfig:
    """Numbers of the network, of training and of tracking; every row of the paper's Tables 6 and 7
    is a field.

    Attributes:
        backbone: "resnet50", "resnet101" (stage 4, stride 16), or "tiny" (stride 8, trained from
            scratch). "sbt-small", "sbt-tiny": STARK-CA (Xie et al. 2022, section 5.3), whose search
            and template features know of one another.
        template_size: side of the template crops, pixels; a multiple of the backbone's stride.
        search_size: side of the search crop, pixels; a multiple of the backbone's stride.
        template_factor: side of a template's window in units of the square root of the target's
            area.
        search_factor: side of the search window in the same units.
        width: channels of the tokens; a multiple of 4 and of `heads`.
        heads: of each attention.
        feedforward: hidden width of the layers' feed-forward part.
        encoder_layers: 0 leaves the encoder out (Table 6).
        decoder_layers: 0 leaves the decoder out, and the query itself is the answer (Table 6).
        dropout: probability of it in the transformer.
        pre_norm: normalise before each step of a layer instead of after it.
        position: "sine", "learned" or "none" (Table 6).
        head: "corner", or "mlp" straight from the decoder (Table 6).
        head_channels: of the first convolution of the corner head; no effect with head "mlp".
        queries: questions to the decoder.
        matching: with several questions, "all" learn the same box and their mean is taken (the
            authors' code), or "hungarian": only the best learns it, and the best score is taken
            (Table 7).
        query: "learned", "template" (the template's tokens ask, and do not meet the search tokens
            before; Table 7), or "updated" (the answer in the last confident frame changes the next
            question; Table 7).
        dynamic: a second template (STARK-ST), or not (STARK-S).
        score: the score head (Table 6).
        joint: localisation and score are learned at once, not in two stages (Table 7).
        update_interval: every so many frames, a frame may become the dynamic template; no effect
            without `dynamic`.
        update_threshold: it does if its score, 0 to 1, exceeds this. Without a score head it always
            does. An "updated" query needs this score too.
        margin: the box keeps at least so many frame pixels inside the frame, and is at least as
            large.
        exact: boxes go into and out of crops by the crops' own geometry. The authors ignore on the
            way out that windows are snapped to whole pixels, learn targets shifted by half a crop
            pixel, drop the frame's last row and column, and drop the GIoU loss of a batch in which
            any box is inside out; False does as they do.
        from_scratch: aids for a network that starts from nothing and sees a thousandth of the
            samples, not in the paper: a learned embedding tells template tokens from search tokens;
            attention starts as a lookup of what is alike (keys start equal to queries, the
            decoder's values pass unchanged); the corner maps also learn by cross-entropy.
    """

    backbone: str = "resnet50"
    template_size: int = 128
    search_size: int = 320
    template_factor: float = 2.0
    search_factor: float = 5.0
    width: int = 256
    heads: int = 8
    feedforward: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.1
    pre_norm: bool = False
    position: str = "sine"
    head: str = "corner"
    head_channels: int = 256
    queries: int = 1
    matching: str = "all"
    query: str = "learned"
    dynamic: bool = True
    score: bool = True
    joint: bool = False
    update_interval: int = 200
    update_threshold: float = 0.5
    margin: float = 10.0
    exact: bool = False
    from_scratch: bool = False

    def __post_init__(self):
        choices = {
            "backbone": ("resnet50", "resnet101", "tiny", "sbt-small", "sbt-tiny"),
            "position": ("sine", "learned", "none"),
            "head": ("corner", "mlp"),
            "matching": ("all", "hungarian"),
            "query": ("learned", "template", "updated"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} must be one of {', '.join(allowed)}; got {getattr(self, field)!r}"
                )
        stride = 8 if self.backbone.endswith("tiny") else 16
        if self.template_size % stride or self.search_size % stride:
            raise ValueError(
                "template_size and search_size must be multiples of the backbone's stride, "
                f"{stride}"
            )
        if self.width % 4 or self.width % self.heads:
            raise ValueError(
                f"a width of {self.width} must be a multiple of 4 and of the {self.heads} heads"
            )
        if self.queries < 1 or self.update_interval < 1:
            raise ValueError("queries and update_interval must be at least 1")
        if not self.score and (self.joint or self.matching == "hungarian"):
            raise ValueError("joint training and hungarian matching need the score head")
        if self.backbone.startswith("sbt") and (self.dynamic or self.query != "learned"):
            raise ValueError(
                f"backbone {self.backbone} joins the search crop with one template: dynamic = "
                'False, query = "learned"'
            )
        if self.query != "learned" and (self.queries > 1 or self.decoder_layers == 0):
            raise ValueError(f'query "{self.query}" needs a decoder and queries = 1')

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
            "backbone": "tiny", "template_size": 48, "search_size": 96, "template_factor": 1.5, "search_factor": 3.0, "width": 64, "heads": 4,
            "feedforward": 128, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0, "head_channels": 64,
            "pre_norm": True, "update_interval": 10, "margin": 4.0, "exact": True, "from_scratch": True,
        }  # fmt: skip
        return cls(**{**small, **changes})


@dataclass(frozen=True)
class Tokens:
    """A crop's features as tokens, row by row."""

    features: Tensor  # (B, N, D)
    position: Tensor  # (B, N, D)
    ignore: Tensor  # (B, N) bool, on the CPU in tracking: cells outside the frame


@dataclass(frozen=True)
class Answer:
    """What the network says of B search crops."""

    boxes: Tensor  # (B, Q, 4), cxcywh, units of the crop
    logits: Tensor | None  # (B, Q), of the score head
    decoded: Tensor  # (B, Q, D), the decoder's output
    corners: tuple[Tensor, Tensor] | None  # 2 x (B, Q, s, s) logits
    maps: dict[str, Tensor]


@dataclass(frozen=True)
class STARKState:
    """What STARK remembers of B sequences."""

    box: Tensor  # (B, 4) xywh, frame pixels, float64
    frame: Tensor  # (B,) int64, frames since the first
    template: Tokens  # of the first frame: encoded once
    dynamic: Tokens | None  # of the last confident frame
    query: Tensor | None  # (B, 1, D), when questions are updated


class STARK(Tracker):
    """The network and the way it tracks."""

    Config = STARKConfig

    def __init__(self, config: STARKConfig = STARKConfig()):
        super().__init__(config)
        cfg = config
        self.backbone = _backbone(cfg.backbone)
        self.bottleneck = nn.Conv2d(self.backbone.channels, cfg.width, 1)
        sizes = cfg.width, cfg.heads, cfg.feedforward, cfg.dropout, cfg.pre_norm
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.layers = nn.ModuleList(EncoderLayer(*sizes) for _ in range(cfg.encoder_layers))
        self.encoder.norm = nn.LayerNorm(cfg.width) if cfg.pre_norm else nn.Identity()
        self.decoder.layers = nn.ModuleList(DecoderLayer(*sizes) for _ in range(cfg.decoder_layers))
        self.decoder.norm = nn.LayerNorm(cfg.width) if cfg.decoder_layers else nn.Identity()
        if cfg.query != "template":  # whose questions are the templates
            self.query = nn.Embedding(cfg.queries, cfg.width)
        if cfg.position == "learned":
            self.position = LearnedPosition(cfg.width)
        self.box_head = (
            CornerHead(cfg.width, cfg.head_channels)
            if cfg.head == "corner"
            else MLP(cfg.width, cfg.width, 4)
        )
        if cfg.score:
            self.score_head = MLP(cfg.width, cfg.width, 1)
        if cfg.query == "updated":
            self.next_query = MLP(cfg.width, cfg.width, cfg.width, depth=2)
        if cfg.from_scratch:
            self.segment = nn.Embedding(2, cfg.width)  # template, search
            self._start_as_lookup()

    def load_pretrained(self) -> bool:
        if isinstance(self.backbone, CorrelatedFeatures):
            return self.backbone.load_pretrained()
        if not isinstance(self.backbone, ResNet):
            return False
        self.backbone.load_pretrained()
        return True

    @torch.no_grad()
    def _start_as_lookup(self) -> None:
        """First weights with which tokens look at what resembles them, and the query repeats what
        it sees.
        """
        width = self.config.width
        for layer in self.encoder.layers:
            queries, keys, _ = layer.self_attn.in_proj_weight.split(width)
            # a dot product of equal tokens stands out among those of random ones
            keys.copy_(queries.mul_(1.5))
        for layer in self.decoder.layers:
            nn.init.eye_(layer.cross_attn.in_proj_weight[2 * width :])
            nn.init.eye_(layer.cross_attn.out_proj.weight)

    # ---- the network (paper, sections 3.1 and 3.2) ----

    def encode(self, images: Tensor, mask: Tensor) -> Tokens:
        """Normalised images (B, 3, S, S) and their mask (B, S, S) bool, True outside the frame ->
        tokens.

        A cell of the feature grid takes the mask's value at its first pixel.
        """
        features = self.backbone(images)
        if not isinstance(self.backbone, CorrelatedFeatures):  # which `meet` first
            features = self.bottleneck(features)
        features = features.flatten(2).transpose(1, 2)  # (B, N, D)
        stride = self.backbone.stride
        cells = mask[:, ::stride, ::stride]  # (B, s, s)
        if self.config.position == "sine":
            position = sine_position(cells, self.config.width).to(features)
        elif self.config.position == "learned":
            position = self.position(cells)
        else:
            position = features.new_zeros(*features.shape[:2], self.config.width)
        return Tokens(features, position, cells.flatten(1))

    def meet(self, templates: list[Tokens], search: Tokens) -> tuple[list[Tokens], Tokens]:
        """STARK-CA: search and template tokens, half-way through the backbone, go through the rest
        of it together.
        """
        sides = [int(t.features.shape[1] ** 0.5) for t in (search, templates[0])]
        maps = [
            t.features.transpose(1, 2).unflatten(2, (s, s))
            for t, s in zip((search, templates[0]), sides, strict=True)
        ]
        x, z = (self.bottleneck(m).flatten(2).transpose(1, 2) for m in self.backbone.meet(*maps))
        return [replace(templates[0], features=z)], replace(search, features=x)

    def forward(
        self,
        templates: list[Tokens],
        search: Tokens,
        query: Tensor | None = None,
        maps: bool = False,
    ) -> Answer:
        """Tokens of the template(s) and of the search crop -> boxes and scores. `query` (B, Q, D)
        replaces the learned one.
        """
        cfg, seen = self.config, {}
        if isinstance(self.backbone, CorrelatedFeatures):
            templates, search = self.meet(templates, search)
        batch, cells = search.features.shape[:2]
        if cfg.from_scratch:
            templates = [
                replace(t, position=t.position + self.segment.weight[0]) for t in templates
            ]
            search = replace(search, position=search.position + self.segment.weight[1])

        # 1. the encoder: every token looks at every token, templates and search alike (section 3.1,
        # "Encoder")
        if cfg.query == "template":
            asked = self._encode_tokens(_concat(templates), seen, "encoder_template", maps)
            memory, context = self._encode_tokens(search, seen, "encoder", maps), search
            x, query = asked, _concat(templates).position.to(asked)
        else:
            context = _concat([*templates, search])  # templates first, the search crop last
            memory = self._encode_tokens(context, seen, "encoder", maps)
            query = self.query.weight.repeat(batch, 1, 1) if query is None else query
            x = torch.zeros_like(query)

        # 2. the decoder: the query gathers what it needs from the memory (section 3.1, "Decoder")
        ignore = _needed(context.ignore, memory)
        for index, layer in enumerate(self.decoder.layers):
            x, share = layer(x, query, memory, context.position, ignore, maps)
            if maps:
                seen[f"decoder_{index}"] = share
        decoded = self.decoder.norm(x) if self.decoder.layers else query
        if cfg.query == "template":
            # the head needs one vector; the paper does not say which
            decoded = decoded.mean(1, keepdim=True)

        # 3. the heads (section 3.1, "Head", and section 3.2)
        boxes, corners = self.locate(memory[:, -cells:], decoded, seen)
        logits = self.score_head(decoded)[..., 0] if cfg.score else None
        if maps:
            seen |= {"memory": memory}
        return Answer(boxes, logits, decoded, corners, seen)

    def _encode_tokens(self, tokens: Tokens, seen: dict, name: str, maps: bool) -> Tensor:
        x, ignore = tokens.features, _needed(tokens.ignore, tokens.features)
        for index, layer in enumerate(self.encoder.layers):
            x, share = layer(x, tokens.position, ignore, maps)
            if maps:
                seen[f"{name}_{index}"] = share
        return self.encoder.norm(x)

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
        return boxes.view(batch, queries, 4), tuple(
            c.view(batch, queries, size, size) for c in corners
        )

    # ---- tracking (section 3.2, "Inference") ----

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> STARKState:
        frames, boxes = self.checked(frames, boxes_xywh)
        template = self._look(
            frames, boxes, self.config.template_factor, self.config.template_size
        )[0]
        return STARKState(
            box=boxes,
            frame=torch.zeros(len(frames), dtype=torch.long),
            template=template,
            dynamic=template if self.config.dynamic else None,
            query=self.query.weight.repeat(len(frames), 1, 1)
            if self.config.query == "updated"
            else None,
        )

    def step(
        self, state: STARKState, frames: list[Tensor], maps: bool = False
    ) -> tuple[STARKState, Prediction]:
        cfg, frames = self.config, self.moved(frames)

        # 1. where is it, around its last box
        search, windows, crops = self._look(frames, state.box, cfg.search_factor, cfg.search_size)
        templates = [state.template, state.dynamic] if cfg.dynamic else [state.template]
        answer = self(templates, search, state.query, maps)
        boxes, score = self._choose(answer)
        box = box_to_frame(boxes, windows, state.box, cfg.exact)
        # (B, 2): width, height
        sizes = torch.tensor([frame.shape[:0:-1] for frame in frames], dtype=torch.float64)
        box = clip_with_margin(box, sizes, cfg.margin)

        # 2. is this frame fit to be remembered
        count = state.frame + 1
        due = (count % cfg.update_interval == 0) & (
            (score > cfg.update_threshold) | (not cfg.score)
        )
        state = replace(state, box=box, frame=count)
        if cfg.dynamic and due.any():
            state = replace(state, dynamic=self._renewed(state.dynamic, frames, box, due))
        if cfg.query == "updated":
            confident = (score > cfg.update_threshold).to(self.device)[:, None, None]
            state = replace(
                state, query=torch.where(confident, self.query_after(answer.decoded), state.query)
            )

        seen = None
        if maps:
            seen = {
                **answer.maps,
                "crop": crops,
                "updated": due & cfg.dynamic,
                "window": torch.stack([windows.left, windows.top, windows.side], 1),
            }
            if answer.corners:
                names = "top_left", "bottom_right"
                seen |= {
                    n: c.flatten(2).softmax(-1).view_as(c)
                    for n, c in zip(names, answer.corners, strict=True)
                }
        return state, Prediction(box, score, seen)

    def query_after(self, decoded: Tensor) -> Tensor:
        """The next frame's question (B, 1, D), from the answer (B, 1, D) of a confident one."""
        return self.query.weight + self.next_query(decoded)

    def _look(
        self, frames: list[Tensor], boxes: Tensor, factor: float, size: int
    ) -> tuple[Tokens, Windows, Tensor]:
        """Tokens of the surroundings of each box, their windows, and the crops (B, 3, S, S)."""
        crops, windows = around_box(frames, boxes, factor, size, self.config.exact)
        lost = 0 if self.config.exact else 1
        mask = outside(
            windows, [(frame.shape[2] - lost, frame.shape[1] - lost) for frame in frames]
        )
        return self.encode(normalise(crops), mask), windows, crops

    def _choose(self, answer: Answer) -> tuple[Tensor, Tensor]:
        """One box (B, 4), cxcywh, and its confidence (B,) for each search crop, on the CPU."""
        boxes, logits = answer.boxes.double().cpu(), answer.logits
        if self.config.matching == "hungarian":
            best = logits.argmax(1).cpu()
            boxes = boxes[torch.arange(len(boxes)), best]
        else:
            boxes = boxes.mean(1)
        if logits is not None:
            return boxes, logits.amax(1).sigmoid().double().cpu()
        if answer.corners is None:
            return boxes, torch.ones(len(boxes), dtype=torch.float64)
        # no score head: how sure the corner maps are of themselves
        peaks = [c.mean(1).flatten(1).softmax(1).amax(1) for c in answer.corners]
        return boxes, (sum(peaks) / 2).double().cpu()

    def _renewed(self, dynamic: Tokens, frames: list[Tensor], boxes: Tensor, due: Tensor) -> Tokens:
        """The dynamic templates, those of the sequences that are `due` (B,) made from this
        frame.
        """
        which = due.nonzero()[:, 0].tolist()
        new = self._look(
            [frames[i] for i in which],
            boxes[which],
            self.config.template_factor,
            self.config.template_size,
        )[0]
        rows = torch.arange(len(due))
        rows[which] = len(due) + torch.arange(len(which))
        both = Tokens(
            *(
                torch.cat([getattr(t, n) for t in (dynamic, new)])
                for n in ("features", "position", "ignore")
            )
        )
        return take(both, rows.tolist())

    # ---- training (sections 3.1 and 3.2, "Training and Inference") ----

    def loss(self, batch: dict[str, Tensor], kind: str = "box") -> dict[str, Tensor]:
        """Losses of a batch: kind "box" (Eq. 2), "score" (Eq. 3), or "joint" (their sum, Table
        7).
        """
        searches = self._encode_all(batch, "search")
        count = len(searches.features) // len(batch["searches"])
        templates = self._encode_all(batch, "template")
        templates = [
            _rows(templates, slice(i, None, batch["templates"].shape[1]))
            for i in range(batch["templates"].shape[1])
        ]
        truth = batch["search_boxes"].flatten(0, 1)
        labels = (
            batch["labels"].flatten()
            if "labels" in batch
            else torch.ones(len(truth), device=truth.device)
        )
        if self.config.query != "updated":
            if count > 1:  # several searches for the same templates
                templates = [
                    Tokens(
                        *(t.repeat_interleave(count, 0) for t in (z.features, z.position, z.ignore))
                    )
                    for z in templates
                ]
            return self._losses(self(templates, searches), truth, labels, kind)
        query, parts = None, []
        # one after the other: the answer in one frame is part of the question in the next
        for i in range(count):
            rows = slice(i, None, count)
            answer = self(templates, _rows(searches, rows), query)
            parts.append(self._losses(answer, truth[rows], labels[rows], kind))
            query = self.query_after(answer.decoded)
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    def _encode_all(self, batch: dict[str, Tensor], role: str) -> Tokens:
        """Tokens of all templates or searches of a batch, sample by sample: (B * N, ...)."""
        crops = batch["templates" if role == "template" else "searches"]
        return self.encode(normalise(crops.flatten(0, 1)), batch[f"{role}_masks"].flatten(0, 1))

    def _losses(
        self, answer: Answer, truth: Tensor, labels: Tensor, kind: str
    ) -> dict[str, Tensor]:
        cfg = self.config
        if kind == "score":
            return {
                "loss": F.binary_cross_entropy_with_logits(
                    answer.logits, labels[:, None].expand_as(answer.logits)
                )
            }
        boxes, corners, wanted = (
            answer.boxes,
            answer.corners,
            labels[:, None].expand(-1, cfg.queries),
        )
        if cfg.matching == "hungarian":
            chosen = hungarian(answer, truth)
            rows = torch.arange(len(boxes), device=boxes.device)
            boxes = boxes[rows, chosen][:, None]
            corners = corners and tuple(c[rows, chosen][:, None] for c in corners)
            wanted = F.one_hot(chosen, cfg.queries) * labels[:, None]
        truth = cxcywh_to_xyxy(truth)[:, None].clamp(0, 1).expand_as(boxes)
        positive = labels > 0
        if positive.any():
            giou, l1 = localisation(
                cxcywh_to_xyxy(boxes[positive]), truth[positive], keep_degenerate=cfg.exact
            )
        else:  # nothing to locate in this batch, and a mean over nothing is NaN
            giou = l1 = 0 * boxes.sum()
        losses = {"loss": 2 * giou + 5 * l1, "giou": giou, "l1": l1}
        if cfg.from_scratch and corners:
            places = truth[positive].unflatten(-1, (2, 2)).unbind(-2)  # (n, Q, 2) of both corners
            pairs = zip(corners, places, strict=True)
            losses["corner"] = (
                sum(place_cross_entropy(c[positive], place) for c, place in pairs) / 2
                if positive.any()
                else l1
            )
            losses["loss"] = losses["loss"] + losses["corner"]
        if kind == "joint" or cfg.matching == "hungarian":
            losses["score"] = F.binary_cross_entropy_with_logits(
                answer.logits, wanted.to(answer.logits)
            )
            losses["loss"] = losses["loss"] + losses["score"]
        return losses

    def samples(self, negatives: float = 0.0) -> SampleSpec:
        """STARK-S: a pair forward in time. STARK-ST: first template and search anywhere, the
        dynamic template on the first's side of the search. A network that starts from scratch gets
        four searches a sample, less far off and in any order.
        """
        cfg = self.config
        templates = 2 if cfg.dynamic else 1
        searches = 2 if cfg.query == "updated" else 4 if cfg.from_scratch else 1
        shared = {"fill": 0.0, "exact": cfg.exact}
        size, centre = (0.2, 1.2) if cfg.from_scratch else (0.5, 4.5)
        if cfg.query == "updated":
            order = "clip"
        elif cfg.from_scratch:
            order = "any"
        else:
            order = "trident" if cfg.dynamic else "causal"
        return SampleSpec(
            template=CropSpec(cfg.template_size, cfg.template_factor, **shared),
            search=CropSpec(
                cfg.search_size, cfg.search_factor, jitter_size=size, jitter_centre=centre, **shared
            ),
            templates=templates,
            searches=searches,
            order=order,
            max_gap=200,
            rule=FrameRule(min_frames=20, min_usable=2 * (templates + searches) + 1),
            flip=0.5,
            flip_each=0.0 if cfg.from_scratch else 0.5,
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
        cfg = self.config
        first, second, batch = {
            "tiny": (150, 30, 8),
            "laptop": (2000, 200, 8),
            "gpu": (20_000, 2_000, 64),
            "paper": (500 * 468, 50 * 468, 128),
        }[scale]
        short = scale in ("tiny", "laptop")

        def stage(name: str, steps: int, **rest) -> Stage:
            fall = (
                {"lr_end": 3e-5, "warmup": 30 if scale == "laptop" else 5}
                if short
                else {"drops": (steps * 4 // 5,)}
            )
            rate, clip = (1.5e-3, 1.0) if short else (1e-4, 0.1)
            return Stage(
                name,
                steps=steps,
                batch=batch,
                lr=rate,
                weight_decay=1e-4,
                clip=clip,
                **fall,
                **rest,
            )

        frozen = ("conv1", "layer1") if isinstance(self.backbone, ResNet) else ()
        body = [
            f"backbone.{name}.*"
            for name, part in self.backbone.named_children()
            if name not in frozen and _learns(part)
        ]
        body += [
            f"{name}.*"
            for name, part in self.named_children()
            if name not in ("backbone", "score_head") and _learns(part)
        ]
        together = cfg.joint or cfg.matching == "hungarian"
        stages = [
            stage(
                "localisation",
                first,
                sample=self.samples(negatives=0.5 if cfg.joint else 0.0),
                trainable=(*body, "score_head.*") if together else tuple(body),
                rates=() if short else (("backbone.*", 0.1),),
                loss="joint" if cfg.joint else "box",
            )
        ]
        if cfg.score and not together:
            stages.append(
                stage(
                    "score",
                    second,
                    sample=self.samples(negatives=0.5),
                    trainable=("score_head.*",),
                    loss="score",
                )
            )
        return stages


def hungarian(answer: Answer, truth: Tensor) -> Tensor:
    """Which query (B,) fits the one true box (B, 4) cxcywh best: least 2 GIoU loss + 5 L1 -
    probability.

    With a single object, the Hungarian algorithm's optimal assignment is the cheapest query.
    """
    with torch.no_grad():
        boxes = cxcywh_to_xyxy(answer.boxes)
        truth = cxcywh_to_xyxy(truth)[:, None].clamp(0, 1).expand_as(boxes)
        cost = (
            2 * (1 - giou(boxes, truth))
            + 5 * (boxes - truth).abs().mean(-1)
            - answer.logits.sigmoid()
        )
    return cost.argmin(1)


def _backbone(name: str) -> nn.Module:
    """By its name in the config. SBT's has the strides of the backbone that it replaces."""
    if name.startswith("sbt"):
        config = SBTConfig.tiny() if name == "sbt-tiny" else SBTConfig.small(strides=(4, 2, 2))
        return CorrelatedFeatures(config)
    return SmallNet() if name == "tiny" else ResNet(name)


def _learns(part: nn.Module) -> bool:
    return any(True for _ in part.parameters())


def _rows(tokens: Tokens, rows: slice) -> Tokens:
    return Tokens(tokens.features[rows], tokens.position[rows], tokens.ignore[rows])


def _concat(parts: list[Tokens]) -> Tokens:
    """Several crops' tokens as one row of tokens."""
    if len(parts) == 1:
        return parts[0]
    return Tokens(
        *(torch.cat([getattr(p, n) for p in parts], 1) for n in ("features", "position", "ignore"))
    )


def _needed(ignore: Tensor, like: Tensor) -> Tensor | None:
    """A mask on the device of `like`, or None if it is known to hide nothing."""
    if ignore.device.type == "cpu" and not ignore.any():
        return None
    return ignore.to(like.device)
