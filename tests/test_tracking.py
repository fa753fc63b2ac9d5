"""The tracking loop: lock-step batches, explicit state, the face for a loop of one's own, bad input."""
from __future__ import annotations

import copy

import pytest
import torch

from trackkit.boxes import iou
from trackkit.errors import DataError
from trackkit.paths import SAMPLES
from trackkit.synth import SynthConfig, SynthDataset
from trackkit.trackers import create, join, load, take
from trackkit.tracking import Online, track, track_many

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
    return load(SAMPLES / "weights" / "siamfc-tiny.safetensors") if request.param == "siamfc-tiny" else create(request.param)


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
    """A snapshot taken at any frame continues to the same boxes, and `step` changes nothing it was given."""
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
    both = tracker.start([videos[0].frame(0), videos[3].frame(0)], torch.cat([videos[0].boxes_xywh[:1], videos[3].boxes_xywh[:1]]))
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
    assert loud.maps["crop"].shape == (1, 3, 3, 127, 127) and loud.maps["raw"].shape == (1, 3, 17, 17)
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


@pytest.mark.parametrize("box", [(100, 100, 1, 1), (-5, -5, 12, 12), (0, 0, 320, 240), (310, 230, 60, 60), (50, 50, 300, 2)])
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
    overlaps = [float(iou(torch.tensor(online.update(f)), torch.tensor(b))) for f, b in zip(frames[1:], boxes[1:], strict=True)]
    assert min(overlaps) > 0.6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same_boxes(videos):
    on_cpu, on_gpu = (load(SAMPLES / "weights" / "siamfc-tiny.safetensors").to(device) for device in ("cpu", "cuda"))
    expected, found = dict(track_many(on_cpu, videos, batch=3)), dict(track_many(on_gpu, videos, batch=3))
    for index in expected:
        assert (expected[index].boxes_xywh - found[index].boxes_xywh).abs().max() < 0.1
