"""The trackers by name, and their weight files: create, save, load."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from trackkit import checkpoints, paths
from trackkit.errors import CheckpointError, TrackkitError, nearest
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

# the one table: what a name means on the command line, in `create`, `load` and `official.load`
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

# these have nothing to learn
UNTRAINED = StayTracker, NccTracker


def known_classes() -> dict[str, type[Tracker]]:
    """The classes that files may be of; some only stand in ablation tables and have no name."""
    return {cls.__name__: cls for cls in (*(cls for cls, _ in TRACKERS.values()), *VARIANTS)}


def create(name: str) -> Tracker:
    """A new tracker with random weights, in evaluation mode; TrackkitError lists the names if there
    is none.
    """
    if name not in TRACKERS:
        raise TrackkitError(_unknown(name))
    cls, config = TRACKERS[name]
    return cls(config).eval()


def _unknown(name: str) -> str:
    near = nearest(name, TRACKERS)
    return f"no tracker is called {name!r}{near}; there are {', '.join(TRACKERS)}"


def shipped(name: str) -> Path | None:
    """The file of weights that comes with trackkit for the tracker called `name`, if there is
    one.
    """
    path = paths.SAMPLES / "weights" / f"{name}.safetensors"
    return path if name.removesuffix("-start") in TRACKERS and path.is_file() else None


def save(tracker: Tracker, path: str | Path, **about) -> None:
    """Write the weights and the config as one safetensors file; `about` is kept beside them
    (JSON).
    """
    checkpoints.write(path, tracker.state_dict(), {**describe(tracker), **about})


def describe(tracker: Tracker) -> dict:
    """Class and config as plain values: what a checkpoint must agree on."""
    return {"tracker": type(tracker).__name__, "config": dataclasses.asdict(tracker.config)}


def load(source: str | Path, classes: Iterable[type[Tracker]] = ()) -> Tracker:
    """A trained tracker, from a file that `save` or `trackkit train` wrote or by its name: then
    with the weights that come with trackkit (`shipped`), or one that needs none, ncc or stay.
    NAME-start has learned for a part of the time only: where a lesson's minute of training begins.
    With float32 weights on the CPU, whatever torch's defaults are.

    `classes` are tracker classes of your own that the file may be of.

    Raises CheckpointError for a file that is damaged, a pickle, or of another tracker or config,
    and for a name without weights: `create` makes trackers with random ones.
    """
    if str(source).removesuffix("-start") in TRACKERS:
        name = str(source)
        if name in TRACKERS and TRACKERS[name][0] in UNTRAINED:
            return create(name)
        source = shipped(name)
        if source is None:
            raise CheckpointError(
                f"no trained weights of {name} come with trackkit: `trackkit train {name}` makes "
                f"some, `trackkit import FILE --tracker {name}` reads its authors'; give the file "
                "that they write (weights.create makes a tracker with random weights)"
            )
    elif not (os.sep in str(source) or Path(source).suffix or Path(source).exists()):
        raise CheckpointError(f"{_unknown(str(source))}; or give a file, tracker.safetensors")
    tensors, about = checkpoints.read(source)
    weights = {
        k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")
    }
    tracker = _fitting(weights or tensors, about, str(source), classes)
    checkpoints.load_strictly(tracker, weights or tensors, str(source))
    return tracker.eval()


def begin(tracker: Tracker, start: str | Path) -> str:
    """Give a tracker those weights of a trained one (a name or a file, see `load`) that have the
    same name and size, and return a digest of all of that one's.

    Raises TrackkitError if none fits, CheckpointError as `load` does.
    """
    own, trained = tracker.state_dict(), load(start).state_dict()
    fits = {k: v for k, v in trained.items() if k in own and own[k].shape == v.shape}
    if not fits:
        raise TrackkitError(f"no weight of {start} fits {type(tracker).__name__}")
    tracker.load_state_dict(own | fits)
    summed = hashlib.sha256()
    for name, value in sorted(trained.items()):
        summed.update(name.encode() + value.numpy().tobytes())
    return summed.hexdigest()[:16]


def _fitting(tensors: dict, about: dict, source: str, classes: Iterable[type[Tracker]]) -> Tracker:
    """A tracker of the class and config that a file says, whose weights have the file's names and
    sizes; its values are still random.
    """
    known = known_classes() | {cls.__name__: cls for cls in classes}
    name, config = about.get("tracker"), about.get("config")
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(
            f"{source}: made for the tracker {_short(name)}; this trackkit has "
            f"{', '.join(known)}. If the class is your own: weights.load(path, classes=(Mine,))"
        )
    cls = known[name]
    fields = {field.name for field in dataclasses.fields(cls.Config)}
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{source}: its config must be fields and values, not {_short(config)}"
        )
    if set(config) != fields:
        odd = ", ".join(_short(key, 40) for key in sorted(set(config) ^ fields)[:5])
        raise CheckpointError(
            f"{source}: its config and this version's differ in {odd}; train again or use the "
            "version that made it"
        )
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        if cls in known_classes().values():
            # without values first: a config of somebody else's may ask for any number of gigabytes
            with torch.device("meta"):
                wanted = cls(cls.Config(**config)).state_dict()
            checkpoints.check_fit(name, {k: v.shape for k, v in wanted.items()}, tensors, source)
        with torch.device("cpu"):
            return cls(cls.Config(**config))
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(
            f"{source}: no {name} can be made with its config ({_short(e, 200, str)}); train again "
            "or copy it anew"
        ) from e
    finally:
        torch.set_default_dtype(before)


def _short(value: Any, most: int = 60, text=repr) -> str:
    """For a message about something that a file says, which may be of any length."""
    shown = text(value).replace("\n", " ")
    return shown if len(shown) <= most else f"{shown[:most]}..."
