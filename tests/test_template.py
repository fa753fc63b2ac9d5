"""The tracker to copy learns, and docs/your_own_tracker.md does what it says: its blocks are run,
in their order, in a folder with nothing but what they write.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

from trackkit import ablations, cli, weights
from trackkit.ablations import Row, Table
from trackkit.errors import TrackkitError
from trackkit.sampling import Samples, batches
from trackkit.synth import SynthConfig, SynthDataset, write_dataset
from trackkit.trackers.template import MyTracker, MyTrackerConfig

PAGE = (Path(__file__).parent.parent / "docs" / "your_own_tracker.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """The page's code blocks of a language ("" for none)."""
    return [
        code for kind, code in re.findall(r"```(\w*)\n(.*?)```", PAGE, re.S) if kind == language
    ]


def short(code: str) -> str:
    """A hundredth of the training."""
    assert code.count("300") == 1
    return code.replace("300", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The user's folder, and beside it GOT-10k in very small."""
    folder = tmp_path_factory.mktemp("own")
    for split, count in (("train", 3), ("val", 2)):
        config = SynthConfig(frames=6, width=160, height=120, split=split)
        write_dataset(folder / "GOT-10k", split, SynthDataset(config, seed=1, length=count))
    return folder


@pytest.fixture(scope="module")
def own(folder):
    """The names that the page's Python leaves behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setenv("TRACKKIT_GOT10K", str(folder / "GOT-10k"))
        names: dict = {}
        for code in blocks("python"):
            exec(short(code) if "steps = " in code else code, names)
        yield names
        sys.modules.pop("mine")


def test_the_weights_are_those_that_were_trained(folder, own):
    file = folder / "runs/mine/tracker.safetensors"
    loaded = weights.load(file, classes=(own["Mine"],))
    assert type(loaded).__module__ == "mine" and loaded.config == own["MineConfig"](depth=2)
    fresh = type(loaded)(loaded.config).state_dict()
    assert any(not torch.equal(value, fresh[key]) for key, value in loaded.state_dict().items())
    assert own["log"][-1]["step"] == own["steps"] == 3
    with pytest.raises(TrackkitError, match="classes="):
        weights.load(file)


def test_boxes_and_scores_are_there(folder, own):
    assert own["result"].boxes_xywh.shape == (6, 4)
    assert torch.isfinite(own["result"].boxes_xywh).all()
    assert all(0 <= score.ao <= 1 for score in own["scores"].values())
    assert len(list((folder / "results/mine").rglob("*_001.txt"))) == 2


def test_the_ablation_has_its_rows_and_claims_nothing_of_a_paper(folder, own):
    text = (folder / "ablations/blocks_Mine_tiny_3-steps.md").read_text("utf-8")
    for row in own["rows"]:
        assert re.search(rf"^\| {row.label} +\| \d+\.\d \(2\)", text, re.M)
    assert "blocks (our own): Mine" in text
    for word in ("paper", "Paper", "agrees", "verdict"):
        assert word not in text
    stored = ablations.load(folder / "ablations/blocks_Mine_tiny_3-steps.json")
    assert stored.text() == text and stored.table.rows == own["rows"]
    assert all(math.isfinite(run["loss"]) for run in stored.runs) and len(stored.runs) == 6


def test_another_code_is_another_run(folder, own, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    mine = Path(shutil.copytree(folder / "ablations", tmp_path / "ablations"))
    monkeypatch.setenv("TRACKKIT_GOT10K", str(folder / "GOT-10k"))
    options = {"seeds": 1, "steps": 3, "out": mine, "rows": ("base",), "progress": False}
    before = set((mine / "runs").iterdir())
    ablations.run(own["table"], **options)
    assert set((mine / "runs").iterdir()) == before
    with (folder / "mine.py").open("a") as file:
        file.write("# another line\n")
    ablations.run(own["table"], **options)
    assert len(set((mine / "runs").iterdir()) - before) == 1


def test_one_line_registers_it(folder, own, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TRACKKIT_GOT10K", str(folder / "GOT-10k"))
    [line] = blocks("")
    for name, entry in eval(f"{{{line}}}", dict(own)).items():
        monkeypatch.setitem(weights.TRACKERS, name, entry)
    for command in short(blocks("bash")[0]).splitlines():
        program, *arguments = shlex.split(command)
        assert program == "trackkit" and cli.main(arguments) == 0, command
    assert weights.load(folder / "runs/deeper/tracker.safetensors").config.depth == 3
    assert re.search(r"deeper +\|? *0\.\d", capsys.readouterr().out)


def test_a_class_without_a_file_cannot_be_ablated(tmp_path):
    loose = dataclasses.make_dataclass("Loose", [], bases=(MyTracker.Config,), frozen=True)
    tracker = type("Typed", (MyTracker,), {"__module__": "builtins", "Config": loose})
    with pytest.raises(TrackkitError, match="in no file"):
        ablations.run(Table("t", "", "", tracker, (Row("base", {}),)), out=tmp_path)


def test_rows_with_and_without_a_papers_figure_stand_side_by_side():
    rows = (Row("base", {}, 60.0), Row("ours", {"depth": 1}))
    about = {"test": "t", "train": "t", "stages": "s", "start": "x", "command": "c"}
    result = ablations.Result(Table("t", "a paper", "AO", MyTracker, rows), about, [])
    assert result.rows[1]["verdict"] is None and result.rows[1]["paper_difference"] is None
    assert re.search(r"^\| ours +\| - \(0\) +\| - +\| - +\| - +\| - +\|$", result.text(), re.M)


def test_training_lowers_the_loss():
    """Thirty steps over three batches, and what was learned there helps on a fourth."""
    torch.manual_seed(0)
    tracker = MyTracker(MyTrackerConfig(depth=1, width=32)).train()
    [stage] = tracker.recipe("tiny")
    data = SynthDataset(SynthConfig(), seed=0, length=4)
    *seen, new = batches(Samples(data, stage.sample, 0, 8 * 4), 8, 0, 4)
    before = [tracker.loss(batch)["loss"].item() for batch in (*seen, new)]
    optimizer = torch.optim.AdamW(tracker.parameters(), lr=stage.lr)
    for step in range(30):
        tracker.loss(seen[step % 3])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = [tracker.loss(batch)["loss"].item() for batch in (*seen, new)]
    assert sum(after[:3]) < 0.75 * sum(before[:3]), (before, after)
    assert after[3] < 0.9 * before[3], (before, after)


@pytest.mark.parametrize("changes", [{"depth": -1}, {"width": 40}, {"search_factor": math.nan}])
def test_impossible_numbers_are_refused(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be"):
        MyTrackerConfig(**changes)
