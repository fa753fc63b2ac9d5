"""What STARK's authors tried and dropped (Table 7): four trackers, each STARK with one change.

The paper describes each in a sentence or two of section 4.4; where that leaves a choice, ours is
said. Two change more than their name says: the updated query stands in place of the dynamic
template (the paper extends STARK-S50: dynamic=False) and learns from clips; Hungarian matching
needs scores from the start, so it is learned in one stage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackkit.boxes import cxcywh_to_xyxy, giou
from trackkit.errors import Range, check_fields
from trackkit.frames import SampleSpec
from trackkit.heads import MLP
from trackkit.stages import Stage
from trackkit.trackers.stark import STARK, Answer, STARKConfig, STARKState, Tokens, concat


@dataclass(frozen=True)
class STARKTemplateQueryConfig(STARKConfig):
    def __post_init__(self):
        super().__post_init__()
        _need(self.decoder_layers, "a template that asks needs a decoder")


class STARKTemplateQuery(STARK):
    """The template's tokens ask, and do not meet the search tokens before the decoder."""

    Config = STARKTemplateQueryConfig

    def make_query(self) -> None:
        return None

    def forward(
        self, templates: list[Tokens], search: Tokens, query: None = None, maps: bool = False
    ) -> Answer:
        seen = {} if maps else None
        templates, search = self.marked(templates, search)
        asked = self.run_encoder(concat(templates), seen, "encoder_template")  # (B, Z, D)
        memory = self.run_encoder(search, seen)  # (B, X, D)
        query = concat(templates).position.to(asked)
        decoded = self.run_decoder(asked, query, memory, search, seen)
        # the head needs one vector; the paper does not say which
        return self.answer(memory, search, decoded.mean(1, keepdim=True), seen)


@dataclass(frozen=True)
class STARKHungarianConfig(STARKConfig):
    queries: int = 10  # questions to the decoder

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, queries=Range(1, 4096))
        _need(self.score, "Hungarian matching needs the score head")


class STARKHungarian(STARK):
    """Several questions: only the best answer learns the box, and the best score is taken."""

    Config = STARKHungarianConfig

    def make_query(self) -> nn.Embedding:
        return nn.Embedding(self.config.queries, self.config.width)

    def choose(self, answer: Answer) -> tuple[Tensor, Tensor]:
        return super().choose(_only(answer, answer.logits.argmax(1)))

    def losses(self, answer: Answer, truth: Tensor, labels: Tensor, kind: str) -> dict[str, Tensor]:
        chosen = hungarian(answer, truth)
        found = super().losses(_only(answer, chosen), truth, labels, "box")
        wanted = F.one_hot(chosen, self.config.queries) * labels[:, None]
        return _with_score(found, answer.logits, wanted)

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        return _at_once(super().recipe(scale, preset))


def hungarian(answer: Answer, truth: Tensor) -> Tensor:
    """Which query (B,) fits the one true box (B, 4) cxcywh best: least 2 GIoU loss + 5 L1 -
    probability.

    With a single object, the Hungarian algorithm's optimal assignment is the cheapest query.
    """
    with torch.no_grad():
        boxes = cxcywh_to_xyxy(answer.boxes)
        truth = cxcywh_to_xyxy(truth)[:, None].clamp(0, 1).expand_as(boxes)
        distance = 2 * (1 - giou(boxes, truth)) + 5 * (boxes - truth).abs().mean(-1)
        return (distance - answer.logits.sigmoid()).argmin(1)


def _only(answer: Answer, chosen: Tensor) -> Answer:
    """The answers to one question (B,) of each search crop."""
    rows = torch.arange(len(chosen), device=chosen.device)
    boxes, logits = (t[rows, chosen][:, None] for t in (answer.boxes, answer.logits))
    corners = answer.corners and tuple(c[rows, chosen][:, None] for c in answer.corners)
    return replace(answer, boxes=boxes, logits=logits, corners=corners)


@dataclass(frozen=True)
class STARKUpdatedQueryConfig(STARKConfig):
    def __post_init__(self):
        super().__post_init__()
        _need(self.decoder_layers, "an updated query needs a decoder")


@dataclass(frozen=True)
class STARKUpdatedQueryState(STARKState):
    query: Tensor  # (B, 1, D)


class STARKUpdatedQuery(STARK):
    """The answer in the last frame whose score exceeds `update_threshold` changes the question."""

    Config = STARKUpdatedQueryConfig

    def add_heads(self) -> None:
        super().add_heads()
        self.next_query = MLP(*[self.config.width] * 3, depth=2)

    def query_after(self, decoded: Tensor) -> Tensor:
        """The next frame's question (B, 1, D), from the answer (B, 1, D) of a confident one."""
        return self.query.weight + self.next_query(decoded)

    def start(self, frames: list[Tensor], boxes_xywh: Tensor) -> STARKUpdatedQueryState:
        first = super().start(frames, boxes_xywh)
        query = self.query.weight.repeat(len(frames), 1, 1)
        return STARKUpdatedQueryState(**vars(first), query=query)

    def ask(self, state: STARKUpdatedQueryState, search: Tokens, maps: bool) -> Answer:
        return self(state.templates, search, state.query, maps)

    def remember(
        self, state: STARKUpdatedQueryState, frames: list[Tensor], answer: Answer, score: Tensor
    ) -> tuple[STARKUpdatedQueryState, Tensor]:
        state, due = super().remember(state, frames, answer, score)
        confident = (score > self.config.update_threshold).to(self.device)[:, None, None]
        query = torch.where(confident, self.query_after(answer.decoded), state.query)
        return replace(state, query=query), due

    def compare(
        self, templates: list[Tokens], search: Tokens, truth: Tensor, labels: Tensor, kind: str
    ) -> dict[str, Tensor]:
        """One search after the other: the answer in one is part of the question in the next."""
        count, query, parts = len(search.features) // len(templates[0].features), None, []
        for i in range(count):
            now = slice(i, None, count)
            answer = self(templates, search.each(lambda t, now=now: t[now]), query)
            parts.append(self.losses(answer, truth[now], labels[now], kind))
            query = self.query_after(answer.decoded)
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    def samples(self, negatives: float = 0.0) -> SampleSpec:
        """Clips of two neighbouring searches."""
        spec = super().samples(negatives)
        rule = replace(spec.rule, min_usable=2 * (spec.templates + 2) + 1)
        return replace(spec, searches=2, order="clip", rule=rule)


@dataclass(frozen=True)
class STARKJointConfig(STARKConfig):
    def __post_init__(self):
        super().__post_init__()
        _need(self.score, "joint training needs the score head")


class STARKJoint(STARK):
    """Localisation (Eq. 2) and score (Eq. 3) are learned at once, not in two stages."""

    Config = STARKJointConfig

    def losses(self, answer: Answer, truth: Tensor, labels: Tensor, kind: str) -> dict[str, Tensor]:
        found = super().losses(answer, truth, labels, "box")
        return _with_score(found, answer.logits, labels[:, None].expand_as(answer.logits))

    def recipe(self, scale: str, preset: str = "") -> list[Stage]:
        return _at_once(super().recipe(scale, preset), sample=self.samples(negatives=0.5))


VARIANTS = STARKTemplateQuery, STARKHungarian, STARKUpdatedQuery, STARKJoint


def _with_score(losses: dict[str, Tensor], logits: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    score = F.binary_cross_entropy_with_logits(logits, wanted.to(logits))
    return {**losses, "score": score, "loss": losses["loss"] + score}


def _at_once(stages: list[Stage], **changes) -> list[Stage]:
    """The first stage alone, which learns the score as well."""
    trainable = (*stages[0].trainable, "score_head.*")
    return [replace(stages[0], trainable=trainable, **changes)]


def _need(there: object, text: str) -> None:
    if not there:
        raise ValueError(text)
