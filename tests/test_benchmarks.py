"""The benchmarks that a machine without a GPU can rehearse."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rehearsal(gpu, tmp_path, monkeypatch):
    """The report and the exit code of a quick run."""

    def run() -> tuple[str, int]:
        code = gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path / "report.md")])
        return (tmp_path / "report.md").read_text("utf-8"), code

    monkeypatch.setattr(gpu, "TINY", ("stark-tiny",))
    return run


def test_a_rehearsal_measures_all_parts(gpu, rehearsal):
    report, code = rehearsal()
    assert code == 0 and "FAILED" not in report
    for title in gpu.PARTS:
        part = report.split(f"## {title}\n")[1].split("\n## ")[0]
        assert any(character.isdigit() for character in part), title
        assert "out of time" not in part
    assert "| stark-tiny | 0.0e+00 | 0.0e+00 |" in report


def test_a_disagreement_and_a_fault_are_told_and_the_rest_goes_on(gpu, rehearsal, monkeypatch):
    honest, calls = gpu.answers, []

    def off_on_the_device(*given):
        calls.append(1)
        found, maps = honest(*given)
        wrong = len(calls) % 3 == 2  # the first is the CPU's, the third under bfloat16
        return found + wrong, {k: v + 0.1 * wrong for k, v in maps.items()}

    def broken(*given):
        raise OSError("no disk")
        yield

    parts = {"Agreement": gpu.agreement, "Broken": broken, "Loading": gpu.loading}
    monkeypatch.setattr(gpu, "answers", off_on_the_device)
    monkeypatch.setattr(gpu, "PARTS", parts)
    report, code = rehearsal()
    assert code == 1
    assert "FAILED: AssertionError: these answer otherwise than on the CPU: siamfc-tiny" in report
    assert "FAILED: OSError: no disk" in report
    assert "stark-tiny, crops made by the loader" in report, "the part after them"


def test_what_is_out_of_time_is_left_out(gpu, rehearsal, monkeypatch):
    monkeypatch.setattr(gpu, "BUDGET", 0.0)
    monkeypatch.setattr(gpu, "PARTS", {"Tracking": gpu.tracking, "Training": gpu.throughput})
    report, code = rehearsal()
    assert code == 0 and report.count("not measured: out of time") == 2


def test_a_result_without_a_gpu_needs_another_file(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "RESULTS.md is for what a GPU does" in capsys.readouterr().err
