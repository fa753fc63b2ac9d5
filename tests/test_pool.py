"""The pool of procedural videos for training: whole, the same whoever makes it."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from trackkit import cli, sampling, synth
from trackkit.errors import DataError
from trackkit.got10k import GOT10k
from trackkit.synth import SynthConfig, SynthDataset
from trackkit.synth import pool as pools


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKKIT_HOME", str(tmp_path))
    monkeypatch.setattr(pools, "FRAMES", 4)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_it_is_the_same_with_any_number_of_processes_and_after_an_interruption():
    made = pools.pool(3, processes=1)
    first = contents(made.folder)
    assert len(made) == 3 and len(first) == 1 + 3 * (4 + 5)
    (made.folder / "list.txt").unlink()
    for path in sorted((made.folder / made.names[1]).iterdir()):
        path.unlink()
    (made.folder / made.names[1]).rmdir()
    assert contents(pools.pool(3, processes=2).folder) == first


def test_it_is_made_once_and_larger_ones_begin_alike(monkeypatch):
    small = pools.pool(2, processes=1)
    monkeypatch.setattr(pools, "_record", None)
    again = pools.pool(2)
    assert again.identity == small.identity
    monkeypatch.undo()


def test_videos_are_those_of_the_stream_recorded():
    made = pools.pool(2, processes=1)
    drawn = SynthDataset(SynthConfig(frames=4, **pools.WORLD), seed=0, length=2)
    for index in range(2):
        kept, fresh = made[index], drawn[index]
        assert kept.name == fresh.name and kept.attributes == fresh.attributes
        # four decimals in a file
        assert torch.allclose(kept.boxes_xywh, fresh.boxes_xywh.double(), atol=1e-4)
        assert torch.equal(kept.cover, fresh.cover) and torch.equal(kept.absent, fresh.absent)
        difference = (kept.frame(2).float() - fresh.frame(2).float()).abs().mean()
        assert 0 < difference < 20


def test_of_two_at_once_one_writes_and_one_waits():
    with ThreadPoolExecutor(2) as both:  # a lock of its own for each call, as in two processes
        first, second = both.map(lambda _: pools.pool(2, processes=1), range(2))
    assert first.identity == second.identity and len(first) == 2
    with pytest.raises(DataError, match="needs a video"):
        pools.pool(0)


def test_enlarged_is_softer_and_as_large():
    frame = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    assert pools.enlarged(frame, 1.0) is frame
    soft = pools.enlarged(frame, 2.0)
    assert soft.shape == frame.shape and soft.dtype == torch.uint8
    assert soft.float().std() < 0.7 * frame.float().std()
    assert abs(float(soft.float().mean() - frame.float().mean())) < 1
    plain = torch.full((3, 61, 83), 77, dtype=torch.uint8)
    assert torch.equal(pools.enlarged(plain, 3.0), plain)


def test_the_command_makes_one_and_needs_a_place_for_anything_else(capsys):
    assert cli.main(["synth", "--pool", "1"]) == 0
    assert f"synth-{pools.EDITION}-0-1: 1 videos" in capsys.readouterr().out
    assert cli.main(["synth"]) == 1 and "name the folder" in capsys.readouterr().err
    assert cli.main(["synth", "--pool", "0"]) == 1 and "--pool must be" in capsys.readouterr().err


def test_held_out_videos_are_further_ones_of_each_kind(monkeypatch):
    monkeypatch.setattr(synth, "SAMPLE_FRAMES", 3)
    made = pools.held_out(2, processes=1)
    assert len(made) == 26
    assert {made[i].attributes for i in range(26)} >= {("occlusion",), ("fast",)}
    assert not set(made.names) & set(GOT10k(None, "val").names)
    assert made[0].boxes_xywh.ne(made[1].boxes_xywh).any()


def test_tiny_trainings_read_it(monkeypatch):
    monkeypatch.delenv("TRACKKIT_GOT10K", raising=False)
    monkeypatch.setattr(sampling, "pool", lambda: pools.pool(2, processes=1))
    assert isinstance(sampling.training_set(), GOT10k)
    assert isinstance(sampling.training_set("stream", 3), SynthDataset)
