"""Costs: counts against closed forms, kernels that hide from the counter, and the clock."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trackkit import cli, profiling
from trackkit.errors import DataError, TrackkitError
from trackkit.profiling import count, frames_per_second, macs, parameters, profile
from trackkit.trackers import create
from trackkit.trackers.references import NccTracker, StayTracker


def test_siamfc_as_its_specification_counts():
    assert profile("siamfc") == {
        "name": "siamfc",
        "parameters": 2_336_320,
        "macs": 8_167_095_648,
        "paper": {},
    }


def test_a_profile_is_json_and_unknown_names_are_refused():
    found = json.loads(json.dumps(profile("siamfc-tiny")))
    assert set(found) == {"name", "parameters", "macs", "paper"} and 0 < found["parameters"] < 200_000
    with pytest.raises(TrackkitError, match="siamfc-tiny"):
        profile("simfc")


def test_a_tracker_may_count_as_its_paper_does(monkeypatch):
    class Own(StayTracker):
        def profile(self):
            return {"parameters": 1, "macs": 2, "paper": {"parameters": 3}}

    monkeypatch.setattr(profiling, "create", lambda name: Own())
    assert profile("own") == {"name": "own", "parameters": 1, "macs": 2, "paper": {"parameters": 3}}


def test_macs_of_layers():
    x = torch.zeros(2, 6, 9, 9)
    assert macs(lambda: nn.Conv2d(6, 4, 3, groups=2)(x)) == 2 * 49 * 4 * 3 * 9
    assert macs(lambda: nn.Linear(9, 5)(x)) == 2 * 6 * 9 * 9 * 5
    assert macs(lambda: x + x) == 0


def test_attention_is_counted_in_every_guise():
    tokens, width = 10, 64
    expected = 4 * tokens * width * width + 2 * tokens * tokens * width
    x = torch.randn(1, tokens, width)
    attention = nn.MultiheadAttention(width, 4, batch_first=True).eval()
    for weights in (False, True):
        assert macs(lambda w=weights: attention(x, x, x, need_weights=w)) == expected
    layer = nn.TransformerEncoderLayer(width, 4, 128, batch_first=True).eval()  # has the fast path
    assert macs(lambda: layer(x)) == expected + 2 * tokens * width * 128
    q = torch.randn(1, 4, tokens, 16)
    assert macs(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * tokens * tokens * width
    assert torch.backends.mha.get_fastpath_enabled()


def test_parameters_are_not_buffers_and_count_once():
    shared = nn.Linear(3, 4)
    assert parameters(nn.Sequential(shared, shared)) == 16
    assert parameters(nn.BatchNorm2d(5)) == 10


def test_speed_states_its_circumstances():
    speed = frames_per_second(NccTracker(), repeats=4, warm_up=1, batch=2)
    assert speed.fps > 0 and speed.milliseconds > 0
    assert (speed.frames, speed.batch, speed.device, speed.threads) == (4, 2, "cpu", torch.get_num_threads())
    assert "frames/s" in str(speed) and "CPU threads" in str(speed)


def test_warm_up_is_not_timed_and_frames_are_repeated(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(profiling, "now", lambda device: float(next(clock)))
    seen = []

    class Watching(StayTracker):
        def step(self, state, frames, maps=False):
            seen.append(int(frames[0][0, 0, 0]))
            return super().step(state, frames, maps)

    frames = [torch.full((3, 40, 40), k, dtype=torch.uint8) for k in range(3)]
    speed = frames_per_second(Watching(), frames, torch.tensor([5.0, 5, 9, 9]), repeats=4, warm_up=1)
    assert seen == [1, 2, 1, 2, 1]
    assert (speed.fps, speed.milliseconds) == (1.0, 1000.0)


def test_unusable_requests_are_refused():
    frame = torch.zeros(3, 40, 40, dtype=torch.uint8)
    for arguments in (
        {"repeats": 0},
        {"frames": [frame, frame]},
        {"frames": [frame], "box_xywh": torch.ones(4)},
    ):
        with pytest.raises(DataError):
            frames_per_second(StayTracker(), **arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_device_is_named():
    speed = frames_per_second(create("siamfc-tiny").cuda(), repeats=3)
    assert speed.device == torch.cuda.get_device_name()


# STARK's Table 5, and the same numbers to the last digit: convolutions, feed-forward layers and heads, by hand
STARK = {
    "stark-s50": (28_095_554, 23_300_000, 10_500_000_000, 12_261_000_000),
    "stark-st50": (28_227_395, 23_500_000, 10_900_000_000, 13_010_000_000),
    "stark-st101": (47_167_299, 42_400_000, 18_500_000_000, 20_586_000_000),
}


@pytest.mark.parametrize("name", STARK)
def test_stark_costs_what_its_table_5_says(name):
    everything, printed, macs_printed, macs_everything = STARK[name]
    found = profile(name)
    assert found["name"] == name and found["paper"] == {"parameters": printed, "macs": macs_printed}
    assert found["parameters"] == everything - 4_737_024 - 15_872 - 256  # attention, layer norms, query
    assert abs(found["parameters"] - printed) <= 50_000
    assert abs(found["macs"] - macs_printed) <= 50_000_000
    tokens = 464 if name == "stark-s50" else 528
    backbone = 14_265_548_800 if name == "stark-st101" else 6_689_587_200
    feedforward = 2 * 256 * 2048 * 6 * (tokens + 1)
    score = 0 if name == "stark-s50" else 2 * 256 * 256 + 256
    assert found["macs"] == backbone + 104_857_600 + feedforward + 781_542_400 + score + 400 * 256  # the last: similarity
    plain = count(create(name))
    assert plain["parameters"] == everything
    assert plain["macs"] == pytest.approx(macs_everything, abs=1_000_000), "with attention"


def test_profile_of_stark_on_the_command_line(capsys):
    assert cli.main(["profile", "stark-st50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == profile("stark-st50")
    assert cli.main(["profile", "stark-tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["paper"] == {}
