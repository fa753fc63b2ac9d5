"""What the tiny trackers start from: where each piece of the target has gone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from trackkit import training, weights
from trackkit.backbones import SmallNet, normalise
from trackkit.errors import CheckpointError
from trackkit.paths import SAMPLES
from trackkit.sampling import Samples
from trackkit.stages import shortened
from trackkit.synth import SynthConfig, SynthDataset
from trackkit.trackers.matching import Matching, relative
from trackkit.weights import create

FILE = SAMPLES / "weights" / "matching-tiny.safetensors"


@pytest.fixture(scope="module")
def batch():
    videos = SynthDataset(SynthConfig(frames=12), seed=3, length=20)
    samples = Samples(videos, Matching().samples(), 0, 3)
    return default_collate([samples[i] for i in range(3)])


def test_the_loss_is_its_definition(batch):
    """Piece by piece: minus the logarithm of the shares of the four cells around the place."""
    network = Matching().eval()
    z = network.features(batch["templates"][:, 0])  # (3, 36, 64)
    x = network.features(batch["searches"].flatten(0, 1)).unflatten(0, (3, 2))  # (3, 2, 144, 64)
    scale, losses = network.log_scale.exp(), []
    for i in range(3):
        old = batch["template_boxes"][i, 0]
        for cell in range(36):
            place = torch.tensor([(cell % 6 + 0.5) / 6, (cell // 6 + 0.5) / 6])
            across = (place - old[:2]) / old[2:]
            if across.abs().max() >= 0.5:
                continue
            alike = scale * x @ z[i, cell]  # (3, 2, 144)
            others = torch.cat([alike[j].flatten() for j in range(3) if j != i])
            for n in range(2):
                new = batch["search_boxes"][i, n]
                column, row = ((new[:2] + across * new[2:]) * 12 - 0.5).tolist()
                if not (0 < column < 11 and 0 < row < 11):
                    continue
                every = alike[i, n].exp().sum() + others.exp().sum() / 4
                for c in (math.floor(column), math.floor(column) + 1):
                    for r in (math.floor(row), math.floor(row) + 1):
                        share = (1 - abs(column - c)) * (1 - abs(row - r))
                        losses.append(-share * (alike[i, n, 12 * r + c].exp() / every).log())
    assert len(losses) > 100
    expected = sum(losses) / (len(losses) / 4)
    assert network.loss(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_pieces_are_counted_from_the_middle_of_the_box():
    across = relative(torch.tensor([[0.5, 0.25, 0.5, 0.5]]), 4)[0]
    assert torch.allclose(across[0], torch.tensor([-0.75, -0.25]))
    assert torch.allclose(across[1], torch.tensor([-0.25, -0.25]))  # row by row
    assert torch.allclose(across[4], torch.tensor([-0.75, 0.25]))


def test_it_learns(tmp_path):
    videos = SynthDataset(SynthConfig(frames=12), seed=3, length=20)
    stages = shortened(Matching().recipe("tiny"), 30)
    network = Matching()
    log = training.train(network, stages, videos, tmp_path, log_steps=5, progress=False)
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    again = weights.load(tmp_path / "tracker.safetensors", classes=(Matching,))
    assert torch.equal(again.project.weight, network.project.weight)


def test_the_shipped_features_are_what_trackers_start_from(batch):
    shipped, tracker = weights.load(FILE, classes=(Matching,)), create("ostrack-tiny")
    assert shipped.loss(batch)["loss"] < Matching().eval().loss(batch)["loss"] - 2
    assert tracker.load_pretrained()
    crops = normalise(batch["searches"].flatten(0, 1))
    with torch.no_grad():
        mine, theirs = tracker.embed(crops), shipped.norm(shipped.project(shipped.net(crops)))
    assert torch.allclose(mine, theirs, atol=1e-3)
    assert mine.mean().abs() < 0.3 and 0.6 < mine.std() < 1.6
    with pytest.raises(CheckpointError):
        SmallNet().load_pretrained(nn.Conv2d(64, 32, 1))
