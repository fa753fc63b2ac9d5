"""A bar on a terminal, a line now and then elsewhere, closed before an error is printed."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from trackkit import cli, progress
from trackkit.progress import bar
from trackkit.synth import SynthConfig, SynthDataset
from trackkit.tracking import track_many
from trackkit.weights import create


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_whole_lines_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0)
    with bar(total=3, desc="work", unit="step") as shown:
        for _ in range(3):
            shown.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"work: {i} of 3 steps" for i in range(4)]


def test_a_short_job_writes_nothing_to_a_file(capsys):
    with bar(range(1000), desc="work", unit="step") as shown:
        for _ in shown:
            shown.set_postfix(refresh=False, loss="0.1")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with bar(range(3), desc="work") as shown:
        list(shown)
    assert "\r" in sys.stderr.getvalue() and "100%" in sys.stderr.getvalue()


@pytest.mark.parametrize("where", [True, False], ids=["terminal", "file"])
def test_bars_are_closed_before_an_error_is_printed(where, monkeypatch, tmp_path):
    """A damaged frame in the middle of `track`: the message has a line of its own, and is last."""
    monkeypatch.setattr(progress, "SECONDS", 0)
    monkeypatch.setattr(sys, "stderr", Terminal() if where else io.StringIO())
    for i in range(3):
        Image.fromarray(np.full((40, 60, 3), 50 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    arguments = ["track", str(tmp_path), "--box", "5,5,9,9", "--tracker", "ncc"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    *before, last = sys.stderr.getvalue().rstrip("\n").split("\n")
    assert before and last.startswith("trackkit track: ") and "2.png" in last


def test_a_consumer_that_gives_up_closes_the_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    videos = SynthDataset(SynthConfig(frames=4, width=64, height=48), seed=0, length=2)
    found = track_many(create("stay"), videos, batch=1, progress=True)
    next(found)
    found.close()
    assert sys.stderr.getvalue().endswith("\n")
