"""The trackers that learn nothing: correlation against its definition, template matching on known
motion.
"""

from __future__ import annotations

import pytest
import torch
from helpers import pixels
from hypothesis import given, settings
from hypothesis import strategies as st

from trackkit.boxes import iou
from trackkit.errors import DataError
from trackkit.trackers.base import join, take
from trackkit.trackers.references import (
    NccConfig,
    NccTracker,
    StayTracker,
    normalised_cross_correlation,
    subpixel_peak,
)


def scene(seed: int, height: int = 120, width: int = 160) -> torch.Tensor:
    """Smooth noise: what is left of it after resampling still looks like itself."""
    coarse = pixels(1, 3, height // 4 + 1, width // 4 + 1, seed=seed).float()
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    return smooth.clamp(0, 255).round().to(torch.uint8)


def by_definition(template: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    h, w = template.shape[1:]
    t = template.double() - template.double().mean((1, 2), keepdim=True)
    rows, columns = image.shape[1] - h + 1, image.shape[2] - w + 1
    result = torch.zeros(rows, columns, dtype=torch.float64)
    for y in range(rows):
        for x in range(columns):
            window = image[:, y : y + h, x : x + w].double()
            window = window - window.mean((1, 2), keepdim=True)
            norm = (t.square().sum() * window.square().sum()).sqrt()
            result[y, x] = (t * window).sum() / norm if norm > 0 else 0
    return result


# ---- correlation ----


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4),
    st.tuples(*[st.integers(1, 6)] * 2),
    st.tuples(*[st.integers(0, 7)] * 2),
    st.integers(0, 9),
)
def test_correlation_is_its_definition(channels, size, more, seed):
    (h, w), (more_h, more_w) = size, more
    template, image = (
        pixels(channels, h, w, seed=seed),
        pixels(channels, h + more_h, w + more_w, seed=seed + 1),
    )
    found = normalised_cross_correlation(template, image)
    assert found.dtype == torch.float64 and found.shape == (more_h + 1, more_w + 1)
    assert found.abs().max() <= 1
    assert torch.allclose(found, by_definition(template, image), atol=1e-9)


def test_a_patch_is_found_where_it_was_cut():
    image = pixels(3, 40, 50, seed=3)
    found = normalised_cross_correlation(image[:, 11:21, 30:37], image)
    assert divmod(int(found.argmax()), found.shape[1]) == (11, 30)
    assert found[11, 30] == pytest.approx(1, abs=1e-12)


def test_gain_and_offset_drop_out_and_a_negative_is_minus_one():
    image = pixels(3, 30, 30, seed=4).double()
    patch = image[:, 5:15, 8:18]
    offset = torch.tensor([40.0, -3.0, 7.0])[:, None, None]
    assert normalised_cross_correlation(0.3 * patch + offset, image)[5, 8] == pytest.approx(
        1, abs=1e-9
    )
    assert normalised_cross_correlation(255 - patch, image)[5, 8] == pytest.approx(-1, abs=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1 / 255])
def test_flat_windows_are_similar_to_nothing(scale):
    image = torch.full((3, 40, 40), 199.0) * scale
    image[:, 20:, 20:] = pixels(3, 20, 20, seed=5) * scale
    found = normalised_cross_correlation(image[:, 25:32, 25:32], image)
    assert torch.isfinite(found).all() and (found[:13, :13] == 0).all()
    assert found[25, 25] == pytest.approx(1, abs=1e-9)
    assert (normalised_cross_correlation(image[:, :7, :7], image) == 0).all()


def test_one_grey_level_in_a_bright_window_is_not_flat():
    image = torch.full((1, 60, 60), 255, dtype=torch.uint8)
    image[0, 30, 30] = 254
    found = normalised_cross_correlation(image[:, 10:50, 10:50], image)
    assert found[10, 10] == pytest.approx(1, abs=1e-9)


def test_batch_is_pairwise():
    templates, images = pixels(4, 3, 5, 6, seed=6), pixels(4, 3, 20, 18, seed=7)
    found = normalised_cross_correlation(templates, images)
    for k in range(4):
        assert torch.allclose(
            found[k], normalised_cross_correlation(templates[k], images[k]), atol=1e-12
        )


@pytest.mark.parametrize(
    "template, image",
    [
        ((3, 5, 5), (3, 4, 9)),
        ((3, 5, 5), (1, 9, 9)),
        ((5, 5), (9, 9)),
        ((2, 3, 5, 5), (3, 9, 9)),
        ((3, 0, 5), (3, 9, 9)),
    ],
)
def test_shapes_that_do_not_fit(template, image):
    with pytest.raises(DataError, match="correlation needs"):
        normalised_cross_correlation(torch.zeros(template), torch.zeros(image))


def test_peak_between_the_cells():
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
    bump = -((x - 6.3) ** 2) - 0.5 * (y - 2.75) ** 2
    edge = -((x - 20) ** 2) - (y + 4) ** 2
    flat = torch.zeros(9, 11)
    found = subpixel_peak(torch.stack([bump, edge, flat]))
    assert torch.allclose(
        found, torch.tensor([[6.3, 2.75], [10, 0], [0, 0]], dtype=torch.float64), atol=1e-5
    )


# ---- trackers ----


def shifted(
    world: torch.Tensor, dx: int, dy: int, height: int = 120, width: int = 160
) -> torch.Tensor:
    """The view of a large picture whose content has moved right by dx and down by dy."""
    return world[:, 60 - dy : 60 - dy + height, 80 - dx : 80 - dx + width]


@pytest.mark.parametrize("size", [(24, 24), (40, 20), (10, 12), (60, 70)])
def test_ncc_follows_known_motion(size):
    world = scene(1, 300, 400)
    first = torch.tensor([[60.0, 40.0, *size]], dtype=torch.float64)
    tracker = NccTracker()
    state = tracker.start([shifted(world, 0, 0)], first)
    for k in range(1, 6):
        state, prediction = tracker.step(state, [shifted(world, 3 * k, 2 * k)])
        truth = first + torch.tensor([3.0 * k, 2.0 * k, 0, 0])
        assert iou(prediction.box, truth).item() > 0.85
        assert prediction.score.item() > 0.8
        assert torch.equal(prediction.box[:, 2:], first[:, 2:])


def test_ncc_is_exact_where_crop_and_frame_pixels_coincide():
    world = scene(2, 300, 400)
    first = torch.tensor([[60.0, 40.0, 24.0, 24.0]], dtype=torch.float64)
    tracker = NccTracker(NccConfig(window_influence=0.0))
    state = tracker.start([shifted(world, 0, 0)], first)
    _, prediction = tracker.step(state, [shifted(world, -7, 9)], maps=True)
    # the parabola's share
    assert (prediction.box - first - torch.tensor([-7.0, 9, 0, 0])).abs().max() < 0.5
    response = prediction.maps["response"][0]
    assert response.max() == pytest.approx(1, abs=1e-9)
    assert divmod(int(response.argmax()), 49) == (24 + 9, 24 - 7)
    assert prediction.score.item() == pytest.approx(1)


def test_ncc_batch_equals_single_and_states_move():
    worlds = [scene(k, 300, 400) for k in range(3)]
    sizes = [(120, 160), (100, 140), (120, 150)]
    first = torch.tensor(
        [[50.0, 40, 20, 30], [0, 10, 25, 12], [90, 70, 60, 50]], dtype=torch.float64
    )

    def frames(k: int, which=(0, 1, 2)):
        return [shifted(worlds[i], 2 * k, -k, *sizes[i]) for i in which]

    tracker = NccTracker()
    together = tracker.start(frames(0), first)
    alone = [tracker.start(frames(0, [i]), first[i : i + 1]) for i in range(3)]
    for k in range(1, 4):
        together, prediction = tracker.step(together, frames(k))
        for i in range(3):
            alone[i], single = tracker.step(alone[i], frames(k, [i]))
            assert torch.allclose(prediction.box[i], single.box[0], atol=1e-6)
    swapped = join(take(together, [2]), take(together, [0]))
    _, prediction = tracker.step(together, frames(4))
    _, other = tracker.step(swapped, frames(4, [2, 0]))
    assert torch.allclose(other.box, prediction.box[[2, 0]], atol=1e-6)


def test_ncc_leaves_its_state_alone_and_survives_anything():
    tracker = NccTracker()
    world = scene(5, 300, 400)
    # partly outside
    state = tracker.start([shifted(world, 0, 0)], torch.tensor([[140.0, 100, 30, 30]]))
    before = state.centre.clone()
    flat = torch.full((3, 120, 160), 9, dtype=torch.uint8)
    for frame in (
        flat,
        pixels(3, 120, 160, seed=1),
        pixels(3, 31, 33, seed=2),
        pixels(3, 1, 1, seed=3),
    ):
        new, prediction = tracker.step(state, [frame])
        assert torch.equal(state.centre, before)
        assert torch.isfinite(prediction.box).all() and 0 <= prediction.score.item() <= 1
        limits = torch.tensor([[frame.shape[2], frame.shape[1]]])
        assert ((new.centre >= 0) & (new.centre <= limits)).all()


def test_ncc_waits_at_the_border_for_a_target_that_leaves():
    world, tracker = scene(7, 300, 400), NccTracker()
    state = tracker.start([shifted(world, 0, 0)], torch.tensor([[4.0, 6, 24, 24]]))
    for k in range(1, 6):
        state, _ = tracker.step(state, [shifted(world, -6 * k, -6 * k)])
        assert (state.centre >= 0).all()


def test_ncc_without_evidence_stays():
    """A frame without any structure says nothing, so the window decides: no motion."""
    tracker = NccTracker()
    first = torch.tensor([[60.0, 50.0, 24.0, 24.0]], dtype=torch.float64)
    state = tracker.start([scene(6)], first)
    _, prediction = tracker.step(state, [torch.full((3, 120, 160), 50, dtype=torch.uint8)])
    assert (prediction.box - first).abs().max() <= 1e-9 and prediction.score.item() == 0


@pytest.mark.parametrize(
    "change", [{"template_size": 1}, {"template_size": 72}, {"window_influence": 1.5}]
)
def test_ncc_config_is_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        NccConfig(**change)


def test_stay_stays():
    tracker = StayTracker()
    first = torch.tensor([[5.0, 6, 7, 8], [1, 2, 3, 4]], dtype=torch.float64)
    state = tracker.start([pixels(3, 40, 40, seed=0)] * 2, first)
    for _ in range(3):
        state, prediction = tracker.step(state, [pixels(3, 40, 40, seed=1)] * 2)
        assert torch.equal(prediction.box, first) and prediction.maps is None


@pytest.mark.parametrize("tracker", [StayTracker(), NccTracker()], ids=["stay", "ncc"])
@pytest.mark.parametrize("box", [[5, 5, 0, 5], [float("nan"), 5, 5, 5], [100, 100, 5, 5]])
def test_unusable_first_boxes_are_refused(tracker, box):
    with pytest.raises(DataError, match="first box"):
        tracker.start([pixels(3, 40, 40, seed=0)], torch.tensor([box]))
