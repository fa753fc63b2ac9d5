"""STARK's crops and samples: the authors' numbers, and what must hold for every sample."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from golden import frames, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from trackkit.boxes import cxcywh_to_xywh, xywh_to_cxcywh
from trackkit.crops import Windows, context_side, cut, gt_in_crop, outside
from trackkit.errors import DataError
from trackkit.frames import FrameRule, choose_frames
from trackkit.rectangles import grey_levels
from trackkit.sampling import (
    CropSpec,
    Samples,
    SampleSpec,
    batches,
    choose_window,
    jitter_box,
)
from trackkit.sequences import ArraySequence

CROP, TRAIN = golden("stark_crop"), golden("stark_train")
BLACK = torch.zeros(3)
TINY = SampleSpec(
    template=CropSpec(64, 2.0, fill=0),
    search=CropSpec(128, 5.0, jitter_size=0.5, jitter_centre=4.5, fill=0),
    templates=2,
    order="trident",
    max_gap=200,
    flip=0.5,
    grey=0.05,
    brightness=0.2,
    flip_each=0.5,
    masks=True,
)
PAIR = SampleSpec(CropSpec(32, 2.0), CropSpec(64, 4.0))


def frame_of(spec: dict) -> torch.Tensor:
    images, _ = frames(spec["name"], spec["n"], spec["height"], spec["width"])
    return images[0]


def window_of(case: dict) -> Windows:
    box = torch.tensor([case["box"]], dtype=torch.float64)
    side = (context_side(box) * case["factor"]).ceil()
    return Windows.around(xywh_to_cxcywh(box)[:, :2], side, case["size"])


def flat_video(count: int = 24, width: int = 160, height: int = 120, **labels) -> ArraySequence:
    """Frame i is one grey, 2 * i + 100, so that a crop tells its frame. The target stands in the
    middle, 40 x 30.
    """
    images = [torch.full((3, height, width), 2 * i + 100, dtype=torch.uint8) for i in range(count)]
    boxes = torch.tensor([[width / 2 - 20, height / 2 - 15, 40, 30]]).expand(count, 4)
    return ArraySequence("flat", images, boxes.clone(), **labels)


def square_video(count: int = 24) -> ArraySequence:
    """A white square of 30 px moves 4 px a frame over grey, from beyond the left border on."""
    images, boxes = [], []
    for i in range(count):
        image, x = torch.full((3, 120, 160), 100, dtype=torch.uint8), 4 * i - 20
        image[:, 50:80, max(x, 0) : max(x + 30, 0)] = 255
        images.append(image)
        boxes.append([x, 50, 30, 30])
    return ArraySequence("square", images, torch.tensor(boxes))


# ------------------------------------------------------------------------------------- the authors'
# numbers


def mask_errors(make_mask) -> int:
    """In how many of the authors' crops a way to make masks differs from theirs."""
    width, height, errors = CROP["frame"]["width"], CROP["frame"]["height"], 0
    for case in CROP["crops"]:
        mask = make_mask(window_of(case), width, height)
        cells = mask[::16, ::16]
        found = [mask.sum(), cells.sum(), cells.sum(1).tolist(), cells.sum(0).tolist()]
        errors += found != [
            case[k] for k in ("mask_true", "mask16_true", "mask16_rows", "mask16_cols")
        ]
    return errors


def test_crops_and_masks_are_the_authors():
    frame = frame_of(CROP["frame"])
    for case in CROP["crops"]:
        window = window_of(case)
        assert window.scale.item() == pytest.approx(case["resize_factor"], abs=1e-12)
        crop = cut([frame[:, :-1, :-1]], window, BLACK)[0].permute(1, 2, 0).flatten()
        assert crop[case["crop"]["index"]].tolist() == case["crop"]["value"]
        assert crop.sum() == case["crop"]["sum"]
    assert mask_errors(lambda w, width, height: outside(w, [(width - 1, height - 1)])[0]) == 0


def test_other_masks_are_not_the_authors():
    def whole_frame(window, width, height):
        return outside(window, [(width, height)])[0]

    def transposed(window, width, height):
        return outside(window, [(width - 1, height - 1)])[0].T

    def entirely_outside(window, width, height):  # instead of partly
        at = (torch.arange(window.size) + 0.5) / window.scale
        x, y = window.left + at, window.top + at
        return ((y < 0) | (y >= height - 1))[:, None] | (x < 0) | (x >= width - 1)

    for mutant in (whole_frame, transposed, entirely_outside):
        assert mask_errors(mutant) > 0, mutant.__name__


def test_box_in_a_crop_is_the_authors():
    differences = []
    for case in CROP["gt_in_crop"]:
        gt, extract = (torch.tensor([case[k]], dtype=torch.float64) for k in ("gt", "extract"))
        centre = xywh_to_cxcywh(extract)[:, :2]
        windows = Windows.around(centre, (context_side(extract) * 5).ceil(), 320)
        expected = torch.tensor(case["gt_in_crop"], dtype=torch.float64)
        found = cxcywh_to_xywh(gt_in_crop(gt, centre, windows))[0]
        assert (found - expected).abs().max() <= CROP["tolerance"]["gt_in_crop"]
        differences.append((windows.to_crop(gt)[0] / 320 - expected).abs().max().item())
    assert max(differences) > 1e-3, "the exact geometry is another rule"


def test_jitter_is_the_authors():
    for case in TRAIN["jitter"]:
        box = torch.tensor(case["box"], dtype=torch.float64)
        normal, uniform = (
            torch.tensor(case[k], dtype=torch.float64) for k in ("normal", "uniform")
        )
        found = jitter_box(box, 0.5, 4.5, normal, uniform)
        torch.testing.assert_close(
            found, torch.tensor(case["search_jittered"]).double(), rtol=0, atol=2e-5
        )
        assert torch.equal(jitter_box(box, 0.0, 0.0, normal, uniform), box)
        mixed_up = jitter_box(box, 0.5, 4.5, normal.flip(0), uniform)
        assert (mixed_up - found).abs().max() > 1


def test_grey_levels_are_those_of_opencv():
    colours = [
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
        [10, 200, 33],
        [255, 255, 255],
        [77, 3, 250],
        [1, 2, 3],
        [128, 127, 129],
    ]
    crop = torch.tensor(colours, dtype=torch.uint8).T[:, None]
    # cv2.cvtColor, RGB2GRAY
    assert grey_levels(crop).flatten().tolist() == [76, 150, 29, 124, 255, 53, 2, 128]


# --------------------------------------------------------------------------------------------------
# windows


@settings(max_examples=60, deadline=None)
@given(
    box=st.tuples(st.floats(-30, 600), st.floats(-30, 400), st.floats(1, 700), st.floats(1, 700)),
    size=st.sampled_from([64, 128]),
    shift=st.sampled_from([0.0, 6.0]),
    seed=st.integers(0, 10_000),
)
def test_the_two_rules_for_the_box_differ_by_half_a_pixel_and_by_rounding(box, size, shift, seed):
    box = torch.tensor([box], dtype=torch.float64)
    spec = CropSpec(size, 5.0, shift_px=shift, jitter_size=0.5, jitter_centre=4.5)
    window, exact = choose_window(box, spec, np.random.default_rng(seed))
    same, theirs = choose_window(
        box, dataclasses.replace(spec, exact=False), np.random.default_rng(seed)
    )
    assert all(torch.equal(getattr(window, k), getattr(same, k)) for k in ("left", "top", "side"))
    torch.testing.assert_close(
        exact.double(), (xywh_to_cxcywh(window.to_crop(box)) / size)[0], rtol=1e-6, atol=1e-6
    )
    difference = (theirs - exact).double() * size
    # of their window: half a frame pixel, also in a frame of reduced size
    snapping = 0.5 * window.scale.item()
    assert (difference[:2] + 0.5).abs().max() <= snapping + 0.01 + 1e-5 * exact.abs().max() * size
    torch.testing.assert_close(theirs[2:], exact[2:], rtol=1e-5, atol=1e-6)


def test_side_is_rounded_up_around_the_jittered_box():
    box = torch.tensor([[50.0, 60, 20, 30]], dtype=torch.float64)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        window, _ = choose_window(box, TINY.search, rng)
        draws = np.random.default_rng(seed)
        draws.random(3)  # zoom and shift
        normal, uniform = (
            torch.from_numpy(draws.standard_normal(2)),
            torch.from_numpy(draws.random(2)),
        )
        around = jitter_box(box, 0.5, 4.5, normal, uniform)
        side = math.ceil(5 * math.sqrt(around[0, 2] * around[0, 3]))
        # beyond, the window may move to the grid of a reduced frame
        if side < 2 * TINY.search.size:
            assert window.side.item() == side
            assert window.left.item() == round(float(around[0, 0] + around[0, 2] / 2) - side / 2)
            assert window.top.item() == round(float(around[0, 1] + around[0, 3] / 2) - side / 2)
    theirs, _ = choose_window(
        box, dataclasses.replace(TINY.template, exact=False), np.random.default_rng(0)
    )
    assert theirs.side.item() == math.ceil(2 * math.sqrt(600))


# ---
# frames


def frequencies(spec: SampleSpec, usable: list[int], length: int, draws: int = 8000) -> Counter:
    rng, usable = np.random.default_rng(0), np.array(usable)
    found = Counter(tuple(choose_frames(spec, usable, rng, length).tolist()) for _ in range(draws))
    return Counter({key: count / draws for key, count in found.items()})


def assert_frequencies(found: Counter, expected: Counter, draws: int = 8000):
    assert sum(expected.values()) == pytest.approx(1)
    assert set(found) <= set(expected)
    for key, p in expected.items():
        assert abs(found[key] - p) <= 5 * math.sqrt(p * (1 - p) / draws), key


def test_trident_is_the_papers_distribution():
    usable, length, gap = [0, 1, 3, 6], 8, 3
    spec, expected = dataclasses.replace(TINY, max_gap=gap), Counter()
    for z, s in itertools.product(usable, usable):
        near = range(s, min(s + gap, length)) if z >= s else range(max(s - gap, 0), s)
        for dynamic in near:
            expected[z, dynamic, s] += 1 / len(usable) ** 2 / len(near)
    assert_frequencies(frequencies(spec, usable, length), expected)


def test_causal_is_the_papers_distribution():
    usable, gap = [0, 1, 3, 4, 9], 4
    spec, expected = dataclasses.replace(PAIR, order="causal", max_gap=gap), Counter()
    # 4 has nothing within its gap, so it is drawn again; and then the gap is wider by 5 and it has
    for template in usable[:-1]:
        later = [f for f in usable if template < f < template + gap]
        for search in later:
            expected[template, search] += 1 / 4 / len(later)
    for template in usable[:-1]:
        later = [f for f in usable if template < f < template + gap + 5]
        for search in later:
            expected[template, search] += 1 / 4 * 1 / 4 / len(later)
    expected[4, 9] = expected[4, 9]  # 4 + 4 + 5 reaches it
    assert_frequencies(frequencies(spec, usable, 10), expected)


def test_causal_finds_far_frames_too():
    spec = dataclasses.replace(PAIR, order="causal", max_gap=10)
    assert choose_frames(spec, np.array([0, 1000]), np.random.default_rng(0)).tolist() == [0, 1000]


@settings(max_examples=60, deadline=None)
@given(
    usable=st.sets(st.integers(0, 300), min_size=2, max_size=80),
    more=st.integers(0, 50),
    searches=st.integers(1, 3),
    max_gap=st.integers(2, 220),
    seed=st.integers(0, 1000),
)
def test_causal_and_trident_keep_their_sides(usable, more, searches, max_gap, seed):
    usable = np.array(sorted(usable))
    length = int(usable[-1]) + 1 + more
    causal = dataclasses.replace(PAIR, order="causal", searches=searches, max_gap=max_gap)
    found = choose_frames(causal, usable, np.random.default_rng(seed), length)
    assert len(found) == 1 + searches and set(found) <= set(usable)
    assert (found[1:] > found[0]).all() and (np.diff(found) >= 0).all()
    found = choose_frames(
        dataclasses.replace(TINY, templates=3, max_gap=max_gap),
        usable,
        np.random.default_rng(seed),
        length,
    )
    first, dynamic, search = found[0], found[1:3], found[3]
    assert {first, search} <= set(usable)
    assert (dynamic >= 0).all() and (dynamic < length).all()
    if first >= search:
        assert (dynamic >= search).all() and (dynamic < search + max_gap).all()
    else:
        assert (dynamic < search).all() and (dynamic >= search - max_gap).all()


def test_a_dynamic_template_needs_a_box_but_no_visible_target():
    absent = torch.zeros(24, dtype=torch.bool)
    absent[8:16] = True
    video = flat_video(absent=absent)
    video.boxes_xywh[8:10] = float("nan")
    video.boxes_xywh[10, 0] = float("inf")
    video.boxes_xywh[11, 2] = -5
    samples = Samples(
        [video], dataclasses.replace(TINY, flip=0, grey=0, brightness=0, max_gap=24), 0, 240
    )
    second = Counter((int(samples[i]["templates"][1, 0, 32, 32]) - 99) // 2 for i in range(240))
    assert not second.keys() & set(range(8, 12)) and set(range(12, 16)) <= second.keys()
    first = {(int(samples[i]["templates"][0, 0, 32, 32]) - 99) // 2 for i in range(50)}
    assert not first & set(range(8, 16))


def test_orders_say_what_they_cannot_do():
    with pytest.raises(ValueError, match="order"):
        dataclasses.replace(PAIR, order="sideways")
    with pytest.raises(ValueError, match="one template"):
        dataclasses.replace(PAIR, order="causal", templates=2)
    with pytest.raises(ValueError, match="one search"):
        dataclasses.replace(TINY, searches=2)
    with pytest.raises(ValueError, match=r"0\.\.255"):
        CropSpec(64, 2.0, fill=256)
    with pytest.raises(ValueError, match="negative"):
        CropSpec(64, 2.0, jitter_size=-0.5)


# --------------------------------------------------------------------------------------------------
# samples


def test_what_a_sample_holds():
    sample = Samples([square_video()], dataclasses.replace(TINY, negatives=0.5), 0, 1)[0]
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in sample.items()}
    assert shapes == {
        "templates": ((2, 3, 64, 64), torch.uint8),
        "template_boxes": ((2, 4), torch.float32),
        "template_masks": ((2, 64, 64), torch.bool),
        "searches": ((1, 3, 128, 128), torch.uint8),
        "search_boxes": ((1, 4), torch.float32),
        "search_masks": ((1, 128, 128), torch.bool),
        "labels": ((1,), torch.float32),
    }
    plain = Samples([square_video()], dataclasses.replace(TINY, masks=False), 0, 1)[0]
    assert set(plain) == {"templates", "template_boxes", "searches", "search_boxes"}


def test_stark_samples_do_not_depend_on_workers_or_interruption():
    absent = torch.arange(24) >= 18
    sequences = [flat_video(absent=absent), square_video(), flat_video()]
    samples = Samples(sequences, dataclasses.replace(TINY, negatives=0.5), 0, 24)
    whole = list(batches(samples, 4, 0, 6))
    for others, expected in (
        (batches(samples, 4, 0, 6, workers=2), whole),
        (batches(samples, 4, 4, 6), whole[4:]),
    ):
        for a, b in zip(others, expected, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("flip", "each"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_boxes_and_masks_stay_on_their_pixels(flip, each):
    spec = dataclasses.replace(TINY, flip=flip, flip_each=each, grey=0, brightness=0)
    samples, checked = Samples([square_video()], spec, 1, 16), 0
    for i in range(16):
        sample = samples[i]
        for what in ("template", "search"):
            crops = sample["templates" if what == "template" else "searches"]
            for crop, box, mask in zip(
                crops, sample[f"{what}_boxes"], sample[f"{what}_masks"], strict=True
            ):
                grey, size = crop[0].int(), crop.shape[-1]
                # a crop of a frame that was decoded at a smaller size blends with the padding a
                # little farther
                assert (grey[~mask] >= 50).all(), "padding lies under the mask"
                x, y, w, h = (cxcywh_to_xywh(box) * size).tolist()
                slack = 1 + w / 30  # a crop pixel and a frame pixel
                at = torch.arange(size) + 0.5
                near = [
                    (at > lo - slack) & (at < hi + slack) for lo, hi in ((y, y + h), (x, x + w))
                ]
                deep = [
                    (at > lo + slack) & (at < hi - slack) for lo, hi in ((y, y + h), (x, x + w))
                ]
                assert not (grey > 250)[~(near[0][:, None] & near[1])].any(), (
                    "white only in the box"
                )
                assert (grey > 250)[deep[0][:, None] & deep[1] & ~mask].all(), (
                    "and everywhere in it, but for padding"
                )
                checked += int((deep[0][:, None] & deep[1] & ~mask).any())
    assert checked > 35, "of 48 crops"


def test_mirrored_twice_is_not_mirrored():
    never, twice, once = (
        Samples([square_video()], dataclasses.replace(TINY, flip=a, flip_each=b), 0, 8)
        for a, b in ((0, 0), (1, 1), (1, 0))
    )
    for i in range(8):
        a, b, c = never[i], twice[i], once[i]
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
        assert torch.equal(a["searches"].flip(-1), c["searches"])
        assert torch.equal(a["search_masks"].flip(-1), c["search_masks"])
        mirrored = torch.cat([1 - c["search_boxes"][:, :1], c["search_boxes"][:, 1:]], 1)
        torch.testing.assert_close(a["search_boxes"], mirrored)


def test_each_crop_is_mirrored_by_itself():
    video = flat_video()
    for image in video.images:
        image[:, :, 80:] = 250  # the right half is light
    samples = Samples([video], dataclasses.replace(TINY, flip=0, grey=0, brightness=0), 0, 200)
    light_left = [
        tuple(bool(crop[0, 32, 8] > 200) for crop in samples[i]["templates"]) for i in range(200)
    ]
    assert (
        all(35 <= count <= 65 for count in Counter(light_left).values())
        and len(set(light_left)) == 4
    )


def test_fill_and_masks_of_the_authors_frames():
    """The last row and column of a frame are masked when the authors' rule is asked for."""
    video = flat_video(width=64, height=64)
    video.boxes_xywh[:] = torch.tensor([16.0, 16, 32, 32])  # the window is the frame
    spec = dataclasses.replace(
        PAIR, template=CropSpec(64, 2.0, fill=7), search=CropSpec(64, 3.0, fill=7), masks=True
    )
    sample = Samples([video], spec, 0, 1)[0]
    assert not sample["template_masks"].any() and sample["search_masks"].any()
    assert (sample["searches"][0, :, 0] == 7).all()
    theirs = dataclasses.replace(spec, template=CropSpec(64, 2.0, fill=7, exact=False))
    mask = Samples([video], theirs, 0, 1)[0]["template_masks"][0]
    assert mask[-1].all() and mask[:, -1].all() and not mask[:-1, :-1].any()


# ------------------------------------------------------------------------------------------------
# negatives


def shades(crops: torch.Tensor) -> list[int]:
    """Which frame of `flat_video` each crop shows; padding is black."""
    return [(int(crop.amax()) - 99) // 2 for crop in crops]


PLAIN = dataclasses.replace(
    TINY, flip=0, flip_each=0, grey=0, brightness=0, order="forward", max_gap=30
)


def test_negatives_are_frames_without_the_target():
    absent = torch.zeros(24, dtype=torch.bool)
    absent[[3, 11]] = True
    cover = torch.full((24,), 8)
    cover[17] = 0
    search = CropSpec(128, 4.0, fill=0)
    spec = dataclasses.replace(
        PLAIN, negatives=0.5, searches=2, search=search, rule=FrameRule(min_area=1)
    )
    samples = Samples([flat_video(absent=absent, cover=cover)], spec, 0, 160)
    labels, seen = [], set()
    for i in range(160):
        sample = samples[i]
        labels.append(sample["labels"][0].item())
        assert sample["labels"].unique().numel() == 1
        assert not {3, 11, 17} & set(shades(sample["templates"]))
        if labels[-1]:
            assert not {3, 11, 17} & set(shades(sample["searches"]))
        else:
            seen |= set(shades(sample["searches"]))
            # the middle of a 160 x 120 frame, an eighth of each side: 70, 52, 20, 15; a window of
            # ~69 px around it
            torch.testing.assert_close(
                sample["search_boxes"][:, 2] * 69, torch.full((2,), 20.0), rtol=0.02, atol=0
            )
            torch.testing.assert_close(
                sample["search_boxes"][:, 3] * 69, torch.full((2,), 15.0), rtol=0.02, atol=0
            )
    assert seen == {3, 11, 17}
    assert 0.38 < np.mean(labels) < 0.62


def test_a_target_that_is_not_there_is_looked_for_in_the_middle():
    video = flat_video(absent=torch.arange(24) == 4)
    video.images[4][:, 52:67, 70:90] = 255
    sample = Samples(
        [video], dataclasses.replace(PLAIN, negatives=1.0, search=CropSpec(64, 4.0)), 0, 1
    )[0]
    x, y, w, h = (cxcywh_to_xywh(sample["search_boxes"][0]) * 64).tolist()
    white = sample["searches"][0, 0] > 180
    rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
    found = [
        columns.min().item(),
        rows.min().item(),
        columns.max().item() + 1,
        rows.max().item() + 1,
    ]
    assert found == pytest.approx([x, y, x + w, y + h], abs=1)


def test_negatives_of_ever_visible_targets_come_from_other_sequences():
    one, other = flat_video(), flat_video()  # one shows the shades 0 to 23, other 25 to 48
    for image in other.images:
        image += 50
    other.boxes_xywh[:] = torch.tensor([40.0, 30, 60, 50])
    # no box to crop around; and a frame without the target, of this sequence
    other.boxes_xywh[5, 2] = 0
    samples = Samples(
        [one, other],
        dataclasses.replace(PLAIN, negatives=1.0, search=CropSpec(128, 4.0, fill=0)),
        0,
        160,
    )
    of_one = Counter()
    for i in range(160):
        sample = samples[i]
        assert not sample["labels"].any()
        search = shades(sample["searches"])[0]
        aspect = (sample["search_boxes"][0, 2] / sample["search_boxes"][0, 3]).item()
        if shades(sample["templates"])[0] < 25:
            of_one[search] += 1
            assert aspect == pytest.approx(60 / 50 if search >= 25 else 40 / 30, rel=1e-3), (
                "the box of that frame"
            )
        else:
            assert search == 30 and aspect == pytest.approx(20 / 15, rel=1e-3)
    assert 30 not in of_one and len(of_one) > 25
    assert (
        0.3 < sum(count for shade, count in of_one.items() if shade < 25) / of_one.total() < 0.7
    ), "by chance the same"


def test_a_spec_without_negatives_has_no_labels_and_one_with_them_only():
    assert "labels" not in Samples([flat_video()], PLAIN, 0, 1)[0]
    always = Samples([flat_video(), flat_video()], dataclasses.replace(PLAIN, negatives=1e-9), 0, 5)
    assert all(always[i]["labels"].tolist() == [1.0] for i in range(5))


# ------------------------------------------------------------------------------------------------
# rejection


def test_crops_that_show_nothing_are_drawn_again():
    spec = dataclasses.replace(TINY, search=CropSpec(64, 1.0, jitter_centre=12.0, fill=0))
    samples = Samples([flat_video()], spec, 0, 60)
    wild = Samples([flat_video()], dataclasses.replace(spec, masks=False), 0, 60)
    for i in range(60):
        sample = samples[i]
        assert not sample["search_masks"][:, ::16, ::16].flatten(1).all(1).any()
        assert sample["searches"].any()
    assert not all(wild[i]["searches"].any() for i in range(60)), (
        "without the rule there are such crops"
    )


def test_data_without_one_good_crop_end_with_an_error():
    video = flat_video()
    video.boxes_xywh[:, 0] = 500  # far right of the frame
    with pytest.raises(DataError, match=r"100 samples drawn.*flat.*check the labels"):
        Samples([video], TINY, 0, 1)[0]
