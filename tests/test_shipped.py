"""The weights that come with trackkit: they track, they say where they are from, and descendants
start from their ancestors'.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trackkit import checkpoints, weights
from trackkit.errors import CheckpointError, TrackkitError
from trackkit.evaluation import sequence_overlaps
from trackkit.got10k import GOT10k
from trackkit.paths import SAMPLES
from trackkit.trackers.base import Tracker
from trackkit.tracking import track

SHIPPED = [name for name in weights.TRACKERS if weights.shipped(name)]
ANCESTORS = {
    "procontext-tiny": ("ostrack-tiny", {}),
    "mixvit-tiny": ("ostrack-tiny", {"position_z": "position_t", "position_x": "position_s"}),
    "ustam-tiny": ("mixvit-tiny", {}),
    "dastm-tiny": ("stmtrack-tiny", {}),
}
LOOKING = [name for name in SHIPPED if getattr(weights.TRACKERS[name][1], "first_look", False)]


@pytest.fixture(scope="module")
def sequence():
    """Of the embedded ones one that most trackers hold."""
    return next(s for s in GOT10k(SAMPLES, "val") if "rotation" in s.name)


def test_they_are_small():
    assert sum(f.stat().st_size for f in (SAMPLES / "weights").iterdir()) < 16e6


@pytest.mark.parametrize("name", ["siamfc", "stark", "ostrack", "sbt", "stmtrack", "mixvit"])
def test_every_ancestor_has_a_half_trained_start(name):
    start, trained = weights.load(f"{name}-tiny-start"), weights.load(f"{name}-tiny")
    assert start.config == trained.config
    theirs = trained.state_dict()
    assert any(not torch.equal(v, theirs[k]) for k, v in start.state_dict().items())


def test_what_fits_of_a_start_is_taken(tmp_path):
    torch.manual_seed(1)
    tracker = weights.create("mixvit-tiny")
    random = {k: v.clone() for k, v in tracker.state_dict().items()}
    digest = weights.begin(tracker, "ostrack-tiny-start")
    own, theirs = tracker.state_dict(), weights.load("ostrack-tiny-start").state_dict()
    fits = [k for k, v in own.items() if k in theirs and theirs[k].shape == v.shape]
    for key, value in own.items():
        assert torch.equal(value, theirs[key] if key in fits else random[key])
    assert digest == weights.begin(tracker, "ostrack-tiny-start")
    assert digest != weights.begin(tracker, "ostrack-tiny")
    with pytest.raises(TrackkitError, match="no weight of ostrack-tiny fits SiamFC"):
        weights.begin(weights.create("siamfc-tiny"), "ostrack-tiny")


@pytest.mark.parametrize("name", SHIPPED)
def test_they_track(name, sequence):
    """Better than to stay at the first box, which has .2 on such sequences."""
    tracker = weights.load(name)
    boxes = track(tracker, sequence).boxes_xywh
    assert sequence_overlaps(sequence, boxes).mean() > 0.4
    assert tracker.config == weights.TRACKERS[name][1], "else `create` makes another network"


@pytest.mark.parametrize("name", ANCESTORS)
def test_descendants_start_from_their_ancestors(name):
    ancestor, renamed = ANCESTORS[name]
    tracker, theirs = weights.create(name), weights.load(ancestor).state_dict()
    assert tracker.load_pretrained()
    own = tracker.state_dict()
    taken = {renamed.get(key, key): value for key, value in theirs.items()}
    shared = own.keys() & taken.keys()
    assert len(shared) > 0.5 * len(taken)
    assert all(torch.equal(own[key], taken[key]) for key in shared)


def test_an_ancestor_of_another_size_is_refused():
    cls, config = weights.TRACKERS["procontext-tiny"]
    with pytest.raises(CheckpointError, match=r"ostrack-tiny.* of another size: position_z"):
        cls(replace(config, template_size=64)).load_pretrained()


@pytest.mark.parametrize("name", LOOKING)
def test_the_first_look_takes_off_what_it_was_off_by(name, sequence):
    """In a second frame that equals the first, the answer is then nearer to the box given."""
    trained = weights.load(name)
    frames, truth = [sequence.frame(0)], sequence.boxes_xywh[:1]
    # off by some pixels, as another habit of drawing boxes would have it
    truth = truth + torch.tensor([[4.0, -3.0, 6.0, -4.0]])

    def answered(first_look: bool) -> torch.Tensor:
        config = replace(trained.config, first_look=first_look, size_rate=1.0)
        tracker: Tracker = type(trained)(config).eval()
        tracker.load_state_dict(trained.state_dict())
        state = tracker.start(frames, truth)
        assert (state.bias is not None) == first_look
        return tracker.step(state, frames)[1].box

    off = [(answered(look) - truth).abs().max() for look in (False, True)]
    assert off[1] < 0.5 * off[0]


def test_files_are_whole():
    for path in (SAMPLES / "weights").glob("*.safetensors"):
        tensors, about = checkpoints.read(path)
        assert tensors and about["tracker"]
