"""The training loop: exact resume after SIGKILL, atomic files, stages, errors."""
from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trackkit import checkpoints, trackers
from trackkit.errors import CheckpointError, TrackkitError
from trackkit.synth import SynthConfig, SynthDataset
from trackkit.trackers.siamfc import SiamFC, SiamFCConfig
from trackkit.training import Stage, freeze, read_log, train


def small_run(out: Path, steps: int = 6, **options) -> SiamFC:
    torch.manual_seed(0)
    tracker = SiamFC(SiamFCConfig.tiny())
    stage = dataclasses.replace(tracker.recipe("tiny")[0], steps=steps, batch=2)
    data = SynthDataset(SynthConfig(frames=8), seed=0, length=50)
    train(tracker, [stage], data, out, **({"progress": False, "log_steps": 2, "device": "cpu"} | options))
    return tracker


def same_weights(a, b) -> bool:
    return all(torch.equal(a.state_dict()[k], b.state_dict()[k]) for k in b.state_dict())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return small_run(out), out


def test_run_leaves_log_state_and_tracker(whole):
    tracker, out = whole
    log = read_log(out)
    assert [line["step"] for line in log] == [2, 4, 6]
    assert all(0 < line["loss"] < 10 and line["samples_per_second"] > 0 for line in log)
    assert same_weights(trackers.load(out / "tracker.safetensors"), tracker)
    assert same_weights(trackers.load(out / "state.safetensors"), tracker), "a state loads as a tracker"
    assert sorted(p.name for p in out.iterdir()) == ["log.jsonl", "state.safetensors", "tracker.safetensors"]


def test_same_seed_same_weights_other_seed_other_weights(whole, tmp_path):
    assert same_weights(small_run(tmp_path / "a"), whole[0])
    assert not same_weights(small_run(tmp_path / "b", seed=1), whole[0])


def test_loader_workers_do_not_change_the_weights(whole, tmp_path):
    assert same_weights(small_run(tmp_path, workers=1), whole[0])


def test_finished_run_is_not_trained_again(whole):
    tracker, out = whole
    before = (out / "state.safetensors").stat().st_mtime_ns
    assert same_weights(small_run(out), tracker)
    assert (out / "state.safetensors").stat().st_mtime_ns == before


def test_killed_run_resumes_to_the_same_weights(whole, tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); import torch; torch.set_num_threads(1);"
        "from test_training import small_run; from pathlib import Path; small_run(Path(sys.argv[1]), save_seconds=0)"
    )
    root = Path(__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    state = tmp_path / "state.safetensors"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = checkpoints.read(state)[1]["step"]
    assert 1 <= done < 6, "the run must have been killed on its way"
    assert not (tmp_path / "tracker.safetensors").exists()
    assert same_weights(small_run(tmp_path), whole[0])
    assert [line["step"] for line in read_log(tmp_path)] == [2, 4, 6]


def test_another_run_in_the_folder_is_refused(whole):
    with pytest.raises(CheckpointError, match=r"another run .*stages"):
        small_run(whole[1], steps=8)
    with pytest.raises(CheckpointError, match="seed"):
        small_run(whole[1], seed=5)


def test_nan_loss_stops_and_keeps_the_last_state(tmp_path, monkeypatch):
    calls = iter(range(100))
    honest = SiamFC.loss

    def loss(self, batch, kind=""):
        result = honest(self, batch, kind)
        return {"loss": result["loss"] * (float("nan") if next(calls) >= 3 else 1.0)}

    monkeypatch.setattr(SiamFC, "loss", loss)
    with pytest.raises(TrackkitError, match="loss is nan at step 4"):
        small_run(tmp_path, save_seconds=0)
    tensors, about = checkpoints.read(tmp_path / "state.safetensors")
    assert about["step"] == 3
    assert all(torch.isfinite(t).all() for t in tensors.values())


def test_stages_follow_each_other_and_frozen_parts_stay(tmp_path):
    torch.manual_seed(0)
    tracker = SiamFC(SiamFCConfig.tiny())
    first = dataclasses.replace(tracker.recipe("tiny")[0], steps=2, batch=2)
    second = dataclasses.replace(first, name="last layer", trainable=("backbone.conv5.*",), momentum=None)
    data = SynthDataset(SynthConfig(frames=8), seed=0, length=50)
    train(tracker, [first], data, tmp_path / "one", progress=False, device="cpu")
    after_first = {k: v.clone() for k, v in tracker.state_dict().items()}
    torch.manual_seed(0)
    tracker = SiamFC(SiamFCConfig.tiny())
    log = train(tracker, [first, second], data, tmp_path / "two", progress=False, log_steps=1, device="cpu")
    assert [(line["stage"], line["step"]) for line in log] == [("pairs", 1), ("pairs", 2), ("last layer", 3), ("last layer", 4)]
    for key, value in tracker.state_dict().items():
        assert torch.equal(value, after_first[key]) == (not key.startswith("backbone.conv5")), key


def test_freeze_names_a_pattern_without_match():
    with pytest.raises(TrackkitError, match="head"):
        freeze(SiamFC(SiamFCConfig.tiny()), ("head.*",))


def test_stage_validation_and_warmup():
    spec = SiamFC(SiamFCConfig.tiny()).samples()
    stage = Stage("s", steps=100, batch=1, sample=spec, lr=1.0, lr_end=0.01, warmup=10)
    assert stage.rate(0) == pytest.approx(0.1) and stage.rate(9) == pytest.approx(0.01 ** (9 / 100))
    assert stage.rate(99) == pytest.approx(0.01, rel=0.06)
    with pytest.raises(ValueError, match="lr_end"):
        Stage("s", steps=1, batch=1, sample=spec, lr=1e-3, lr_end=1e-2)


def test_pickle_is_never_executed(tmp_path):
    proof = tmp_path / "executed"

    class Trap:
        def __reduce__(self):
            return (proof.write_text, ("boo",))

    for name, kwargs in (("zip.safetensors", {}), ("old.safetensors", {"_use_new_zipfile_serialization": False})):
        torch.save({"net": Trap()}, tmp_path / name, **kwargs)
        with pytest.raises(CheckpointError, match="pickle"):
            trackers.load(tmp_path / name)
    from trackkit import official

    with pytest.raises(CheckpointError, match="other than tensors"):
        official.read(tmp_path / "zip.safetensors")
    assert not proof.exists()


def test_checkpoint_errors(whole, tmp_path):
    good = (whole[1] / "tracker.safetensors").read_bytes()
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        trackers.load(bad)
    bad.write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        trackers.load(bad)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        trackers.load(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        trackers.load("siamfc-tny")

    tensors, about = checkpoints.read(whole[1] / "tracker.safetensors")
    checkpoints.write(bad, tensors, {**about, "tracker": "Oracle"})
    with pytest.raises(CheckpointError, match="'Oracle'"):
        trackers.load(bad)
    checkpoints.write(bad, tensors, {**about, "config": {**about["config"], "channels": [8, 8, 8, 8, 8]}})
    with pytest.raises(CheckpointError, match=r"another size: backbone.conv1.0.weight"):
        trackers.load(bad)
    checkpoints.write(bad, tensors, {**about, "config": {**about["config"], "future": 1}})
    with pytest.raises(CheckpointError, match="future"):
        trackers.load(bad)
    bad.write_bytes(good.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(CheckpointError, match="format 9"):
        trackers.load(bad)


def test_write_is_all_or_nothing(whole, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    trackers.save(whole[0], path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        trackers.save(SiamFC(SiamFCConfig.tiny()), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_log_lines_are_json(whole):
    lines = (whole[1] / "log.jsonl").read_text().splitlines()
    assert all(set(json.loads(line)) == {"stage", "step", "lr", "loss", "samples_per_second"} for line in lines)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_trains_on_a_gpu(tmp_path, precision):
    tracker = small_run(tmp_path, device="cuda", precision=precision)
    assert tracker.device.type == "cuda" and all(torch.isfinite(p).all() for p in tracker.parameters())
