"""The trackers by name, and their weight files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from trackkit import checkpoints
from trackkit.errors import CheckpointError, TrackkitError
from trackkit.trackers.base import Prediction, Tracker, join, take
from trackkit.trackers.dastm import DASTM, DASTMConfig
from trackkit.trackers.procontext import ProContext, ProContextConfig
from trackkit.trackers.references import NccTracker, StayTracker
from trackkit.trackers.sbt import SBT, SBTConfig
from trackkit.trackers.siamfc import SiamFC, SiamFCConfig
from trackkit.trackers.siamfc_ca import SiamFCCA
from trackkit.trackers.stark import Stark, StarkConfig
from trackkit.trackers.ustam import Ustam, UstamConfig

__all__ = ["TRACKERS", "Prediction", "Tracker", "create", "join", "load", "save", "take"]

TRACKERS: dict[str, Callable[[], Tracker]] = {
    "stay": StayTracker,
    "ncc": NccTracker,
    "siamfc": SiamFC,
    "siamfc-tiny": lambda: SiamFC(SiamFCConfig.tiny()),
    "stark-s50": lambda: Stark(StarkConfig.s50()),
    "stark-st50": lambda: Stark(StarkConfig.st50()),
    "stark-st101": lambda: Stark(StarkConfig.st101()),
    "stark-tiny": lambda: Stark(StarkConfig.tiny()),
    "sbt-light": lambda: SBT(SBTConfig.light()),
    "sbt-small": lambda: SBT(SBTConfig.small()),
    "sbt-base": lambda: SBT(SBTConfig.base()),
    "sbt-large": lambda: SBT(SBTConfig.large()),
    "sbt-tiny": lambda: SBT(SBTConfig.tiny()),
    "siamfc-ca": SiamFCCA,
    "stark-ca": lambda: Stark(StarkConfig.s50(backbone="sbt-small")),
    "ostrack-256": lambda: ProContext(ProContextConfig.ostrack_256()),
    "ostrack-384": lambda: ProContext(ProContextConfig.ostrack_384()),
    "procontext-256": lambda: ProContext(ProContextConfig.procontext_256()),
    "procontext-384": lambda: ProContext(ProContextConfig.procontext_384()),
    "procontext-tiny": lambda: ProContext(ProContextConfig.tiny()),
    "stmtrack": lambda: DASTM(DASTMConfig.stmtrack()),
    "sastm": lambda: DASTM(DASTMConfig.sastm()),
    "dastm": lambda: DASTM(DASTMConfig.dastm()),
    "dastm-tiny": lambda: DASTM(DASTMConfig.tiny()),
    "mixvit-b288": lambda: Ustam(UstamConfig.mixvit_b288()),
    "mixvit-l384": lambda: Ustam(UstamConfig.mixvit_l384()),
    "ustam-b288": lambda: Ustam(UstamConfig.ustam_b288()),
    "ustam-b384": lambda: Ustam(UstamConfig.ustam_b384()),
    "ustam-l384": lambda: Ustam(UstamConfig.ustam_l384()),
    "ustam-tiny": lambda: Ustam(UstamConfig.tiny()),
}


def create(name: str) -> Tracker:
    """A new tracker with random weights, in evaluation mode; TrackkitError lists the names if there
    is none.
    """
    if name not in TRACKERS:
        raise TrackkitError(f"no tracker is called {name!r}; there are {', '.join(TRACKERS)}")
    return TRACKERS[name]().eval()


def save(tracker: Tracker, path: str | Path, **about) -> None:
    """Write the weights and the config as one safetensors file; `about` is kept beside them (JSON)."""
    checkpoints.write(path, tracker.state_dict(), {**describe(tracker), **about})


def describe(tracker: Tracker) -> dict:
    """Class and config as plain values: what a checkpoint must agree on."""
    return {"tracker": type(tracker).__name__, "config": dataclasses.asdict(tracker.config)}


def load(source: str | Path) -> Tracker:
    """A tracker from its name (`TRACKERS`) or from a file that `save` or `trackkit train` wrote.

    Raises CheckpointError for a file that is damaged, a pickle, or of another tracker or config.
    """
    if str(source) in TRACKERS:
        return create(str(source))
    tensors, about = checkpoints.read(source)
    classes = {
        cls.__name__: cls for cls in (SiamFC, SiamFCCA, Stark, SBT, ProContext, DASTM, Ustam)
    }
    if about.get("tracker") not in classes:
        raise CheckpointError(
            f"{source}: made for the tracker {about.get('tracker')!r}; this trackkit has "
            f"{', '.join(classes)}"
        )
    cls = classes[about["tracker"]]
    known = {field.name for field in dataclasses.fields(cls.Config)}
    config = about.get("config", {})
    if set(config) != known:
        odd = ", ".join(sorted(set(config) ^ known))
        raise CheckpointError(
            f"{source}: its config and this version's differ in {odd}; train again or use the "
            "version that made it"
        )
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    tracker = cls(cls.Config(**config))
    weights = {
        k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")
    } or tensors
    checkpoints.load_strictly(tracker, weights, str(source))
    return tracker.eval()
