"""Device placement of every tracker, on a GPU that is not there: see `pretend_gpu` for the idea and
for what it cannot prove (kernels, the backward pass, real streams, timing).

A tracked frame goes to the GPU once and one answer comes back; what does not depend on the frame is
there already; a loss waits for nothing. Tiny trackers run with numbers, the others as shapes.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from helpers import instead
from pretend_gpu import Crossed, OnGPU, PretendGPU
from torch import Tensor

from trackkit import backbones, devices, losses, weights
from trackkit.sampling import Samples
from trackkit.synth import SynthDataset
from trackkit.trackers.dastm import MemoryAttention

LEARNED = [name for name, (cls, _) in weights.TRACKERS.items() if cls not in weights.UNTRAINED]
# what may go up at each frame: the frame, its windows, what of them lies outside, and where in the
# crop the box is
OF_THE_FRAME = {
    "base.py:moved", "crops.py:cut", "siamfc.py:step", "stark.py:encode", "stark.py:_needed",
    "stmtrack.py:_memorise",
}  # fmt: skip


@cache
def video():
    """The first frames of two sequences, and boxes of which one lies in a corner, so that its
    window crosses the border.
    """
    data = SynthDataset(seed=0, length=8)
    sequences = data[3], data[4]
    frames = [[sequence.frame(t) for sequence in sequences] for t in range(3)]
    return frames, torch.stack([sequences[0].boxes_xywh[0], torch.tensor([2.0, 3.0, 40.0, 30.0])])


@cache
def sample(spec) -> dict[str, Tensor]:
    return Samples(SynthDataset(seed=0, length=8), spec, 0, 1)[0]


def is_small(name: str) -> bool:
    return name.endswith("-tiny")


def created(name: str, gpu: PretendGPU):
    """A tracker on the GPU; of the large ones no number was ever made."""
    torch.manual_seed(0)
    with torch.device(gpu.place):
        tracker = weights.create(name)
    return gpu.moved(tracker)


def tracked(name: str, numbers: bool, autocast: bool = True):
    """The GPU after a second step, where all constants are known, and that step's prediction."""
    frames, boxes = video()
    with PretendGPU(numbers) as gpu:
        tracker = created(name, gpu)
        with gpu.autocast() if autocast else torch.no_grad():
            state = tracker.start(frames[0], boxes)
            state, _ = tracker.step(state, frames[1])
            gpu.forget()
            _, prediction = tracker.step(state, frames[2])
    return gpu, prediction


def check_tracking(name: str, numbers: bool) -> None:
    gpu, prediction = tracked(name, numbers)
    assert sum(gpu.waits.values()) <= 1, f"waits for the GPU: {dict(gpu.waits)}"
    assert set(gpu.uploads) <= OF_THE_FRAME, f"goes up at each frame: {dict(gpu.uploads)}"
    assert gpu.uploads["base.py:moved"] == 2, "each frame goes up once"
    assert torch.isfinite(prediction.box).all()


def check_losses(name: str, numbers: bool) -> None:
    with PretendGPU(numbers) as gpu:
        tracker = created(name, gpu).train()
        stages = tracker.recipe("tiny" if is_small(name) else "paper")
        for stage in stages:
            batch = {k: gpu.hold(torch.stack([v, v])) for k, v in sample(stage.sample).items()}
            batch["progress"] = torch.tensor(0.5)  # training leaves it on the CPU
            for _ in range(1 + numbers):  # the first makes constants, the second has them
                gpu.forget()
                with gpu.autocast():
                    found = tracker.loss(batch, stage.loss)
            assert not gpu.waits, f"stage {stage.name} waits for the GPU: {dict(gpu.waits)}"
            if not numbers:
                del gpu.uploads["devices.py:constant"]
            assert not gpu.uploads, f"stage {stage.name} uploads: {dict(gpu.uploads)}"
            assert all(isinstance(value, OnGPU) for value in found.values())
            assert not numbers or torch.isfinite(found["loss"].held)


@pytest.mark.parametrize("name", LEARNED)
def test_a_tracked_frame_goes_over_once_and_comes_back_once(name):
    check_tracking(name, numbers=is_small(name))


@pytest.mark.parametrize("name", LEARNED)
def test_a_loss_waits_for_nothing(name):
    check_losses(name, numbers=is_small(name))


@pytest.mark.parametrize("name", [name for name in LEARNED if is_small(name)])
def test_the_numbers_are_those_of_the_cpu(name):
    frames, boxes = video()
    torch.manual_seed(0)
    tracker = weights.create(name)
    state = tracker.start(frames[0], boxes)
    for each in frames[1:]:
        state, expected = tracker.step(state, each)
    _, prediction = tracked(name, numbers=True, autocast=False)
    assert (prediction.box - expected.box).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["stay", "ncc"])
def test_what_has_no_weights_stays_on_the_cpu(name):
    gpu, _ = tracked(name, numbers=True)
    assert not gpu.waits and not gpu.uploads


# ---- the pretence itself ----


def test_the_pretence_raises_and_counts():
    with PretendGPU() as gpu:
        a = gpu.hold(torch.arange(4.0))
        assert a.device.type == "cuda" and (a + 1).device.type == "cuda"
        assert ((a + 1) * torch.tensor(2.0)).held.tolist() == [2, 4, 6, 8]  # one number may come
        with pytest.raises(Crossed):
            a + torch.ones(4)
        a.add_(1)
        assert a.held.tolist() == [1, 2, 3, 4] and not gpu.waits and not gpu.uploads
        for wait in (a.cpu, a.sum().item, a.nonzero, lambda: a[a > 2], lambda: bool(a[0])):
            gpu.forget()
            wait()
            assert gpu.waits.total() >= 1
        gpu.forget()
        torch.ones(4).to("cuda")
        torch.tensor([1.0, 2.0], device="cuda")
        a[torch.tensor([0, 1])]
        assert gpu.uploads.total() == 3 and not gpu.waits
        with gpu.autocast():
            assert (a[None] @ a[:, None]).dtype == torch.bfloat16
        assert (a[None] @ a[:, None]).dtype == torch.float32


# ---- mutants: what the tests above must see ----


def stays_behind(make, *given, device):
    return make(*given)


def uploaded_each_time(make, *given, device):
    return make(*given).to(device)


def one_by_one(*values):
    return [value.double().cpu() for value in values]


def statistics_each_time(crops):
    mean, std = (torch.tensor(v, device=crops.device) for v in (backbones.MEAN, backbones.STD))
    return (crops.float() / 255 - mean[:, None, None]) / std[:, None, None]


def asks_how_many(values, counted):
    if counted is None:
        return values.mean()
    return values.sum() / max(counted.sum().item(), 1)


def picks(values, counted):
    return values.mean() if counted is None else values[counted.expand_as(values)].mean()


def asks_whether_any(values, counted):
    return 0 * values.sum() if counted is not None and not counted.any() else values.mean()


@pytest.mark.parametrize(
    ("name", "original", "mutant", "check"),
    [
        ("ostrack-tiny", devices.constant, stays_behind, check_tracking),
        ("siamfc-tiny", devices.constant, stays_behind, check_losses),
        ("ostrack-tiny", devices.constant, uploaded_each_time, check_tracking),
        ("siamfc-tiny", devices.constant, uploaded_each_time, check_losses),
        ("stark-tiny", devices.to_host, one_by_one, check_tracking),
        ("sbt-tiny", backbones.normalise, statistics_each_time, check_tracking),
        ("stark-tiny", losses.mean_of, asks_how_many, check_losses),
        ("sbt-tiny", losses.mean_of, picks, check_losses),
        ("stmtrack-tiny", losses.mean_of, asks_whether_any, check_losses),
    ],
)
def test_a_mutant_is_seen(name, original, mutant, check, monkeypatch):
    instead(monkeypatch, original, mutant)
    with pytest.raises((AssertionError, Crossed)):
        check(name, numbers=True)


def test_a_module_for_each_frame_that_chose_it_is_seen(monkeypatch):
    monkeypatch.setattr(MemoryAttention, "mixed", MemoryAttention.routed)
    with pytest.raises(AssertionError, match="waits"):
        check_tracking("dastm-tiny", numbers=True)
