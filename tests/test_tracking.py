"""The tracking loop: lock-step batches, explicit state, the face for a loop of one's own, bad
input.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import pixels

from trackkit.boxes import iou
from trackkit.errors import DataError, TrackkitError
from trackkit.paths import SAMPLES
from trackkit.synth import SynthConfig, SynthDataset
from trackkit.trackers.base import join, take
from trackkit.trackers.references import StayTracker
from trackkit.trackers.siamfc_ca import SiamFCCA, SiamFCCAConfig
from trackkit.trackers.stark_ca import STARKCA, STARKCAConfig
from trackkit.tracking import Online, track, track_many
from trackkit.weights import TRACKERS, create, load

NAMES = ["siamfc-tiny", "ncc", "stay"]


@pytest.fixture(scope="module")
def videos():
    """Sequences of different lengths, and one of another size."""
    lengths = [6, 3, 1, 8, 5]
    made = [SynthDataset(SynthConfig(frames=n), seed=1, length=5)[i] for i, n in enumerate(lengths)]
    made.append(SynthDataset(SynthConfig(frames=4, width=200, height=160), seed=2, length=1)[0])
    return made


@pytest.fixture(params=NAMES)
def tracker(request):
    # trained weights: peaks that stand out, so that rounding does not choose between two of them
    return (
        load(SAMPLES / "weights" / "siamfc-tiny.safetensors")
        if request.param == "siamfc-tiny"
        else create(request.param)
    )


def test_lock_step_equals_one_by_one(tracker, videos):
    together = dict(track_many(tracker, videos, batch=3))
    assert sorted(together) == list(range(len(videos)))
    for index, video in enumerate(videos):
        alone = track(tracker, video)
        assert alone.boxes_xywh.shape == (len(video), 4) and alone.boxes_xywh.dtype == torch.float64
        assert torch.equal(alone.boxes_xywh[0], video.boxes_xywh[0])
        assert (alone.boxes_xywh - together[index].boxes_xywh).abs().max() < 1e-3
        assert len(alone.scores) == len(alone.seconds) == len(video)
        assert ((alone.scores >= 0) & (alone.scores <= 1)).all()


def test_state_is_explicit(tracker, videos):
    """A snapshot taken at any frame continues to the same boxes, and `step` changes nothing it was
    given.
    """
    video = videos[3]
    state = tracker.start([video.frame(0)], video.boxes_xywh[:1])
    state, _ = tracker.step(state, [video.frame(1)])
    snapshot = copy.deepcopy(state)
    runs = []
    for begin in (state, snapshot, state):
        boxes = []
        for i in range(2, 6):
            begin, prediction = tracker.step(begin, [video.frame(i)])
            boxes.append(prediction.box)
        runs.append(torch.cat(boxes))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_take_and_join(tracker, videos):
    both = tracker.start(
        [videos[0].frame(0), videos[3].frame(0)],
        torch.cat([videos[0].boxes_xywh[:1], videos[3].boxes_xywh[:1]]),
    )
    swapped = join(take(both, [1]), take(both, [0]))
    _, a = tracker.step(both, [videos[0].frame(1), videos[3].frame(1)])
    _, b = tracker.step(swapped, [videos[3].frame(1), videos[0].frame(1)])
    assert (a.box - b.box.flip(0)).abs().max() < 1e-3


def test_maps_only_when_asked(videos):
    tracker = create("siamfc-tiny")
    state = tracker.start([videos[0].frame(0)], videos[0].boxes_xywh[:1])
    _, quiet = tracker.step(state, [videos[0].frame(1)])
    _, loud = tracker.step(state, [videos[0].frame(1)], maps=True)
    assert quiet.maps is None and torch.equal(quiet.box, loud.box)
    assert loud.maps["crop"].shape == (1, 3, 3, 127, 127) and loud.maps["raw"].shape == (
        1,
        3,
        17,
        17,
    )
    assert loud.maps["blended"].shape == (1, 272, 272)


def test_online_face_takes_arrays_and_tensors(tracker, videos):
    video, online = videos[0], Online(tracker)
    with pytest.raises(RuntimeError, match="init"):
        online.update(video.frame(0))
    bgr = video.frame(0).permute(1, 2, 0).numpy()[..., ::-1]
    online.init(bgr[..., ::-1], tuple(video.boxes_xywh[0].tolist()))
    boxes = [online.update(video.frame(i).permute(1, 2, 0).numpy()) for i in range(1, len(video))]
    assert (torch.tensor(boxes) - track(tracker, video).boxes_xywh[1:]).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((float("nan"), 1, 5, 5), "not finite"),
        ((10, 10, 0, 5), "no area"),
        ((10, 10, -4, 5), "no area"),
        ((5000, 10, 8, 8), "outside its"),
        ((-20, 10, 20, 8), "outside its"),
    ],
)
def test_bad_first_box(tracker, videos, box, message):
    with pytest.raises(DataError, match=message):
        Online(tracker).init(videos[0].frame(0), box)


@pytest.mark.parametrize(
    "box",
    [(100, 100, 1, 1), (-5, -5, 12, 12), (0, 0, 320, 240), (310, 230, 60, 60), (50, 50, 300, 2)],
)
def test_odd_first_boxes_are_followed(tracker, videos, box):
    online = Online(tracker)
    online.init(videos[0].frame(0), box)
    for i in range(1, 4):
        assert all(torch.isfinite(torch.tensor(online.update(videos[0].frame(i)))))


def test_bad_frames(tracker, videos):
    online = Online(tracker)
    with pytest.raises(DataError, match="uint8"):
        online.init(videos[0].frame(0).float(), (10, 10, 20, 20))
    with pytest.raises(DataError, match=r"\(3, H, W\)"):
        online.init(videos[0].frame(0)[0], (10, 10, 20, 20))
    with pytest.raises(DataError, match=r"shape \(N, 4\)"):
        online.init(videos[0].frame(0), (10, 10, 20))
    with pytest.raises(DataError, match="one box for each frame"):
        tracker.start([videos[0].frame(0)], torch.tensor([[1, 1, 5, 5], [1, 1, 5, 5]]))


def test_frames_smaller_than_the_crop_and_of_changing_size(tracker):
    online = Online(tracker)
    online.init(torch.full((3, 9, 7), 90, dtype=torch.uint8), (1, 1, 4, 4))
    for size in ((9, 7), (40, 30), (5, 100)):
        box = online.update(torch.full((3, *size), 90, dtype=torch.uint8))
        assert all(torch.isfinite(torch.tensor(box)))


def test_siamfc_follows_what_it_saw_with_random_weights():
    """Even untrained convolutions match a bright square: the geometry of the loop is right."""
    torch.manual_seed(0)
    frames, boxes = [], []
    noise = torch.randint(0, 60, (3, 200, 260), dtype=torch.uint8)
    pattern = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    for i in range(10):
        frame = noise.clone()
        frame[:, 60 + i : 100 + i, 50 + 4 * i : 90 + 4 * i] = pattern
        frames.append(frame)
        boxes.append([50.0 + 4 * i, 60.0 + i, 40.0, 40.0])
    online = Online(create("siamfc-tiny"))
    online.init(frames[0], boxes[0])
    overlaps = [
        float(iou(torch.tensor(online.update(f)), torch.tensor(b)))
        for f, b in zip(frames[1:], boxes[1:], strict=True)
    ]
    assert min(overlaps) > 0.6


# ---- every tracker: batches whose sequences end at different times, frames and boxes as they come
# ----

WEIGHTS = SAMPLES / "weights"
OFTEN = {  # so that a few frames are enough for what happens every so many
    "stark-tiny": {"update_interval": 2, "update_threshold": 0.0},
    "procontext-tiny": {"update_interval": 2, "update_threshold": 0.0},
    "dastm-tiny": {"capacity": 6},
    "stmtrack-tiny": {"capacity": 6},
    "mixvit-tiny": {"update_interval": 3},
    "ustam-tiny": {"update_interval": 3},
}
OTHERS = {
    "siamfc-ca": lambda: SiamFCCA(replace(SiamFCCAConfig.tiny(), scales=1)),
    "stark-ca": lambda: STARKCA(STARKCAConfig.tiny()),
}


@pytest.fixture(
    scope="module",
    params=["stay", "ncc", *(name for name in TRACKERS if name.endswith("-tiny")), *OTHERS],
)
def any_tracker(request):
    torch.manual_seed(0)
    name, file = request.param, WEIGHTS / f"{request.param}.safetensors"
    made = OTHERS[name]() if name in OTHERS else create(name)
    if name in OFTEN:
        made = type(made)(replace(made.config, **OFTEN[name]))
    if file.exists():
        made.load_state_dict(load(file).state_dict())
    return made.eval()


@pytest.fixture(scope="module")
def endings():
    """Sequences of 2, 5, 9, 1 and 6 frames, some of another size."""
    sizes = [(96, 80), (96, 80), (120, 70), (64, 90), (96, 80)]
    return [
        SynthDataset(SynthConfig(frames=n, width=width, height=height), seed=3, length=5)[i]
        for i, (n, (width, height)) in enumerate(zip((2, 5, 9, 1, 6), sizes, strict=True))
    ]


def test_sequences_that_end_at_different_times(any_tracker, endings):
    """Together each gives what it gives alone; others take the place of the first that ends, so
    targets differ in age.
    """
    together = dict(track_many(any_tracker, endings, batch=3))
    assert sorted(together) == [0, 1, 2, 3, 4]
    for video, found in zip(endings, (together[i] for i in range(5)), strict=True):
        alone = track(any_tracker, video)
        assert len(alone.boxes_xywh) == len(alone.scores) == len(found.scores) == len(video)
        assert torch.equal(found.boxes_xywh[0], video.boxes_xywh[0]) and found.scores[0] == 1
        assert (alone.boxes_xywh - found.boxes_xywh).abs().max() < 2e-4  # pixels
        assert (alone.scores - found.scores).abs().max() < 1e-4


@pytest.mark.parametrize(
    "any_tracker", ["stark-tiny", "dastm-tiny", "mixvit-tiny", "ustam-tiny"], indirect=True
)
def test_that_test_can_fail(any_tracker, endings, monkeypatch):
    """Trackers that renew all templates of a batch when one is due, or count all by the oldest, are
    found out.
    """
    mine = {"STARK": "_renewed", "MixViT": "_renewed", "USTAM": "_renewed", "DASTM": "_memorise"}[
        type(any_tracker).__name__
    ]
    genuine = getattr(type(any_tracker), mine)

    def renewed(self, kept, frames, boxes, due):
        return genuine(self, kept, frames, boxes, torch.ones_like(due))

    def memorised(self, state, frames):
        state = genuine(self, state, frames)
        return replace(state, count=torch.full_like(state.count, int(state.count.max())))

    monkeypatch.setattr(type(any_tracker), mine, renewed if mine == "_renewed" else memorised)
    with pytest.raises(AssertionError):
        test_sequences_that_end_at_different_times(any_tracker, endings)


def test_states_change_places(any_tracker, endings):
    """Targets leave a batch, come back and join others of another age: each goes on as if alone."""
    first, second = endings[2], endings[1]
    old = any_tracker.start([first.frame(0)], first.boxes_xywh[:1])
    for i in range(1, 4):
        old, _ = any_tracker.step(old, [first.frame(i)])
    young = any_tracker.start([second.frame(0)], second.boxes_xywh[:1])
    _, a = any_tracker.step(old, [first.frame(4)])
    _, b = any_tracker.step(young, [second.frame(1)])
    both = take(join(old, young), [1, 0])
    _, swapped = any_tracker.step(both, [second.frame(1), first.frame(4)])
    assert (torch.cat([b.box, a.box]) - swapped.box).abs().max() < 2e-4


ODD = [  # frame height and width; box
    # smaller than the crop
    ((15, 20), (3, 4, 6, 5)), ((1, 40), (10, 0, 5, 1)), ((40, 1), (0, 10, 1, 5)),
    ((1, 1), (0, 0, 1, 1)),
    # partly outside
    ((15, 20), (17, 12, 6, 6)), ((15, 20), (-3, -4, 6, 6)), ((60, 80), (79.5, 59.5, 30, 30)),
    # larger than the frame
    ((15, 20), (-50, -50, 200, 200)), ((60, 80), (20, 20, 800, 800)),
    ((60, 80), (-790, 10, 800, 1)), ((60, 80), (0, 0, 80, 60)),
    # all but nothing
    ((60, 80), (10, 10, 0.01, 0.01)), ((60, 80), (10, 10, 1e-9, 1e-9)),
]  # fmt: skip


def test_odd_frames_and_boxes(any_tracker):
    """All at once, then frames of another size: boxes and scores are numbers, and boxes have an
    area.
    """
    frames, boxes, made = (
        [pixels(3, *size, seed=sum(size)) for size, _ in ODD],
        torch.tensor([box for _, box in ODD], dtype=torch.float64),
        [any_tracker],
    )
    if hasattr(any_tracker.config, "exact"):  # and as the authors' code cuts crops
        made.append(type(any_tracker)(replace(any_tracker.config, exact=False)).eval())
    for tracker in made:
        state = tracker.start(frames, boxes)
        for images in (frames, frames[::-1]):
            state, prediction = tracker.step(state, images)
            assert prediction.box.shape == (len(ODD), 4) and prediction.box.dtype == torch.float64
            assert torch.isfinite(prediction.box).all() and (prediction.box[:, 2:] > 0).all()
            assert ((prediction.score >= 0) & (prediction.score <= 1)).all()


NAN, INF = float("nan"), float("inf")


IMPOSSIBLE = [
    ((NAN, 1, 5, 5), "not finite"), ((1, 1, NAN, 5), "not finite"),
    ((1, INF, 5, 5), "not finite"), ((1, 1, 5, INF), "not finite"),
    ((10, 10, 0, 5), "no area"), ((10, 10, 5, 0), "no area"),
    ((10, 10, -4, 5), "no area"), ((0, 0, 0, 0), "no area"),
    ((20, 5, 8, 8), "outside its 20x15 frame"), ((5, 15, 8, 8), "outside its"),
    ((-8, 5, 8, 8), "outside its"), ((5, -80, 8, 8), "outside its"),
]  # fmt: skip


def test_impossible_boxes(any_tracker):
    for box, says in IMPOSSIBLE:
        with pytest.raises(DataError, match=f"first box of sequence 1: box 0 .*{says}"):
            any_tracker.start(
                [pixels(3, 15, 20)] * 2, torch.tensor([(3, 4, 6, 5), box], dtype=torch.float64)
            )


def test_frames_that_are_none(any_tracker):
    good, box = pixels(3, 15, 20), torch.tensor([[3.0, 4, 6, 5]])
    state = any_tracker.start([good], box)
    for frame, says in (
        (good[:1], r"got torch.uint8 \(1, 15, 20\); repeat a grey image"),
        (good[0], "repeat a grey image"),
        (torch.cat([good, good[:1]]), r"got torch.uint8 \(4, 15, 20\); drop the alpha"),
        (good.permute(1, 2, 0), "put the colours first"),
        (good.float(), r"got torch.float32 .*to\(torch.uint8\)"),
        (good.double() / 255, "float64"),
        (good.int(), "int32"),
        (good[:, :0], "no pixels"),
        (good.permute(1, 2, 0).numpy(), "got a ndarray; torch.from_numpy"),
        (None, "got a NoneType"),
        (good[None], r"\(1, 3, 15, 20\)"),
    ):
        with pytest.raises(DataError, match=f"a frame must be uint8 .*{says}"):
            any_tracker.start([frame], box)
        if not isinstance(any_tracker, StayTracker):  # it does not look
            with pytest.raises(DataError, match=f"a frame must be uint8 .*{says}"):
                any_tracker.step(state, [frame])
    # what the errors say to do
    for shown in (good[:1].expand(3, -1, -1), torch.cat([good, good[:1]])[:3]):
        any_tracker.step(state, [shown])


def test_as_many_frames_as_targets(any_tracker):
    good = pixels(3, 15, 20)
    boxes = torch.tensor([[3.0, 4, 6, 5], [1, 1, 5, 5]])
    state = any_tracker.start([good, good], boxes)
    for count in (0, 1, 3):
        with pytest.raises(DataError, match=f"step: {count} frames for the state of 2 targets"):
            any_tracker.step(state, [good] * count)
        with pytest.raises(DataError, match=f"start: {count} frames but 2 boxes"):
            any_tracker.start([good] * count, boxes)
    with pytest.raises(DataError, match="no frames"):
        any_tracker.start([], boxes[:0])
    with pytest.raises(DataError, match="shape"):
        any_tracker.start([good, good], boxes[:, :3])
    with pytest.raises(DataError):
        any_tracker.start([good], boxes[0])
    # a batch of equal frames is as good as a list
    assert any_tracker.step(state, torch.stack([good, good]))[1].box.shape == (2, 4)


def test_a_network_that_answers_nan(any_tracker):
    """An error in the very frame, and no box that is none: SiamFC alone would go on in some
    direction.
    """
    broken = copy.deepcopy(any_tracker)
    if not list(broken.parameters()):
        pytest.skip("there is no network")
    for weight in broken.parameters():
        weight.data.fill_(NAN)
    state = broken.start([pixels(3, 60, 80)], torch.tensor([[20.0, 20, 15, 12]]))
    with pytest.raises(DataError, match="NaN or infinite"):
        broken.step(state, [pixels(3, 60, 80)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same_boxes(videos):
    on_cpu, on_gpu = (
        load(SAMPLES / "weights" / "siamfc-tiny.safetensors").to(device)
        for device in ("cpu", "cuda")
    )
    expected, found = (
        dict(track_many(on_cpu, videos, batch=3)),
        dict(track_many(on_gpu, videos, batch=3)),
    )
    for index in expected:
        assert (expected[index].boxes_xywh - found[index].boxes_xywh).abs().max() < 0.1


# ---- whatever was called before ----


@pytest.mark.parametrize("any_tracker", ["siamfc-tiny", "stark-tiny", "dastm-tiny"], indirect=True)
def test_tracking_is_in_evaluation_mode_whatever_was_called(any_tracker, endings):
    """Boxes are the same, statistics of batch norms stay, and who trained trains on."""
    video = endings[0]
    wanted = track(any_tracker, video).boxes_xywh
    before = {key: value.clone() for key, value in any_tracker.state_dict().items()}
    any_tracker.train()
    online = Online(any_tracker)
    any_tracker.train()
    online.init(video.frame(0), video.boxes_xywh[0])
    found = [online.update(video.frame(i)) for i in range(1, len(video))]
    assert torch.equal(torch.tensor(found, dtype=torch.float64), wanted[1:])
    assert any_tracker.training and all(m.training for m in any_tracker.modules())
    assert all(torch.equal(value, before[key]) for key, value in any_tracker.state_dict().items())
    any_tracker.eval()


@pytest.mark.parametrize(
    "image",
    [None, "frame.jpg", np.array([[None]]), [[1, 2], [3]], np.zeros((4, 4, 3), "complex64")],
    ids=["none", "text", "objects", "ragged", "complex"],
)
def test_images_that_are_none_are_refused(image):
    online = Online(create("stay"))
    with pytest.raises(DataError, match=r"an image must be|a frame must be"):
        online.init(image, (1, 1, 4, 4))


@pytest.mark.parametrize("box", [None, "1,2,3,4", (1, 2, "x", 4), [object()] * 4, (1, 2, 3)])
def test_boxes_that_are_none_are_refused(box):
    online = Online(create("stay"))
    with pytest.raises(DataError, match="box"):
        online.init(np.zeros((20, 20, 3), "uint8"), box)


def test_arrays_that_must_not_be_written_to_are_fine():
    image = np.zeros((20, 20, 3), "uint8")
    image.flags.writeable = False
    online = Online(create("stay"))
    online.init(image[::-1], (1, 1, 4, 4))
    assert online.update(image[..., ::-1]) == (1, 1, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_of_the_weights_are_refused(any_tracker, dtype):
    if not list(any_tracker.parameters()):
        return
    image, box = torch.zeros(3, 40, 40, dtype=torch.uint8), torch.tensor([[9.0, 9, 20, 20]])
    odd = copy.deepcopy(any_tracker).to(dtype)
    with pytest.raises(TrackkitError, match=rf"weights of {dtype}.*tracker.float\(\)"):
        odd.start([image], box)
    with torch.autocast("cpu", torch.bfloat16):
        state = any_tracker.start([image], box)
        assert any_tracker.step(state, [image])[1].box.dtype == torch.float64
