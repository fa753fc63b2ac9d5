"""Cuts of trained trackers: each applies, is felt, and is undone; the probe that measures them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from helpers import variant
from torch import Tensor

from trackkit import cli, cuts, weights
from trackkit.boxes import iou
from trackkit.cuts import Cut, Result, compare, cuts_of, probe, told
from trackkit.errors import DataError, TrackkitError
from trackkit.evaluation import average_overlap, sequence_overlaps
from trackkit.got10k import GOT10k
from trackkit.paths import SAMPLES
from trackkit.sequences import ArraySequence
from trackkit.trackers.base import Tracker
from trackkit.trackers.references import StayTracker
from trackkit.trackers.stark_ca import STARKCA, STARKCAConfig
from trackkit.trackers.stark_variants import VARIANTS
from trackkit.tracking import track

NAMES = [name for name in weights.TRACKERS if name.endswith("-tiny")]
# what two videos of six frames may not show: what the gate chooses anyway, a peak in the middle
MAY_BE_SILENT = {"gate-none", "gate-se", "gate-ca", "gate-cbam", "no-window"}


def trained(name: str) -> Tracker:
    """With the weights that come with trackkit, else its ancestor's; dynamic templates are renewed
    every other frame, so that a few frames show it.
    """
    tracker = weights.create(name)
    if weights.shipped(name):
        tracker = weights.load(name)
    else:
        tracker.load_pretrained()
    if name == "ustam-tiny":  # a spatial layer that says something
        torch.nn.init.normal_(tracker.spatial_attention.fc.weight, std=0.1)
    if getattr(tracker.config, "dynamic", False):
        tracker = variant(tracker, update_interval=2, update_threshold=0.0)
    return tracker.eval()


@pytest.fixture(scope="module")
def videos() -> list[ArraySequence]:
    """Six frames of two of the samples, each with its target visible."""
    data, found = GOT10k(SAMPLES, "val"), []
    for index in (6, 12):
        frames = [data[index].frame(i) for i in range(6)]
        found.append(ArraySequence(f"v{index}", frames, data[index].boxes_xywh[:6]))
    return found


def everything(tracker: Tracker) -> dict[str, object]:
    """All that a module holds, bit by bit."""
    own = {
        f"{name}.{key}": value
        for name, module in tracker.named_modules()
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers", "_modules")
    }
    return own | {key: value.clone() for key, value in tracker.state_dict().items()}


def same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


@pytest.mark.parametrize("name", NAMES)
def test_every_cut_is_felt_and_undone(name, videos):
    tracker = trained(name)
    before, whole, silent = everything(tracker), probe(tracker, videos), set()
    there = cuts_of(tracker)
    assert there
    for key, cut in there.items():
        assert key == cut.name and key not in ("all", "list")
        with cut.applied(tracker) as changed:
            if probe(changed, videos) == whole:
                silent.add(key)
        after = everything(tracker)
        assert before.keys() == after.keys(), key
        assert all(same(value, after[entry]) for entry, value in before.items()), key
    assert probe(tracker, videos) == whole, "bit for bit"
    assert silent <= MAY_BE_SILENT and len(silent) <= 2
    sentences = [cut.sentence for cut in there.values()]
    assert len(set(sentences)) == len(sentences) and all(s == s.strip() for s in sentences)


@pytest.mark.parametrize("cls", [*VARIANTS, STARKCA])
def test_descendants_have_the_cuts_that_make_sense(cls, videos):
    torch.manual_seed(0)
    tracker = cls((STARKCAConfig if cls is STARKCA else cls.Config).tiny()).eval()
    there, boxes = cuts_of(tracker), torch.stack([video.boxes_xywh[0] for video in videos])
    first = [video.frame(0) for video in videos], boxes
    assert ("template-apart" in there) == (cls.__name__ != "STARKTemplateQuery")
    assert ("dynamic-of-another" in there) == (cls is not STARKCA)
    for cut in there.values():
        with cut.applied(tracker) as changed:
            changed.step(changed.start(*first), first[0])


def test_a_cut_is_undone_after_an_exception():
    tracker = trained("stark-tiny")
    before = everything(tracker)
    for cut in cuts_of(tracker).values():
        with pytest.raises(ZeroDivisionError), cut.applied(tracker):
            raise ZeroDivisionError
        assert everything(tracker).keys() == before.keys()


def test_a_cut_that_fails_half_way_is_undone():
    def patches(tracker):
        yield tracker, "ask", None
        raise ZeroDivisionError

    tracker = trained("stark-tiny")
    with pytest.raises(ZeroDivisionError), Cut("a", "b", patches=patches).applied(tracker):
        pass
    assert "ask" not in vars(tracker)


def test_cuts_inside_cuts(videos):
    tracker = trained("stark-tiny")
    there, before = cuts_of(tracker), everything(tracker)
    with there["no-positions"].applied(tracker) as one, there["no-encoder"].applied(one) as two:
        both = probe(two, videos)
    with there["no-encoder"].applied(tracker):
        assert both != probe(tracker, videos)
    assert everything(tracker).keys() == before.keys()


def test_random_numbers_are_left_alone():
    tracker = trained("stark-tiny")
    state = torch.get_rng_state()
    with cuts_of(tracker)["no-positions"].applied(tracker):
        pass
    assert torch.equal(state, torch.get_rng_state())


# ---- what single cuts are ----


def test_template_apart_is_two_encoders(videos):
    tracker = trained("stark-tiny")
    frames, boxes = [videos[0].frame(0)], videos[0].boxes_xywh[:1]
    state = tracker.start(frames, boxes)
    with cuts_of(tracker)["template-apart"].applied(tracker):
        a = tracker.step(state, [videos[0].frame(1)], maps=True)[1].maps["memory"]
    with cuts_of(tracker)["no-encoder"].applied(tracker):
        b = tracker.step(state, [videos[0].frame(1)], maps=True)[1].maps["memory"]
    assert a.shape == b.shape and not torch.equal(a, b)
    changed = tracker.start([videos[1].frame(0)], videos[1].boxes_xywh[:1])
    with cuts_of(tracker)["template-apart"].applied(tracker):
        c = tracker.step(dataclasses.replace(changed, box=state.box), [videos[0].frame(1)], True)
    cells = 144
    assert torch.allclose(a[:, -cells:], c[1].maps["memory"][:, -cells:], atol=1e-5)
    assert not torch.allclose(a[:, :-cells], c[1].maps["memory"][:, :-cells], atol=1e-2)


def test_hidden_templates_do_not_matter(videos):
    for name in ("ostrack-tiny", "procontext-tiny", "mixvit-tiny", "sbt-tiny"):
        tracker = trained(name)
        if hasattr(tracker.config, "keep_ratio"):  # pruning still asks the templates
            tracker = variant(tracker, keep_ratio=1.0)
        states = [tracker.start([v.frame(0)], v.boxes_xywh[:1]) for v in videos]
        answers = []
        cut = cuts_of(tracker)["no-cross" if name == "sbt-tiny" else "templates-hidden"]
        with cut.applied(tracker):
            for state in states:
                state = dataclasses.replace(state, box=states[0].box, bias=states[0].bias)
                answers.append(tracker.step(state, [videos[0].frame(1)])[1].box)
        assert torch.allclose(*answers, atol=1e-3), name


def test_the_template_of_another_is_that_of_another(videos):
    tracker = trained("siamfc-tiny")
    cut = cuts_of(tracker)["template-of-another"]
    firsts = [v.frame(0) for v in videos], torch.stack([v.boxes_xywh[0] for v in videos])
    seconds = [v.frame(1) for v in videos]
    state = tracker.start(*firsts)
    with cut.applied(tracker):
        after, found = tracker.step(state, seconds)
    by_hand = tracker.step(dataclasses.replace(state, exemplar=state.exemplar.flip(0)), seconds)[1]
    assert torch.equal(found.box, by_hand.box) and after.exemplar is state.exemplar
    with cut.applied(tracker), pytest.raises(TrackkitError, match="two videos side by side"):
        probe(tracker, videos[:1])


def test_uniform_attention_gathers_the_mean():
    tracker = trained("stark-tiny")
    layer, x = tracker.encoder.layers[0].self_attn, torch.randn(2, 7, 64)
    ignore = torch.arange(7).expand(2, -1) > 4
    with cuts_of(tracker)["uniform-attention"].applied(tracker):
        found, share = layer(x, x, x, ignore, weights=True)
    weight, bias = layer.in_proj_weight[128:], layer.in_proj_bias[128:]
    mean = layer.out_proj((x[:, :5] @ weight.T + bias).mean(1, keepdim=True))
    assert torch.allclose(found, mean.expand(-1, 7, -1), atol=1e-5)
    assert share.shape == (2, 4, 7, 7) and torch.allclose(share.sum(-1), torch.ones(2, 4, 7))


# ---- the probe ----


class Recorder(StayTracker):
    """Stays, and notes where it was told to have been."""

    def step(self, state, frames, maps=False):
        self.seen.append(state.box)
        return super().step(state, frames, maps)


def test_the_probe_of_a_tracker_that_stays(videos):
    tracker = Recorder()
    tracker.seen = []
    found = probe(tracker, videos)
    for number, video in enumerate(videos):
        boxes = video.boxes_xywh
        assert found[video.name] == pytest.approx(float(iou(boxes[:-1], boxes[1:]).mean()))
        assert torch.equal(torch.stack([box[number] for box in tracker.seen]), boxes[:-1])


def test_only_frames_that_show_the_target_after_one_that_does_count(videos):
    images, boxes = videos[0].images, videos[0].boxes_xywh.clone()
    absent = torch.tensor([False, False, True, False, False, False])
    boxes[2] = 0.0
    video = ArraySequence("gap", images, boxes, absent=absent)
    overlaps = iou(boxes[:-1], boxes[1:])[[0, 3, 4]]
    assert probe(StayTracker(), [video])["gap"] == pytest.approx(float(overlaps.mean()))
    hidden = ArraySequence("hidden", images[:2], boxes[:2], absent=torch.tensor([False, True]))
    with pytest.raises(DataError, match="hidden: no frame"):
        probe(StayTracker(), [hidden])
    with pytest.raises(DataError, match="one has no labels"):
        probe(StayTracker(), [ArraySequence("one", images, boxes[:1])])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_told_is_what_would_have_been(name, videos):
    """If the answer was the truth, the probe goes on with the tracker's own state."""
    tracker = trained(name)
    state = tracker.start(
        [v.frame(0) for v in videos], torch.stack([v.boxes_xywh[0] for v in videos])
    )
    for now in range(1, 4):
        frames = [video.frame(now) for video in videos]
        after, found = tracker.step(state, frames)
        again = told(tracker, state, after, frames, found.box)
        for part in dataclasses.fields(after):
            a, b = getattr(after, part.name), getattr(again, part.name)
            if part.name not in ("confident", "chosen"):
                close(a, b)
        state = after


def close(a: object, b: object) -> None:
    if isinstance(a, Tensor):
        assert torch.allclose(a, b, atol=1e-4)
    elif dataclasses.is_dataclass(a):
        close(list(vars(a).values()), list(vars(b).values()))
    elif isinstance(a, (list, tuple)):
        for one, other in zip(a, b, strict=True):
            close(one, other)
    else:
        assert a == b


def test_videos_in_groups_and_of_several_lengths(videos):
    tracker, short = trained("siamfc-tiny"), videos[0]
    short = ArraySequence("short", short.images[:3], short.boxes_xywh[:3])
    together = probe(tracker, [*videos, short])
    for video in (*videos, short):
        assert probe(tracker, [video])[video.name] == pytest.approx(together[video.name], abs=1e-3)
    assert probe(tracker, [*videos, short], batch=2) == pytest.approx(together, abs=1e-3)


def test_tracking_is_that_of_the_loop(videos):
    tracker = trained("siamfc-tiny")
    result = compare(tracker, [], videos, "track")
    for video in videos:
        overlaps = sequence_overlaps(video, track(tracker, video).boxes_xywh)
        assert result.whole[video.name] == pytest.approx(average_overlap(overlaps), abs=1e-3)


# ---- results ----


def test_numbers_of_a_result():
    whole = {"a": 0.5, "b": 0.6, "c": 0.7}
    found = {
        "worse": {"a": 0.3, "b": 0.5, "c": 0.6},
        "none": whole,
        "unclear": {"a": 0.6, "b": 0.5, "c": 0.71},
    }
    result = Result("t", "probe", "d", whole, found, dict.fromkeys(found, "said"))
    worse, none, unclear = result.rows
    assert worse["difference"] == pytest.approx(-0.4 / 3)
    assert worse["error"] == pytest.approx(0.1 / 3)
    verdicts = [row["verdict"] for row in (worse, none, unclear)]
    assert verdicts == ["worse", "no effect", "cannot be told"]
    text = result.text()
    assert "| worse   | 0.467   | -0.133 ± 0.033 | worse          | said  " in text
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1
    one = Result("t", "track", "d", {"a": 0.5}, {"x": {"a": 0.4}}, {"x": "said"})
    assert one.rows[0]["error"] is None and one.rows[0]["verdict"] == "cannot be told"


# ---- the command line ----


@pytest.fixture
def one_video(tmp_path):
    folder = tmp_path / "data" / "val"
    folder.mkdir(parents=True)
    (folder / "list.txt").write_text("synth_val_fast\n")
    (folder / "synth_val_fast").symlink_to(SAMPLES / "val" / "synth_val_fast")
    return tmp_path / "data"


def test_the_command(one_video, tmp_path, capsys):
    given = ["--data", str(one_video), "--out", str(tmp_path / "out")]
    cut = ["--cut", "no-encoder", "--cut", "no-positions"]
    assert cli.main(["ablate", "stark-tiny", *cut, *given]) == 0
    said, files = capsys.readouterr().out, tmp_path / "out" / "stark-tiny_cuts_probe"
    assert "| no-encoder " in said and "| no-positions " in said
    values = json.loads(files.with_suffix(".json").read_text())
    assert [row["name"] for row in values["rows"]] == ["no-encoder", "no-positions"]
    assert values["rows"][0]["difference"] < -0.2
    assert files.with_suffix(".md").read_text() in said


def test_the_list_of_cuts(capsys):
    assert cli.main(["ablate", "stark-st50", "--cut", "list"]) == 0, "needs no weights"
    said = capsys.readouterr().out
    assert all(name in said for name in cuts_of(trained("stark-tiny")))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["stark-tiny", "--cut", "no-encodr"], "did you mean no-encoder"),
        (["stark-tny", "--cut", "all"], "did you mean stark-tiny"),
        (["--cut", "all"], "name the tracker"),
        (["ncc", "--cut", "all"], "ncc has no cuts"),
        (["stark-tiny"], "--cut list"),
    ],
)
def test_mistakes(given, message, capsys):
    assert cli.main(["ablate", *given]) == 1
    assert message in capsys.readouterr().err


def test_a_way_to_measure_that_there_is_not(videos):
    with pytest.raises(TrackkitError, match="probe or track"):
        compare(StayTracker(), [], videos, "guess")


def test_a_tracker_without_a_box_in_its_state():
    with pytest.raises(TrackkitError, match=r"told\.register"):
        cuts.told(StayTracker(), None, object(), [], torch.zeros(1, 4))
