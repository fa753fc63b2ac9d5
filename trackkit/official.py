"""The authors' checkpoints: read without running anything in them, renamed to our entries, loaded strictly.

    tracker = official.load("siamfc", official.read("siamfc_alexnet_e50.pth"))

A tracker that agrees with `tests/goldens` computes what the authors' code computes with the same weights.
"""
from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from trackkit import checkpoints
from trackkit.errors import CheckpointError
from trackkit.trackers import TRACKERS, Tracker, create


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of an authors' checkpoint (`torch.save`), by the authors' names.

    Files that hold the weights under "net", "model" or "state_dict" are understood. Only tensors and plain
    containers are read; nothing in the file is executed.

    Raises CheckpointError if the file is missing, damaged, or holds other pickled objects.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with path.open("rb") as file:  # by handle: from a path, torch goes by the suffix
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds objects other than tensors, so it was not loaded ({str(error).splitlines()[0]}). In an environment that you trust, "
            "with the authors' code, save its state dict alone: torch.save(checkpoint['net'], 'weights.pth')"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a torch checkpoint ({str(error).splitlines()[0]})") from error
    for key in ("net", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path}: no tensors in it; expected a state dict")
    return tensors


def load(name: str, state_dict: dict[str, Tensor]) -> Tracker:
    """The tracker called `name` (`trackers.TRACKERS`) with the authors' weights, in evaluation mode.

    Raises CheckpointError that names the first entries that are missing, not expected or of another size.
    """
    tracker = create(name)
    renamed = {rename(name, key): value.float() if value.is_floating_point() else value for key, value in state_dict.items()}
    try:
        checkpoints.load_strictly(tracker, renamed, f"the checkpoint for {name}")
    except CheckpointError as error:
        fits = [other for other in TRACKERS if other != name and _fits(other, state_dict)]
        hint = f"; it fits {' and '.join(fits)}" if fits else ""
        raise CheckpointError(f"{error}{hint}") from error
    return tracker


def rename(name: str, key: str) -> str:
    """Our name for an entry of the authors' checkpoint. Our SiamFC has the authors' names."""
    return key


def _fits(name: str, state_dict: dict[str, Tensor]) -> bool:
    wanted = {k: v.shape for k, v in create(name).state_dict().items()}
    return wanted == {rename(name, k): v.shape for k, v in state_dict.items()}
