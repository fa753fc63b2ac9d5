"""Parts of a trained tracker switched off or exchanged, without training it anew.

    tracker = weights.load("stark-tiny")
    cuts = cuts_of(tracker)
    with cuts["no-encoder"].applied(tracker) as cut_tracker:
        ...
    print(compare(tracker, cuts.values(), GOT10k(None, "val")).text())

An ablation says what a network learns without a part, a cut what the trained one does with it: it
costs seconds, and videos are compared with themselves, so that small effects can be told. It is
measured in two ways. In tracking, where one lost target costs all later frames. Or by the `probe`:
each frame is searched around the true last box, with and without the cut, so frames do not depend
on one another and errors are several times smaller.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trackkit.attention import Attention
from trackkit.boxes import xywh_to_cxcywh
from trackkit.crops import context_side
from trackkit.errors import DataError, TrackkitError
from trackkit.evaluation import average_overlap, bounded_iou, sequence_overlaps
from trackkit.progress import bar
from trackkit.sequences import Sequence
from trackkit.trackers.base import Tracker, put, take
from trackkit.trackers.dastm import DASTM, Choices
from trackkit.trackers.mixvit import MixViT, MixViTState, TemplateCache
from trackkit.trackers.ostrack import OSTrack, Template
from trackkit.trackers.procontext import ProContEXT, ProContEXTState
from trackkit.trackers.sbt import SBT, ConvMlp, EoC
from trackkit.trackers.siamfc import SiamFC, SiamFCState
from trackkit.trackers.stark import STARK, STARKState, Tokens
from trackkit.trackers.stark_variants import STARKTemplateQuery
from trackkit.trackers.stmtrack import STMTrack, STMTrackState
from trackkit.trackers.ustam import USTAM

Patch = tuple[Any, str, Any]  # an object, the name of its attribute, and what that is meanwhile


@dataclass(frozen=True)
class Cut:
    """A part of a tracker that is switched off or exchanged: either `changes` of its config, or
    `patches`, attributes of it and of its modules, most of them methods, that are others meanwhile.
    """

    name: str
    sentence: str
    changes: dict[str, Any] = field(default_factory=dict)
    patches: Callable[[Any], Iterable[Patch]] = lambda tracker: ()

    @contextmanager
    def applied(self, tracker: Tracker) -> Iterator[Tracker]:
        """The tracker to use inside `with`: another one with the same weights if the config
        changes, else `tracker` itself, which afterwards is as it was.
        """
        if self.changes:
            tracker = _with_config(tracker, self.changes)
        before: list[Patch] = []
        try:
            for part, name, new in self.patches(tracker):
                before.append((part, name, vars(part).get(name, before)))
                setattr(part, name, new)
            yield tracker
        finally:
            for part, name, old in reversed(before):
                if old is before:  # its class has it
                    delattr(part, name)
                else:
                    setattr(part, name, old)


def _with_config(tracker: Tracker, changes: dict[str, Any]) -> Tracker:
    """A tracker that shares this one's weights and has another config."""
    with torch.device("meta"):  # so no random number is drawn
        other = type(tracker)(replace(tracker.config, **changes))
    weights = tracker.state_dict()
    other.load_state_dict({key: weights[key] for key in other.state_dict()}, assign=True)
    return other.train(tracker.training)


def _around(part: Any, name: str, new: Callable) -> Patch:
    """`new` in place of a method; it is given the method first."""
    return part, name, partial(new, getattr(part, name))


def cuts_of(tracker: Tracker) -> dict[str, Cut]:
    """The cuts of a tracker by name: those of its class, and of its ancestors'. None is without
    effect by its config, as one of a dynamic template where there is none.
    """
    classes = [cls for cls in reversed(type(tracker).__mro__) if cls in CUTS]
    return {cut.name: cut for cls in classes for cut in CUTS[cls](tracker)}


# ---- parts of another video ----


def _others(part: Any) -> Any:
    """What a state holds of B videos, shifted by one: each has that of the next.

    Raises TrackkitError for a single video.
    """
    first = part
    while not isinstance(first, Tensor):
        first = next(value for value in vars(first).values() if value is not None)
    if len(first) < 2:
        raise TrackkitError("a cut with a part of another video needs two videos side by side")
    return take(part, [*range(1, len(first)), 0])


def _exchanged(
    tracker: Tracker, method: str, what: str, new: Callable[[Any], Any] = _others
) -> Patch:
    """A method that reads the field `what` of a state reads something else, and the state that
    comes out has its own again.
    """

    def reads(original: Callable, state: Any, *rest: Any, **named: Any) -> Any:
        own = getattr(state, what)
        given = new(own)

        def restored(part: Any) -> Any:
            # what the method itself has renewed stays
            kept = isinstance(part, type(state)) and getattr(part, what) is given
            return replace(part, **{what: own}) if kept else part

        found = original(replace(state, **{what: given}), *rest, **named)
        return tuple(map(restored, found)) if isinstance(found, tuple) else found

    return _around(tracker, method, reads)


def _template_of_another(method: str, *fields: str) -> Cut:
    """Of trackers whose `method` reads what they know of the target from these fields."""

    def patches(tracker: Tracker) -> Iterator[Patch]:
        # each wraps the one before it
        return (_exchanged(tracker, method, what) for what in fields)

    return Cut(
        "template-of-another",
        "what is known of the target is that of the target of another video",
        patches=patches,
    )


# ---- the cuts of each class ----

UNIFORM = "attention without weighing: each token gathers the mean of all"
TEMPLATES_HIDDEN = "the search tokens do not see the templates' tokens"
NO_POSITIONS = "tokens do not say where in their crop they are, only of which crop"
NEVER = 10**9  # an interval in frames that no video is as long as


def _siamfc(tracker: SiamFC) -> list[Cut]:
    return [_template_of_another("step", "exemplar"), *_no_window(tracker, "window_influence")]


def _no_window(tracker: Tracker, name: str) -> list[Cut]:
    cut = Cut("no-window", "the response is not weighed by a cosine window", {name: 0.0})
    return [cut] if getattr(tracker.config, name) else []


def _stark(tracker: STARK) -> list[Cut]:
    cfg = tracker.config
    cells = (cfg.search_size // tracker.backbone.stride) ** 2  # the last tokens, the search crop's

    def no_encoder(original: Callable, tokens: Tokens, *rest: Any, **named: Any) -> Tensor:
        return tokens.features

    def apart(original: Callable, tokens: Tokens, seen: dict | None) -> Tensor:
        templates = original(tokens.each(lambda t: t[:, :-cells]), seen, "encoder_template")
        return torch.cat([templates, original(tokens.each(lambda t: t[:, -cells:]), seen)], 1)

    def search_alone(original, x, query, memory, tokens, seen) -> Tensor:
        return original(x, query, memory[:, -cells:], tokens.each(lambda t: t[:, -cells:]), seen)

    def patched(method: str, new: Callable) -> Callable[[STARK], list[Patch]]:
        return lambda tracker: [_around(tracker, method, new)]

    fields = ("template", "dynamic") if cfg.dynamic else ("template",)
    cuts = [_template_of_another("ask", *fields)]
    if cfg.encoder_layers:
        skipped = "the encoder is skipped: the tokens go to the decoder as the backbone made them"
        cuts.append(Cut("no-encoder", skipped, patches=patched("run_encoder", no_encoder)))
    if not isinstance(tracker, STARKTemplateQuery):  # whose templates are not in the same row
        split = "in the encoder templates and search crop look at themselves only"
        cuts.append(Cut("template-apart", split, patches=patched("run_encoder", apart)))
        hidden = "the decoder sees the tokens of the search crop only"
        cuts.append(
            Cut("decoder-without-template", hidden, patches=patched("run_decoder", search_alone))
        )
    cuts.append(Cut("uniform-attention", UNIFORM, patches=_uniform_stark))
    if cfg.head == "corner":
        flat = "the head does not weigh search tokens by how much they resemble the answer"
        cuts.append(Cut("no-weighing", flat, patches=_unweighed))
    if cfg.position != "none":
        cuts.append(Cut("no-positions", NO_POSITIONS, {"position": "none"}))
    return cuts + (_dynamic("ask") if cfg.dynamic else [])


def _dynamic(method: str) -> list[Cut]:
    """Of trackers with a dynamic template, which `method` reads."""
    never = "the dynamic template stays that of the first frame"
    foreign = "the dynamic template is that of another video"
    return [
        Cut("dynamic-never-renewed", never, {"update_interval": NEVER}),
        Cut("dynamic-of-another", foreign, patches=lambda t: [_exchanged(t, method, "dynamic")]),
    ]


def _unweighed(tracker: STARK) -> Iterator[Patch]:
    """The corner head is given all search tokens times the mean of their similarities."""
    seen: dict[str, Tensor] = {}

    def locate(original: Callable, memory: Tensor, decoded: Tensor, *rest: Any) -> Any:
        similarity = decoded @ memory.transpose(1, 2)  # (B, Q, N)
        seen["flat"] = similarity.mean(-1)[..., None, None] * memory[:, None]  # (B, Q, N, D)
        return original(memory, decoded, *rest)

    def head(original: Callable, grid: Tensor) -> tuple[Tensor, Tensor]:
        return original(seen["flat"].flatten(0, 1).transpose(1, 2).reshape(grid.shape))

    yield _around(tracker, "locate", locate)
    yield _around(tracker.box_head, "forward", head)


def _uniform_stark(tracker: STARK) -> Iterator[Patch]:
    def mean(layer: Attention, query, key, value, ignore=None, weights=False):
        width = query.shape[-1]
        v = F.linear(value, layer.in_proj_weight[2 * width :], layer.in_proj_bias[2 * width :])
        share = torch.ones_like(v[..., 0]) if ignore is None else (~ignore).to(v)
        share = (share / share.sum(1, keepdim=True))[:, None]  # (B, 1, T)
        shown = share[:, None].expand(-1, layer.heads, query.shape[1], -1) if weights else None
        return layer.out_proj(share @ v).expand_as(query), shown

    for layer in tracker.decoder.layers:
        yield layer, "shortcut", False
    for layer in tracker.modules():
        if isinstance(layer, Attention):
            yield layer, "forward", partial(mean, layer)


def _sbt(tracker: SBT) -> list[Cut]:
    crossed = [name for name, _, cross in tracker.backbone.steps() if cross]
    cuts = [_template_of_another("step", "template")]
    for name in crossed:
        alone = f"{name}, a cross-attention, lets each image look at itself"
        patches = partial(_self_attention, [name])
        cuts.append(Cut(f"no-cross-{name.replace('.', '-')}", alone, patches=patches))
    if crossed:
        alone = "all cross-attentions let each image look at itself: the two never meet"
        cuts.append(Cut("no-cross", alone, patches=partial(_self_attention, crossed)))
    if tracker.config.position == "conditional":
        without = "the MLPs' convolutions, which tell tokens where they are, are skipped"
        cuts.append(Cut("no-position-convolution", without, patches=_no_convolution))
    other = {"simultaneous": "sequential", "sequential": "simultaneous"}[tracker.config.order]
    order = f"cross-attention is {other}: see the config's `order`"
    cuts.append(Cut("order-changed", order, {"order": other}))
    return cuts + _no_window(tracker, "window_influence")


def _self_attention(names: list[str], tracker: SBT) -> Iterator[Patch]:
    """The blocks of these names are SA, where they were CA."""

    def alone(block: EoC, x, z, prepared=None, renew=True, weights=False):
        new, share = block(x, weights)
        return new, block(z)[0] if renew else z, share

    for name, block, _ in tracker.backbone.steps():
        if name in names:
            yield block, "cross", partial(alone, block)


def _no_convolution(tracker: SBT) -> Iterator[Patch]:
    for module in tracker.modules():
        if isinstance(module, ConvMlp):
            yield module.position, "forward", lambda hidden: hidden


def _ostrack(tracker: OSTrack) -> list[Cut]:
    cfg = tracker.config
    cuts = [
        _template_of_another("template_of", "template"),
        Cut("templates-hidden", TEMPLATES_HIDDEN, patches=partial(_regathered, _search_alone)),
        Cut("uniform-attention", UNIFORM, patches=partial(_regathered, _mean)),
        Cut("no-positions", NO_POSITIONS, patches=_no_positions),
    ]
    if not cfg.prune_blocks:
        return cuts
    if cfg.keep_ratio < 1:
        random = "pruning keeps search tokens that are drawn at random"
        cuts.append(Cut("keep-random", random, patches=_keep_random))
        worst = "pruning keeps the search tokens that the templates look at least"
        cuts.append(Cut("keep-worst", worst, patches=_keep_worst))
    for ratio in (1.0, 0.5, 0.2):
        share = f"each pruning keeps {ratio:.0%} of the search tokens"
        if ratio != cfg.keep_ratio:
            cuts.append(Cut(f"keep-{ratio}", share, {"keep_ratio": ratio}))
    return cuts


def _regathered(how: Callable, tracker: OSTrack) -> Iterator[Patch]:
    """What tokens gather is `how`(mixed, q, k, v, number of template tokens); pruning reads the
    attention as it would be.
    """
    seen: dict[str, Any] = {}

    def forward(original: Callable, template: Template, *rest: Any, **named: Any) -> Any:
        seen["known"] = template.tokens.shape[1]
        return original(template, *rest, **named)

    def project(original: Callable, x: Tensor) -> tuple[Tensor, ...]:
        seen["qkv"] = original(x)
        return seen["qkv"]

    def gather(original: Callable, x: Tensor, mixed: Tensor) -> Tensor:
        return original(x, how(mixed, *seen["qkv"], seen["known"]))

    yield _around(tracker, "forward", forward)
    for block in tracker.blocks:
        yield _around(block, "project", project)
        yield _around(block, "gather", gather)


def _search_alone(mixed: Tensor, q: Tensor, k: Tensor, v: Tensor, known: int) -> Tensor:
    alone = F.scaled_dot_product_attention(*(t[:, :, known:] for t in (q, k, v)))
    return torch.cat([mixed[:, :, :known], alone], 2)


def _mean(mixed: Tensor, q: Tensor, k: Tensor, v: Tensor, known: int) -> Tensor:
    return v.mean(2, keepdim=True).expand_as(v)


def _no_positions(tracker: OSTrack | MixViT) -> Iterator[Patch]:
    """The mean of all positions, in which the two crops may differ, for each token."""

    def tokens(original: Callable, images: Tensor, position: Tensor) -> Tensor:
        return original(images, position.mean(1, keepdim=True).expand_as(position))

    yield _around(tracker, "tokens", tokens)


def _keep_random(tracker: OSTrack) -> Iterator[Patch]:
    draws = torch.Generator().manual_seed(0)

    def score(original: Callable, *given: Any) -> Tensor:
        asked = original(*given)
        return torch.rand(asked.shape, generator=draws).to(asked)

    yield _around(tracker, "pruning_score", score)


def _keep_worst(tracker: OSTrack) -> Iterator[Patch]:
    yield _around(tracker, "pruning_score", lambda original, *given: -original(*given))


def _procontext(tracker: ProContEXT) -> list[Cut]:
    cfg, cuts = tracker.config, []
    if cfg.extra_factors:
        first, *more = cfg.extra_factors
        small = "the templates with more background than the first are removed"
        cuts.append(Cut("no-background", small, {"extra_factors": ()}))
        large = {"template_factor": first, "extra_factors": tuple(more)}
        cuts.append(Cut("no-target", "the templates that show the target alone are removed", large))
    if cfg.dynamic:
        without = "the dynamic templates are removed"
        cuts += [Cut("no-dynamic", without, {"dynamic": False}), *_dynamic("template_of")]
        cuts.append(_template_of_another("template_of", "template", "dynamic"))
    return cuts


def _stmtrack(tracker: STMTrack) -> list[Cut]:
    def no_map(original: Callable, crops: Tensor, foreground: Tensor) -> Tensor:
        return original(crops)

    def first(original: Callable, state: STMTrackState, numbers: Tensor) -> tuple:
        return original(state, torch.ones_like(numbers[:, :1]))

    def latest(original: Callable, state: STMTrackState, numbers: Tensor) -> tuple:
        return original(state, state.count[:, None])

    def another(original: Callable, state: STMTrackState, numbers: Tensor) -> tuple:
        return original(state, _others(numbers))

    def foreign(tracker: STMTrack) -> Iterator[Patch]:
        yield _around(tracker, "_recalled", another)
        yield _exchanged(tracker, "_recalled", "memory")

    def reads(new: Callable) -> Callable[[STMTrack], list[Patch]]:
        return lambda tracker: [_around(tracker, "_recalled", new)]

    unmarked = "memory frames are encoded without the map of where the target is"
    marks = lambda t: [_around(t.memory, "forward", no_map)]  # noqa: E731
    return [
        Cut("no-foreground", unmarked, patches=marks),
        Cut("only-first", "of the memory the first frame only is looked at", patches=reads(first)),
        Cut("only-latest", "of the memory the last frame only is looked at", patches=reads(latest)),
        Cut("memory-of-another", "the memory is that of another video", patches=foreign),
        *_no_window(tracker, "window"),
    ]


def _dastm(tracker: DASTM) -> list[Cut]:
    cfg, cuts = tracker.config, []
    if cfg.gate == "none":
        return cuts

    def forced(number: int, tracker: DASTM) -> Iterator[Patch]:
        def chosen(original: Callable, *given: Any) -> Choices:
            said = original(*given)
            one = torch.full(said.weights.shape[:-1], number, device=said.weights.device)
            return replace(said, weights=F.one_hot(one, said.weights.shape[-1]).to(said.weights))

        yield _around(tracker.attention, "chosen", chosen)

    for number, name in enumerate(["none", *tracker.attention.branches]):
        choice = f"the gate chooses {'no module' if name == 'none' else name} for all memory frames"
        cuts.append(Cut(f"gate-{name}", choice, patches=partial(forced, number)))
    if "random" not in (cfg.test_gate, cfg.gate):
        cuts.append(Cut("gate-random", "the gate chooses at random", {"test_gate": "random"}))
    return cuts


def _mixvit(tracker: MixViT) -> list[Cut]:
    def forgetful(original: Callable, cache: TemplateCache, *rest: Any, **named: Any) -> Any:
        none = TemplateCache(cache.keys[:, :, :, :0], cache.values[:, :, :, :0])
        return original(none, *rest, **named)

    def unasked(original: Callable, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = original(x)
        return torch.zeros_like(q), k, v  # all logits are 0

    return [
        _template_of_another("answer_and_carry", "cache"),
        Cut(
            "templates-hidden",
            TEMPLATES_HIDDEN,
            patches=lambda t: [_around(t, "forward", forgetful)],
        ),
        Cut(
            "uniform-attention",
            UNIFORM,
            patches=lambda t: [_around(block, "project", unasked) for block in t.blocks],
        ),
        Cut("no-positions", NO_POSITIONS, patches=_no_positions),
    ]


def _ustam(tracker: USTAM) -> list[Cut]:
    def carried(new: Callable[[Tensor], Tensor]) -> Callable[[USTAM], list[Patch]]:
        return lambda tracker: [_exchanged(tracker, "answer_and_carry", "carried", new)]

    def even(maps: Tensor) -> Tensor:
        return maps.mean(-1, keepdim=True).expand_as(maps)

    cuts = []
    if tracker.config.spatial:
        zeroed = "the spatial layer answers 0"
        silent = lambda t: [(t.spatial_attention.fc, "forward", torch.zeros_like)]  # noqa: E731
        cuts.append(Cut("spatial-zero", zeroed, patches=silent))
        without = "without spatial attention: the last block's map is as it is"
        cuts.append(Cut("no-spatial", without, {"spatial": False}))
    if tracker.config.temporal:
        without = "without temporal attention: no map is carried to the next frame"
        cuts.append(Cut("no-temporal", without, {"temporal": False}))
        foreign = "the carried map is that of another video"
        cuts.append(Cut("map-of-another", foreign, patches=carried(_others)))
        flat = "the carried map is uniform: the mean of each of its rows"
        cuts.append(Cut("map-uniform", flat, patches=carried(even)))
        zero = "the carried map is 0, as for a first frame"
        cuts.append(Cut("map-zero", zero, patches=carried(torch.zeros_like)))
    return cuts


CUTS: dict[type[Tracker], Callable[[Any], list[Cut]]] = {
    SiamFC: _siamfc,
    STARK: _stark,
    SBT: _sbt,
    OSTrack: _ostrack,
    ProContEXT: _procontext,
    STMTrack: _stmtrack,
    DASTM: _dastm,
    MixViT: _mixvit,
    USTAM: _ustam,
}


# ---- the probe: what a state is when all answers so far were the truth ----


@singledispatch
def told(tracker: Tracker, before: Any, after: Any, frames: list[Tensor], boxes: Tensor) -> Any:
    """The state after a step if the tracker had answered `boxes` (B, 4) in `frames`; `before` and
    `after` are those of the step. What it remembers of this frame is of these boxes, and what is
    due is remembered, whatever its score.

    A tracker of your own: `told.register`, unless its state has a field `box` and all else in it
    does not depend on the answer.
    """
    if not hasattr(after, "box"):
        raise TrackkitError(
            f"the probe does not know where {type(tracker).__name__} keeps its last box: "
            "cuts.told.register says it"
        )
    return replace(after, box=boxes)


@told.register
def _(tracker: SiamFC, before, after: SiamFCState, frames, boxes) -> SiamFCState:
    z, x, box = tracker.template_crop, tracker.search_crop, xywh_to_cxcywh(boxes)
    side = context_side(boxes, z.context) * x.size / z.size
    return replace(after, centre=box[:, :2], size=box[:, 2:], side=side)


@told.register
def _(tracker: STARK, before: STARKState, after: STARKState, frames, boxes) -> STARKState:
    due = (after.frame % tracker.config.update_interval == 0) & (before.dynamic is not None)
    dynamic = before.dynamic
    if due.any():
        dynamic = tracker._renewed(dynamic, tracker.moved(frames), boxes, due)
    return replace(after, box=boxes, dynamic=dynamic)


@told.register
def _(tracker: ProContEXT, before, after: ProContEXTState, frames, boxes) -> ProContEXTState:
    due = (after.frame % tracker.config.update_interval == 0) & tracker.config.dynamic
    dynamic, rows = before.dynamic, due.nonzero()[:, 0].tolist()
    if rows:
        new = tracker.make_template([tracker.moved(frames)[i] for i in rows], boxes[rows])
        dynamic = put(dynamic, rows, new)
    return replace(after, box=boxes, dynamic=dynamic)


@told.register
def _(tracker: MixViT, before: MixViTState, after: MixViTState, frames, boxes) -> MixViTState:
    interval, cache = tracker.config.update_interval, before.cache
    if interval and (due := after.frame % interval == 0).any():
        cache = tracker._renewed(before, tracker.moved(frames), boxes, due)
    return replace(after, box=boxes, cache=cache)


@told.register
def _(tracker: STMTrack, before: STMTrackState, after, frames, boxes) -> STMTrackState:
    centre, sure = boxes[:, :2] + tracker._half(boxes[:, 2:]), torch.ones_like(before.confident)
    where = {"centre": centre, "size": boxes[:, 2:], "count": after.count, "confident": sure}
    return tracker._memorise(replace(before, **where), tracker.moved(frames))


def probe(tracker: Tracker, sequences: Iterable[Sequence], batch: int = 16) -> dict[str, float]:
    """Overlap of a tracker's answers with the truth when each frame is searched around the true
    box of the frame before: the mean over the frames of each video, by its name, 0..1.

    What it knows of the target is what it got in the first frame and, if it has a memory, a dynamic
    template, a map of the last frame, what it would have got if its answers had been true (`told`).
    The truth enters by that, of frames that have passed, and by nothing else. `batch` videos go
    side by side. Frames count if the target is visible in them and in the one before.

    Raises DataError for videos without labels, or in which no frame counts.
    """
    return _measured(tracker, sequences, batch, True)


def _tracked(tracker: Tracker, sequences: Iterable[Sequence], batch: int = 16) -> dict[str, float]:
    """Average overlap in tracking: of each video, by its name, 0..1."""
    return _measured(tracker, sequences, batch, False)


def _measured(
    tracker: Tracker, sequences: Iterable[Sequence], batch: int, probing: bool
) -> dict[str, float]:
    # of about one length; for a cut with parts of another video none is left alone
    videos = sorted((sequences[i] for i in range(len(sequences))), key=len)
    groups = max(1, -(-len(videos) // batch))
    found = {}
    for group in range(groups):
        part = videos[len(videos) * group // groups : len(videos) * (group + 1) // groups]
        found |= _side_by_side(tracker, part, probing)
    return {name: found[name] for name in sorted(found)}


@torch.no_grad()
def _side_by_side(tracker: Tracker, videos: list[Sequence], probing: bool) -> dict[str, float]:
    for video in videos:
        if not video.labelled:
            raise DataError(
                f"sequence {video.name} has no labels, so nothing can be measured on it"
            )
    lengths = [len(video) for video in videos]
    truth = [_last_seen(video) for video in videos]
    state = tracker.start([v.frame(0) for v in videos], torch.stack([t[0] for t in truth]))
    answers = [torch.stack([t[0] for t in truth])]
    for now in range(1, max(lengths)):
        # a video that has ended stands still: others may be looking at it
        at = [min(now, length - 1) for length in lengths]
        frames = [video.frame(i) for video, i in zip(videos, at, strict=True)]
        before = state
        state, prediction = tracker.step(before, frames)
        answers.append(prediction.box)
        if probing:
            boxes = torch.stack([t[i] for t, i in zip(truth, at, strict=True)])
            state = told(tracker, before, state, frames, boxes)
    found = torch.stack(answers, 1)  # (B, T, 4)
    measure = _probed if probing else lambda v, boxes: average_overlap(sequence_overlaps(v, boxes))
    rows = zip(videos, found, lengths, strict=True)
    return {video.name: measure(video, boxes[:length]) for video, boxes, length in rows}


def _last_seen(video: Sequence) -> Tensor:
    """True boxes (N, 4); where the target is not visible, the last one in which it was."""
    index = torch.where(video.visible, torch.arange(len(video)), 0).cummax(0).values
    return video.boxes_xywh[index]


def _probed(video: Sequence, boxes: Tensor) -> float:
    sizes = torch.tensor([video.frame_size(i) for i in range(len(video))])
    counts = video.visible[1:] & video.visible[:-1]
    if not counts.any():
        raise DataError(f"sequence {video.name}: no frame that follows one with a visible target")
    return float(bounded_iou(boxes, video.boxes_xywh, sizes)[1:][counts].mean())


# ---- with and without ----

HOW = {"probe": probe, "track": _tracked}
_ABOUT = {
    "probe": "frames searched around the true last box",
    "track": "tracking, average overlap",
}


@dataclass(frozen=True)
class Result:
    """Overlaps of the videos by name, 0..1, with the whole tracker (`whole`) and under each cut."""

    tracker: str
    how: str
    data: str
    whole: dict[str, float]
    cuts: dict[str, dict[str, float]]
    sentences: dict[str, str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of each cut: name; mean over the videos; difference, that of cut minus whole; error, its
        standard error over videos, None for one; verdict, "cannot be told" if the difference is
        less than two errors.
        """
        rows = []
        for name, videos in self.cuts.items():
            each = [value - self.whole[video] for video, value in videos.items()]
            error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
            row = {"name": name, "mean": statistics.fmean(videos.values())}
            row |= {"difference": statistics.fmean(each), "error": error}
            rows.append(row | {"verdict": _verdict(each, row["difference"], error)})
        return rows

    def text(self) -> str:
        """A Markdown table, and below it what its numbers are."""
        lines = [["cut", "overlap", "difference", "verdict", "what is cut"]]
        lines.append(["none", f"{statistics.fmean(self.whole.values()):.3f}", "-", "-", "nothing"])
        for row in self.rows:
            error = "" if row["error"] is None else f" ± {row['error']:.3f}"
            numbers = f"{row['mean']:.3f}", f"{row['difference']:+.3f}{error}"
            lines.append([row["name"], *numbers, row["verdict"], self.sentences[row["name"]]])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        shown = "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)
        return f"""{self.tracker}: {_ABOUT[self.how]}

{shown}

overlap: mean over the {len(self.whole)} videos of {self.data}, 0 to 1.
difference: cut minus none, mean over videos ± its standard error; it cannot be told if it is less \
than two errors.
"""


def _verdict(each: list[float], difference: float, error: float | None) -> str:
    if not any(each):
        return "no effect"
    if error is None or abs(difference) < 2 * error:
        return "cannot be told"
    return "worse" if difference < 0 else "better"


def compare(
    tracker: Tracker,
    cuts: Iterable[Cut],
    sequences: Any,
    how: str = "probe",
    name: str = "",
    progress: bool = False,
) -> Result:
    """Measure a tracker without and with each of the cuts, one at a time, on the same videos.

    `how` is "probe" or "track", `name` the tracker's in the result. Raises TrackkitError for
    another `how`.
    """
    if how not in HOW:
        raise TrackkitError(f"how must be probe or track, got {how!r}")
    cuts, measure = list(cuts), HOW[how]
    with bar(total=1 + len(cuts), desc=how, unit="cut", shown=progress) as shown:
        whole, found = measure(tracker, sequences), {}
        shown.update()
        for cut in cuts:
            with cut.applied(tracker) as changed:
                found[cut.name] = measure(changed, sequences)
            shown.update()
    data = getattr(sequences, "name", None) or f"{len(sequences)} sequences"
    sentences = {cut.name: cut.sentence for cut in cuts}
    return Result(name or type(tracker).__name__, how, data, whole, found, sentences)
