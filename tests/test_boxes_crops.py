"""Properties of boxes and crops that hold for all inputs, searched by hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trackkit import boxes as B
from trackkit.boxes import bias_of, follow_size, without_bias
from trackkit.crops import (
    Windows,
    context_side,
    cut,
    mean_colour,
    outside,
    reduction,
    resample,
    shown,
)
from trackkit.errors import DataError

settings.register_profile("trackkit", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("trackkit")

coordinate = st.floats(-2000, 2000, allow_nan=False, width=32)
length = st.floats(0.125, 2000, width=32)
box = st.tuples(coordinate, coordinate, length, length).map(
    lambda b: torch.tensor([b], dtype=torch.float64)
)


def frame_of(height: int, width: int, seed: int = 0, channels_last: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(
        0, 256, (height, width, 3), dtype=torch.uint8, generator=generator
    ).permute(2, 0, 1)
    return pixels if channels_last else pixels.contiguous()


def windows(*rows: tuple[int, int, int], size: int) -> Windows:
    left, top, side = torch.tensor(rows).T
    return Windows(left, top, side, size)


# -------------------------------------------------------------------------------------------- boxes


@given(box)
def test_conversions_round_trip(b):
    there_and_back = [
        B.xyxy_to_xywh(B.xywh_to_xyxy(b)),
        B.cxcywh_to_xywh(B.xywh_to_cxcywh(b)),
        B.xyxy_to_xywh(B.cxcywh_to_xyxy(B.xywh_to_cxcywh(b))),
        B.cxcywh_to_xywh(B.xyxy_to_cxcywh(B.xywh_to_xyxy(b))),
    ]
    for result in there_and_back:
        torch.testing.assert_close(result, b, rtol=0, atol=1e-9)


@given(box, box)
def test_iou_is_a_symmetric_share(a, b):
    value = B.iou(a, b)
    assert value.shape == (1,) and 0 <= value <= 1
    assert torch.equal(value, B.iou(b, a))
    torch.testing.assert_close(B.iou(a, a), torch.ones(1, dtype=torch.float64), rtol=0, atol=1e-9)


@given(box, box)
def test_giou_is_at_most_iou_and_at_least_minus_one(a, b):
    value = B.giou(B.xywh_to_xyxy(a), B.xywh_to_xyxy(b))
    assert -1 <= value <= B.iou(a, b) + 1e-12
    assert torch.equal(value, B.giou(B.xywh_to_xyxy(b), B.xywh_to_xyxy(a)))


@given(box, coordinate, coordinate)
def test_overlap_does_not_depend_on_the_origin(a, dx, dy):
    b = a + torch.tensor([3.0, -2.0, 1.0, 5.0])
    moved = torch.tensor([dx, dy, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(B.iou(a + moved, b + moved), B.iou(a, b), rtol=0, atol=1e-9)


@given(box, st.integers(1, 1920), st.integers(1, 1080))
def test_clip_stays_inside_and_is_the_intersection(b, width, height):
    clipped = B.clip_xywh(b, width, height)
    x1, y1, x2, y2 = B.xywh_to_xyxy(clipped).unbind(-1)
    assert 0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height
    assert B.area(clipped) <= B.area(b) + 1e-6
    assert torch.allclose(B.clip_xywh(clipped, width, height), clipped)


def test_iou_and_giou_by_hand():
    a, b = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 1, 2, 2]])
    assert B.iou(a, b).item() == pytest.approx(1 / 7)
    assert B.giou(B.xywh_to_xyxy(a), B.xywh_to_xyxy(b)).item() == pytest.approx(1 / 7 - 2 / 9)
    assert B.iou(a[:, None], torch.cat([a, b])[None]).shape == (1, 2)


def test_empty_boxes_have_no_overlap_and_no_nan():
    empty = torch.zeros(1, 4)
    assert (
        B.iou(empty, empty).item() == 0 and B.iou(empty, torch.tensor([[0.0, 0, 1, 1]])).item() == 0
    )
    assert B.area(torch.tensor([[0.0, 0, -3, -3]])).item() == 0


@pytest.mark.parametrize(
    "bad, says",
    [
        ([[0, 0, float("nan"), 5]], "not finite"),
        ([[0, 0, float("inf"), 5]], "not finite"),
        ([[0, 0, 0, 5]], "no area"),
        ([[0, 0, 5, -1]], "no area"),
        ([[100, 0, 5, 5]], "outside its 100x50 frame"),
        ([[-5, 0, 5, 5]], "outside"),
        ([0, 0, 5, 5], "shape"),
        ([[0, 0, 5]], "shape"),
    ],
)
def test_check_boxes_names_what_is_wrong(bad, says):
    with pytest.raises(DataError, match=says) as caught:
        B.check_boxes(torch.tensor(bad, dtype=torch.float64), "first box of camel", (100, 50))
    assert "first box of camel" in str(caught.value)


def test_check_boxes_takes_a_pixel_and_a_box_that_is_cut():
    fine = torch.tensor([[99.0, 49, 1, 1], [-4, -4, 5, 5], [0, 0, 1000, 1000]])
    assert B.check_boxes(fine, "boxes", (100, 50)).dtype == torch.float64


# ------------------------------------------------------------------------------------------ windows


@given(
    box, st.floats(1, 3000), st.sampled_from([1, 7, 127, 255, 320]), st.sampled_from([1, 2, 4, 8])
)
def test_boxes_go_into_a_window_and_back(b, side, size, grid):
    window = Windows.around(
        B.xywh_to_cxcywh(b)[:, :2], torch.tensor([side], dtype=torch.float64), size, grid
    )
    assert window.divisible(grid) and window.reduced(grid).side * grid == window.side
    for boxes in (b, b[:, None].expand(1, 3, 4)):
        back = window.to_frame(window.to_crop(boxes))
        torch.testing.assert_close(back, boxes.contiguous(), rtol=0, atol=1e-6)
    in_float32 = window.to_frame(window.to_crop(b).float())
    # float32 has 7 digits, enough for pictures of this size
    near = b.abs().max() < 500 and side < 500
    assert not near or (in_float32 - b).abs().max() <= 1e-4


@given(box, st.floats(1, 3000))
def test_a_window_is_centred_to_a_pixel(b, side):
    centre = B.xywh_to_cxcywh(b)[:, :2]
    window = Windows.around(centre, torch.tensor([side], dtype=torch.float64), 127)
    middle = torch.stack([window.left + window.side / 2, window.top + window.side / 2], -1)
    assert (middle - centre).abs().max() <= 1.0


def test_window_refuses_what_a_diverged_network_gives():
    with pytest.raises(DataError, match="finite"):
        Windows.around(torch.tensor([[float("nan"), 0]]), torch.tensor([10.0]), 127)


@given(length, length)
def test_context_side(w, h):
    side = context_side(torch.tensor([0, 0, w, h], dtype=torch.float64))
    assert side.item() == pytest.approx((w * h) ** 0.5)
    assert context_side(torch.tensor([0.0, 0, w, w]), 0.5).item() == pytest.approx(2 * w, rel=1e-5)


@given(st.floats(1, 5000), st.integers(1, 400))
def test_reduction_keeps_a_pixel_for_each_crop_pixel(side, size):
    r = reduction(side, size)
    assert r in (1, 2, 4, 8) and (r == 1 or side / r >= size) and (r == 8 or side / (2 * r) < size)


# -------------------------------------------------------------------------------------------- crops

place = st.tuples(st.integers(-60, 90), st.integers(-60, 70), st.integers(1, 80))
places = st.lists(place, min_size=1, max_size=4)


@given(places, st.sampled_from([1, 15, 32]))
def test_a_batch_is_its_crops_one_by_one(rows, size):
    frames = [frame_of(50 + 3 * i, 70 - 2 * i, seed=i) for i in range(len(rows))]
    fill = torch.arange(3 * len(rows)).reshape(-1, 3).float()
    together = cut(frames, windows(*rows, size=size), fill)
    assert together.shape == (len(rows), 3, size, size) and together.dtype == torch.uint8
    for i, row in enumerate(rows):
        assert torch.equal(cut([frames[i]], windows(row, size=size), fill[i])[0], together[i])


@given(place, st.sampled_from([1, 15, 32, 64]))
def test_memory_layout_does_not_change_a_crop(row, size):
    last, planar = frame_of(50, 70), frame_of(50, 70, channels_last=False)
    window = windows(row, size=size)
    difference = cut([last], window).int() - cut([planar], window).int()
    assert difference.abs().max() <= 1


@given(
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(5, 40),
    st.integers(-30, 30),
    st.integers(-30, 30),
)
def test_the_crop_moves_with_the_frame(left, top, side, dx, dy):
    canvas = frame_of(160, 160)
    a, b = canvas[:, 40:120, 40:120], canvas[:, 40 + dy : 120 + dy, 40 + dx : 120 + dx]
    x, y = left + 20, top + 20
    corners = torch.tensor([x, y, x - dx, y - dy])
    # both windows inside: no fill colour in the crops
    if corners.min() >= 0 and corners.max() + side <= 80:
        assert torch.equal(
            cut([a], windows((x, y, side), size=31)),
            cut([b], windows((x - dx, y - dy, side), size=31)),
        )


@pytest.mark.parametrize("corner", [(-90, 0), (70, 0), (0, 50), (0, -90), (500, 500)])
def test_a_crop_outside_the_frame_is_the_fill(corner):
    frame, window = frame_of(50, 70), windows((*corner, 60), size=16)
    crop = cut([frame], window, torch.tensor([1.0, 2.0, 250.0]))
    assert torch.equal(
        crop[0], torch.tensor([1, 2, 250], dtype=torch.uint8)[:, None, None].expand(3, 16, 16)
    )
    mean = mean_colour(frame).round().to(torch.uint8)
    assert torch.equal(cut([frame], window)[0], mean[:, None, None].expand(3, 16, 16))


@given(
    st.integers(20, 90),
    st.integers(20, 60),
    st.integers(9, 40),
    st.integers(9, 40),
    st.integers(-20, 20),
    st.integers(60, 120),
)
def test_content_lands_where_to_crop_says(x, y, w, h, shift, side):
    frame = torch.zeros(120, 160, 3, dtype=torch.uint8).permute(2, 0, 1)
    frame[:, y : y + h, x : x + w] = 255
    b = torch.tensor([[x, y, w, h]], dtype=torch.float64)
    window = Windows.around(B.xywh_to_cxcywh(b)[:, :2] + shift, torch.tensor([float(side)]), 127)
    crop = cut([frame], window, torch.zeros(3))[0, 0].double() / 255
    # sub-pixel edges: the sum of a profile through the rectangle is its length, its centroid the
    # centre
    expected = B.clip_xywh(window.to_crop(b), 127, 127)[0]
    if expected[2:].min() < 3:
        return
    at = torch.arange(127) + 0.5
    for axis, profile in ((0, crop.amax(0)), (1, crop.amax(1))):
        extent = profile.sum()
        centre = (profile * at).sum() / extent
        assert abs(extent - expected[2 + axis]) <= 0.5
        assert abs(centre - (expected[axis] + expected[2 + axis] / 2)) <= 0.5


def weights_of(side: int, size: int) -> np.ndarray:
    """Bilinear interpolation along one axis as a matrix (size, side), entry by entry."""
    matrix = np.zeros((size, side))
    for i in range(size):
        at = np.float32((i + 0.5) * (side / size) - 0.5)
        below = int(np.floor(at))
        for tap, weight in ((below, 1 - (at - np.floor(at))), (below + 1, at - np.floor(at))):
            matrix[i, min(max(tap, 0), side - 1)] += weight
    return matrix


@given(st.lists(place, min_size=1, max_size=3), st.sampled_from([1, 15, 32, 100]))
@example([(0, 0, 20), (48, 33, 20), (-1, 40, 19)], 32)  # windows that touch their frame's border
@example([(0, 0, 20), (48, 33, 20), (-1, 40, 19)], 15)
def test_outside_is_where_the_padding_has_weight(rows, size):
    frame_sizes = [(70 - 2 * i, 50 + 3 * i) for i in range(len(rows))]
    result = outside(windows(*rows, size=size), frame_sizes)
    assert result.shape == (len(rows), size, size) and result.dtype == torch.bool
    for (left, top, side), (width, height), mask in zip(rows, frame_sizes, result, strict=True):
        x, y = np.arange(left, left + side), np.arange(top, top + side)
        padding = ~(((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))).astype(bool)
        weights = weights_of(side, size)
        assert np.array_equal(mask.numpy(), weights @ padding @ weights.T > 1e-12)


@given(place, st.sampled_from([1, 15, 32, 100]))
def test_the_fill_shows_only_outside(row, size):
    frame, window = frame_of(50, 70), windows(row, size=size)
    black, white = (cut([frame], window, torch.full((3,), float(grey)))[0] for grey in (0, 255))
    mask = outside(window, [(70, 50)])[0]
    assert torch.equal(black[:, ~mask], white[:, ~mask])
    left, top, side = row
    if left + side <= 0 or top + side <= 0 or left >= 70 or top >= 50:
        assert mask.all()
    if left >= 0 and top >= 0 and left + side <= 70 and top + side <= 50:
        assert not mask.any()


def test_outside_wants_a_size_for_each_window():
    with pytest.raises(ValueError):
        outside(windows((0, 0, 10), (5, 5, 10), size=8), [(70, 50)])


def test_same_size_crop_is_an_exact_copy():
    frame = frame_of(50, 70)
    crop = cut([frame], windows((5, 6, 32), size=32))
    assert torch.equal(crop[0], frame[:, 6:38, 5:37])
    crop[:] = 0
    assert frame[:, 6:38, 5:37].any(), "a crop must not share memory with its frame"


@given(places, st.sampled_from([1, 15, 32, 90]))
def test_many_windows_at_once_give_the_bytes_of_one_by_one(rows, size):
    """What runs on a GPU, on the CPU."""
    frame, colour = frame_of(50, 70), torch.tensor([9, 50, 200])
    table, pixels = [], []
    for left, top, side in rows:
        x1, y1, x2, y2 = shown(left, top, side, 70, 50)
        pixels.append(frame[:, y1:y2, x1:x2].permute(1, 2, 0).flatten())
        first = sum(map(len, pixels[:-1]))
        table.append([first, y2 - y1, x2 - x1, left - x1, top - y1, side, *colour.tolist()])
    together = resample(torch.cat(pixels), torch.tensor(table), size)
    assert torch.equal(together, cut([frame] * len(rows), windows(*rows, size=size), colour))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_crops_on_the_gpu_are_those_of_the_cpu():
    frame = frame_of(200, 300)
    rows = [(-20, -30, 150), (50, 40, 64), (10, 10, 180)]
    on_cpu = cut([frame] * 3, windows(*rows, size=127))
    on_gpu = cut([frame.cuda()] * 3, windows(*rows, size=127))
    assert on_gpu.device.type == "cuda" and (on_gpu.cpu().int() - on_cpu.int()).abs().max() <= 1


def test_a_size_is_followed_by_a_share_around_the_new_centre():
    old = torch.tensor([[10.0, 20.0, 40.0, 10.0]], dtype=torch.float64)
    new = torch.tensor([[50.0, 60.0, 80.0, 40.0]], dtype=torch.float64)
    assert follow_size(old, new, 1.0) is new
    half = follow_size(old, new, 0.5)
    assert torch.allclose(half[:, 2:], torch.tensor([[40 * 2**0.5, 20.0]], dtype=torch.float64))
    none = follow_size(old, new, 0.0)
    assert torch.equal(none[:, 2:], old[:, 2:])
    for box in (half, none):
        assert torch.allclose(box[:, :2] + box[:, 2:] / 2, new[:, :2] + new[:, 2:] / 2)
    flat = torch.tensor([[0.0, 0.0, 1e9, 1e-9]], dtype=torch.float64)  # a network may say anything
    assert torch.isfinite(follow_size(old, flat, 0.3)).all()
    assert (follow_size(old, flat, 0.3)[:, 2:] > 0).all()


def test_a_bias_that_was_seen_is_taken_off_wherever_the_target_has_gone():
    truth = torch.tensor([[100.0, 50.0, 40.0, 60.0]], dtype=torch.float64)
    found = torch.tensor([[104.0, 44.0, 50.0, 45.0]], dtype=torch.float64)
    bias = bias_of(found, truth)
    assert torch.allclose(without_bias(found, bias), truth)
    # elsewhere, and twice as large: the same share of it
    far = torch.tensor([[300.0, 10.0, 0.0, 0.0]]) + 2 * found
    assert torch.allclose(without_bias(far, bias), torch.tensor([[300.0, 10, 0, 0]]) + 2 * truth)
    # a first answer that is somewhere else says nothing about later ones: it is not believed
    lost = bias_of(torch.tensor([[500.0, 500.0, 4.0, 4.0]], dtype=torch.float64), truth)
    assert lost[0].tolist() == [-0.3, -0.3, 2, 2]
    none = bias_of(truth, truth)
    assert torch.equal(without_bias(found, none), found)
