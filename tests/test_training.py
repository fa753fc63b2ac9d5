"""The training loop: exact resume after SIGKILL, atomic files, stages, optimiser, errors."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import golden
from safetensors.torch import save_file
from torch import nn

from trackkit import checkpoints, cli, paths, weights
from trackkit.errors import CheckpointError, DataError, Stopped, TrackkitError
from trackkit.got10k import GOT10k
from trackkit.paths import alone
from trackkit.sampling import CropSpec, Samples, SampleSpec, batches
from trackkit.stages import Stage, held
from trackkit.synth import SynthConfig, SynthDataset, write_dataset
from trackkit.trackers.base import Tracker
from trackkit.trackers.siamfc import SiamFC, SiamFCConfig
from trackkit.training import _optimizer, freeze, read_log, train


def small_run(out: Path, steps: int = 6, second: int = 0, **options) -> SiamFC:
    """A run of a few steps and, with `second`, of a second stage: AdamW for two layers, their
    biases at a tenth of the rate.
    """
    torch.manual_seed(0)
    tracker = SiamFC(SiamFCConfig.tiny())
    first = dataclasses.replace(tracker.recipe("tiny")[0], steps=steps, batch=2, momentum=0.9)
    stages = [first]
    if second:
        layers = {
            "trainable": ("backbone.conv4.*", "backbone.conv5.*"),
            "rates": (("*.bias", 0.1),),
        }
        stages.append(
            dataclasses.replace(
                first,
                name="last layers",
                steps=second,
                momentum=None,
                lr_end=None,
                drops=(2,),
                **layers,
            )
        )
    data = options.pop("data", None) or SynthDataset(SynthConfig(frames=8), seed=0, length=50)
    train(
        tracker,
        stages,
        data,
        out,
        **({"progress": False, "log_steps": 2, "device": "cpu"} | options),
    )
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
    assert same_weights(weights.load(out / "tracker.safetensors"), tracker)
    assert same_weights(weights.load(out / "state.safetensors"), tracker), (
        "a state loads as a tracker"
    )
    assert sorted(p.name for p in out.glob("[!.]*")) == [
        "log.jsonl",
        "state.safetensors",
        "tracker.safetensors",
    ]


def test_same_seed_same_weights_other_seed_other_weights(whole, tmp_path):
    assert same_weights(small_run(tmp_path / "a"), whole[0])
    assert not same_weights(small_run(tmp_path / "b", seed=1), whole[0])


def test_loader_workers_do_not_change_the_weights(whole, tmp_path):
    assert same_weights(small_run(tmp_path, workers=1), whole[0])


def test_finished_run_is_not_trained_again(whole, monkeypatch):
    tracker, out = whole
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("[!.]*")}
    monkeypatch.setattr(SiamFC, "loss", lambda *_: pytest.fail("trained again"))
    assert same_weights(small_run(out), tracker)
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("[!.]*")} == before


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("two"), steps=3, second=3)


# Each saved state replaces two files, the log and then the state; the run is killed just before
# replacement N.
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a signal of unix")
@pytest.mark.parametrize(
    ("replacement", "steps_done"),
    [(1, 0), (4, 1), (5, 2), (7, 3), (10, 4)],
    ids=[
        "before anything",
        "new log, old state",
        "between steps",
        "between stages",
        "in the second stage",
    ],
)
def test_killed_run_resumes_to_the_same_weights(two_stages, tmp_path, replacement, steps_done):
    code = f"""
import os, signal, sys, torch
from pathlib import Path
from test_training import small_run
torch.set_num_threads(1)
count, replace = 0, os.replace
def deadly(*paths):
    global count
    count += 1
    if count == {replacement}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = deadly
small_run(Path(sys.argv[1]), steps=3, second=3, save_seconds=0)
"""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL
    )
    assert killed.returncode == -signal.SIGKILL
    state = tmp_path / "state.safetensors"
    assert (checkpoints.read(state)[1]["step"] if state.exists() else 0) == steps_done
    assert same_weights(small_run(tmp_path, steps=3, second=3), two_stages)
    assert [line["step"] for line in read_log(tmp_path)] == [2, 3, 4, 6]
    assert {p.name for p in tmp_path.glob("[!.]*")} == {
        "log.jsonl",
        "state.safetensors",
        "tracker.safetensors",
    }


# ---- what is in a folder ----


def test_a_finished_run_is_never_written_over(whole, tmp_path):
    """Without its state too: the weights say whose they are."""
    out = shutil.copytree(whole[1], tmp_path / "run")
    (out / "state.safetensors").unlink()
    final = (out / "tracker.safetensors").read_bytes()
    assert same_weights(small_run(out), whole[0])
    for other in ({"seed": 1}, {"steps": 7}, {"precision": "bf16"}):
        with pytest.raises(CheckpointError, match="holds another run"):
            small_run(out, **other)
    assert (out / "tracker.safetensors").read_bytes() == final
    assert not (out / "state.safetensors").exists()
    assert checkpoints.read(out / "tracker.safetensors")[1]["trained"]["seed"] == 0


@pytest.mark.parametrize("state", [True, False], ids=["with a state", "without"])
@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_damaged_weights_are_written_again(whole, tmp_path, state, damage):
    out = shutil.copytree(whole[1], tmp_path / "run")
    final = out / "tracker.safetensors"
    data = bytearray(final.read_bytes())
    data[-100] ^= 4
    final.write_bytes({"empty": b"", "cut": data[:-7], "flipped": data}[damage])
    if not state:
        (out / "state.safetensors").unlink()
    assert same_weights(small_run(out), whole[0]) and same_weights(weights.load(final), whole[0])


@pytest.mark.parametrize("what", ["another run", "an import", "a pickle", "another format"])
@pytest.mark.parametrize("state", [True, False], ids=["with a state", "without"])
def test_weights_of_something_else_are_left_alone(whole, tmp_path, what, state):
    out = shutil.copytree(whole[1], tmp_path / "run")
    final = out / "tracker.safetensors"
    tensors, about = checkpoints.read(final)
    if what == "another run":
        about["trained"]["seed"] = 9
        checkpoints.write(final, tensors, about)
    elif what == "an import":
        weights.save(whole[0], final, source="siamfc.pth")
    elif what == "a pickle":
        torch.save(tensors, final)
    else:
        final.write_bytes(final.read_bytes().replace(b'format\\": 2', b'format\\": 1'))
    if not state:
        (out / "state.safetensors").unlink()
    before = {file.name: file.read_bytes() for file in out.glob("[!.]*")}
    with pytest.raises(CheckpointError, match=str(out)):
        small_run(out)
    assert {file.name: file.read_bytes() for file in out.glob("[!.]*")} == before


def test_a_flipped_bit_anywhere_in_a_file_is_noticed(tmp_path):
    """It is refused, or it changes nothing that the file says (1e-05 is 1E-05)."""
    path, draw = tmp_path / "a.safetensors", random.Random(0)
    tensors = {"weights.a": torch.arange(12.0).reshape(3, 4), "optimizer.0.step": torch.tensor(3.0)}
    tensors["b"] = torch.tensor([True, False])
    checkpoints.write(path, tensors, {"step": 12, "config": {"lr": 1e-5, "sizes": [3, 4]}})
    data, (_, about) = path.read_bytes(), checkpoints.read(path)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            found, says = checkpoints.read(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            assert says == about and found.keys() == tensors.keys()
            assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("change", ["no optimizer", "half an optimizer", "step", "no step", "sums"])
def test_states_that_cannot_be_are_refused(tmp_path, change):
    with pytest.raises(Stopped):
        small_run(tmp_path, data=Stopping(3))
    state = tmp_path / "state.safetensors"
    tensors, about = checkpoints.read(state)
    assert about["step"] in (1, 2, 3)
    if change.endswith("optimizer"):
        keys = [key for key in tensors if key.startswith("optimizer.")]
        for key in keys if change == "no optimizer" else keys[:3]:
            del tensors[key]
    elif change == "step":
        about["step"] = 10**9
    elif change == "no step":
        del about["step"]
    else:
        about["count"] = "many"
    checkpoints.write(state, tensors, about)
    with pytest.raises(CheckpointError, match=rf"{state}: .*delete the folder"):
        small_run(tmp_path)


class Stopping(SynthDataset):
    """Procedural video; in the `at`-th look at it a signal comes."""

    def __init__(self, at: int, number: int = signal.SIGTERM):
        super().__init__(SynthConfig(frames=8), seed=0, length=50)
        self.at, self.number, self.looks = at, number, 0

    def __getitem__(self, index: int):
        self.looks += 1
        if self.looks == self.at:
            os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 5, 8])
def test_means_of_the_log_go_on_after_a_resume(whole, tmp_path, number, at):
    """The second line is of steps 3 and 4 also where the run was stopped between them."""
    with pytest.raises(Stopped) as stopped:
        small_run(tmp_path, data=Stopping(at, number))
    assert stopped.value.signal == number
    assert same_weights(small_run(tmp_path), whole[0])
    mine, others = (
        [{k: v for k, v in line.items() if k != "samples_per_second"} for line in read_log(out)]
        for out in (tmp_path, whole[1])
    )
    assert [line["step"] for line in mine] == [2, 4, 6]
    for line, other in zip(mine, others, strict=True):
        assert line == pytest.approx(other, abs=1e-6)


def test_data_are_what_is_in_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, seed in (("data", 0), ("other", 1)):
        videos = SynthDataset(SynthConfig(frames=8), seed=seed, length=2)
        write_dataset(tmp_path / place, "train", videos)
    whole = small_run(tmp_path / "run", data=GOT10k("data"))
    os.symlink("data", "link")
    for same in (tmp_path / "data", "link", "data/../data/train"):
        assert same_weights(small_run(tmp_path / "run", data=GOT10k(same)), whole)
    Path("data").rename("moved")
    assert same_weights(small_run(tmp_path / "run", data=GOT10k("moved")), whole)
    Path("other").rename("data")  # other data under the same path
    with pytest.raises(CheckpointError, match=r"another run \(other data\)"):
        small_run(tmp_path / "run", data=GOT10k("data"))


LOGS = {
    "cut": lambda data: data[:-20],
    "blank": lambda data: b"\n\n" + data.replace(b"\n", b"\n\n"),
    "foreign": lambda data: (
        b'{"step": 1}\n[1]\nnull\n{"stage": 1, "step": 2, "loss": 0.5}\n' + data
    ),
    "binary": lambda data: bytes(range(256)) * 20 + b"\n" + data,
    "deep": lambda data: b"[" * 99999 + b"\n" + data,
    "empty": lambda data: b"",
    "missing": None,
    "a folder": None,
}


@pytest.mark.parametrize("damage", LOGS)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
@pytest.mark.filterwarnings("ignore:.*damaged, and left out", "ignore:.*cannot be read")
def test_a_damaged_log_does_not_block(whole, tmp_path, damage, finished):
    if finished:
        shutil.copytree(whole[1], tmp_path / "run")
        if damage in ("cut", "missing"):
            (tmp_path / "run" / "state.safetensors").unlink()
    else:
        with pytest.raises(Stopped):
            small_run(tmp_path / "run", data=Stopping(8))
    path = tmp_path / "run" / "log.jsonl"
    data = path.read_bytes()
    path.unlink()
    if LOGS[damage]:
        path.write_bytes(LOGS[damage](data))
    elif damage == "a folder":
        path.mkdir()
    if damage == "a folder" and not finished:  # it cannot be written, which is said
        with pytest.raises(DataError, match=r"cannot write .*log.jsonl"):
            small_run(tmp_path / "run")
        return
    assert same_weights(small_run(tmp_path / "run"), whole[0])
    if damage in ("blank", "foreign", "binary", "deep"):  # and what is whole of it is kept
        assert [line["step"] for line in read_log(tmp_path / "run")] == [2, 4, 6]


def test_damaged_lines_are_one_warning(tmp_path):
    (tmp_path / "log.jsonl").write_text("\n" * 1000)
    with pytest.warns(UserWarning, match=r"log.jsonl, line 1 and 999 more: damaged") as caught:
        assert read_log(tmp_path) == []
    assert len(caught) == 1


# ---- processes ----

SIGNALLED = """
import os, signal, sys, torch
from trackkit import cli
from trackkit.trackers.siamfc import SiamFC
torch.set_num_threads(1)
honest, steps = SiamFC.loss, 0
def loss(self, batch, kind=""):
    global steps
    steps += 1
    if steps == 4:
        os.killpg(0, signal.{name})  # all processes of a terminal or a job
    return honest(self, batch, kind)
SiamFC.loss = loss
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of unix")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_ends_the_workers_and_says_how_to_go_on(tmp_path, name, status, workers):
    out, whole = tmp_path / "my run", tmp_path / "whole"
    command = ["train", "siamfc-tiny", "--data=stream", "--steps=6", "--batch=2", "--device=cpu"]
    command += [f"--workers={workers}", f"--out={out}"]
    ended = subprocess.run(
        [sys.executable, "-c", SIGNALLED.format(name=name), *command],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True, text=True, start_new_session=True,
    )  # fmt: skip
    lines = ended.stderr.strip().splitlines()
    assert ended.returncode == status and "Traceback" not in ended.stderr, ended.stderr
    assert checkpoints.read(out / "state.safetensors")[1]["step"] == 4
    assert lines[-1].startswith(f"trackkit train: {out}: stopped after step 4 of 6, and saved")
    again = shlex.split(lines[-1].split("goes on with: ")[1])
    start = shlex.split(paths.command("trackkit"))
    assert again == [*start, *command]
    assert cli.main(again[len(start) :]) == 0 and cli.main([*command[:-1], f"--out={whole}"]) == 0
    assert same_weights(*(weights.load(run / "tracker.safetensors") for run in (out, whole)))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["data", "numpy's memory", "torch's memory", "memory"])
def test_an_error_in_a_sample_is_one_line(tmp_path, monkeypatch, capsys, workers, kind):
    def sample(self, index):
        if kind == "data":
            raise DataError("cannot read frame swan.jpg")
        if kind == "memory":
            raise MemoryError
        return np.empty(1 << 50) if kind[0] == "n" else torch.empty(1 << 50, dtype=torch.uint8)

    monkeypatch.setattr(Samples, "__getitem__", sample)
    command = [
        "train",
        "siamfc-tiny",
        "--data=stream",
        "--steps=2",
        "--batch=2",
        f"--workers={workers}",
    ]
    assert cli.main([*command, f"--out={tmp_path}"]) == 1
    error, says = capsys.readouterr().err, "swan.jpg" if kind == "data" else "no memory left"
    assert "Traceback" not in error
    assert re.fullmatch(f"trackkit train: .*{says}.*", error.splitlines()[-1])


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a signal of unix")
@pytest.mark.parametrize("when", ["at work", "during a step"])
def test_a_killed_worker_is_one_line(tmp_path, monkeypatch, when):
    honest, loss = Samples.__getitem__, SiamFC.loss

    def sample(self, index):
        if when == "at work" and index == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(self, index)

    def step(self, batch, kind=""):
        for child in multiprocessing.active_children() if when == "during a step" else ():
            os.kill(child.pid, signal.SIGKILL)
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        return loss(self, batch, kind)

    monkeypatch.setattr(Samples, "__getitem__", sample)
    monkeypatch.setattr(SiamFC, "loss", step)
    with pytest.raises(TrackkitError, match=r"worker was ended from outside.*--workers"):
        small_run(tmp_path, workers=1)


def test_workers_that_cannot_be_started_are_one_line(tmp_path, monkeypatch):
    def fork(*_):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(multiprocessing.Process, "start", fork)
    with pytest.raises(TrackkitError, match=r"3 loader workers cannot be started .*--workers"):
        small_run(tmp_path, workers=3)


def test_a_second_training_in_a_folder_is_refused_while_the_first_lives(whole, tmp_path):
    with alone(tmp_path, "trains"), pytest.raises(DataError, match="another process trains here"):
        small_run(tmp_path)
    assert same_weights(small_run(tmp_path), whole[0])


def test_several_processes_train_one_tracker(tmp_path):
    """Two processes share each batch, keep equal weights and write one log; one process goes on
    from their state.
    """
    code = """
import sys, torch
from pathlib import Path
from test_training import small_run
torch.set_num_threads(1)
folder = Path(sys.argv[1])
tracker = small_run(folder, steps=3, second=2)
rank = torch.distributed.get_rank()
torch.save([p.detach() for p in tracker.parameters()], folder / f"rank{rank}.pt")
"""
    root = Path(__file__).parent.parent
    (tmp_path / "job.py").write_text(code)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
        "ACCELERATE_USE_CPU": "1",
    }
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(tmp_path / "job.py"),
        str(tmp_path),
    ]
    subprocess.run(launch, env=environment, check=True, capture_output=True)
    first, second = (torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [line["step"] for line in read_log(tmp_path)] == [2, 3, 4, 5]
    assert all(
        torch.equal(a, b)
        for a, b in zip(small_run(tmp_path, steps=3, second=2).parameters(), first, strict=True)
    )


def test_log_lines_are_means_of_the_steps_since_the_last_line(tmp_path):
    """Also where a stage ends between two lines: with a line for each step their means must be the
    same.
    """
    small_run(tmp_path / "each", steps=3, second=4, log_steps=1)
    small_run(tmp_path / "some", steps=3, second=4, log_steps=2)
    each = {line["step"]: line["loss"] for line in read_log(tmp_path / "each")}
    some = {line["step"]: line["loss"] for line in read_log(tmp_path / "some")}
    assert list(some) == [2, 3, 4, 6, 7]
    for step, before in ((2, 0), (3, 2), (4, 3), (6, 4), (7, 6)):
        assert some[step] == pytest.approx(
            sum(each[i] for i in range(before + 1, step + 1)) / (step - before), abs=2e-6
        )


def test_another_run_in_the_folder_is_refused(whole):
    with pytest.raises(CheckpointError, match=r"another run .*stages"):
        small_run(whole[1], steps=8)
    with pytest.raises(CheckpointError, match="seed"):
        small_run(whole[1], seed=5)
    with pytest.raises(CheckpointError, match="other data"):
        small_run(
            whole[1], data=SynthDataset(SynthConfig.only("blur", frames=8), seed=0, length=50)
        )


def test_state_files_are_as_readable_as_any_other(whole):
    (whole[1] / "plain").write_text("")
    modes = {p.name: p.stat().st_mode for p in whole[1].iterdir()}
    (whole[1] / "plain").unlink()
    assert len(set(modes.values())) == 1, modes


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


def test_frozen_parts_stay(two_stages, tmp_path):
    first = small_run(tmp_path / "one", steps=3, second=0).state_dict()
    for key, value in two_stages.state_dict().items():
        assert torch.equal(value, first[key]) == (
            not key.startswith(("backbone.conv4", "backbone.conv5"))
        ), key
    assert all(p.requires_grad for p in two_stages.parameters()) and not two_stages.training


def test_freeze_names_a_pattern_without_match():
    with pytest.raises(TrackkitError, match="head"):
        freeze(SiamFC(SiamFCConfig.tiny()), ("head.*",))


def test_stage_validation_and_warmup():
    spec = SiamFC(SiamFCConfig.tiny()).samples()
    stage = Stage("s", steps=100, batch=1, sample=spec, lr=1.0, lr_end=0.01, warmup=10)
    assert stage.rate(0) == pytest.approx(0.1) and stage.rate(9) == pytest.approx(0.01 ** (9 / 100))
    assert stage.rate(99) == pytest.approx(0.01, rel=0.06)
    for wrong, message in (
        ({"lr_end": 10.0}, "lr_end"),
        ({"lr_end": 0.1, "drops": (3,)}, "drops"),
        ({"drops": (0,)}, "drops"),
        ({"rates": (("*", 0.0),)}, "rates"),
        ({"cosine": (0.0, 1.0)}, "needs lr_end"),
        ({"cosine": (0.5, 0.5), "lr_end": 0.1}, "the smaller first"),
    ):
        with pytest.raises(TrackkitError, match=message):
            Stage("s", steps=1, batch=1, sample=spec, lr=1.0, **wrong)


def test_half_a_cosine_in_one_stage_and_in_two():
    spec = SiamFC(SiamFCConfig.tiny()).samples()
    shared = {"batch": 1, "sample": spec, "lr": 0.08, "lr_end": 1e-6}
    whole = Stage("s", steps=200, cosine=(-1 / 19, 1.0), warmup=10, **shared)
    first, second = (
        Stage("s", steps=100, cosine=part, **shared) for part in ((-1 / 19, 9 / 19), (9 / 19, 1.0))
    )
    parts = [
        *map(dataclasses.replace(first, warmup=10).rate, range(100)),
        *map(second.rate, range(100)),
    ]
    assert [whole.rate(i) for i in range(200)] == pytest.approx(parts)
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=0.08)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 190, eta_min=1e-6)
    for i in range(10, 200):
        assert whole.rate(i) == pytest.approx(optimiser.param_groups[0]["lr"])
        optimiser.step()
        theirs.step()
    assert [whole.rate(i) for i in (0, 4, 9)] == pytest.approx([0.008, 0.04, 0.08])


def test_held_stages_keep_the_rate():
    for stage in held(weights.create("sbt-tiny").recipe("laptop")):
        rates = [stage.rate(step) for step in range(stage.warmup, stage.steps)]
        assert set(rates) == {stage.lr}


def test_rate_by_steps_constant_and_resized():
    spec = SiamFC(SiamFCConfig.tiny()).samples()
    assert {Stage("s", steps=100, batch=1, sample=spec, lr=0.5).rate(i) for i in range(100)} == {
        0.5
    }
    stage = Stage("s", steps=100, batch=1, sample=spec, lr=1.0, drops=(60, 80), warmup=2)
    assert [stage.rate(i) for i in (0, 1, 59, 60, 79, 80, 99)] == pytest.approx(
        [0.5, 1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert (
        stage.resized(10).drops == (6, 8)
        and stage.resized(1).drops == (1, 1)
        and stage.resized(100) == stage
    )


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    dropout: float = 0.5


class Toy(Tracker):
    """Two layers of a backbone, the first to be frozen, and a head with dropout, named as in
    STARK.
    """

    Config = ToyConfig
    spec = SampleSpec(template=CropSpec(8, 2.0), search=CropSpec(8, 4.0))

    def __init__(self, config: ToyConfig = ToyConfig()):
        super().__init__(config)
        self.backbone = nn.ModuleDict({"layer1": nn.Linear(192, 8), "layer2": nn.Linear(8, 8)})
        self.head = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(8, 4))

    def loss(self, batch, kind=""):
        features = self.backbone.layer2(
            self.backbone.layer1(batch["searches"].float().flatten(1) / 255).relu()
        )
        return {"loss": (self.head(features) - batch["search_boxes"][:, 0]).square().mean()}


def stark_stage(steps: int = 6) -> Stage:
    """The numbers of STARK's first stage, the rate falling after four fifths, as after 400 of 500
    epochs.
    """
    return Stage(
        "localisation", steps=steps, batch=2, sample=Toy.spec,
        lr=1e-4, drops=(steps * 4 // 5,), rates=(("backbone.*", 0.1),),
        weight_decay=1e-4, clip=0.1, trainable=("backbone.layer2.*", "head.*"),
    )  # fmt: skip


def test_stark_optimiser_has_the_numbers_of_the_authors():
    numbers, stage, toy = golden("stark_train")["optimizer"], stark_stage(), Toy()
    groups = {
        len(group["params"]): group
        for group in _optimizer(dataclasses.replace(stage, trainable=("*",)), toy).param_groups
    }
    for expected, tensors in zip(numbers["stage1"], (2, 4), strict=True):
        group = groups[tensors]  # of the head, of the backbone
        assert (
            group["lr"] == pytest.approx(expected["lr"])
            and list(group["betas"]) == expected["betas"]
        )
        assert group["weight_decay"] == expected["weight_decay"] and group["eps"] == expected["eps"]
    for kind, epochs in (("stage1", 500), ("stage2", 50)):
        size, gamma = numbers[f"{kind}_step_size"], numbers[f"{kind}_gamma"]
        by_epoch = dataclasses.replace(stage, steps=epochs, drops=(size,))
        assert [by_epoch.rate(i) for i in range(epochs)] == pytest.approx(
            [1e-4 * gamma ** (i // size) for i in range(epochs)]
        )


def test_training_with_groups_and_drops_is_torchs_own(tmp_path):
    """The loop's weights are those of a plain loop with the authors' two groups, StepLR and
    clipping.
    """
    torch.manual_seed(0)
    toy, data, stage = Toy(), SynthDataset(SynthConfig(frames=8), seed=0, length=50), stark_stage()
    plain = copy.deepcopy(toy).train()
    train(toy, [stage], data, tmp_path, progress=False, device="cpu")
    parameters = [*plain.backbone.layer2.parameters(), *plain.head.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": parameters[:2], "lr": 1e-5}, {"params": parameters[2:]}],
        lr=1e-4,
        weight_decay=1e-4,
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.1)
    plain.backbone.layer1.requires_grad_(False)
    for step, batch in enumerate(batches(Samples(data, stage.sample, 0, 12), 2, 0, 6)):
        torch.manual_seed(step)
        plain.loss(batch)["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for (name, mine), other in zip(toy.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-8, msg=name)


def test_crops_made_on_the_device_train_to_the_same_weights(tmp_path):
    data, stage, ends = SynthDataset(SynthConfig(frames=8), seed=0, length=50), stark_stage(), []
    for crops in ("loader", "device"):
        torch.manual_seed(0)
        toy = Toy()
        train(toy, [stage], data, tmp_path / crops, progress=False, device="cpu", crops=crops)
        ends.append(toy.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with pytest.raises(TrackkitError, match="auto, loader, device, not by 'gpu'"):
        train(toy, [stage], data, tmp_path, crops="gpu")


def test_dropout_groups_and_drops_resume_exactly(tmp_path, monkeypatch):
    def toy_run(out):
        torch.manual_seed(0)
        data = SynthDataset(SynthConfig(frames=8), seed=0, length=50)
        train(
            toy := Toy(), [stark_stage()], data, out, progress=False, device="cpu", save_seconds=0
        )
        return toy

    whole, honest, calls = toy_run(tmp_path / "whole"), Toy.loss, iter(range(100))

    def loss(self, batch, kind=""):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return honest(self, batch, kind)

    monkeypatch.setattr(Toy, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        toy_run(tmp_path / "cut")
    assert checkpoints.read(tmp_path / "cut" / "state.safetensors")[1]["step"] == 3
    assert same_weights(toy_run(tmp_path / "cut"), whole)


def test_first_matching_rate_counts():
    stage = dataclasses.replace(stark_stage(), rates=(("backbone.*", 0.1), ("*.weight", 2.0)))
    groups = _optimizer(stage, toy := Toy()).param_groups
    names = {id(p): name for name, p in toy.named_parameters()}
    assert {g["factor"]: [names[id(p)] for p in g["params"]] for g in groups} == {
        0.1: ["backbone.layer2.weight", "backbone.layer2.bias"],
        2.0: ["head.1.weight"],
        1.0: ["head.1.bias"],
    }


def test_a_pattern_without_match_is_told_before_the_first_stage(tmp_path):
    data = SynthDataset(SynthConfig(frames=8), seed=0, length=50)
    frozen = (
        {"rates": (("backbone.layer1.*", 0.1),)},
        r"Toy that stage later trains matches 'backbone.layer1",
    )
    for wrong, message in (
        ({"trainable": ("neck.*",)}, r"no parameter of Toy matches 'neck"),
        frozen,
    ):
        stages = [stark_stage(), dataclasses.replace(stark_stage(), name="later", **wrong)]
        with pytest.raises(TrackkitError, match=message):
            train(Toy(), stages, data, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_pickle_is_never_executed(tmp_path):
    proof = tmp_path / "executed"

    class Trap:
        def __reduce__(self):
            return (proof.write_text, ("boo",))

    for name, kwargs in (
        ("zip.safetensors", {}),
        ("old.safetensors", {"_use_new_zipfile_serialization": False}),
    ):
        torch.save({"net": Trap()}, tmp_path / name, **kwargs)
        with pytest.raises(CheckpointError, match="pickle"):
            weights.load(tmp_path / name)
    from trackkit import official

    with pytest.raises(CheckpointError, match="no tensors in it"):
        official.read(tmp_path / "zip.safetensors")
    assert not proof.exists()


def test_checkpoint_errors(whole, tmp_path):
    good = (whole[1] / "tracker.safetensors").read_bytes()
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        weights.load(bad)
    bad.write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        weights.load(bad)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        weights.load(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"did you mean siamfc-tiny\?"):
        weights.load("siamfc-tny")

    tensors, about = checkpoints.read(whole[1] / "tracker.safetensors")
    checkpoints.write(bad, tensors, {**about, "tracker": "Oracle"})
    with pytest.raises(CheckpointError, match="'Oracle'"):
        weights.load(bad)
    checkpoints.write(
        bad, tensors, {**about, "config": {**about["config"], "channels": [8, 8, 8, 8, 8]}}
    )
    with pytest.raises(CheckpointError, match=r"another size: backbone.conv1.0.weight"):
        weights.load(bad)
    checkpoints.write(bad, tensors, {**about, "config": {**about["config"], "future": 1}})
    with pytest.raises(CheckpointError, match="future"):
        weights.load(bad)
    bad.write_bytes(good.replace(b'\\"format\\": 2', b'\\"format\\": 9'))
    with pytest.raises(CheckpointError, match="format 9"):
        weights.load(bad)


def test_write_is_all_or_nothing(whole, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    weights.save(whole[0], path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(DataError, match=r"cannot write .*: power cut"):
        weights.save(SiamFC(SiamFCConfig.tiny()), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_log_lines_are_json(whole):
    lines = (whole[1] / "log.jsonl").read_text().splitlines()
    assert all(
        set(json.loads(line)) == {"stage", "step", "lr", "loss", "samples_per_second"}
        for line in lines
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_trains_on_a_gpu(tmp_path, precision):
    tracker = small_run(tmp_path, second=3, device="cuda", precision=precision)
    assert tracker.device.type == "cuda" and all(
        torch.isfinite(p).all() for p in tracker.parameters()
    )


# ---- descriptions that somebody else wrote ----


@pytest.mark.parametrize(
    "about",
    [
        {"config": []},
        {"config": None},
        {"config": "tiny"},
        {"config": {"channels": 1e6}},
        {"tracker": None},
        {"tracker": ["SiamFC"]},
        {"tracker": "x" * 10_000},
        {"config_change": {"channels": [1_000_000] * 5}},
        {"config_change": {"channels": [8, 8]}},
        {"config_change": {"scales": "3"}},
        {"config_change": {"exemplar_size": None}},
        {"config_change": {"exemplar_size": 10**9}},
        {"config_change": {"scale_step": [[[[1]]]]}},
    ],
    ids=str,
)
def test_odd_descriptions_are_one_line(tmp_path, about):
    """And take no memory: a config may ask for any number of gigabytes."""
    tracker, path = SiamFC(SiamFCConfig.tiny()), tmp_path / "odd.safetensors"
    described = weights.describe(tracker)
    change = about.get("config_change")
    if change is not None:
        about = {"config": {**described["config"], **change}}
    checkpoints.write(path, tracker.state_dict(), {**described, **about})
    with pytest.raises(CheckpointError, match=r"odd\.safetensors") as error:
        weights.load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000, "null", '"text"', "[2]", '{"a":'])
def test_descriptions_of_other_shapes_are_one_line(tmp_path, text):
    path = tmp_path / "odd.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"trackkit": text})
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: damaged") as error:
        weights.load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_weights_are_float32_on_the_cpu_whatever_the_defaults_are(tmp_path):
    path = tmp_path / "tracker.safetensors"
    weights.save(SiamFC(SiamFCConfig.tiny()), path)
    wanted = weights.load(path).state_dict()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found = weights.load(path)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(torch.equal(found.state_dict()[key], value) for key, value in wanted.items())
