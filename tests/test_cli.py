"""The command line, end to end: train, evaluate, track and continue, as a user types it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import golden, state_dict
from PIL import Image

from trackkit import ablations, cli, weights
from trackkit.got10k import GOT10k
from trackkit.synth import SynthConfig, SynthDataset, write_dataset
from trackkit.trackers.stark import STARK
from trackkit.training import read_log
from trackkit.video import VideoSequence, write_video
from trackkit.weights import load

ROOT = Path(__file__).parent.parent


def run(*arguments) -> int:
    return cli.main([str(a) for a in arguments])


def test_train_evaluate_track(tmp_path, capsys):
    """The main job in small: GOT-10k in, checkpoint, scores, video and boxes out."""
    data = tmp_path / "GOT-10k"
    for split, count in (("train", 3), ("val", 2), ("test", 2)):
        write_dataset(
            data,
            split,
            SynthDataset(
                SynthConfig(frames=8, width=160, height=120, split=split), seed=1, length=count
            ),
        )

    options = (
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--steps",
        4,
        "--batch",
        2,
        "--device",
        "cpu",
    )
    assert run("train", "siamfc-tiny", *options, "--config.window-influence", 0.3) == 0
    assert "4 steps on GOT-10k-train" in capsys.readouterr().out
    checkpoint = tmp_path / "run" / "tracker.safetensors"
    assert weights.load(checkpoint).config.window_influence == 0.3

    results = ("--data", data, "--out", tmp_path / "results")
    assert run("evaluate", checkpoint, "ncc", *results, "--json", tmp_path / "scores.json") == 0
    table = capsys.readouterr().out
    assert re.search(r"^run +0\.\d{3}", table, re.M) and re.search(r"^ncc +0\.\d{3}", table, re.M)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == {"run", "ncc"} and 0 <= scores["run"]["ao"] <= 1
    assert (tmp_path / "results" / "success-GOT-10k-val.png").stat().st_size > 5000
    name = GOT10k(data, "val").names[0]
    assert (tmp_path / "results" / "run" / name / f"{name}_001.txt").exists()

    assert (
        run(
            "evaluate",
            "stay",
            "--split",
            "test",
            "--zip",
            tmp_path / "s.zip",
            "--data",
            data,
            "--out",
            tmp_path / "test",
        )
        == 0
    )
    assert (tmp_path / "s.zip").exists() and "server" in capsys.readouterr().out

    assert run("track", data / "val" / name, "--tracker", checkpoint, "--out", tmp_path) == 0
    assert "average overlap with groundtruth.txt" in capsys.readouterr().out
    assert len(VideoSequence(tmp_path / f"{name}-run.mp4")) == 8
    assert len((tmp_path / f"{name}-run.txt").read_text().splitlines()) == 8


def test_track_a_video_with_a_box(tmp_path, capsys):
    sequence = SynthDataset(SynthConfig.only("motion", frames=6, split="val"), seed=0, length=1)[0]
    write_video(tmp_path / "clip.mp4", (sequence.frame(i) for i in range(6)), fps=10)
    box = ",".join(f"{v:.0f}" for v in sequence.boxes_xywh[0].tolist())
    before = (tmp_path / "clip.mp4").read_bytes()
    assert (
        run("track", tmp_path / "clip.mp4", "--box", box, "--tracker", "ncc", "--out", tmp_path)
        == 0
    )
    assert (tmp_path / "clip.mp4").read_bytes() == before, (
        "the user's own video is never written over"
    )
    rows = [
        [float(v) for v in line.split(",")]
        for line in (tmp_path / "clip-ncc.txt").read_text().splitlines()
    ]
    assert rows[0] == [float(v) for v in box.split(",")] and len(rows) == 6
    assert (torch.tensor(rows) - sequence.boxes_xywh).abs().max() < 8
    assert "6 frames" in capsys.readouterr().out


def test_track_frames_of_changing_size(tmp_path):
    for i, size in enumerate([(60, 80), (90, 120), (40, 50)]):
        Image.fromarray(np.full((*size, 3), 90 + 20 * i, dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    assert (
        run(
            "track", tmp_path, "--box", "10,10,20,20", "--tracker", "ncc", "--out", tmp_path / "out"
        )
        == 0
    )
    video = VideoSequence(tmp_path / "out" / f"{tmp_path.name}-ncc.mp4")
    assert len(video) == 3 and video.frame_size(0) == (80, 60)


def test_options_may_come_before_the_name(tmp_path):
    assert run("train", "--steps", 1, "--batch", 2, "--out", tmp_path, "siamfc-tiny") == 0


def test_ablate(tmp_path, capsys, monkeypatch):
    """A table of a paper in small: listed, trained in part, shown, continued and read."""
    assert run("ablate") == 0
    assert re.search(
        r"^stark-table6 +STARK, Table 6 \(stark-tiny\): base, no encoder, ",
        capsys.readouterr().out,
        re.M,
    )

    data = tmp_path / "GOT-10k"
    for split in ("train", "val"):
        write_dataset(
            data,
            split,
            SynthDataset(
                SynthConfig(frames=20, width=160, height=120, split=split), seed=1, length=2
            ),
        )
    options = (
        "--steps",
        2,
        "--seeds",
        1,
        "--data",
        data,
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
    )
    assert run("ablate", "stark-table6", "--rows", "no encoder", "MLP head", *options) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^\| base +\| \d+\.\d \(1\) ", shown, re.M) and re.search(
        r"^\| MLP head +\| \d+\.\d \(1\) ", shown, re.M
    )
    assert re.search(r"^\| no decoder +\| - \(0\) ", shown, re.M) and "seeds 0." in shown
    path = tmp_path / "out" / "stark-table6_stark-tiny_tiny_2-steps.json"
    assert str(path.with_suffix(".md")) in shown and path.with_suffix(".md").read_text() in shown
    assert [row["label"] for row in ablations.load(path).rows if row["ao"]] == [
        "base",
        "no encoder",
        "MLP head",
    ]

    monkeypatch.setattr(STARK, "loss", lambda *_: pytest.fail("trained again"))
    assert run("ablate", "stark-table6", "--rows", "MLP head", *options) == 0
    assert capsys.readouterr().out == shown


def test_ablate_interrupted(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(STARK, "start", interrupted)
    assert run("ablate", "stark-table6", "--steps", 1, "--out", tmp_path) == 130
    assert (
        "continues" in capsys.readouterr().err
        and len(read_log(next((tmp_path / "runs").iterdir()))) == 2
    )


def test_import(tmp_path, capsys, monkeypatch):
    """An authors' checkpoint becomes a file that all other commands take; one that does not fit
    leaves none.
    """
    monkeypatch.chdir(tmp_path)
    keys = golden("siamfc")["keys"]
    theirs = state_dict(keys, {})
    torch.save({"epoch": 50, "model": theirs}, "siamfc_alexnet_e50.pth")
    assert run("import", "siamfc_alexnet_e50.pth", "--tracker", "siamfc") == 0
    assert "siamfc.safetensors" in capsys.readouterr().out
    loaded = load("siamfc.safetensors")
    assert all(torch.equal(value, theirs[key]) for key, value in loaded.state_dict().items())
    assert (
        run(
            "import",
            "siamfc_alexnet_e50.pth",
            "--tracker",
            "stark-s50",
            "--out",
            "other.safetensors",
        )
        == 1
    )
    assert "it fits siamfc" in capsys.readouterr().err and not Path("other.safetensors").exists()


def test_synth(tmp_path, capsys):
    assert (
        run("synth", tmp_path, "--only", "occlusion", "--count", 2, "--frames", 5, "--split", "val")
        == 0
    )
    assert [len(s) for s in GOT10k(tmp_path, "val")] == [5, 5]
    assert all("occlusion" in s.attributes for s in GOT10k(tmp_path, "val"))


def test_profile_counts_siamfc_as_the_specification_says(capsys):
    assert run("profile", "siamfc", "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert row == {"name": "siamfc", "parameters": 2_336_320, "macs": 8_167_095_648, "paper": {}}


def test_doctor(capsys, monkeypatch, tmp_path):
    assert run("doctor") == 0
    assert "torch" in (out := capsys.readouterr().out) and "data: " in out and "! " not in out
    monkeypatch.setenv("TRACKKIT_GOT10K", str(tmp_path / "nowhere"))
    assert run("doctor") == 0
    assert "! data: " in capsys.readouterr().out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(command, "--help")
    assert exit_.value.code == 0
    assert "usage: trackkit " + command in capsys.readouterr().out


EXPLAINED = [
    "siamfc-tiny",
    "siamfc-ca",
    "stark-ca",
    "stark-tiny",
    "sbt-tiny",
    "ostrack-tiny",
    "procontext-tiny",
    "stmtrack-tiny",
    "dastm-tiny",
    "mixvit-tiny",
    "ustam-tiny",
]


@pytest.mark.parametrize("name", EXPLAINED)
def test_train_help_explains_every_field_of_the_config(name, capsys):
    """Each field has an entry of its own, and all of it is shown."""
    with pytest.raises(SystemExit):
        run("train", name, "--help")
    shown = re.sub(r"[\s│]", "", capsys.readouterr().out)
    with torch.device("meta"):
        config = type(weights.create(name).config)
    entries = {}
    for cls in reversed(config.__mro__[:-1]):
        entries |= re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(cls), re.M)
        source = inspect.getsource(cls)  # or beside the field, or under it
        entries |= re.findall(r"^    (\w+): .+  # (.+)", source, re.M)
        entries |= re.findall(r'^    (\w+): .+\n    """((?:.|\n)+?)"""', source, re.M)
    for field in dataclasses.fields(config):
        assert f"--config.{field.name.replace('_', '-')}" in shown
        assert field.name in entries, f"{config.__name__}.{field.name} has no entry of its own"
        assert re.sub(r"\s", "", entries[field.name]) in shown


def test_no_config_goes_unexplained():
    with torch.device("meta"):
        configs = {name: type(weights.create(name).config) for name in weights.TRACKERS}
    assert {configs[name] for name in EXPLAINED} == {
        config for name, config in configs.items() if name not in ("stay", "ncc")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "siamfc-tny"], "there are stay, ncc, siamfc"),
        (["train"], "name the tracker to train"),
        (["train", "ncc"], "nothing to train"),
        (["train", "siamfc-tiny", "--steps", "0"], "at least 1"),
        (["train", "siamfc-tiny", "--steps", "1", "--seed", "-1"], "--seed must be at least 0"),
        (["train", "siamfc-tiny", "--data", "nowhere"], "nowhere"),
        (["track", "nowhere.mp4", "--tracker", "ncc", "--box", "1,2,3,4"], "nowhere.mp4"),
        (["track", "x.mp4", "--tracker", "ncc", "--box", "1,2,3"], "four numbers"),
        (["track", str(ROOT / "docs"), "--tracker", "ncc"], "say what to follow: --box"),
        (
            [
                "track",
                str(ROOT / "data_samples" / "val" / "synth_val_scale"),
                "--tracker",
                "none.safetensors",
            ],
            "no such checkpoint",
        ),
        (["evaluate"], "at least one tracker"),
        (["evaluate", "ncc", "--data", "nowhere"], "nowhere"),
        (["evaluate", "ncc", "--batch", "0"], "batch must be at least 1"),
        (["evaluate", "ncc", "stay", "--split", "test", "--zip", "s.zip"], "one tracker"),
        (["evaluate", "ncc", "--zip", "s.zip"], "test split"),
        (
            ["ablate", "table6"],
            "there are stark-table1, stark-table6, stark-table7",
        ),
        (
            ["ablate", "stark-table6", "--rows", "no eyes"],
            "no row 'no eyes'; it has base, no encoder",
        ),
        (
            ["ablate", "stark-table6", "--tracker", "siamfc-tiny"],
            "siamfc-tiny has no encoder_layers",
        ),
        (["ablate", "stark-table6", "--tracker", "x"], "no tracker is called 'x'"),
        (["ablate", "stark-table6", "--seeds", "0"], "at least 1"),
        (["ablate", "stark-table6", "--steps", "0"], "at least 1"),
        (["ablate", "stark-table6", "--data", "nowhere"], "nowhere"),
        (["profile"], "name a tracker"),
        (["profile", "x"], "no tracker is called 'x'"),
        (["synth", "out", "--only", "rain"], "rain"),
    ],
)
def test_mistakes_are_one_line_on_stderr(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert (
        message in error
        and error.count("\n") == 1
        and error.startswith(f"trackkit {arguments[0]}: ")
    )


def test_no_command_unknown_command_version(capsys):
    assert run() == 0 and "usage: trackkit COMMAND" in capsys.readouterr().out
    assert run("fly") == 2 and "no command 'fly'" in capsys.readouterr().err
    assert run("--version") == 0


def test_help_does_not_wait_for_torch():
    code = "import sys; from trackkit.cli import main; main([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


# ---- names, numbers and pipes ----


@pytest.mark.parametrize(
    "arguments",
    [
        ["--out", "stark-tiny", "siamfc-tiny"],
        ["siamfc-tiny", "--out", "stark-tiny"],
        ["--out=stark-tiny", "siamfc-tiny"],
        ["--no-pretrained", "siamfc-tiny", "--out", "stark-tiny"],
        ["--config.channels", "8", "8", "8", "8", "8", "siamfc-tiny", "--out", "stark-tiny"],
    ],
)
def test_the_positional_argument_says_what_is_trained(arguments):
    assert cli._positional(arguments, weights.TRACKERS) == "siamfc-tiny"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "siamfc-tiny", "--config.search-size", "0"], "search_size must be at least 1"),
        (["train", "siamfc-tiny", "--config.search-size", "-255"], "search_size must be at least"),
        (["train", "siamfc-tiny", "--config.search-size", "100000000"], "at most 4096; got 1000"),
        (["train", "siamfc-tiny", "--config.scale-step", "nan"], "scale_step must be above 0"),
        (["train", "siamfc-tiny", "--config.serch-size", "9"], "mean --config.search-size?"),
        (["train", "siamfc-tiny", "--scale", "tinny"], "did you mean tiny?"),
        (["train", "siamfc-tiny", "--seed", "x"], "--seed: invalid literal"),
        (["train", "--out", "stark-tiny"], "Missing"),
        (["evaluate", "ncc", "--split", "vall"], "did you mean val?"),
        (["evaluate", "ncc", "--bach", "3"], "did you mean --batch?"),
        (["lessons", "strat"], "did you mean start?"),
        (["lessons"], "start, student, build, check"),
        (["track", "x"], "--tracker"),
    ],
)
def test_mistyped_options_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and said.startswith("trackkit ")
    assert not list(tmp_path.glob("[!.]*"))


def test_a_switch_before_the_name_takes_no_value(tmp_path, monkeypatch):
    """`--config.no-exact` looks like an option with a value, and the folder comes first."""
    monkeypatch.chdir(tmp_path)
    short = ("--steps", 1, "--batch", 2)
    assert run("train", "--out", "siamfc-tiny", *short, "--config.no-exact", "stark-tiny") == 0
    assert type(load("siamfc-tiny/tracker.safetensors")).__name__ == "STARK"


def test_the_largest_seed_trains(tmp_path):
    short = ("--steps", 1, "--batch", 2, "--out", tmp_path)
    assert run("train", "siamfc-tiny", "--seed", 2**32 - 1, *short) == 0


def test_all_trackers_are_there_before_one_is_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trackkit.evaluation.evaluate", lambda *_, **__: pytest.fail("began"))
    assert run("evaluate", "ncc", "siamfc-tny", "--out", tmp_path) == 1
    assert "did you mean siamfc-tiny?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["track", "evaluate", "train"])
def test_help_says_what_surprises(command, capsys):
    with pytest.raises(SystemExit):
        run(*([command, "siamfc-tiny"] if command == "train" else [command]), "--help")
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    wanted = {
        "track": "EXIF data is ignored",
        "evaluate": 'ExperimentGOT10k(ROOT, result_dir="results").report(NAMES)',
        "train": "the learning rate stays as it is",
    }
    assert wanted[command] in shown


def test_a_folder_named_like_a_tracker_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train", "--out", "stark-tiny", "siamfc-tiny", "--steps", "1", "--batch", "2") == 0
    assert type(load("stark-tiny/tracker.safetensors")).__name__ == "SiamFC"


def test_a_name_means_trained_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    video = str(ROOT / "data_samples" / "val" / "synth_val_scale")
    assert run("track", video, "--tracker", "siamfc-tiny") == 0
    assert "siamfc-tiny: with the weights that come with trackkit" in capsys.readouterr().out
    shipped = load(weights.shipped("siamfc-tiny")).state_dict()
    assert all(torch.equal(v, shipped[k]) for k, v in load("siamfc-tiny").state_dict().items())
    for command in (["track", video, "--tracker", "sbt-light"], ["evaluate", "sbt-light"]):
        assert run(*command) == 1
        said = capsys.readouterr().err
        assert "no trained weights of sbt-light" in said and "trackkit train sbt-light" in said


def test_training_begins_with_the_weights_of_another(tmp_path, capsys):
    short = ("--hold", "ostrack-tiny", "--steps", 1, "--batch", 2, "--out", tmp_path)
    assert run("train", *short, "--start", "ostrack-tiny") == 0
    theirs = load("ostrack-tiny").state_dict()
    own = load(tmp_path / "tracker.safetensors").state_dict()
    # one step of a rate that is still rising
    assert all((own[k] - v).abs().max() < 2e-3 for k, v in theirs.items() if v.ndim > 1)
    assert run("train", *short, "--start", "procontext-tiny") == 1
    assert "holds another run (other start)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ablate", "stark-table6", "--batch", "0"], "--batch must be at least 1"),
        (["ablate", "stark-tiny", "--cut", "all", "--seeds", "5"], "--seeds is for training"),
        (["ablate", "stark-table6", "--jobs", "0"], "--jobs must be at least 1"),
        (["train", "siamfc-tiny", "--batch", "0"], "--batch must be at least 1"),
        (["train", "siamfc-tiny", "--workers", "-1"], "--workers must be at least 0"),
        (["train", "siamfc-tiny", "--seed", "9" * 23], "--seed must be at least 0"),
        (["train", "siamfc-tiny", "--preset", "x"], "SiamFC has no preset 'x'"),
        (["synth", "out", "--width", "1000000"], "--width must be at least 32 and at most 8192"),
        (["synth", "out", "--count", "0"], "--count must be at least 1"),
        (["synth", "out", "--frames", "0"], "--frames must be at least 1"),
        (["evaluate", "ncc", "--batch", "-3"], "--batch must be at least 1"),
        (["evaluate", "ncc", "ncc"], "ncc is named twice"),
        (["ablate", "stark-tabel6"], "did you mean stark-table6?"),
        (["ablate", "stark-table6", "--rows", "no encodr"], "did you mean no encoder?"),
        (["ablate", "stark-table6", "--seeds", "100000"], "--seeds must be at least 1 and at most"),
        (["evaluate", "ncc", "--batch", "1000000"], "--batch must be at least 1 and at most 65536"),
        (["track", "x.mp4", "--tracker", "ncc", "--box", "nan,1,2,3"], "four numbers"),
        (["profile", "siamfc-tny"], "did you mean siamfc-tiny?"),
        (["track", "x.mp4", "--box", "1,1,2,2", "--tracker", "siamfc-tny"], "x.mp4"),
    ],
)
def test_odd_options_are_one_line_before_work_begins(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not list(tmp_path.glob("[!.]*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "siamfc-tiny", "--steps", "1"],
        ["evaluate", "ncc"],
        ["track", str(ROOT / "data_samples" / "val" / "synth_val_scale"), "--tracker", "ncc"],
        ["ablate", "stark-table1", "--steps", "1"],
    ],
)
def test_a_gpu_that_is_not_there_is_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, "--device", "cuda") == 1
    assert "device cuda: torch sees no GPU here" in capsys.readouterr().err


def test_a_misspelt_command_suggests_one(capsys):
    assert run("trian") == 2
    assert "no command 'trian' (did you mean train?)" in capsys.readouterr().err


def test_equal_file_names_get_labels_of_their_own(tmp_path):
    def label(*files):
        return cli._labels([str(tmp_path / file) for file in files])

    assert label("a/tracker.safetensors", "b/tracker.safetensors") == ["a", "b"]
    assert label("a/x/tracker.safetensors", "b/x/tracker.safetensors") == ["a-x", "b-x"]
    assert label("a/mine.safetensors", "b/mine.safetensors") == ["a-mine", "b-mine"]
    assert cli._labels(["ncc", "stay"]) == ["ncc", "stay"]


def test_a_closed_pipe_is_no_error():
    command = f'"{sys.executable}" -m trackkit profile --all | head -1'
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert ended.stdout.startswith("tracker") and ended.stderr == ""


def test_no_home_folder_is_one_line(monkeypatch, capsys):
    monkeypatch.delenv("TRACKKIT_HOME")

    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", staticmethod(none))
    assert run("evaluate", "stay") == 1
    assert "TRACKKIT_HOME" in capsys.readouterr().err
    assert run("doctor") == 0
