"""STARK as a tracker: states, batches, templates, maps, geometry, odd input. Small networks that
nobody has trained.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trackkit.boxes import xywh_to_cxcywh
from trackkit.errors import DataError
from trackkit.sequences import ArraySequence
from trackkit.synth import SynthConfig, SynthDataset
from trackkit.trackers.base import join, take
from trackkit.trackers.stark import STARK, Answer, STARKConfig
from trackkit.trackers.stark_variants import STARKUpdatedQuery
from trackkit.tracking import Online, track, track_many

SMALL = {
    "template_size": 32, "search_size": 64, "width": 16, "heads": 2, "feedforward": 32,
    "encoder_layers": 2, "decoder_layers": 1, "head_channels": 16, "update_interval": 2,
    "update_threshold": 0.0,
}  # fmt: skip


def small(seed: int = 0, cls: type[STARK] = STARK, **changes) -> STARK:
    """A network that nobody has trained, with norms and scores that say something."""
    torch.manual_seed(seed)
    tracker = cls(cls.Config.tiny(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for layer in (getattr(tracker, "score_head", None), tracker.box_head):
            for p in layer.parameters() if layer else ():
                p.mul_(2 if p.ndim > 1 else 1)
    return tracker


@pytest.fixture(scope="module")
def videos():
    """Of several lengths; the third of another size, the last at the border of its frame."""
    made = [
        SynthDataset(SynthConfig(frames=n), seed=1, length=4)[i] for i, n in enumerate((6, 3, 5))
    ]
    made[2] = SynthDataset(SynthConfig(frames=5, width=200, height=160), seed=2, length=1)[0]
    images = [made[0].frame(i) for i in range(4)]
    made.append(ArraySequence("border", images, torch.tensor([[-9.0, 190, 60, 45]]).repeat(4, 1)))
    return made


def firsts(videos) -> tuple[list[Tensor], Tensor]:
    return [video.frame(0) for video in videos], torch.cat(
        [video.boxes_xywh[:1] for video in videos]
    )


def parts(state) -> list[Tensor]:
    """All tensors of a state, in order."""
    if isinstance(state, Tensor):
        return [state]
    if dataclasses.is_dataclass(state):
        return [t for field in dataclasses.fields(state) for t in parts(getattr(state, field.name))]
    return []


KINDS = {
    "S": {"dynamic": False, "score": False},
    "ST": {},
    "no score": {"score": False},
    "updated query": {"cls": STARKUpdatedQuery, "dynamic": False},
    "authors' habits": {"exact": False},
}


@pytest.fixture(params=KINDS, scope="module")
def kind(request) -> STARK:
    return small(**KINDS[request.param])


# ---- states ----


def test_state_is_explicit(kind, videos):
    """`step` changes nothing that it is given, and the same state goes on to the same boxes."""
    video = videos[0]
    state = kind.start([video.frame(0)], video.boxes_xywh[:1])
    state, _ = kind.step(state, [video.frame(1)])
    snapshot, runs = copy.deepcopy(state), []
    for begin in (state, snapshot, state):
        boxes = []
        for i in range(2, 6):
            begin, prediction = kind.step(
                begin, [video.frame(i)], maps=i == 3 and begin is not snapshot
            )
            boxes += [prediction.box, prediction.score[:, None]]
        runs.append(torch.cat([b.flatten() for b in boxes]))
    assert all(torch.equal(a, b) for a, b in zip(parts(state), parts(snapshot), strict=True))
    assert torch.equal(runs[0], runs[2]) and (runs[0] - runs[1]).abs().max() < 1e-4
    assert len(parts(begin)) >= 5 and begin.frame.item() == 5


def test_the_module_remembers_nothing(kind, videos):
    weights = copy.deepcopy(kind.state_dict())
    first, other = (track(kind, videos[0]).boxes_xywh, track(kind, videos[2]))
    assert torch.equal(first, track(kind, videos[0]).boxes_xywh) and len(other.boxes_xywh) == 5
    assert all(torch.equal(weights[k], v) for k, v in kind.state_dict().items())


def test_predictions(kind, videos):
    for video in videos:
        boxes = track(kind, video)
        width, height = video.frame_size(0)
        x, y, w, h = boxes.boxes_xywh[1:].T
        margin = kind.config.margin
        assert (
            boxes.boxes_xywh.dtype == torch.float64
            and ((boxes.scores >= 0) & (boxes.scores <= 1)).all()
        )
        assert (torch.stack([w, h]) >= margin).all() and (torch.stack([x, y]) >= 0).all()
        assert (x <= width - margin).all() and (y <= height - margin).all()


# ---- batches ----


def gap(scores: Tensor) -> float:
    """A threshold in the widest gap between scores, so that rounding does not decide."""
    ordered = scores.sort().values
    widest = ordered.diff().argmax()
    return float(ordered[widest : widest + 2].mean())


def test_lock_step_equals_one_by_one(kind, videos):
    """Padded and unpadded windows side by side, templates and questions renewed for some sequences
    only.
    """
    images = [[video.frame(i) for video in videos] for i in range(3)]
    tracker, state = copy.copy(kind), kind.start(*firsts(videos))
    first, _ = tracker.step(state, images[1])
    scores = tracker.step(first, images[2])[1].score
    tracker.config = replace(kind.config, update_threshold=gap(scores))
    state, predictions = tracker.start(*firsts(videos)), []
    for now in images[1:]:
        state, prediction = tracker.step(state, now, maps=True)
        predictions.append(prediction)
    updated = predictions[-1].maps["updated"]
    some = kind.config.score and kind.config.dynamic
    assert 0 < updated.sum() < 4 if some else updated.all() == kind.config.dynamic
    outside = state.template.ignore.any(1)
    assert outside.any() and not outside.all()
    for k, video in enumerate(videos):
        alone = tracker.start([video.frame(0)], video.boxes_xywh[:1])
        for now, prediction in zip(images[1:], predictions, strict=True):
            alone, single = tracker.step(alone, [now[k]])
            assert (single.box - prediction.box[k]).abs().max() < 1e-4
            assert (single.score - prediction.score[k]).abs().max() < 1e-5
        for one, many in zip(parts(alone), parts(take(state, [k])), strict=True):
            assert one.shape == many.shape and (one.double() - many.double()).abs().max() < 1e-4


def test_sequences_come_and_go(kind, videos):
    """`track_many` takes states out of a batch and joins new ones to it."""
    together = dict(track_many(kind, videos, batch=2))
    assert sorted(together) == [0, 1, 2, 3]
    for index, video in enumerate(videos):
        assert (track(kind, video).boxes_xywh - together[index].boxes_xywh).abs().max() < 1e-4


def test_take_and_join(kind, videos):
    frames, boxes = firsts(videos)
    both = kind.start(frames, boxes)
    swapped = join(take(both, [2, 3]), take(both, [0, 1]))
    _, a = kind.step(both, frames)
    _, b = kind.step(swapped, frames[2:] + frames[:2])
    assert (a.box - b.box.roll(2, 0)).abs().max() < 1e-4


def test_a_template_is_encoded_once(kind, videos):
    """The backbone sees each template once and each frame once."""
    looks, video, z, x = [], videos[0], kind.config.template_size, kind.config.search_size
    hook = kind.backbone.register_forward_pre_hook(
        lambda module, given: looks.append(given[0].shape[-1])
    )
    state = kind.start([video.frame(0)], video.boxes_xywh[:1])
    assert looks == [z]
    for i in range(1, 5):
        looks.clear()
        state, prediction = kind.step(state, [video.frame(i)], maps=True)
        assert looks == ([x, z] if prediction.maps["updated"] else [x])
    hook.remove()


# ---- the dynamic template ----


def follow(tracker: STARK, video, frames: int) -> list:
    """(state before, state after, prediction) of each step."""
    state, steps = tracker.start([video.frame(0)], video.boxes_xywh[:1]), []
    assert state.dynamic is state.template
    for i in range(1, frames):
        before = state
        state, prediction = tracker.step(state, [video.frame(i)])
        steps.append((before, state, prediction))
    return steps


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_the_template_is_renewed_at_the_interval_from_the_new_box(videos, interval):
    tracker = small(update_interval=interval)
    for number, (before, after, prediction) in enumerate(follow(tracker, videos[0], 6), start=1):
        assert after.template is before.template
        if number % interval:
            assert after.dynamic is before.dynamic
        else:
            fresh = tracker.start([videos[0].frame(number)], prediction.box).template
            assert all(
                torch.equal(a, b) for a, b in zip(parts(after.dynamic), parts(fresh), strict=True)
            )
            assert not torch.equal(after.dynamic.features, before.dynamic.features)


def test_a_score_must_exceed_the_threshold(videos):
    score = follow(small(), videos[0], 3)[1][2].score.item()
    for threshold, renewed in ((score, False), (score - 1e-9, True), (1.0, False)):
        before, after, prediction = follow(small(update_threshold=threshold), videos[0], 3)[1]
        assert prediction.score.item() == score and (after.dynamic is not before.dynamic) == renewed


def test_a_refused_update_waits_for_the_next_multiple(videos):
    steps = follow(small(), videos[0], 6)
    second, fourth = (steps[i][2].score.item() for i in (1, 3))
    if second == fourth:
        pytest.fail("two frames cannot be told apart; choose another seed")
    tracker = small(update_threshold=min(second, fourth))
    renewed = [
        after.dynamic is not before.dynamic for before, after, _ in follow(tracker, videos[0], 6)
    ]
    assert sum(renewed) <= 1 and not renewed[0] and not renewed[2] and not renewed[4]


def test_without_a_score_head_every_such_frame_is_taken(videos):
    tracker = small(score=False, update_threshold=1.0)
    renewed = [
        after.dynamic is not before.dynamic for before, after, _ in follow(tracker, videos[0], 6)
    ]
    assert renewed == [False, True, False, True, False]


def test_stark_s_has_no_dynamic_template(videos):
    tracker = small(dynamic=False, score=False, update_interval=1)
    state = tracker.start([videos[0].frame(0)], videos[0].boxes_xywh[:1])
    state, prediction = tracker.step(state, [videos[0].frame(1)], maps=True)
    assert state.dynamic is None and not prediction.maps["updated"].any()


def test_sequences_that_are_not_due_keep_their_template(videos):
    tracker, (frames, boxes) = small(), firsts(videos)
    state = tracker.start(frames, boxes)
    state = replace(state, frame=torch.tensor([0, 1, 2, 3]))
    after, prediction = tracker.step(state, frames, maps=True)
    assert prediction.maps["updated"].tolist() == [False, True, False, True]
    changed = [
        not torch.equal(a, b)
        for a, b in zip(after.dynamic.features, state.dynamic.features, strict=True)
    ]
    assert changed == [False, True, False, True]


# ---- maps ----


def test_maps_only_when_asked(kind, videos):
    frames, boxes = firsts(videos)
    state = kind.start(frames, boxes)
    _, quiet = kind.step(state, frames)
    _, loud = kind.step(state, frames, maps=True)
    assert quiet.maps is None
    assert (quiet.box - loud.box).abs().max() < 1e-4, "fused kernels and plain ones agree"
    cfg, maps = kind.config, loud.maps
    search, template = (cfg.search_size // 8) ** 2, (cfg.template_size // 8) ** 2
    tokens = search + template * (2 if cfg.dynamic else 1)
    attention = {
        name: share for name, share in maps.items() if name.startswith(("encoder_", "decoder_"))
    }
    assert {name: tuple(share.shape) for name, share in attention.items()} == {
        "encoder_0": (4, 2, tokens, tokens),
        "encoder_1": (4, 2, tokens, tokens),
        "decoder_0": (4, 2, 1, tokens),
    }
    for share in attention.values():
        assert torch.allclose(share.sum(-1), torch.ones(()), atol=1e-5) and (share >= 0).all()
    hidden = state.template.ignore[3]
    looks = maps["decoder_0"][3, :, :, : len(hidden)]
    assert hidden.any() and (looks[..., hidden] == 0).all(), "nobody looks outside the frame"
    for name in ("top_left", "bottom_right"):
        assert maps[name].shape == (4, 1, cfg.search_size // 8, cfg.search_size // 8)
        assert torch.allclose(maps[name].flatten(1).sum(1), torch.ones(4), atol=1e-5)
    assert maps["crop"].shape == (4, 3, cfg.search_size, cfg.search_size) and maps[
        "window"
    ].shape == (4, 3)
    assert maps["memory"].shape == (4, tokens, cfg.width) and maps["similarity"].shape == (
        4,
        1,
        search,
    )


def test_the_box_is_the_mean_of_the_corner_maps(videos):
    tracker = small(dynamic=False, score=False, margin=0.0)
    state = tracker.start(*firsts(videos[:1]))
    _, prediction = tracker.step(state, [videos[0].frame(1)], maps=True)
    corners = []
    left, top, side = prediction.maps["window"][0].tolist()
    for name in ("top_left", "bottom_right"):
        share = prediction.maps[name][0, 0]
        cells = torch.arange(8) / 8 * side
        corners.append(((share.sum(0) @ cells).item() + left, (share.sum(1) @ cells).item() + top))
    (x1, y1), (x2, y2) = corners
    box = prediction.box[0].tolist()
    assert box == pytest.approx([x1, y1, max(x2 - x1, 0), max(y2 - y1, 0)], abs=1e-3)


# ---- geometry ----


class Oracle(STARK):
    """Finds in each search crop the box that it is told."""

    told: Tensor

    def forward(self, templates, search, query=None, maps=False):
        batch = len(search.ignore)
        return Answer(
            self.told.expand(batch, 1, 4),
            torch.zeros(batch, 1),
            torch.zeros(batch, 1, 16),
            None,
            {},
        )


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_found_in_the_crop_is_found_in_the_frame(videos, exact):
    tracker, frame = Oracle(STARKConfig.tiny(**SMALL, exact=exact)).eval(), videos[0].frame(0)
    truth = torch.tensor([[100.3, 80.7, 41.0, 33.5]], dtype=torch.float64)
    state = tracker.start([frame], torch.tensor([[97.2, 83.1, 37.0, 35.0]]))
    tracker.told = torch.zeros(1, 1, 4)
    _, prediction = tracker.step(state, [frame], maps=True)
    left, top, side = prediction.maps["window"][0].tolist()
    tracker.told = ((xywh_to_cxcywh(truth) - torch.tensor([left, top, 0, 0])) / side)[:, None]
    _, prediction = tracker.step(state, [frame])
    error = (prediction.box - truth).abs().max()
    assert error < 1e-9 if exact else 0.01 < error <= 0.5, (
        "the authors forget where the window was snapped to"
    )


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "box",
    [
        (-20, -10, 50, 40),
        (280, 200, 80, 80),
        (0, 0, 320, 240),
        (-100, -80, 600, 500),
        (319, 239, 1, 1),
        (150.5, 100.5, 1, 1),
        (10, 10, 0.01, 0.01),
        (-999, 50, 1000, 1),
        (0, 120, 320, 1),
    ],
    ids=str,
)
def test_odd_first_boxes(videos, box, exact):
    """Partly outside, at the border, larger than the frame, tiny: always a box inside the frame."""
    tracker, video = small(exact=exact), videos[0]
    state = tracker.start([video.frame(0)], torch.tensor([box], dtype=torch.float64))
    for i in range(1, 4):
        state, prediction = tracker.step(state, [video.frame(i)])
        x, y, w, h = prediction.box[0].tolist()
        assert 0 <= x <= 316 and 0 <= y <= 236 and 4 <= w <= 320 and 4 <= h <= 240
        assert 0 <= prediction.score.item() <= 1


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "box",
    [(10, 10, NAN, 5), (10, 10, 0, 5), (10, 10, -5, 5), (400, 10, 5, 5), (10, INF, 5, 5)],
    ids=str,
)
def test_impossible_first_boxes(videos, box):
    with pytest.raises(DataError, match="sequence 1"):
        small().start([videos[0].frame(0)] * 2, torch.tensor([[10, 10, 5, 5], box]))


def test_a_network_that_answers_nan_is_an_error_and_not_a_box(videos):
    tracker = small()
    with torch.no_grad():
        tracker.bottleneck.weight.fill_(float("nan"))
    online = Online(tracker)
    online.init(videos[0].frame(0), videos[0].boxes_xywh[0])
    with pytest.raises(DataError, match="NaN"):
        for i in range(1, 3):
            online.update(videos[0].frame(i))


def test_a_frame_smaller_than_its_search_window():
    tracker, frame = small(), torch.randint(0, 255, (3, 21, 17), dtype=torch.uint8)
    state = tracker.start([frame], torch.tensor([[3.0, 4, 9, 9]]))
    _, prediction = tracker.step(state, [frame])
    assert torch.isfinite(prediction.box).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_gpu_tracks_as_the_cpu_does(kind, videos, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    cpu, gpu = (
        dict(track_many(tracker, videos, batch=4)) for tracker in (kind, copy.deepcopy(kind).cuda())
    )
    assert max((cpu[i].boxes_xywh - gpu[i].boxes_xywh).abs().max() for i in cpu) < 0.05
