"""What several test files need; what belongs to the golden files is in `golden`."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from trackkit.sampling import Samples
from trackkit.trackers.base import Prediction, Tracker


def pixels(*shape: int, seed: int = 0) -> Tensor:
    """Random grey levels, uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def variant(tracker: Tracker, **changes) -> Tracker:
    """The same weights, shared, with another config, as far as the other network has them.

    The other is made without values, so a table that is not in a checkpoint would stay empty.
    """
    with torch.device("meta"):
        other = type(tracker)(replace(tracker.config, **changes)).eval()
    weights = tracker.state_dict()
    other.load_state_dict({key: weights[key] for key in other.state_dict()}, assign=True)
    assert not any(table.is_meta for table in other.buffers())
    return other


def tracked(
    tracker: Tracker, images: list[Tensor], boxes_xywh: Tensor, **options
) -> tuple[list, list[Prediction]]:
    """One video in which each row of `boxes_xywh`, (B, 4), is a target: all N states and the N - 1
    predictions.
    """
    count = len(boxes_xywh)
    states, predictions = [tracker.start(images[:1] * count, boxes_xywh)], []
    for image in images[1:]:
        state, prediction = tracker.step(states[-1], [image] * count, **options)
        states.append(state)
        predictions.append(prediction)
    return states, predictions


def gathered(samples: Samples, count: int) -> dict[str, Tensor]:
    """The first samples as one batch."""
    drawn = [samples[i] for i in range(count)]
    return {key: torch.stack([sample[key] for sample in drawn]) for key in drawn[0]}


def instead(monkeypatch, function, substitute) -> None:
    """`substitute` in the place of a function of trackkit, in whatever modules it is known by its
    name: where it stands and who imports it may change.
    """
    name, places = function.__name__, 0
    for module in [m for key, m in sys.modules.items() if key.partition(".")[0] == "trackkit"]:
        if vars(module).get(name) is function:
            monkeypatch.setattr(module, name, substitute)
            places += 1
    assert places, f"nothing of trackkit is called {name}"
