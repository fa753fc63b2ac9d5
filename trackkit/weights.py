"""The trackers by name, and their weight files: create, save, load."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trackkit import checkpoints
from trackkit.errors import CheckpointError, TrackkitError
from trackkit.trackers.base import Tracker
from trackkit.trackers.dastm import DASTM, DASTMConfig
from trackkit.trackers.mixvit import MixViT, MixViTConfig
from trackkit.trackers.ostrack import OSTrack, OSTrackConfig
from trackkit.trackers.procontext import ProContEXT, ProContEXTConfig
from trackkit.trackers.references import NccConfig, NccTracker, StayConfig, StayTracker
from trackkit.trackers.sbt import SBT, SBTConfig
from trackkit.trackers.siamfc import SiamFC, SiamFCConfig
from trackkit.trackers.siamfc_ca import SiamFCCA, SiamFCCAConfig
from trackkit.trackers.stark import STARK, STARKConfig
from trackkit.trackers.stark_ca import STARKCA, STARKCAConfig
from trackkit.trackers.stark_variants import VARIANTS
from trackkit.trackers.stmtrack import STMTrack, STMTrackConfig
from trackkit.trackers.ustam import USTAM, USTAMConfig

# the one table: what a name means on the command line, in `create` and in `official.load`
TRACKERS: dict[str, tuple[type[Tracker], Any]] = {
    "stay": (StayTracker, StayConfig()),
    "ncc": (NccTracker, NccConfig()),
    "siamfc": (SiamFC, SiamFCConfig()),
    "siamfc-tiny": (SiamFC, SiamFCConfig.tiny()),
    "stark-s50": (STARK, STARKConfig.s50()),
    "stark-st50": (STARK, STARKConfig.st50()),
    "stark-st101": (STARK, STARKConfig.st101()),
    "stark-tiny": (STARK, STARKConfig.tiny()),
    "sbt-light": (SBT, SBTConfig.light()),
    "sbt-small": (SBT, SBTConfig.small()),
    "sbt-base": (SBT, SBTConfig.base()),
    "sbt-large": (SBT, SBTConfig.large()),
    "sbt-tiny": (SBT, SBTConfig.tiny()),
    "siamfc-ca": (SiamFCCA, SiamFCCAConfig()),
    "stark-ca": (STARKCA, STARKCAConfig()),
    "ostrack-256": (OSTrack, OSTrackConfig.ostrack_256()),
    "ostrack-384": (OSTrack, OSTrackConfig.ostrack_384()),
    "ostrack-tiny": (OSTrack, OSTrackConfig.tiny()),
    "procontext-256": (ProContEXT, ProContEXTConfig.procontext_256()),
    "procontext-384": (ProContEXT, ProContEXTConfig.procontext_384()),
    "procontext-tiny": (ProContEXT, ProContEXTConfig.tiny()),
    "stmtrack": (STMTrack, STMTrackConfig()),
    "stmtrack-tiny": (STMTrack, STMTrackConfig.tiny()),
    "sastm": (DASTM, DASTMConfig.sastm()),
    "dastm": (DASTM, DASTMConfig()),
    "dastm-tiny": (DASTM, DASTMConfig.tiny()),
    "mixvit-b288": (MixViT, MixViTConfig.b288()),
    "mixvit-l384": (MixViT, MixViTConfig.l384()),
    "mixvit-tiny": (MixViT, MixViTConfig.tiny()),
    "ustam-b288": (USTAM, USTAMConfig.b288()),
    "ustam-b384": (USTAM, USTAMConfig.b384()),
    "ustam-l384": (USTAM, USTAMConfig.l384()),
    "ustam-tiny": (USTAM, USTAMConfig.tiny()),
}


def known_classes() -> dict[str, type[Tracker]]:
    """The classes that files may be of; some only stand in ablation tables and have no name."""
    return {cls.__name__: cls for cls in (*(cls for cls, _ in TRACKERS.values()), *VARIANTS)}


def create(name: str) -> Tracker:
    """A new tracker with random weights, in evaluation mode; TrackkitError lists the names if there
    is none.
    """
    if name not in TRACKERS:
        raise TrackkitError(f"no tracker is called {name!r}; there are {', '.join(TRACKERS)}")
    cls, config = TRACKERS[name]
    return cls(config).eval()


def save(tracker: Tracker, path: str | Path, **about) -> None:
    """Write the weights and the config as one safetensors file; `about` is kept beside them
    (JSON).
    """
    checkpoints.write(path, tracker.state_dict(), {**describe(tracker), **about})


def describe(tracker: Tracker) -> dict:
    """Class and config as plain values: what a checkpoint must agree on."""
    return {"tracker": type(tracker).__name__, "config": dataclasses.asdict(tracker.config)}


def load(source: str | Path, classes: Iterable[type[Tracker]] = ()) -> Tracker:
    """A tracker from its name (`TRACKERS`) or from a file that `save` or `trackkit train` wrote.

    `classes` are tracker classes of your own that the file may be of.

    Raises CheckpointError for a file that is damaged, a pickle, or of another tracker or config.
    """
    if str(source) in TRACKERS:
        return create(str(source))
    tensors, about = checkpoints.read(source)
    known = known_classes() | {cls.__name__: cls for cls in classes}
    if about.get("tracker") not in known:
        raise CheckpointError(
            f"{source}: made for the tracker {about.get('tracker')!r}; this trackkit has "
            f"{', '.join(known)}. If the class is your own: weights.load(path, classes=(Mine,))"
        )
    cls = known[about["tracker"]]
    fields = {field.name for field in dataclasses.fields(cls.Config)}
    config = about.get("config", {})
    if set(config) != fields:
        odd = ", ".join(sorted(set(config) ^ fields))
        raise CheckpointError(
            f"{source}: its config and this version's differ in {odd}; train again or use the "
            "version that made it"
        )
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    tracker = cls(cls.Config(**config))
    weights = {
        k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")
    }
    checkpoints.load_strictly(tracker, weights or tensors, str(source))
    return tracker.eval()
