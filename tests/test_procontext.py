"""OSTrack and ProContEXT: what is removed, what is remembered, what happens to bad input."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from golden import frames

from trackkit import official
from trackkit.errors import CheckpointError, DataError
from trackkit.sampling import Samples
from trackkit.stages import SCALES
from trackkit.synth import SynthConfig, SynthDataset
from trackkit.trackers.base import join, take
from trackkit.trackers.ostrack import OSTrack, OSTrackConfig, Template
from trackkit.trackers.procontext import ProContEXT, ProContEXTConfig
from trackkit.training import train
from trackkit.weights import TRACKERS, create, load


@pytest.fixture(scope="module")
def tracker() -> ProContEXT:
    torch.manual_seed(0)
    return create("procontext-tiny")


@pytest.fixture(scope="module")
def video():
    return frames("procontext", 6, 200, 260)


def changed(tracker: ProContEXT, **changes) -> ProContEXT:
    """The same weights with another config."""
    other = ProContEXT(replace(tracker.config, **changes)).eval()
    other.load_state_dict(tracker.state_dict())
    return other


def run(tracker, video, boxes=None, **options):
    images, truth = video
    state = tracker.start(images[:1], torch.tensor(truth[:1]) if boxes is None else boxes)
    states, predictions = [state], []
    for image in images[1:]:
        state, prediction = tracker.step(state, [image], **options)
        states.append(state)
        predictions.append(prediction)
    return states, predictions


def test_one_template_is_ostrack(tracker, video):
    """Without scales and without a present, what is left is OSTrack, bit for bit and with the same
    weights, in tracking and in training; more templates do change things.
    """
    one = changed(tracker, extra_factors=(), dynamic=False)
    plain = OSTrack(OSTrackConfig.tiny()).eval()
    plain.load_state_dict(tracker.state_dict())
    states, predictions = run(one, video, maps=True)
    assert states[-1].dynamic is None and states[-1].template.tokens.shape[1] == 36
    _, expected = run(plain, video, maps=True)
    for ours, theirs in zip(predictions, expected, strict=True):
        assert torch.equal(ours.box, theirs.box) and torch.equal(ours.score, theirs.score)
        assert all(torch.equal(ours.maps[name], value) for name, value in theirs.maps.items())
    batch = batch_of(one, 2)
    assert torch.equal(one.loss(batch)["loss"], plain.loss(batch)["loss"])
    assert replace(one.samples(), template_factors=()) == plain.samples()
    for scale in {*SCALES} - {"laptop"}:
        ours, theirs = one.recipe(scale)[0], plain.recipe(scale)[0]
        assert replace(ours, sample=theirs.sample) == theirs
    assert one.recipe("laptop")[0].steps < plain.recipe("laptop")[0].steps, "it can track already"
    _, four = run(tracker, video)
    assert not torch.equal(predictions[0].score, four[0].score)


def test_a_batch_is_its_sequences(tracker, video):
    """Each sample loses its own tokens, and nothing else depends on the neighbours."""
    images, boxes = video
    other, other_boxes = frames("procontext other", 6, 190, 250)
    batch = tracker.start([images[0], other[0]], torch.tensor([boxes[0], other_boxes[0]]))
    alone = [
        tracker.start([images[0]], torch.tensor(boxes[:1])),
        tracker.start([other[0]], torch.tensor(other_boxes[:1])),
    ]
    for index in range(1, 4):
        batch, together = tracker.step(batch, [images[index], other[index]], maps=True)
        for i, video_frames in enumerate((images, other)):
            alone[i], single = tracker.step(alone[i], [video_frames[index]], maps=True)
            assert torch.equal(together.maps["kept"][i], single.maps["kept"][0])
            assert torch.allclose(together.box[i], single.box[0], atol=1e-3)
    assert not torch.equal(together.maps["kept"][0], together.maps["kept"][1])
    again = join(take(batch, [1]), take(batch, [0]))
    _, swapped = tracker.step(again, [other[4], images[4]])
    _, straight = tracker.step(batch, [images[4], other[4]])
    assert torch.allclose(swapped.box.flip(0), straight.box, atol=1e-3)


def test_removed_cells_are_zero_and_the_others_where_they_were(tracker, video):
    seen = []
    hook = tracker.head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    _, predictions = run(tracker, video, maps=True)
    hook.remove()
    kept = predictions[-1].maps["kept"][0]  # (prunings, g, g)
    assert kept.sum((1, 2)).tolist() == [101, 71]  # of 144: ceil(0.7 n), twice
    assert (kept[1] <= kept[0]).all()
    assert torch.equal(seen[-1][0].abs().sum(0) > 0, kept[1])
    focus = predictions[-1].maps["focus"][0]
    assert (
        (focus > 0)
        == torch.stack([torch.ones_like(kept[0]), torch.ones_like(kept[0]), kept[0], kept[1]])
    ).all()


def test_kept_tokens_do_not_depend_on_their_order(tracker, video):
    """Everything after the pruning treats tokens as a set: with a keep ratio that removes none,
    order aside, nothing changes.
    """
    search = torch.randn(2, 144, 64)
    four = Template(torch.randn(2, 144, 64), torch.rand(2, 4, 4))
    with torch.no_grad():
        straight = tracker(four, search, keep=1.0)
        shuffled = tracker(replace(four, tokens=four.tokens.flip(1)), search, keep=1.0)
    assert straight.kept == []
    assert torch.allclose(straight.score, shuffled.score, atol=1e-5)


@pytest.mark.parametrize(("changes", "frames_with_update"), [
    # the paper: whenever the score is high
    ({"update_interval": 1, "update_threshold": 0.0}, [1, 2, 3, 4, 5]),
    ({"update_interval": 2, "update_threshold": 0.0}, [2, 4]),  # the code: only now and then
    ({"update_interval": 1, "update_threshold": 0.9999}, []),
])  # fmt: skip
def test_update_rules(tracker, video, changes, frames_with_update):
    states, predictions = run(changed(tracker, **changes), video, maps=True)
    assert [
        i + 1 for i, p in enumerate(predictions) if p.maps["updated"].item()
    ] == frames_with_update
    for index, (before, after) in enumerate(itertools.pairwise(states), 1):
        assert torch.equal(before.dynamic.tokens, after.dynamic.tokens) == (
            index not in frames_with_update
        )
        assert torch.equal(before.template.tokens, after.template.tokens)


def test_only_confident_sequences_of_a_batch_are_updated(tracker, video):
    images, boxes = video
    state = tracker.start([images[0]] * 2, torch.tensor([boxes[0]] * 2))
    state = replace(state, frame=torch.tensor([9, 4]))
    lax = changed(tracker, update_threshold=0.0)  # every tenth frame: the first sequence's
    after, prediction = lax.step(state, [images[1]] * 2)
    assert not torch.equal(after.dynamic.tokens[0], state.dynamic.tokens[0])
    assert torch.equal(after.dynamic.tokens[1], state.dynamic.tokens[1])
    fresh = lax.start([images[1]], prediction.box[:1])
    assert torch.allclose(after.dynamic.tokens[:1], fresh.template.tokens, atol=1e-6)


def test_a_second_sequence_never_sees_the_first_ones_templates(tracker, video):
    """The authors' tracker object goes on with the templates of the first sequence it was given."""
    eager = changed(tracker, update_interval=1, update_threshold=0.0)
    expected, _ = run(eager, video)
    run(eager, frames("procontext other", 4, 190, 250))
    again, _ = run(eager, video)
    for one, two in zip(expected, again, strict=True):
        assert torch.equal(one.box, two.box)
        assert torch.equal(one.template.tokens, two.template.tokens) and torch.equal(
            one.dynamic.tokens, two.dynamic.tokens
        )


@pytest.mark.parametrize("rows", ["point", "square", "all", "box"])
@pytest.mark.parametrize("softmax", ["all", "search"])
def test_pruning_scores(tracker, video, rows, softmax):
    other = changed(tracker, pruning_rows=rows, pruning_softmax=softmax)
    _, predictions = run(other, (video[0][:3], video[1]), maps=True)
    focus = predictions[-1].maps["focus"][0]
    if softmax == "search":
        assert torch.allclose(focus.sum((1, 2)), torch.ones(4), atol=1e-5)
    else:
        assert (focus.sum((1, 2)) < 1).all()
    if (rows, softmax) != ("point", "all"):
        _, usual = run(tracker, (video[0][:2], video[1]), maps=True)
        assert not torch.equal(usual[0].maps["focus"], predictions[0].maps["focus"])


def test_both_softmaxes_rank_alike_only_for_one_row(tracker):
    q, k = torch.randn(1, 1, 20, 8), torch.randn(1, 1, 20, 8)

    def ranking(rows, softmax):
        asked = changed(tracker, pruning_softmax=softmax)
        return asked.pruning_score(q, k, 8, torch.tensor(rows)).argsort(1).tolist()

    assert ranking([3], "all") == ranking([3], "search")
    # token 3 is busy with templates: all it says of search tokens counts less in one of the two
    q[:, :, 3] *= 5
    k[:, :, :8] += q[:, :, 3:4]
    assert ranking([3, 4, 5], "all") != ranking([3, 4, 5], "search")


@pytest.mark.parametrize("extra", [(), (4.0,), (3.0, 4.0), (2.7, 3.3, 4.0)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_tables_2_and_3(video, extra, dynamic):
    tracker = ProContEXT(ProContEXTConfig.tiny(extra_factors=extra, dynamic=dynamic)).eval()
    states, _ = run(tracker, (video[0][:2], video[1]))
    assert states[-1].template.tokens.shape == (1, 36 * (1 + len(extra)), 64)
    assert (states[-1].dynamic is not None) == dynamic


def test_the_state_given_is_left_alone(tracker, video):
    images, boxes = video
    state = changed(tracker, update_interval=1, update_threshold=0.0).start(
        images[:1], torch.tensor(boxes[:1])
    )
    kept = state.dynamic.tokens.clone(), state.box.clone(), state.frame.clone()
    tracker.step(state, [images[1]])
    assert (
        torch.equal(kept[0], state.dynamic.tokens)
        and torch.equal(kept[1], state.box)
        and torch.equal(kept[2], state.frame)
    )


def test_half_a_cosine_of_pruning_in_training():
    tracker = OSTrack(OSTrackConfig.tiny())
    ratios = [tracker.keep_at(epoch) for epoch in range(1, 301)]
    assert ratios[:19] == [1.0] * 19 and ratios[99:] == [0.7] * 201
    assert all(a >= b for a, b in itertools.pairwise(ratios))
    assert ratios[59] == pytest.approx(0.85)


def batch_of(tracker: ProContEXT, count: int) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    cfg = tracker.config
    crops = len(cfg.template_factors) * (2 if cfg.dynamic else 1)
    pixels = {
        "templates": (count, crops, 3, cfg.template_size, cfg.template_size),
        "searches": (count, 1, 3, cfg.search_size, cfg.search_size),
    }
    batch = {
        k: torch.randint(0, 256, shape, generator=noise, dtype=torch.uint8)
        for k, shape in pixels.items()
    }
    boxes = {"template_boxes": (count, crops, 4), "search_boxes": (count, 1, 4)}
    return batch | {k: torch.rand(shape, generator=noise) * 0.2 + 0.3 for k, shape in boxes.items()}


def test_loss(tracker):
    """It is made of its parts, everything learns, and it follows the schedule of the keep ratio."""
    tracker = changed(tracker).train()
    batch = batch_of(tracker, 4)
    losses = tracker.loss(batch)
    assert losses["loss"].item() == pytest.approx(
        (losses["focal"] + 2 * losses["giou"] + 5 * losses["l1"]).item()
    )
    losses["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in tracker.parameters())
    tracker.eval()
    at = {
        share: tracker.loss(batch | {"progress": torch.tensor(share)})["loss"].item()
        for share in (0.0, 0.05, 0.2, 0.5)
    }
    assert at[0.0] == at[0.05] != at[0.2] != at[0.5] == tracker.loss(batch)["loss"].item()


def test_training_orders_templates_as_tracking_does(tracker, monkeypatch):
    """The sampler gives frames within factors; the network wants factors within frames."""
    batch, seen = batch_of(tracker, 1), []
    # first@2, dynamic@2, first@4, dynamic@4
    batch["templates"][0, :] = torch.tensor([10, 20, 30, 40])[:, None, None, None]
    monkeypatch.setattr(
        tracker,
        "tokens",
        lambda images, position: (
            seen.append(images) or ProContEXT.tokens(tracker, images, position)
        ),
    )
    with torch.no_grad():
        tracker.loss(batch)
    levels = [((images * 0.229 + 0.485) * 255)[:, 0, 0, 0].round().tolist() for images in seen]
    assert levels[:2] == [[10, 30], [20, 40]]


def test_learns_and_is_saved(tmp_path):
    tracker = ProContEXT(ProContEXTConfig.tiny())
    stage = replace(tracker.recipe("tiny")[0], steps=2, batch=2)
    train(
        tracker,
        [stage],
        SynthDataset(SynthConfig(frames=10), 0, 4),
        tmp_path,
        device="cpu",
        progress=False,
    )
    assert load(tmp_path / "tracker.safetensors").config == tracker.config


def test_samples():
    """OSTrack: one crop of one earlier frame. ProContEXT: two frames, each at two scales, around
    the same box.
    """
    data = SynthDataset(SynthConfig(frames=20), 0, 4)
    pair = Samples(data, OSTrack(OSTrackConfig.tiny()).samples(), 0, 1)[0]
    assert pair["templates"].shape == (1, 3, 48, 48) and pair["searches"].shape == (1, 3, 96, 96)
    spec = ProContEXT(ProContEXTConfig.tiny()).samples()
    four = Samples(data, replace(spec, flip_each=0.0), 0, 1)[0]
    assert four["templates"].shape == (4, 3, 48, 48)
    ratio = four["template_boxes"][:2, 2:] / four["template_boxes"][2:, 2:]
    assert torch.allclose(ratio, torch.full((2, 2), 2.0), rtol=0.1)


def test_recipes():
    code, text = ProContEXTConfig.procontext_384(), ProContEXTConfig.paper()
    with torch.device("meta"):
        stage, other = ProContEXT(code).recipe("paper")[0], ProContEXT(text).recipe("paper")[0]
    assert (
        stage.steps == 300 * 468
        and stage.drops == (240 * 468,)
        and stage.batch == 128
        and stage.clip == 0.1
    )
    assert (stage.lr, dict(stage.rates)["*"]) == (4e-4, 0.1) and (
        other.lr,
        dict(other.rates)["*"],
    ) == (1e-4, 1.0)
    assert stage.sample.search.factor == 5.0 and other.sample.search.factor == 4.0
    assert stage.sample.template_factors == (2.0, 4.0) and stage.sample.order == "trident"
    assert (text.update_interval, text.pruning_softmax) == (1, "search")
    for scale in ("tiny", "laptop", "gpu"):
        assert ProContEXT(ProContEXTConfig.tiny()).recipe(scale)


@pytest.mark.parametrize(("changes", "message"), [
    ({"pruning_rows": "middle"}, "pruning_rows must be one of point"),
    ({"pruning_softmax": "rows"}, "pruning_softmax must be one of all"),
    ({"template_size": 50}, "sizes of crops must be multiples of the stride, 8"),
    ({"search_size": 96.0}, "search_size must be a whole number"),
    ({"template_factor": 0.0}, "template_factor must be above 0"),
    ({"extra_factors": (3.0, -4.0)}, "extra_factors must be above 0"),
    ({"search_factor": float("nan")}, "search_factor"),
    ({"keep_ratio": 0.0}, "keep_ratio"),
    ({"prune_blocks": (4,)}, "prune_blocks must be at least 0 and at most 3"),
    ({"width": 66}, "multiple of 4"),
    ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ({"update_interval": 0}, "at least 1"),
    ({"update_threshold": 1.5}, "update_threshold"),
])  # fmt: skip
def test_impossible_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        ProContEXTConfig.tiny(**changes)


def test_hard_frames_and_boxes(tracker):
    """Frames smaller than the crop, boxes at the border, boxes that leave."""
    small = torch.randint(0, 256, (3, 20, 15), dtype=torch.uint8)
    state = tracker.start([small], torch.tensor([[10.0, 15, 30, 30]]))
    for _ in range(3):
        state, prediction = tracker.step(state, [small])
        assert (
            torch.isfinite(prediction.box).all()
            and (prediction.box[:, 2:] >= tracker.config.margin).all()
        )
    with pytest.raises(DataError, match="outside its 15x20 frame"):
        tracker.start([small], torch.tensor([[40.0, 5, 5, 5]]))
    with pytest.raises(DataError, match="uint8"):
        tracker.step(state, [small.float()])


def test_checkpoints_of_the_authors(monkeypatch):
    """Their unused entries may be there or not; another resolution is told apart from another
    family.
    """
    with torch.device("meta"):
        ours = create("ostrack-256").state_dict()
    towers = {"score": "ctr", "offset": "offset", "size": "size"}
    theirs = {}
    for key, value in ours.items():
        name = (
            key.replace("position_", "pos_embed_").replace("embed.", "patch_embed.proj.", 1)
            if key.startswith(("position", "embed"))
            else key
        )
        if key.startswith("head."):
            _, tower, number, rest = key.split(".", 3)
            name = f"box_head.conv{int(number) + 1}_{towers[tower]}.{rest}"
        else:
            name = f"backbone.{name}"
        theirs[name] = value
    assert {official.rename("ostrack-256", key) for key in theirs} == set(ours)
    theirs |= {
        "backbone.cls_token": torch.zeros(1, 1, 768),
        "backbone.pos_embed": torch.zeros(1, 197, 768),
    }
    assert set(official._names("procontext-256", theirs)) == set(ours)
    monkeypatch.setattr(
        official,
        "TRACKERS",
        {name: TRACKERS[name] for name in ("siamfc", "ostrack-256", "ostrack-384")},
    )
    with (
        pytest.raises(
            CheckpointError,
            match=r"position_z is \(1, 64, 768\), needs \(1, 144, 768\).*fits ostrack-256",
        ),
        torch.device("meta"),
    ):
        official.load("ostrack-384", {k: torch.empty(v.shape) for k, v in theirs.items()})
