"""Ablation tables: they fit their trackers, nothing is trained twice, interruptions lose nothing,
the numbers are right.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import instead

from trackkit import ablations, cli, weights
from trackkit.ablations import TABLES, Result, Row, Table, load, run
from trackkit.errors import DataError, TrackkitError
from trackkit.paths import SAMPLES
from trackkit.synth import SynthConfig, SynthDataset, write_dataset
from trackkit.trackers.siamfc import SiamFC, SiamFCConfig
from trackkit.training import _groups, train

ROOT = Path(__file__).parent.parent
TOY = Table(
    "toy",
    "a paper, Table 1",
    "success",
    "siamfc-tiny",
    (
        Row("base", {}, 60.0),
        Row("no window", {"window_influence": 0.0}, 55.0),
        Row("one scale", {"scales": 1}, 61.0),
    ),
)
OTHER = dataclasses.replace(
    TOY, name="other", rows=(Row("ours", {}, 50.0), Row("one scale", {"scales": 1}, 49.0))
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """GOT-10k in very small."""
    root = tmp_path_factory.mktemp("data") / "GOT-10k"
    for split, count in (("train", 3), ("val", 2)):
        write_dataset(
            root,
            split,
            SynthDataset(
                SynthConfig(frames=6, width=160, height=120, split=split), seed=1, length=count
            ),
        )
    return root


def small(table, out, data, **options) -> Result:
    return run(
        table,
        **{"seeds": 2, "steps": 2, "out": out, "data": data, "device": "cpu", "progress": False}
        | options,
    )


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The toy table in one go."""
    out = tmp_path_factory.mktemp("whole")
    return small(TOY, out, data), out


def figures(result: Result) -> list[tuple]:
    return [(r["row"], r["seed"], r["ao"], r["loss"]) for r in result.runs]


@pytest.fixture
def trained(monkeypatch):
    """Names of the run folders that were handed to `train`, in order."""
    names, honest = [], train

    def noted(tracker, stages, sequences, folder, **options):
        names.append(folder.name)
        return honest(tracker, stages, sequences, folder, **options)

    instead(monkeypatch, train, noted)
    return names


# ---- the tables ----


@pytest.mark.parametrize(
    ("table", "row"),
    [(t, r) for t in TABLES.values() for r in t.rows],
    ids=lambda v: getattr(v, "label", None) or v.name,
)
def test_every_row_builds_and_its_stages_fit_it(table, row):
    for scale in ("tiny", "laptop", "gpu", "paper"):
        tracker, stages = table.build(row, scale)
        assert {key: getattr(tracker.config, key) for key in row.changes} == row.changes
        assert stages and all(_groups(tracker, stage) for stage in stages)


def test_rows_are_different_and_begin_with_the_base():
    for name, table in TABLES.items():
        assert table.name == name and table.rows[0].changes == {}
        assert len({str(table.build(row, "tiny")[0].config) for row in table.rows}) == len(
            table.rows
        )


def test_figures_agree_with_the_papers_text():
    """Section 4.4 says how much the rows of Table 7 lose, apart from the first."""
    losses = {row.label: round(66.4 - row.paper, 1) for row in TABLES["stark-table7"].rows}
    assert losses == {
        "base": 0,
        "template as query": 5.2,
        "Hungarian": 2.7,
        "updated query": 1.6,
        "joint": 3.9,
    }
    assert [row.paper for row in TABLES["stark-table6"].rows] == [
        66.4,
        61.1,
        64.5,
        66.2,
        63.7,
        64.5,
    ]


def test_changes_must_be_fields_of_the_config(tmp_path, data):
    wrong = dataclasses.replace(
        TOY, rows=(*TOY.rows, Row("no encoder", {"encoder_layers": 0}, 1.0))
    )
    with pytest.raises(
        TrackkitError,
        match=r"toy, no encoder: siamfc-tiny has no encoder_layers, only exemplar_size",
    ):
        small(wrong, tmp_path, data)
    assert not (tmp_path / "runs").exists(), "told before anything is trained"


# ---- the numbers ----


def made_up(**ao: list[list[float]]) -> Result:
    """Rows -> seeds -> AO of each video."""
    about = {
        "command": "trackkit ablate toy",
        "stages": "pairs 2 steps of 16",
        "train": "a",
        "test": "b",
        "start": "stark-tiny",
        "files": "toy",
    }
    rest = {"machine": "m", "trackkit": "0", "samples_per_second": 9.0}
    return Result(
        TOY,
        about,
        [
            {"row": k.replace("_", " "), "seed": s, "ao": sum(v) / len(v), **rest}
            | {"videos": {f"v{i}": one for i, one in enumerate(v)}}
            for k, vs in ao.items()
            for s, v in enumerate(vs)
        ],
    )


def test_rows_are_compared_video_by_video_and_seed_by_seed():
    base, window, scale = made_up(
        base=[[0.2, 0.8], [0.3, 0.9]],
        no_window=[[0.1, 0.6], [0.2, 0.7]],
        one_scale=[[0.3, 0.9], [0.2, 0.8]],
    ).rows
    assert base["mean"] == pytest.approx(55) and base["ao"] == pytest.approx({0: 50, 1: 60})
    assert (base["difference"], base["error"], base["verdict"]) == (None, None, "-")
    # -10 on one video, -20 on the other, in both seeds
    assert window["difference"] == pytest.approx(-15)
    assert window["by_video"] == pytest.approx(5) and window["by_seed"] == pytest.approx(0)
    assert window["error"] == pytest.approx(5) and window["verdict"] == "agrees"
    assert window["paper_difference"] == -5.0
    # +10 with one seed, -10 with the other, on both videos
    assert scale["difference"] == pytest.approx(0) and scale["by_seed"] == pytest.approx(10)
    assert scale["by_video"] == pytest.approx(0) and scale["verdict"] == "cannot be told"


def test_both_errors_count():
    window = made_up(base=[[0.5, 0.5]] * 2, no_window=[[0.3, 0.5], [0.4, 0.6]]).rows[1]
    errors = window["by_video"], window["by_seed"]
    assert errors == pytest.approx((10, 5)) and window["error"] == pytest.approx(125**0.5)


@pytest.mark.parametrize(
    ("change", "verdict"), [(0.1, "disagrees"), (-0.1, "agrees"), (0.001, "cannot be told")]
)
def test_verdicts(change, verdict):
    base = [[0.5, 0.6, 0.7]]
    row = [[0.5 + change, 0.61 + change, 0.7 + change]]
    assert made_up(base=base, no_window=row).rows[1]["verdict"] == verdict


def test_one_seed_and_no_runs():
    _, window, scale = made_up(base=[[0.5, 0.5]], no_window=[[0.5, 0.6]]).rows
    assert window["by_seed"] is None and window["error"] == window["by_video"]
    assert (scale["mean"], scale["difference"], scale["verdict"]) == (None, None, "-")
    text = made_up(one_scale=[[0.6], [0.4]]).text()
    assert "| one scale | 50.0 (2)   | -  " in text and "| base      | - (0)  " in text


def test_rows_without_a_papers_figure():
    rows = (*TOY.rows[:2], Row("ours", {"scales": 5}))
    made = made_up(base=[[0.5, 0.6]] * 2, no_window=[[0.4, 0.5]] * 2, ours=[[0.6, 0.6], [0.6, 0.6]])
    own = dataclasses.replace(made, table=dataclasses.replace(TOY, rows=rows))
    *_, window, ours = own.rows
    assert window["verdict"] == "agrees" and ours["difference"] == pytest.approx(5)
    assert (ours["paper"], ours["paper_difference"], ours["verdict"]) == (None, None, None)
    bare = tuple(dataclasses.replace(row, paper=None) for row in rows)
    text = dataclasses.replace(made, table=dataclasses.replace(TOY, rows=bare)).text()
    assert "| ours      | 60.0 (2)   | +5.0 ± 5.0         |\n" in text


def test_a_variant_must_be_of_the_tables_tracker(tmp_path, data):
    wrong = dataclasses.replace(TOY, rows=(*TOY.rows, Row("joint", {}, variant="STARKJoint")))
    with pytest.raises(TrackkitError, match="toy, joint: STARKJoint is no siamfc-tiny"):
        small(wrong, tmp_path, data)


def test_text_is_a_markdown_table_that_says_what_it_is():
    text = made_up(base=[[0.50, 0.60]] * 2, no_window=[[0.48, 0.57]] * 2).text()
    assert "| base      | 55.0 (2)   | -                  | 60.0  | -  " in text
    assert "| no window | 52.5 (2)   | -2.5 ± 0.5         | 55.0  | -5.0  " in text
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1
    for said in (
        "seeds 0, 1",
        "± its standard error",
        "from stark-tiny",
        "pairs 2 steps of 16",
        "directions, not sizes",
        "trackkit ablate toy",
    ):
        assert said in text


# ---- where rows start ----


def test_rows_start_from_the_same_trained_weights(tmp_path):
    torch.manual_seed(5)
    weights.save(SiamFC(SiamFCConfig.tiny()), tmp_path / "start.safetensors")
    table = dataclasses.replace(TOY, start=str(tmp_path / "start.safetensors"))
    trained = weights.load(tmp_path / "start.safetensors").state_dict()
    for row in TOY.rows:
        for seed in (0, 1):
            tracker, _ = table.build(row, "tiny", seed=seed)
            assert all(torch.equal(v, trained[k]) for k, v in tracker.state_dict().items())


def test_what_the_start_does_not_have_is_the_seeds():
    table = TABLES["stark-table6"]
    row = next(row for row in table.rows if row.label == "MLP head")
    shipped = weights.load("stark-tiny").state_dict()
    a, b = (table.build(row, "tiny", seed=seed)[0].state_dict() for seed in (0, 1))
    assert all(torch.equal(a[k], shipped[k]) for k in a.keys() & shipped.keys())
    new = [key for key in a.keys() - shipped.keys() if a[key].ndim > 1]
    assert new and not any(torch.equal(a[key], b[key]) for key in new)


def test_a_start_that_does_not_fit_is_refused(tmp_path, data):
    with pytest.raises(TrackkitError, match="no weight of ostrack-tiny fits SiamFC"):
        small(TOY, tmp_path, data, start="ostrack-tiny")


def test_another_start_is_another_run(whole, data, tmp_path):
    torch.manual_seed(5)
    weights.save(SiamFC(SiamFCConfig.tiny()), tmp_path / "start.safetensors")
    options = {"start": tmp_path / "start.safetensors", "seeds": 1, "rows": ("one scale",)}
    result = small(TOY, tmp_path, data, **options)
    assert {r["folder"] for r in result.runs}.isdisjoint(r["folder"] for r in whole[0].runs)
    assert "--start=" in result.about["command"] and "from random" not in result.text()


# ---- running ----


def test_all_rows_of_a_seed_before_the_next_and_files_after_each_run(
    tmp_path, data, monkeypatch, whole
):
    seen, honest = [], ablations._write

    def spied(*arguments):
        result = honest(*arguments)
        assert load(tmp_path / "toy_siamfc-tiny_tiny_2-steps.json") == result
        seen.append([(r["row"], r["seed"]) for r in result.runs])
        return result

    monkeypatch.setattr(ablations, "_write", spied)
    result = small(TOY, tmp_path, data)
    order = [(row.label, seed) for seed in (0, 1) for row in TOY.rows]
    assert seen == [order[: n + 1] for n in range(6)] + [order]
    assert figures(result) == figures(whole[0])
    assert (tmp_path / "toy_siamfc-tiny_tiny_2-steps.md").read_text() == result.text()


def test_json_holds_everything(whole):
    result, out = whole
    values = json.loads((out / "toy_siamfc-tiny_tiny_2-steps.json").read_text())
    assert set(values) == {"table", "about", "runs", "rows"}
    # other tests add seeds to this table
    told = r"trackkit ablate toy --seeds=\d --scale=tiny --steps=2 --data="
    assert re.match(told, values["about"]["command"])
    one = values["runs"][1]
    assert (
        one["row"] == "no window"
        and one["changes"] == {"window_influence": 0.0}
        and one["samples_per_second"] > 0
    )
    assert (
        "1 thread(s)" in one["machine"] and torch.__version__ in one["machine"] and one["trackkit"]
    )
    assert (
        values["rows"][1]["mean"] == result.rows[1]["mean"]
        and values["rows"][1]["verdict"] == result.rows[1]["verdict"]
    )
    config = weights.load(out / "runs" / one["folder"] / "tracker.safetensors").config
    assert config.window_influence == 0.0


def test_nothing_is_trained_twice(whole, data, trained):
    result, out = whole
    assert figures(small(TOY, out, data)) == figures(result) and trained == []
    other = small(OTHER, out, data)
    assert trained == [] and [r["ao"] for r in other.runs] == [
        r["ao"] for r in result.runs if r["row"] != "no window"
    ]
    small(TOY, out, data, seeds=3, rows=("one scale",))
    assert [name.split("-")[2] for name in trained] == ["2", "2"], (
        "the base and the row, of the new seed"
    )
    assert (
        sum(r["row"] == "no window" for r in load(out / "toy_siamfc-tiny_tiny_2-steps.json").runs)
        == 2
    )


def test_the_base_is_what_trackkit_train_makes(whole, data, tmp_path):
    arguments = [
        "train",
        "siamfc-tiny",
        "--steps",
        "2",
        "--data",
        data,
        "--seed",
        "1",
        "--out",
        tmp_path,
        "--device",
        "cpu",
    ]
    assert cli.main([str(a) for a in arguments]) == 0
    folder = next(r["folder"] for r in whole[0].runs if (r["row"], r["seed"]) == ("base", 1))
    mine, other = (
        weights.load(p / "tracker.safetensors").state_dict()
        for p in (whole[1] / "runs" / folder, tmp_path)
    )
    assert all(torch.equal(mine[key], other[key]) for key in other)


def test_side_by_side_gives_the_same_numbers(tmp_path, data, whole):
    assert figures(small(TOY, tmp_path, data, jobs=2, seeds=1)) == figures(whole[0])[:3]


class Hopeless(SiamFC):
    """Does not learn if its window is half of the score."""

    def __init__(self, config: SiamFCConfig = SiamFCConfig.tiny()):
        super().__init__(config)

    def loss(self, batch, kind=""):
        bad = self.config.window_influence == 0.5
        return {key: v * torch.nan if bad else v for key, v in super().loss(batch, kind).items()}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_is_named(tmp_path, data, jobs):
    rows = TOY.rows[0], Row("bad", {"window_influence": 0.5}, 1.0)
    nan = dataclasses.replace(TOY, tracker=Hopeless, rows=rows)
    with pytest.raises(TrackkitError, match=r"bad, seed 0: the loss is nan.*--rows"):
        small(nan, tmp_path, data, jobs=jobs)


def test_a_row_out_of_range_is_named(tmp_path, data):
    odd = dataclasses.replace(TOY, rows=(TOY.rows[0], Row("odd", {"scales": -1}, 1.0)))
    with pytest.raises(TrackkitError, match="odd: scales must be at least 1"):
        small(odd, tmp_path, data)


def test_mistakes(tmp_path, data):
    for options, message in (
        ({"rows": ("no encoder",)}, "no row 'no encoder'; it has base, no window"),
        ({"jobs": 0}, "at least 1"),
        ({"jobs": 2, "backend": "abacus"}, "--backend abacus: "),
    ):
        with pytest.raises(TrackkitError, match=message):
            small(TOY, tmp_path, data, **options)
    for text in ("", "[]", "{}", '{"table": {"rows": []}}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DataError, match=r"x.json: not the result"):
            load(tmp_path / "x.json")
    with pytest.raises(DataError, match=r"nowhere.json"):
        load(tmp_path / "nowhere.json")


# ---- interruptions ----

CODE = """
import os, signal, sys, torch
from pathlib import Path
import test_ablations as t
from trackkit import ablations
if __name__ == "__main__":
    torch.set_num_threads(1)
    out, data = map(Path, sys.argv[1:])
"""


def start(tmp_path, data, code: str) -> subprocess.Popen:
    (tmp_path / "job.py").write_text(CODE + code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "out"), str(data)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a signal of unix")
def test_killed_table_continues(tmp_path, data, whole, trained):
    """Killed while the third run is evaluated: two are done, the third is only evaluated."""
    code = """
    honest, count = ablations.evaluate, iter(range(9))
    def deadly(*given):
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*given)
    ablations.evaluate = deadly
    t.small(t.TOY, out, data)
"""
    process = start(tmp_path, data, code)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == -signal.SIGKILL, output
    assert len(load(tmp_path / "out" / "toy_siamfc-tiny_tiny_2-steps.json").runs) == 2
    third = tmp_path / "out" / "runs" / whole[0].runs[2]["folder"]
    before = (
        (third / "state.safetensors").stat().st_mtime_ns,
        (third / "tracker.safetensors").stat().st_mtime_ns,
    )
    assert figures(small(TOY, tmp_path / "out", data)) == figures(whole[0])
    assert trained == [r["folder"] for r in whole[0].runs[2:]]
    assert (third / "tracker.safetensors").stat().st_mtime_ns == before[1] and not (
        third / "state.safetensors"
    ).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of unix")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_kill_stop_all_processes(tmp_path, data, how):
    """The pipe of the output is closed when the last process that could write to it has ended."""
    process = start(tmp_path, data, "    t.small(t.TOY, out, data, jobs=2, steps=1_000_000)\n")
    deadline = time.monotonic() + 600  # on a crowded machine
    while len(list((tmp_path / "out").glob("runs/*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)  # both train
    process.send_signal(how)
    output = process.communicate(timeout=300)[0]
    assert ("KeyboardInterrupt" in output) == (how == signal.SIGINT) and process.returncode != 0, (
        output
    )


@pytest.mark.parametrize("name", ["stark-table1", "stark-table6", "stark-table7"])
def test_results_that_come_with_trackkit(name):
    result = load(SAMPLES / "ablations" / f"{name}.json")
    assert result.table == TABLES[name] and {row["label"] for row in result.rows} == {
        row.label for row in TABLES[name].rows
    }
    assert all(len(row["ao"]) >= 2 for row in result.rows), (
        "run the command in data_samples/ablations/README.md to the end"
    )
