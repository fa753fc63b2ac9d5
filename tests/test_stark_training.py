"""STARK in training and on disk: stages, losses, ablations, questions, files, settings. Small
untrained networks.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from golden import golden
from test_stark import KINDS, firsts, small
from torch import Tensor

from trackkit import official, weights
from trackkit.ablations import TABLES
from trackkit.boxes import cxcywh_to_xyxy, giou
from trackkit.errors import CheckpointError, TrackkitError
from trackkit.sampling import Samples
from trackkit.synth import SynthConfig, SynthDataset
from trackkit.trackers.stark import STARK, Answer, STARKConfig
from trackkit.trackers.stark_variants import (
    STARKHungarian,
    STARKHungarianConfig,
    STARKJoint,
    STARKJointConfig,
    STARKTemplateQuery,
    STARKTemplateQueryConfig,
    STARKUpdatedQuery,
    STARKUpdatedQueryConfig,
)
from trackkit.tracking import track, track_many
from trackkit.training import train
from trackkit.weights import TRACKERS, create, known_classes


@pytest.fixture(scope="module")
def videos():
    """Of six frames, of three, and of another size."""
    made = [SynthDataset(SynthConfig(frames=n), seed=1, length=4)[i] for i, n in enumerate((6, 3))]
    return [*made, SynthDataset(SynthConfig(frames=5, width=200, height=160), seed=2, length=1)[0]]


DATA = SynthDataset(SynthConfig(), seed=0, length=50)


def stages(tracker: STARK, steps: int, batch: int = 2) -> list:
    return [
        replace(stage.resized(steps), batch=batch, warmup=0) for stage in tracker.recipe("tiny")
    ]


def trained(tracker: STARK, out, steps: int, **options) -> list[dict]:
    return train(
        tracker,
        stages(tracker, steps),
        DATA,
        out,
        progress=False,
        device="cpu",
        log_steps=1,
        **options,
    )


def test_the_score_stage_changes_the_score_head_alone(tmp_path):
    """Bit for bit, norms' statistics included, although dropout is at work."""
    tracker = small(dropout=0.1)
    before = copy.deepcopy(tracker.state_dict())
    log = train(
        tracker, stages(tracker, 3)[1:], DATA, tmp_path, progress=False, device="cpu", log_steps=1
    )
    after = tracker.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {key for key in before if key.startswith("score_head.")}
    assert [line["stage"] for line in log] == ["score"] * 3 and tracker.training is False


def test_the_localisation_stage_leaves_the_score_head(tmp_path):
    tracker = small()
    before = copy.deepcopy(tracker.state_dict())
    train(tracker, stages(tracker, 2)[:1], DATA, tmp_path, progress=False, device="cpu")
    same = {key for key, value in tracker.state_dict().items() if torch.equal(value, before[key])}
    mute = "decoder.layers.0.self_attn.in_proj"  # with one query its queries and keys have no say
    assert {key for key in same if not key.startswith(mute)} == {
        key for key in before if key.startswith("score_head.")
    }


TABLES_OF_STARK = [table for table in TABLES.values() if table.tracker == "stark-tiny"]
ROWS = {
    f"{table.name}: {row.label}": {"cls": known_classes()[row.variant or "STARK"], **row.changes}
    for table in TABLES_OF_STARK
    for row in table.rows
}


@pytest.mark.parametrize("changes", ROWS.values(), ids=ROWS)
def test_every_row_of_the_ablation_tables_trains_and_tracks(changes, videos, tmp_path):
    tracker = small(**changes)
    log = trained(tracker, tmp_path / "run", 2)
    cfg = tracker.config
    at_once = not cfg.score or isinstance(tracker, (STARKHungarian, STARKJoint))
    assert [line["stage"] for line in log] == ["localisation"] * 2 + (
        [] if at_once else ["score"] * 2
    )
    assert all(0 < line["loss"] < 50 for line in log)
    again = weights.load(tmp_path / "run" / "tracker.safetensors")
    assert again.config == tracker.config
    runs = [
        [found.boxes_xywh for _, found in track_many(which, videos[:2], batch=2)]
        for which in (tracker, again)
    ]
    assert [len(boxes) for boxes in runs[0]] == [3, 6] and all(
        torch.isfinite(boxes).all() for boxes in runs[0]
    )
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def batch_of(tracker: STARK, negatives: float = 0.0, count: int = 3) -> dict[str, Tensor]:
    samples = Samples(DATA, tracker.samples(negatives), seed=0, length=count)
    return {key: torch.stack([samples[i][key] for i in range(count)]) for key in samples[0]}


@pytest.mark.parametrize("changes", ROWS.values(), ids=ROWS)
def test_losses_reach_all_that_their_stage_trains(changes):
    tracker = small(**changes)
    for stage in tracker.recipe("tiny"):
        tracker.zero_grad()
        tracker.train()
        tracker.loss(batch_of(tracker, stage.sample.negatives), stage.loss)["loss"].backward()
        reached = {name for name, p in tracker.named_parameters() if p.grad is not None}
        prefixes = tuple(pattern.rstrip("*") for pattern in stage.trainable)
        wanted = {name for name, _ in tracker.named_parameters() if name.startswith(prefixes)}
        assert wanted <= reached, "several processes would wait for the gradients of the others"


@pytest.mark.parametrize("from_scratch", [False, True])
def test_loss_is_the_sum_of_its_parts(from_scratch):
    tracker = small(from_scratch=from_scratch)
    batch = batch_of(tracker, negatives=0.5)
    twin = small(cls=STARKJoint, from_scratch=from_scratch)
    twin.load_state_dict(tracker.state_dict())
    kinds = [tracker.loss(batch, "box"), tracker.loss(batch, "score"), twin.loss(batch)]
    box, score, joint = ({name: loss.item() for name, loss in losses.items()} for losses in kinds)
    assert set(box) == {"loss", "giou", "l1"} | ({"corner"} if from_scratch else set())
    assert set(joint) == set(box) | {"score"}
    assert box["loss"] == pytest.approx(
        2 * box["giou"] + 5 * box["l1"] + box.get("corner", 0), rel=1e-5
    )
    assert joint["score"] == pytest.approx(score["loss"], rel=1e-5)
    assert joint["loss"] == pytest.approx(box["loss"] + score["loss"], rel=1e-5)


def test_negatives_have_no_box():
    """In joint training boxes are learned from the samples that show the target, and none from a
    batch without.
    """
    tracker = small(cls=STARKJoint)
    batch = batch_of(tracker)
    batch["labels"] = torch.tensor([[1.0], [0.0], [1.0]]).expand(batch["search_boxes"].shape[:2])
    kept = {key: value[[0, 2]] for key, value in batch.items()}
    assert tracker.loss(batch)["l1"].item() == pytest.approx(
        tracker.loss(kept)["l1"].item(), rel=1e-4
    )
    losses = tracker.loss({**batch, "labels": torch.zeros_like(batch["labels"])})
    assert set(losses) == set(tracker.loss(kept)), (
        "or processes that log together would wait for each other"
    )
    assert (
        losses["giou"] == losses["l1"] == losses["corner"] == 0
        and losses["loss"] == losses["score"] > 0
    )
    losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in tracker.parameters() if p.grad is not None)
    assert (tracker.box_head.top_left[-1].weight.grad == 0).all()


def test_targets_beyond_the_crop_are_cut_off():
    tracker = small()
    batch = batch_of(tracker)
    batch["search_boxes"][:] = torch.tensor([0.9, 0.5, 0.4, 0.2])
    cut = copy.deepcopy(batch)
    cut["search_boxes"][:] = torch.tensor([0.85, 0.5, 0.3, 0.2])
    assert tracker.loss(batch)["loss"].item() == pytest.approx(
        tracker.loss(cut)["loss"].item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("kind", "templates", "searches"), [("S", 1, 1), ("ST", 2, 1), ("updated query", 1, 2)]
)
def test_samples_are_as_many_crops_as_the_network_reads(kind, templates, searches):
    paper = batch_of(small(**KINDS[kind], from_scratch=False))
    assert paper["templates"].shape[1] == paper["template_masks"].shape[1] == templates
    assert paper["searches"].shape[1] == paper["search_masks"].shape[1] == searches
    assert batch_of(small(**KINDS[kind]))["templates"].shape[1] == templates


def test_several_searches_of_a_sample_are_several_samples():
    """Encoding the templates once for all of them changes nothing but the time."""
    tracker = small()
    batch = batch_of(tracker)
    count = batch["searches"].shape[1]
    apart = {
        key: value.repeat_interleave(count, 0)
        for key, value in batch.items()
        if key.startswith("template")
    }
    apart |= {
        key: value.flatten(0, 1)[:, None]
        for key, value in batch.items()
        if key.startswith("search")
    }
    together, single = tracker.loss(batch), tracker.loss(apart)
    assert count > 1 and apart["searches"].shape[:2] == (3 * count, 1)
    for name, loss in together.items():
        assert loss.item() == pytest.approx(single[name].item(), rel=1e-4), name


def test_mixed_precision_changes_little():
    tracker = small()
    batch = batch_of(tracker)
    exact = tracker.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = tracker.loss(batch)
    assert rough["loss"].dtype == torch.float32
    assert rough["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.05)


# ---- questions ----


def answers(boxes, logits) -> Answer:
    boxes, logits = torch.tensor(boxes), torch.tensor(logits)
    return Answer(boxes, logits, torch.zeros(*logits.shape, 4), None, {})


def test_one_box_of_many():
    found = answers([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.2, 0.4]]], [[-1.0, 2.0]])
    mean, score = small().choose(found)
    best, same = small(cls=STARKHungarian, queries=2).choose(found)
    assert mean[0].tolist() == pytest.approx([0.3, 0.3, 0.2, 0.3])
    assert best[0].tolist() == pytest.approx([0.1, 0.1, 0.2, 0.4])
    assert score.item() == same.item() == pytest.approx(1 / (1 + math.exp(-2)))


def test_hungarian_matching_teaches_the_best_query_alone():
    tracker = small(cls=STARKHungarian, queries=2)
    truth = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2]])
    near, far = [0.52, 0.5, 0.2, 0.2], [0.8, 0.8, 0.1, 0.1]
    found = answers([[near, far], [far, [0.1, 0.1, 0.2, 0.3]]], [[0.0, 5.0], [0.0, 0.0]])
    losses = tracker.losses(found, truth, torch.ones(2), "box")
    matched, corners = (
        cxcywh_to_xyxy(torch.tensor([near, [0.1, 0.1, 0.2, 0.3]])),
        cxcywh_to_xyxy(truth).clamp(0, 1),
    )
    wanted = F.binary_cross_entropy_with_logits(
        found.logits, torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    )
    assert losses["l1"].item() == pytest.approx((matched - corners).abs().mean().item(), abs=1e-6)
    assert losses["giou"].item() == pytest.approx(
        1 - giou(matched, corners).mean().item(), abs=1e-6
    )
    assert losses["score"].item() == pytest.approx(wanted.item(), abs=1e-6)
    even = answers([[near, near]], [[0.0, 1.0]])
    losses = tracker.losses(even, truth[:1], torch.ones(1), "box")
    wanted = F.binary_cross_entropy_with_logits(even.logits, torch.tensor([[0.0, 1.0]]))
    assert losses["score"].item() == pytest.approx(wanted.item(), abs=1e-6), (
        "of two equal boxes the more confident one"
    )


def test_a_confident_answer_is_the_next_question(videos):
    frame, box = videos[0].frame(0), videos[0].boxes_xywh[:1]
    for threshold, renewed in ((0.0, True), (1.0, False)):
        tracker = small(cls=STARKUpdatedQuery, dynamic=False, update_threshold=threshold)
        state = tracker.start([frame], box)
        assert torch.equal(state.query[0], tracker.query.weight)
        after, _ = tracker.step(state, [frame])
        assert torch.equal(after.query, state.query) != renewed


def test_templates_that_ask_do_not_meet_the_search_before(videos):
    tracker = small(cls=STARKTemplateQuery)
    state = tracker.start(*firsts(videos[:1]))
    changed = replace(state, template=tracker.start(*firsts(videos[2:3])).template)
    (_, one), (_, other) = (
        tracker.step(which, [videos[0].frame(1)], maps=True) for which in (state, changed)
    )
    assert torch.equal(one.maps["memory"], other.maps["memory"]) and not torch.equal(
        one.box, other.box
    )
    assert one.maps["decoder_0"].shape == (1, 2, 32, 64)
    assert one.maps["encoder_template_0"].shape == (1, 2, 32, 32)


# ---- files and settings ----


@pytest.mark.parametrize(
    "changes",
    [{}, KINDS["S"], {"position": "learned"}, {"head": "mlp"}, {"pre_norm": False}],
    ids=str,
)
def test_a_saved_tracker_is_the_same(changes, videos, tmp_path):
    tracker = small(**changes)
    weights.save(tracker, tmp_path / "stark.safetensors")
    loaded = weights.load(tmp_path / "stark.safetensors")
    assert loaded.config == tracker.config
    assert torch.equal(track(loaded, videos[0]).boxes_xywh, track(tracker, videos[0]).boxes_xywh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vgg"}, "backbone must be one of resnet50"),
        ({"position": "rope"}, "position must be"),
        ({"head": "anchor"}, "head must be"),
        ({"template_size": 120}, "multiples of the backbone's stride, 16"),
        ({"search_size": 330}, "multiples of the backbone's stride, 16"),
        ({"width": 250}, "multiple of 4 and of the 8 heads"),
        ({"heads": 3}, "multiple of 4 and of the 3 heads"),
        ({"width": 4100}, "at least 1 and at most 4096"),
        ({"update_interval": 0}, "at least 1"),
        ({"update_threshold": 1.1}, "at most 1"),
        ({"margin": float("inf")}, "margin must be"),
        ({"dropout": float("nan")}, "dropout must be"),
        ({"encoder_layers": 1.5}, "a whole number"),
        ({"cls": STARKHungarianConfig, "queries": 0}, "at least 1"),
        ({"cls": STARKJointConfig, "score": False}, "needs the score head"),
        ({"cls": STARKHungarianConfig, "score": False}, "needs the score head"),
        ({"cls": STARKTemplateQueryConfig, "decoder_layers": 0}, "needs a decoder"),
        ({"cls": STARKUpdatedQueryConfig, "decoder_layers": 0}, "needs a decoder"),
    ],
    ids=str,
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        changes.get("cls", STARKConfig).st50(**{k: v for k, v in changes.items() if k != "cls"})


def test_named_variants():
    s50, st50, st101, tiny = (
        STARKConfig.s50(),
        STARKConfig.st50(),
        STARKConfig.st101(),
        STARKConfig.tiny(),
    )
    assert (
        replace(st50, dynamic=False, score=False) == s50
        and replace(st50, backbone="resnet101") == st101
    )
    assert (tiny.backbone, tiny.exact, tiny.dynamic, tiny.score) == ("tiny", True, True, True)
    assert STARKConfig.st50(update_interval=25).update_interval == 25


def authors(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A checkpoint under the authors' names, of random numbers; counts are integers."""
    torch.manual_seed(1)
    return {
        key: torch.rand(shape).to(dtype if shape else torch.long)
        for key, shape in golden(name)["keys"].items()
    }


def test_a_checkpoint_in_half_precision():
    weights = authors("stark_s50", torch.float16)
    tracker = official.load("stark-s50", weights)
    assert {p.dtype for p in tracker.parameters()} == {torch.float32} and not tracker.training
    assert torch.equal(tracker.query.weight, weights["query_embed.weight"].float())


@pytest.fixture
def stark_alone():
    """Fewer trackers to compare with are quicker. (All come back in their order.)"""
    everyone = dict(TRACKERS)
    for name in everyone:
        if not name.startswith("stark"):
            del TRACKERS[name]
    yield
    TRACKERS.clear()
    TRACKERS.update(everyone)


def test_a_checkpoint_of_another_variant(stark_alone):
    weights = authors("stark_s50")
    with pytest.raises(
        CheckpointError,
        match=r"stark-st50 does not fit .*missing: score_head.*; it fits stark-s50$",
    ):
        official.load("stark-st50", weights)
    cut = {key: value for key, value in weights.items() if key != "bottleneck.bias"}
    with pytest.raises(CheckpointError, match=r"missing: bottleneck.bias$"):
        official.load("stark-s50", cut)
    with pytest.raises(CheckpointError, match=r"not expected: neck$"):
        official.load("stark-s50", {**weights, "neck": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"query.weight is \(10, 256\), needs \(1, 256\)"):
        official.load("stark-s50", {**weights, "query_embed.weight": torch.zeros(10, 256)})


def test_names():
    with pytest.raises(TrackkitError, match="stark-st50"):
        create("stark")
