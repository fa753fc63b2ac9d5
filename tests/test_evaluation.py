"""GOT-10k's numbers, against hand calculation and a slow second implementation; runs that stop and
go on.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trackkit.errors import DataError
from trackkit.evaluation import (
    THRESHOLDS,
    Rates,
    Scores,
    average_overlap,
    bounded_iou,
    compare,
    compare_attributes,
    evaluate,
    fingerprint,
    overlaps,
    score,
    score_results,
    success_curve,
    success_rate,
)
from trackkit.got10k import GOT10k, write_sequence
from trackkit.paths import alone
from trackkit.results import read_results, write_results
from trackkit.sampling import CropSpec, Samples, SampleSpec
from trackkit.sequences import ArraySequence
from trackkit.trackers.references import NccTracker, StayTracker
from trackkit.trackers.siamfc import SiamFC, SiamFCConfig


def boxes(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


class Videos(list):
    """A data set: a list of sequences with a name."""

    name = "videos"


def video(name: str, truth, size=(64, 48), **labels) -> ArraySequence:
    truth = torch.as_tensor(truth, dtype=torch.float64)
    frames = labels.pop("frames", len(truth))
    blank = torch.zeros(3, size[1], size[0], dtype=torch.uint8)
    return ArraySequence(name, [blank] * frames, truth, **labels)


def moving(name: str, frames: int, **labels) -> ArraySequence:
    """Starts at (10, 10) and moves right by one pixel a frame: a box that stays has overlap
    (20-k)/(20+k).
    """
    return video(name, [[10 + k, 10, 20, 10] for k in range(frames)], **labels)


# ---- overlaps ----


def test_iou_by_hand():
    truth = boxes([0, 0, 10, 10]).repeat(4, 1)
    predicted = boxes([0, 0, 10, 10], [5, 0, 10, 10], [20, 20, 5, 5], [0, 0, 5, 5])
    assert bounded_iou(predicted, truth, (100, 100)).tolist() == pytest.approx(
        [1, 1 / 3, 0, 1 / 4], abs=1e-12
    )


@pytest.mark.parametrize(
    "predicted, truth, expected",
    [
        ([-10, 20, 50, 30], [0, 20, 40, 30], 0.8),  # moved inside, then 50 wide: 40 / 50
        ([20, -10, 30, 50], [20, 0, 30, 40], 0.8),
        ([80, 20, 50, 30], [80, 20, 20, 30], 1.0),  # what is right of the frame is cut
        ([0, 20, 40, 30], [-10, 20, 50, 30], 0.8),  # the truth is bounded in the same way
        ([-10, 20, 50, 30], [-10, 20, 50, 30], 1.0),
        ([200, 20, 50, 30], [80, 20, 20, 30], 0.0),  # outside: an empty box at the border
        ([20, 20, -5, 30], [20, 20, 5, 30], 0.0),
        ([20, 20, 30, 30], [-1, -1, -1, -1], 0.0),
    ],
)
def test_bounding_moves_first_and_cuts_then(predicted, truth, expected):
    assert bounded_iou(boxes(predicted), boxes(truth), (100, 80)).item() == pytest.approx(
        expected, abs=1e-12
    )


def test_size_of_each_frame_and_arguments_left_alone():
    predicted, truth = (
        boxes([-10, 0, 50, 50], [-10, 0, 50, 50]),
        boxes([0, 0, 40, 50], [0, 0, 30, 50]),
    )
    before = predicted.clone(), truth.clone()
    found = bounded_iou(predicted, truth, torch.tensor([[100, 100], [30, 100]]))
    assert found.tolist() == pytest.approx([0.8, 1.0], abs=1e-12)
    assert torch.equal(predicted, before[0]) and torch.equal(truth, before[1])


def test_first_frame_and_hidden_frames_do_not_count():
    truth = boxes([0, 0, 10, 10]).repeat(5, 1)
    predicted = truth.clone()
    predicted[0] = boxes([50, 50, 1, 1])
    predicted[2] = boxes([50, 50, 1, 1])
    predicted[4] = boxes([0, 0, 5, 10])
    assert overlaps(
        predicted, truth, (99, 99), torch.tensor([8, 8, 0, 1, 8])
    ).tolist() == pytest.approx([1, 1, 0.5])
    assert len(overlaps(predicted, truth, (99, 99), torch.tensor([8, 0, 0, 0, 0]))) == 0


def test_unusable_boxes_are_named():
    truth = boxes([0, 0, 10, 10]).repeat(3, 1)
    with pytest.raises(DataError, match="a row for every frame"):
        bounded_iou(truth[1:], truth, (99, 99))
    with pytest.raises(DataError, match="cover value for each of the 3"):
        overlaps(truth, truth, (99, 99), torch.ones(2))
    broken = truth.clone()
    broken[1, 2] = math.nan
    with pytest.raises(DataError, match="frame 1 is not finite"):
        bounded_iou(broken, truth, (99, 99))


# ---- averages ----


def test_rates_are_strict():
    found = torch.tensor([0.5, 0.75, 0.2, 1.0], dtype=torch.float64)
    assert average_overlap(found) == pytest.approx(2.45 / 4)
    assert success_rate(found, 0.5) == 0.5
    assert success_rate(found, 0.75) == 0.25
    curve = success_curve(found)
    assert curve.shape == (101,) and curve[0] == 1 and curve[100] == 0
    assert curve[50] == 0.5 and curve[75] == 0.25 and curve[19] == 1 and curve[20] == 0.75
    for function in (average_overlap, success_curve):
        with pytest.raises(DataError, match="no overlaps"):
            function(torch.empty(0))


def slow_overlaps(predicted, truth, sizes, cover) -> list[float]:
    """Section 3 of the specification again: one frame at a time, plain Python."""
    result = []
    for k in range(1, len(truth)):
        if cover[k] == 0:
            continue
        bounded = []
        for x, y, w, h in (predicted[k], truth[k]):
            x, y = min(max(x, 0), sizes[k][0]), min(max(y, 0), sizes[k][1])
            bounded.append((x, y, min(max(w, 0), sizes[k][0] - x), min(max(h, 0), sizes[k][1] - y)))
        (ax, ay, aw, ah), (bx, by, bw, bh) = bounded
        iw = max(min(ax + aw, bx + bw) - max(ax, bx), 0)
        ih = max(min(ay + ah, by + bh) - max(ay, by), 0)
        result.append(min(max(iw * ih / (aw * ah + bw * bh - iw * ih + np.finfo(float).eps), 0), 1))
    return result


number = st.floats(-50, 150, width=32) | st.integers(-50, 150)
row = st.tuples(number, number, number, number)
frame = st.tuples(row, row, st.tuples(st.integers(1, 120), st.integers(1, 120)), st.integers(0, 8))


@settings(deadline=None, max_examples=150)
@given(st.lists(frame, min_size=2, max_size=8))
def test_same_as_a_second_implementation(frames):
    predicted, truth, sizes, cover = zip(*frames, strict=True)
    found = overlaps(boxes(*predicted), boxes(*truth), torch.tensor(sizes), torch.tensor(cover))
    expected = np.array(slow_overlaps(predicted, truth, sizes, cover))
    assert np.abs(found.numpy() - expected).max(initial=0) == 0
    if len(expected):
        assert average_overlap(found) == pytest.approx(expected.mean(), abs=1e-12)
        assert success_rate(found, 0.5) == (expected > 0.5).mean()
        curve = (expected[:, None] > np.linspace(0, 1, 101)).mean(0)
        assert np.array_equal(success_curve(found).numpy(), curve)


@given(st.lists(st.sampled_from(THRESHOLDS.tolist()), min_size=1, max_size=30))
def test_curve_on_the_thresholds_themselves(values):
    expected = (np.array(values)[:, None] > np.linspace(0, 1, 101)).mean(0)
    assert np.array_equal(
        success_curve(torch.tensor(values, dtype=torch.float64)).numpy(), expected
    )


# ---- scores of a data set ----


def three_videos() -> Videos:
    still = video("c", [[10, 10, 20, 10]] * 3, attributes=("scale",), meta={"object_class": "cat"})
    return Videos(
        [
            moving("a", 3, attributes=("fast", "scale"), meta={"object_class": "cat"}),
            moving("b", 11, attributes=("fast",), meta={"object_class": "dog"}),
            still,
        ]
    )


def stay(sequence) -> tuple[torch.Tensor, torch.Tensor]:
    return sequence.boxes_xywh[:1].repeat(len(sequence), 1), torch.full(
        (len(sequence),), 0.1, dtype=torch.float64
    )


def test_three_averages_by_hand():
    data = three_videos()
    scores = score(data, map(stay, data), "stay")
    a = [19 / 21, 18 / 22]
    b = [(20 - k) / (20 + k) for k in range(1, 11)]
    c = [1.0, 1.0]
    assert scores.ao == pytest.approx(np.mean(a + b + c)) and scores.frames == 14
    assert scores.sr50 == pytest.approx(np.mean(np.array(a + b + c) > 0.5))
    assert scores.sr75 == pytest.approx(np.mean(np.array(a + b + c) > 0.75)) == scores.curve[75]
    assert scores.sequence_mean.ao == pytest.approx(np.mean([np.mean(a), np.mean(b), 1]))
    assert scores.class_mean.ao == pytest.approx(np.mean([np.mean([np.mean(a), 1]), np.mean(b)]))
    assert scores.sequences["b"] == Rates(pytest.approx(np.mean(b)), 0.6, 0.2, 10, 1)
    assert scores.attributes["fast"].ao == pytest.approx(np.mean(a + b))
    assert (scores.attributes["scale"].frames, scores.attributes["scale"].sequences) == (4, 2)
    assert scores.fps == pytest.approx(10) and scores.unscored == ()


def test_hidden_sequences_missing_classes_and_times():
    data = three_videos()
    data[0].cover[1:] = 0
    data[2].meta = {}
    tracks = [stay(s) for s in data]
    tracks[1][1][:] = 0
    tracks[1][1][0] = 0.01
    tracks[2][1][:] = 0
    scores = score(data, tracks, "stay")
    assert scores.unscored == ("a",) and set(scores.sequences) == {"b", "c"}
    assert scores.class_mean is None
    assert scores.fps == pytest.approx(17 / 0.31)
    assert scores.fps_toolkit == pytest.approx((3 * 10 + 100) / 4)
    assert Scores.from_json(scores.to_json()) == scores
    for sequence in data:
        sequence.cover[1:] = 0
    with pytest.raises(DataError, match="no frame counts"):
        score(data, tracks, "stay")


def test_json_round_trip():
    data = three_videos()
    scores = score(data, map(stay, data), "stay")
    assert Scores.from_json(scores.to_json()) == scores
    for text in ("", "{}", "[1]", '{"sequences": 3}', scores.to_json().replace('"sr50"', '"sr60"')):
        with pytest.raises(DataError, match="not the scores"):
            Scores.from_json(text)


def test_wrong_number_of_boxes_or_no_labels():
    data = Videos([moving("a", 3)])
    with pytest.raises(DataError, match="sequence a: 2 boxes for 3 frames"):
        score(data, [(torch.ones(2, 4), torch.ones(2))], "x")
    with pytest.raises(DataError, match="sequence t has only its first box"):
        score(
            Videos([video("t", [[1, 1, 5, 5]], frames=3)]), [(torch.ones(3, 4), torch.ones(3))], "x"
        )


def test_tables():
    data = three_videos()
    good = score(data, [(s.boxes_xywh, torch.ones(len(s))) for s in data], "perfect")
    scores = {"stay": score(data, map(stay, data), "stay"), "perfect": good}
    lines = compare(scores).splitlines()
    assert lines[0].startswith("videos: 3 sequences, 14 frames")
    assert lines[2].split() == [
        "tracker",
        "AO",
        "SR0.50",
        "SR0.75",
        "AO/seq",
        "AO/class",
        "frames/s",
    ]
    assert lines[4].split() == ["perfect", "1.000", "1.000", "1.000", "1.000", "1.000", "1.0"]
    assert lines[5].split()[:2] == ["stay", f"{scores['stay'].ao:.3f}"]
    assert len({len(line) for line in lines[2:]}) == 1
    rows = [line.split() for line in compare_attributes(scores).splitlines()]
    assert ["scale", "2", "4", f"{scores['stay'].attributes['scale'].ao:.3f}", "1.000"] in rows
    assert rows[-1][0] == "all"
    with pytest.raises(DataError, match="cannot be compared"):
        compare({"a": good, "b": score(Videos(data[:2]), map(stay, data[:2]), "b")})


# ---- runs ----


class Counting(StayTracker):
    """Counts its steps (in frames), and may stop like a run that is cut off."""

    def __init__(self, stop_after: float = math.inf):
        super().__init__()
        self.seen, self.stop_after = 0, stop_after

    def step(self, state, frames, maps=False):
        if self.seen >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(frames)
        return super().step(state, frames, maps)


def five_videos() -> Videos:
    return Videos(moving(f"v{k}", length) for k, length in enumerate((4, 9, 2, 6, 3)))


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_evaluate_writes_and_scores_everything(tmp_path, batch):
    data = five_videos()
    scores = evaluate(StayTracker(), data, tmp_path / "stay", "stay", batch)
    expected = score(data, map(stay, data), "stay")
    assert (scores.ao, scores.sequences, scores.dataset) == (
        expected.ao,
        expected.sequences,
        "videos",
    )
    for sequence in data:
        assert torch.equal(read_results(tmp_path / "stay", sequence.name)[0], stay(sequence)[0])
    assert score_results(tmp_path / "stay", data, "stay") == scores


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    data, whole = five_videos(), Counting()
    complete = evaluate(whole, data, tmp_path / "whole", "stay", batch=1)
    assert whole.seen == 3 + 8 + 1 + 5 + 2
    with pytest.raises(KeyboardInterrupt):
        evaluate(Counting(stop_after=13), data, tmp_path / "part", "stay", batch=1)
    rest = Counting()
    scores = evaluate(rest, data, tmp_path / "part", "stay", batch=1)
    assert rest.seen == 5 + 2  # the first three were complete
    assert (scores.ao, scores.sequences) == (complete.ao, complete.sequences)
    again = Counting()
    assert evaluate(again, data, tmp_path / "part", "stay") == scores
    assert again.seen == 0


def test_damaged_results_are_computed_again(tmp_path):
    data = five_videos()
    complete = evaluate(Counting(), data, tmp_path, "stay")
    cut = tmp_path / "v1" / "v1_001.txt"
    cut.write_text("\n".join(cut.read_text().splitlines()[:3]) + "\n")
    (tmp_path / "v3" / "v3_time.txt").unlink()
    tracker = Counting()
    scores = evaluate(tracker, data, tmp_path, "stay")
    assert tracker.seen == 8 + 5
    assert (scores.ao, scores.sequences) == (complete.ao, complete.sequences)


@pytest.mark.parametrize("change", ["frame", "time of a frame", "label", "results", "times"])
def test_what_has_changed_on_disk_is_tracked_again_with_a_word(tmp_path, change):
    names = ("a", "b")
    for name in names:
        write_sequence(
            tmp_path / "r" / "val" / name,
            [torch.full((3, 48, 64), 40 * i, dtype=torch.uint8) for i in range(4)],
            boxes([10, 10, 20, 10]).repeat(4, 1),
        )
    data, out = GOT10k(tmp_path / "r", "val"), tmp_path / "out"
    evaluate(Counting(), data, out, "stay")
    folder, cut = data.folder / "b", out / "b" / "b_001.txt"
    if change == "frame":
        (folder / "00000002.jpg").write_bytes((folder / "00000004.jpg").read_bytes())
    elif change == "time of a frame":
        os.utime(folder / "00000002.jpg", ns=(1, 1))
    elif change == "label":
        lines = (folder / "groundtruth.txt").read_text().splitlines()
        (folder / "groundtruth.txt").write_text("\n".join([*lines[:3], "10,10,21,10"]))
    else:  # cut digits, but as many numbers and lines
        cut = cut if change == "results" else cut.with_name("b_time.txt")
        cut.write_text(cut.read_text()[:-3] + "\n")
    tracker, what = Counting(), "result files" if cut.exists() and change[-1] == "s" else "data"
    with pytest.warns(UserWarning, match=f"b: the {what} have changed .*tracked again") as caught:
        evaluate(tracker, GOT10k(tmp_path / "r", "val"), out, "stay")
    assert tracker.seen == 3 and len(caught) == 1  # only that sequence
    again = Counting()
    evaluate(again, GOT10k(tmp_path / "r", "val"), out, "stay")
    assert again.seen == 0


def test_rows_of_nan_are_neither_scored_nor_trained_on(tmp_path):
    frames = [torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8) for _ in range(6)]
    truth = boxes([40, 30, 30, 20]).repeat(6, 1)
    folder = write_sequence(tmp_path / "r" / "clip", frames, truth)
    rows = (folder / "groundtruth.txt").read_text().splitlines()
    (folder / "groundtruth.txt").write_text(
        "\n".join([*rows[:2], *["NaN,NaN,NaN,NaN"] * 3, rows[5]])
    )
    data = GOT10k(tmp_path / "r", "val")
    scores = evaluate(StayTracker(), data, tmp_path / "out", "stay")
    assert (scores.ao, scores.frames) == (pytest.approx(1), 2)
    spec = SampleSpec(template=CropSpec(32, 2.0), search=CropSpec(64, 4.0), negatives=0.3)
    samples = Samples(data, spec, 0, 20)
    assert all(torch.isfinite(samples[i]["search_boxes"]).all() for i in range(20))
    (folder / "groundtruth.txt").write_text("\n".join(["nan nan nan nan", *rows[1:]]))
    with pytest.raises(DataError, match=r"clip, first frame: box 0 .* has no area"):
        evaluate(StayTracker(), GOT10k(tmp_path / "r", "val"), tmp_path / "other", "stay")


def test_listed_paths_with_one_folder_name_are_scored_apart(tmp_path):
    data = Videos([moving("cam1/clip", 9), moving("cam2/clip", 4), moving("cam2", 3)])
    scores = evaluate(Counting(), data, tmp_path, "stay")
    assert set(scores.sequences) == {"cam1/clip", "cam2/clip", "cam2"}
    assert [len(read_results(tmp_path, s.name)[0]) for s in data] == [9, 4, 3]
    assert scores == score_results(tmp_path, data, "stay")
    assert scores.sequences["cam1/clip"].ao < scores.sequences["cam2/clip"].ao
    rest = Counting()
    assert evaluate(rest, data, tmp_path, "stay") == scores and rest.seen == 0


def test_a_second_evaluation_into_a_folder_is_refused_while_the_first_lives(tmp_path):
    data = five_videos()
    with (
        alone(tmp_path, "writes results"),
        pytest.raises(DataError, match="another process writes"),
    ):
        evaluate(StayTracker(), data, tmp_path, "stay")
    assert evaluate(StayTracker(), data, tmp_path, "stay").frames == 19


def test_partial_files_of_a_killed_evaluation_are_removed(tmp_path):
    data = five_videos()
    evaluate(StayTracker(), data, tmp_path, "stay")
    for partial in (tmp_path / ".x.77-0123abcd.json", tmp_path / "v1" / ".v1_001.77-0123abcd.txt"):
        partial.write_text("half")
    evaluate(StayTracker(), data, tmp_path, "stay")
    assert not list(tmp_path.rglob(".*.77-*"))


def test_results_of_another_tracker_or_other_videos_are_refused(tmp_path):
    data = five_videos()
    evaluate(StayTracker(), data, tmp_path, "stay")
    with pytest.raises(DataError, match="stay"):
        evaluate(NccTracker(), data, tmp_path, "ncc")
    with pytest.raises(DataError, match="stay"):
        evaluate(NccTracker(), data, tmp_path, "stay")  # same name, other tracker
    others = Videos(video(s.name, s.boxes_xywh + 1) for s in data)
    with pytest.raises(DataError, match="other videos"):
        evaluate(StayTracker(), others, tmp_path, "stay")


def test_fingerprint_depends_on_class_config_and_weights():
    torch.manual_seed(0)
    tracker = SiamFC(SiamFCConfig.tiny())
    first = fingerprint(tracker)
    assert fingerprint(tracker) == first and len(first) == 16
    with torch.no_grad():
        next(tracker.parameters()).view(-1)[3] += 1e-6
    assert (
        len({first, fingerprint(tracker), fingerprint(StayTracker()), fingerprint(NccTracker())})
        == 4
    )


def test_without_labels_results_are_written_and_the_server_is_named(tmp_path, capsys):
    data = Videos([video("t1", [[5, 5, 9, 9]], frames=4), video("t2", [[5, 5, 9, 9]], frames=2)])
    assert evaluate(StayTracker(), data, tmp_path, "stay") is None
    assert "need the server" in capsys.readouterr().out
    assert len(read_results(tmp_path, "t1", 4)[0]) == 4


def test_the_files_alone_decide(tmp_path):
    """Boxes are scored as written, with three decimals, so a resumed run cannot differ from a whole
    one.
    """
    data = Videos([moving("a", 3)])
    tracker = StayTracker()
    shifted = data[0].boxes_xywh + 0.00049
    about = "stay", fingerprint(tracker), data[0].fingerprint()
    write_results(tmp_path, "a", shifted, torch.ones(3), *about)
    assert evaluate(tracker, data, tmp_path, "stay").ao == pytest.approx(1, abs=1e-12)


def test_changing_frame_size_inside_a_sequence():
    images = [torch.zeros(3, 48, 64, dtype=torch.uint8)] * 2 + [
        torch.zeros(3, 48, 30, dtype=torch.uint8)
    ]
    sequence = ArraySequence("s", images, boxes([0, 0, 40, 40]).repeat(3, 1))
    predicted = boxes([0, 0, 40, 40], [0, 0, 40, 40], [0, 0, 30, 40])
    assert score(Videos([sequence]), [(predicted, torch.ones(3))], "x").ao == pytest.approx(1)
