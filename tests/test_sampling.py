"""Training samples: determinism, frame choice, geometry, stated visibility rules."""

from __future__ import annotations

import dataclasses
import logging
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trackkit.boxes import cxcywh_to_xywh
from trackkit.errors import DataError
from trackkit.frames import FrameRule, choose_frames
from trackkit.got10k import GOT10k
from trackkit.sampling import CropSpec, Samples, SampleSpec, batches, rendered
from trackkit.sequences import ArraySequence
from trackkit.synth import SynthConfig, SynthDataset, write_dataset
from trackkit.trackers.siamfc import SiamFC

PAIR = SampleSpec(template=CropSpec(32, 2.0), search=CropSpec(64, 4.0))


def moving_square(count: int = 12, **labels) -> ArraySequence:
    """A white square of 20 px on black that moves 3 px a frame."""
    frames, boxes = [], []
    for i in range(count):
        frame = torch.zeros(3, 120, 160, dtype=torch.uint8)
        frame[:, 40:60, 30 + 3 * i : 50 + 3 * i] = 255
        frames.append(frame)
        boxes.append([30 + 3 * i, 40, 20, 20])
    return ArraySequence("square", frames, torch.tensor(boxes), **labels)


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fill", [None, 7])
def test_packed_rectangles_become_the_same_crops(tmp_path, fill, workers):
    """Rendered all at once where the batch is, as on a GPU; from JPEGs, reduced and beyond their
    borders, from frames in memory, and drawn.
    """
    jpegs = SynthDataset(SynthConfig(width=300, height=210, frames=4), seed=1, length=2)
    write_dataset(tmp_path, "train", jpegs)
    data = [*GOT10k(tmp_path, "train"), moving_square(), SynthDataset(SynthConfig(), 2, 1)[0]]
    jitter = {"shift_px": 20, "scale": 0.2, "jitter_size": 0.3, "jitter_centre": 2}
    spec = dataclasses.replace(
        PAIR, template=CropSpec(32, 2.0, fill=fill), search=CropSpec(64, 6.0, fill=fill, **jitter),
        searches=2, flip=0.5, flip_each=0.5, grey=0.5, brightness=0.3, masks=True, negatives=0.2,
    )  # fmt: skip
    whole = batches(Samples(data, spec, 5, 24), 8, 0, 3)
    packed = batches(Samples(data, spec, 5, 24, packed=True), 8, 0, 3, workers)
    for ours, theirs in zip(packed, whole, strict=True):
        assert ours["searches"].to("cpu").pixels.dtype == torch.uint8
        assert equal(rendered(ours), theirs)


def test_sample_depends_on_seed_and_number_only():
    data = SynthDataset(SynthConfig(frames=10), seed=3, length=40)
    spec = dataclasses.replace(PAIR, flip=0.5, grey=0.5, brightness=0.2)
    one, two, other = (
        Samples(data, spec, 7, 20),
        Samples(data, spec, 7, 20),
        Samples(data, spec, 8, 20),
    )
    backwards = {i: two[i] for i in reversed(range(6))}
    assert all(equal(one[i], backwards[i]) for i in range(6))
    assert not equal(one[0], other[0])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {
                "template": CropSpec(32, 1.0, 0.5, 2, 0.05),
                "search": CropSpec(60, 60 / 32, 0.5, 2, 0.05),
            },
            1384541349,
        ),
        ({"order": "any", "templates": 2, "flip": 0.5, "brightness": 0.2}, 3654441044),
        ({"order": "clip", "searches": 3, "max_gap": 8}, 2441668059),
    ],
)
def test_samples_are_still_those_that_shipped_weights_and_lessons_have_seen(changes, expected):
    y, x = torch.meshgrid(torch.arange(120), torch.arange(160), indexing="ij")
    frames = [
        torch.stack([x * 3 + i, y * 5 + x, x * y + 7 * i]).remainder(256).to(torch.uint8)
        for i in range(12)
    ]
    sequence = ArraySequence(
        "pattern", frames, torch.tensor([[30 + 3 * i, 40, 20, 25] for i in range(12)])
    )
    samples, crc = Samples([sequence], dataclasses.replace(PAIR, **changes), 3, 6), 0
    for i in range(6):
        for key in ("templates", "searches"):
            crc = zlib.crc32(samples[i][key].contiguous().numpy().tobytes(), crc)
    assert crc == expected


def test_batches_do_not_depend_on_workers_processes_or_interruption():
    samples = Samples([moving_square()], dataclasses.replace(PAIR, flip=0.5), 0, 24)
    whole = list(batches(samples, 4, 0, 6))
    assert len(whole) == 6 and whole[0]["searches"].shape == (4, 1, 3, 64, 64)
    assert all(
        equal(a, b) for a, b in zip(whole, batches(samples, 4, 0, 6, workers=2), strict=True)
    )
    assert all(equal(a, b) for a, b in zip(whole[4:], batches(samples, 4, 4, 6), strict=True))
    ranks = [list(batches(samples, 2, 0, 6, rank=r, world=2)) for r in (0, 1)]
    for step in range(6):
        joined = {k: torch.cat([ranks[0][step][k], ranks[1][step][k]]) for k in whole[step]}
        assert equal(joined, whole[step])


def test_each_template_frame_is_cropped_with_each_factor():
    data = [moving_square()]
    spec = dataclasses.replace(PAIR, templates=2)
    both, near, far = (
        Samples(data, dataclasses.replace(spec, template_factors=factors), 0, 3)[2]
        for factors in ((2.0, 3.0), (), (3.0,))
    )
    assert both["templates"].shape[0] == 4
    for key in ("templates", "template_boxes"):
        assert torch.equal(both[key], torch.cat([near[key], far[key]]))
    assert torch.equal(both["searches"], near["searches"])


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_box_is_where_the_pixels_are(flip):
    spec = SampleSpec(
        template=CropSpec(64, 2.0, shift_px=6, scale=0.2),
        search=CropSpec(96, 3.0, shift_px=15, scale=0.3),
        searches=2,
        flip=flip,
    )
    samples = Samples([moving_square()], spec, 0, 20)
    for i in range(20):
        sample = samples[i]
        for crops, boxes in (("templates", "template_boxes"), ("searches", "search_boxes")):
            for crop, box in zip(sample[crops], sample[boxes], strict=True):
                size = crop.shape[-1]
                x, y, w, h = (cxcywh_to_xywh(box) * size).tolist()
                rows, columns = (crop[0] > 127).any(1).nonzero(), (crop[0] > 127).any(0).nonzero()
                assert columns.min() == pytest.approx(
                    x, abs=1
                ) and columns.max() + 1 == pytest.approx(x + w, abs=1)
                assert rows.min() == pytest.approx(y, abs=1) and rows.max() + 1 == pytest.approx(
                    y + h, abs=1
                )


@pytest.mark.parametrize(("exact", "shift"), [(True, 0.0), (False, 0.0), (True, 6.0)])
def test_later_searches_from_the_first_ones_window(exact, shift):
    """What moved in the frame moves in the crop, and what stood still stays, up to the shift."""
    search = CropSpec(
        64, 4.0, jitter_size=0.3, jitter_centre=2.0, shift_px=shift, fill=0, exact=exact
    )
    spec = dataclasses.replace(
        PAIR, search=search, searches=3, order="clip", same_window=True, masks=True
    )
    moved = []
    for i in range(10):
        sample = Samples([moving_square()], spec, 0, 10)[i]
        first, *later = sample["search_boxes"]
        pixels = 20 / first[2]  # side of the window in frame pixels
        moved += [
            (box - first) * pixels - torch.tensor([3.0 * n, 0, 0, 0])
            for n, box in enumerate(later, 1)
        ]
        for crop, box in zip(sample["searches"], sample["search_boxes"], strict=True):
            x, y = (box[:2] * 64).floor().long()
            assert not (0 <= x < 64 and 0 <= y < 64) or crop[0, y, x] == 255
    moved = torch.stack(moved).abs()
    # not exact: as if windows were not whole pixels
    assert moved[:, 2:].max() < 1e-4 and moved[:, :2].max() < (0.01 if exact else 0.51) + 4 * shift
    assert (moved[:, :2].max() > 1) == (shift > 0)


def test_jitter_stays_within_its_bounds():
    spec = dataclasses.replace(PAIR, search=CropSpec(100, 4.0, shift_px=10, scale=0.1))
    samples = Samples([moving_square()], spec, 0, 60)
    boxes = torch.cat([samples[i]["search_boxes"] for i in range(60)])
    shifts, sizes = (boxes[:, :2] - 0.5) * 100, boxes[:, 2] * 100
    assert 7 < shifts.abs().max() <= 11, "the pixel grid of the frame rounds by half a frame pixel"
    assert 22 < sizes.min() < 23.5 and 26.5 < sizes.max() < 28


@settings(max_examples=60, deadline=None)
@given(
    usable=st.sets(st.integers(0, 80), min_size=2, max_size=60),
    templates=st.integers(1, 3),
    searches=st.integers(1, 4),
    order=st.sampled_from(["forward", "any", "clip"]),
    max_gap=st.integers(2, 50),
    seed=st.integers(0, 1000),
)
def test_frames_are_usable_close_and_in_order(usable, templates, searches, order, max_gap, seed):
    usable = np.array(sorted(usable))
    spec = dataclasses.replace(
        PAIR, templates=templates, searches=searches, order=order, max_gap=max_gap
    )
    frames = choose_frames(spec, usable, np.random.default_rng(seed))
    assert len(frames) == templates + searches
    assert set(frames) <= set(usable) and frames.max() - frames.min() < max_gap
    if order != "any":
        assert (np.diff(frames) >= 0).all()
    if order == "clip" and len(set(frames)) == len(frames):
        positions = np.searchsorted(usable, frames[templates:])
        assert (np.diff(positions) == 1).all()
    room = max(int(((usable >= s) & (usable < s + max_gap)).sum()) for s in usable)
    if room >= templates + searches:
        assert len(set(frames)) == len(frames), "frames repeat only when there are too few"


def test_invisible_frames_are_never_used():
    absent = torch.zeros(12, dtype=torch.bool)
    absent[::2] = True
    cover = torch.full((12,), 8)
    cover[1] = 0
    sequence = moving_square(absent=absent, cover=cover)
    sequence.boxes_xywh[3, 2] = 0
    sequence.boxes_xywh[5] = float("nan")
    assert FrameRule().usable(sequence).tolist() == [7, 9, 11]


def test_siamfc_rule():
    rule = SiamFC().samples().rule
    sequence = moving_square()
    assert len(rule.usable(sequence)) == 12
    sequence.boxes_xywh[0, 2:] = torch.tensor([19.0, 20.0])  # a side under 20 px
    sequence.boxes_xywh[1, 2:] = torch.tensor([81.0, 30.0])  # more than half the frame's width
    # more than half the height, and aspect over 4
    sequence.boxes_xywh[2, 2:] = torch.tensor([20.0, 81.0])
    sequence.cover[3] = 2  # not more than 0.3 of the best level, 8
    assert rule.usable(sequence).tolist() == list(range(4, 12))
    sequence.cover[:] = 1  # the best level must itself be more than 1
    assert len(rule.usable(sequence)) == 0


def test_unusable_sequence_is_named_once_and_another_is_drawn(caplog):
    hidden = moving_square(absent=torch.ones(12, dtype=torch.bool))
    hidden.name = "hidden"
    samples = Samples([hidden, moving_square()], PAIR, 0, 30)
    with caplog.at_level(logging.WARNING, "trackkit"):
        for i in range(30):
            assert samples[i]["search_boxes"].isfinite().all()
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["hidden"]
    with pytest.raises(DataError, match="100 sequences drawn"):
        Samples([hidden], PAIR, 0, 1)[0]


def test_short_sequences_are_not_used():
    long, short = moving_square(), moving_square(8)
    short.name = "short"
    hidden = moving_square(absent=torch.arange(12) >= 6)  # 6 usable frames
    hidden.name = "hidden"
    rule = FrameRule(min_frames=10, min_usable=7)
    samples = Samples([short, hidden, long], dataclasses.replace(PAIR, rule=rule), 0, 20)
    assert {samples._draw(np.random.default_rng(i))[0].name for i in range(20)} == {"square"}
    with pytest.raises(ValueError, match="two usable frames"):
        FrameRule(min_usable=1)


def test_errors():
    with pytest.raises(DataError, match="no sequences"):
        Samples([], PAIR, 0, 1)
    unlabelled = moving_square()
    unlabelled.boxes_xywh = unlabelled.boxes_xywh[:1]
    with pytest.raises(DataError, match="no boxes beyond the first frame"):
        Samples([unlabelled], PAIR, 0, 1)[0]
    with pytest.raises(ValueError, match="order"):
        dataclasses.replace(PAIR, order="sideways")
    with pytest.raises(ValueError, match="impossible crop"):
        CropSpec(0, 1.0)


@pytest.mark.parametrize(("frames", "max_gap"), [(24, 100), (150, 100)])
def test_every_pair_within_the_gap_is_equally_likely(frames, max_gap):
    spec, usable, rng = (
        dataclasses.replace(PAIR, max_gap=max_gap),
        np.arange(frames),
        np.random.default_rng(0),
    )
    drawn = np.array([choose_frames(spec, usable, rng) for _ in range(20_000)])
    pairs = [(a, b) for a in range(frames) for b in range(a + 1, min(frames, a + max_gap))]
    gaps = np.array([b - a for a, b in pairs])
    assert np.diff(drawn).mean() == pytest.approx(gaps.mean(), rel=0.03)
    expected = np.bincount(np.array(pairs).ravel(), minlength=frames) / len(pairs) / 2
    found = np.bincount(drawn.ravel(), minlength=frames) / drawn.size
    for frame in (0, frames // 2, frames - 1):
        assert found[frame] == pytest.approx(expected[frame], rel=0.2)
