"""The authors' checkpoints: read without running anything in them, renamed to our entries, loaded
strictly.

    tracker = official.load("siamfc", official.read("siamfc_alexnet_e50.pth"))

A tracker that agrees with `tests/goldens` computes what the authors' code computes with the same
weights.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trackkit import checkpoints, pickles
from trackkit.errors import CheckpointError
from trackkit.trackers.base import Tracker
from trackkit.trackers.mixvit import MixViT
from trackkit.trackers.ostrack import OSTrack
from trackkit.trackers.sbt import SBT
from trackkit.trackers.sbt_backbone import pvt_name
from trackkit.trackers.siamfc import SiamFC
from trackkit.trackers.stark import STARK
from trackkit.trackers.stmtrack import STMTrack
from trackkit.weights import TRACKERS, create

# under which training loops keep the weights
WRAPPERS = ("net", "model", "state_dict", "model_state_dict")


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of an authors' checkpoint (`torch.save`), by the authors' names.

    Files that hold the weights under "net", "model", "state_dict" or "model_state_dict" are
    understood. Nothing in the file is executed: objects beside the weights (settings, statistics)
    are not made, see `trackkit.pickles`. A number with a dotted name is an entry without
    dimensions; others, such as an epoch or a best score, are left out like the rest of a training
    loop's notes.

    Raises CheckpointError if the file is missing or damaged, or has no tensors.
    """
    content = _unwrapped(pickles.read(path))
    if isinstance(content, pickles.StandIn):
        raise CheckpointError(
            f"{path}: a whole object, {content.name}, which would have to be made by the authors' "
            "code; in a place that has it, load the object and save its state_dict()"
        )
    entries = content.items() if isinstance(content, Mapping) else ()
    named = {str(key): value for key, value in entries}
    tensors = {
        k: _tensor(k, v)
        for k, v in named.items()
        if isinstance(v, Tensor) or (isinstance(v, (int, float, np.generic)) and "." in k)
    }
    if not tensors:
        raise CheckpointError(f"{path}: no tensors in it; expected a state dict")
    return tensors


def load(name: str, state_dict: Mapping[str, Any]) -> Tracker:
    """The tracker called `name` (`weights.TRACKERS`) with the authors' weights, in evaluation
    mode.

    Half precision becomes float32; numbers and arrays become tensors; the "module." that
    DataParallel puts before names is dropped.

    Raises CheckpointError that names the first entries that are missing, not expected, given twice
    or of another size, by our names and the authors', and the trackers that the checkpoint does
    fit.
    """
    state_dict = _unwrapped(state_dict)
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            f"expected the entries of a checkpoint by name, got {type(state_dict).__name__}; "
            "official.read(path) gives them"
        )
    wanted, tensors = (
        _shapes(name),
        {str(key): _tensor(key, value) for key, value in state_dict.items()},
    )
    names = _names(name, tensors)
    found = {ours: tensors[theirs[0]] for ours, theirs in names.items()}
    # frozen norms do not count batches, and nothing that tracks reads the count
    counts = (key for key in wanted.keys() - found.keys() if key.endswith(".num_batches_tracked"))
    counts = (key for key in counts if key.replace("num_batches_tracked", "running_mean") in found)
    found |= {key: torch.tensor(0) for key in counts}

    def note(ours: str) -> str:
        theirs = names[ours][0] if ours in names else _authors_name(name, ours, names)
        return "" if theirs in (None, ours) else f" (the authors' {theirs})"

    twice = {
        ours: f"{ours} (by {' and by '.join(theirs)})"
        for ours, theirs in names.items()
        if len(theirs) > 1
    }
    problems = checkpoints.differences(wanted, found, note)
    problems += [checkpoints.listed("given twice", list(twice), texts=twice)] if twice else []
    if problems:
        raise CheckpointError(
            f"the checkpoint for {name} does not fit it; "
            f"{'; '.join(problems)}{_advice(name, tensors)}"
        )
    tracker = create(name)
    tracker.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in found.items()}
    )
    return tracker


def _unwrapped(content: Any) -> Any:
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return content


def _tensor(key: str, value: Any) -> Tensor:
    if isinstance(value, (Tensor, int, float, np.generic, np.ndarray)) and not isinstance(
        value, (np.object_, np.flexible)
    ):
        try:
            return torch.as_tensor(value)
        except TypeError as error:
            raise CheckpointError(
                f"entry {key} is an array of {value.dtype}, not of numbers"
            ) from error
    raise CheckpointError(
        f"entry {key} is a {type(value).__name__}, not a tensor; official.read leaves aside what "
        "is no weight"
    )


def left_out(name: str, state_dict: Mapping[str, Any]) -> list[str]:
    """Which entries `load` does not use, as "pattern: how many", for a message."""
    keys = [str(key).removeprefix("module.") for key in _unwrapped(state_dict)]
    counts = {pattern: len(fnmatch.filter(keys, pattern)) for pattern in renaming(name).unused}
    return [f"{pattern}: {count}" for pattern, count in counts.items() if count]


# ---- which trackers fit ----


@cache
def _shapes(name: str) -> dict[str, torch.Size]:
    with torch.device("meta"):  # shapes only: the largest would need gigabytes
        return {key: value.shape for key, value in create(name).state_dict().items()}


def _advice(name: str, tensors: dict[str, Tensor]) -> str:
    """The other trackers that all entries fit, or if there is none the one that most of them
    fit.
    """
    misfits = {other: _misfits(other, tensors) for other in TRACKERS if _shapes(other)}
    fits = [other for other, count in misfits.items() if count == 0 and other != name]
    if fits:
        return f"; it fits {' and '.join(fits)}"
    nearest = min(misfits, key=lambda other: (misfits[other], other != name)) if misfits else name
    if nearest != name and misfits[nearest] < len(tensors) / 2:
        return (
            f"; it fits no tracker, but {nearest} best, all but {misfits[nearest]} of the entries"
        )
    return ""


def _misfits(name: str, tensors: dict[str, Tensor]) -> int:
    """How many entries are missing, extra, given twice or of another size."""
    wanted, names = _shapes(name), _names(name, tensors)
    twice = sum(len(theirs) - 1 for theirs in names.values())
    return (
        twice
        + len(wanted.keys() ^ names.keys())
        + sum(tensors[names[k][0]].shape != wanted[k] for k in wanted.keys() & names.keys())
    )


def _authors_name(name: str, ours: str, names: dict[str, list[str]]) -> str | None:
    """What the authors call an entry that is missing, by the example of entries beside it; None if
    those do not tell.
    """
    for depth in range(ours.count("."), 0, -1):
        parent = ".".join(ours.split(".")[:depth]) + "."
        for sibling, (theirs, *_) in names.items():
            rest = sibling.removeprefix(parent)
            if rest != sibling and theirs.endswith(rest):
                guess = theirs.removesuffix(rest) + ours.removeprefix(parent)
                if rename(name, guess.removeprefix("module.")) == ours:
                    return guess
    return None


# ---- our names for the authors' entries, by tracker class ----


@dataclass(frozen=True)
class Renaming:
    """How the entries of an authors' checkpoint become ours.

    `rules` are (pattern, replacement) pairs for `re.sub`, applied in this order; `unused` are the
    entries (`fnmatch`) that the authors' networks keep and never use.
    """

    rules: tuple[tuple[str, Any], ...] = ()
    unused: tuple[str, ...] = ()


def _corner(match: re.Match) -> str:
    """`box_head.conv3_tl...` -> `box_head.top_left.2...`"""
    number, which, rest = match.groups()
    side = "top_left" if which == "tl" else "bottom_right"
    return f"box_head.{side}.{int(number) - 1}{rest}"


def _centre(match: re.Match) -> str:
    """`box_head.conv3_ctr...` -> `head.score.2...`"""
    number, which, rest = match.groups()
    return f"head.{'score' if which == 'ctr' else which}.{int(number) - 1}{rest}"


def _pyramid(match: re.Match) -> str:
    """`box_head.adjust1_tl...` -> `box_head.top_left.adjust1...`"""
    layer, which, rest = match.groups()
    return f"box_head.{'top_left' if which == 'tl' else 'bottom_right'}.{layer}{rest}"


VIT = (
    (r"backbone\.patch_embed\.proj\.", "embed."),
    (r"backbone\.pos_embed_", "position_"),
    (r"backbone\.", ""),
)
VIT_UNUSED = ("backbone.cls_token", "backbone.pos_embed")  # inherited from timm

RENAMINGS: dict[type[Tracker], Renaming] = {
    SiamFC: Renaming(),  # has the authors' names
    STARK: Renaming(
        (
            (r"backbone\.0\.body\.", "backbone."),
            (r"backbone\.1\.row_embed\.", "position.row."),
            (r"backbone\.1\.col_embed\.", "position.column."),
            (r"transformer\.", ""),
            (r"\.multihead_attn\.", ".cross_attn."),
            (r"query_embed\.", "query."),
            (r"cls_head\.", "score_head."),
            (r"^box_head\.conv(\d)_(tl|br)(.*)$", _corner),
        )
    ),
    SBT: Renaming(
        (
            (r"^.*$", lambda match: pvt_name(match[0])),
            (r"box_head\.class_head\.", "class_head."),
            (r"box_head\.bbox_head\.", "box_head."),
            (r"layers_spatial\.", "spatial."),
            (r"layers_channle\.", "channel."),
        ),
        ("backbone.norm1.*", "backbone.norm2.*"),  # of the single-image form
    ),
    OSTrack: Renaming((*VIT, (r"^box_head\.conv(\d)_(ctr|offset|size)(.*)$", _centre)), VIT_UNUSED),
    MixViT: Renaming(
        (*VIT, (r"^box_head\.(conv\d|adjust\d)_(tl|br)(.*)$", _pyramid)),
        # the score branch is of a second training stage
        (*VIT_UNUSED, "backbone.norm.*", "backbone.head.*", "score_branch.*"),
    ),
    STMTrack: Renaming(
        (
            (r"^head\.si$", "head.scale"),
            (r"^head\.bi$", "head.shift"),
            (r"^basemodel_m\.proj_fg_bg_label_map\.", "memory.label."),
            (r"^basemodel_m\.", "memory.trunk."),
            (r"^basemodel_q\.", "query.trunk."),
            (r"^neck_m\.adjustor\.", "memory.neck."),
            (r"^neck_q\.adjustor\.", "query.neck."),
            (r"^head\.cls_ctr\.", "head.score_tower."),
            (r"^head\.reg\.", "head.side_tower."),
            (r"^head\.cls_score\.", "head.score."),
            (r"^head\.ctr_score\.", "head.centre."),
            (r"^head\.reg_offsets\.", "head.sides."),
            (r"(_tower\.)conv1\.", r"\g<1>0."),
            (r"(_tower\.)conv_layers\.(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}"),
            (r"^(head\.(?:score|centre|sides))\.conv\.", r"\1.0."),
            (r"^(head\.(?:score|centre|sides))\.bn\.", r"\1.1."),
        ),
        # adjusters of the framework's Siamese head
        ("r_z_k.*", "c_z_k.*", "r_x.*", "c_x.*"),
    ),
}


def renaming(name: str) -> Renaming:
    """That of the tracker's class, or of the ancestor that its weights are of."""
    return next(
        (RENAMINGS[cls] for cls in TRACKERS[name][0].__mro__ if cls in RENAMINGS), Renaming()
    )


def rename(name: str, key: str) -> str:
    """Our name for an entry of the authors' checkpoint."""
    for pattern, replacement in renaming(name).rules:
        key = re.sub(pattern, replacement, key)
    return key


def _names(name: str, keys: Iterable[str]) -> dict[str, list[str]]:
    """Our name of each entry -> the authors' names that stand for it, one if all is well; without
    entries that nothing uses.
    """
    names: dict[str, list[str]] = {}
    for theirs in keys:
        plain = theirs.removeprefix("module.")
        if not any(fnmatch.fnmatchcase(plain, pattern) for pattern in renaming(name).unused):
            names.setdefault(rename(name, plain), []).append(theirs)
    return names
