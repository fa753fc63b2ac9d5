"""The authors' checkpoints: read without running anything in them, renamed to our entries, loaded strictly.

    tracker = official.load("siamfc", official.read("siamfc_alexnet_e50.pth"))

A tracker that agrees with `tests/goldens` computes what the authors' code computes with the same weights.
"""
from __future__ import annotations

import fnmatch
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from trackkit import checkpoints
from trackkit.errors import CheckpointError
from trackkit.pretraining import pvt_name
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
    renamed = {key: value.float() if value.is_floating_point() else value for key, value in _translated(name, state_dict).items()}
    try:
        checkpoints.load_strictly(tracker, renamed, f"the checkpoint for {name}")
    except CheckpointError as error:
        fits = [other for other in TRACKERS if other != name and _fits(other, state_dict)]
        hint = f"; it fits {' and '.join(fits)}" if fits else ""
        raise CheckpointError(f"{error}{hint}") from error
    return tracker


STARK = (
    ("backbone.0.body.", "backbone."),
    ("backbone.1.row_embed.", "position.row."),
    ("backbone.1.col_embed.", "position.column."),
    ("transformer.", ""),
    (".multihead_attn.", ".cross_attn."),
    ("query_embed.", "query."),
    ("cls_head.", "score_head."),
)

SBT = (  # and `pretraining.pvt_name` for the backbone
    ("box_head.class_head.", "class_head."),
    ("box_head.bbox_head.", "box_head."),
    ("layers_spatial.", "spatial."),
    ("layers_channle.", "channel."),
)
OSTRACK = (
    ("backbone.patch_embed.proj.", "embed."),
    ("backbone.pos_embed_", "position_"),
    ("backbone.", ""),
)
STMTRACK = (
    ("head.si", "head.scale"),
    ("head.bi", "head.shift"),
    ("basemodel_m.proj_fg_bg_label_map.", "memory.label."),
    ("basemodel_m.", "memory.trunk."),
    ("basemodel_q.", "query.trunk."),
    ("neck_m.adjustor.", "memory.neck."),
    ("neck_q.adjustor.", "query.neck."),
    ("head.cls_ctr.", "head.score_tower."),
    ("head.reg.", "head.side_tower."),
    ("head.cls_score.", "head.score."),
    ("head.ctr_score.", "head.centre."),
    ("head.reg_offsets.", "head.sides."),
)
UNUSED = {  # entries of the authors' checkpoints that their networks never use, by the beginning of the tracker's name
    "sbt": ("backbone.norm1.*", "backbone.norm2.*"),  # of the single-image form
    "ostrack": ("backbone.cls_token", "backbone.pos_embed"),
    "procontext": ("backbone.cls_token", "backbone.pos_embed"),
    "stmtrack": ("r_z_k.*", "c_z_k.*", "r_x.*", "c_x.*"),  # adjusters of the framework's Siamese head
    # what its transformer inherits from timm, and the score branch of a second training stage
    **dict.fromkeys(("mixvit", "ustam"), ("backbone.cls_token", "backbone.pos_embed", "backbone.norm.*", "backbone.head.*", "score_branch.*")),
}


def rename(name: str, key: str) -> str:
    """Our name for an entry of the authors' checkpoint. Our SiamFC has the authors' names."""
    if name.startswith("stark"):
        for theirs, ours in STARK:
            key = key.replace(theirs, ours)
        corner = re.fullmatch(r"box_head\.conv(\d)_(tl|br)(.*)", key)
        if corner:
            number, which, rest = corner.groups()
            key = f"box_head.{'top_left' if which == 'tl' else 'bottom_right'}.{int(number) - 1}{rest}"
    if name.startswith("sbt"):
        key = pvt_name(key)
        for theirs, ours in SBT:
            key = key.replace(theirs, ours)
    if name.startswith(("ostrack", "procontext")):
        for theirs, ours in OSTRACK:
            key = key.replace(theirs, ours)
        tower = re.fullmatch(r"box_head\.conv(\d)_(ctr|offset|size)(.*)", key)
        if tower:
            number, which, rest = tower.groups()
            key = f"head.{'score' if which == 'ctr' else which}.{int(number) - 1}{rest}"
    if name.startswith(("mixvit", "ustam")):
        for theirs, ours in OSTRACK:
            key = key.replace(theirs, ours)
        tower = re.fullmatch(r"box_head\.(conv\d|adjust\d)_(tl|br)(.*)", key)
        if tower:
            layer, which, rest = tower.groups()
            key = f"box_head.{'top_left' if which == 'tl' else 'bottom_right'}.{layer}{rest}"
    if name == "stmtrack":
        for theirs, ours in STMTRACK:
            key = ours + key.removeprefix(theirs) if key.startswith(theirs) else key
        if "_tower." in key:
            layers = re.compile(r"conv_layers\.(\d+)")
            key = layers.sub(lambda match: str(int(match[1]) + 1), key.replace("conv1.", "0."))
        elif key.startswith(("head.score.", "head.centre.", "head.sides.")):
            key = key.replace(".conv.", ".0.").replace(".bn.", ".1.")
    return key


def _translated(name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries by our names, without those that nothing uses; these may be missing."""
    unused = [pattern for family, patterns in UNUSED.items() if name.startswith(family) for pattern in patterns]
    return {rename(name, k): v for k, v in state_dict.items() if not any(fnmatch.fnmatchcase(k, p) for p in unused)}


def _fits(name: str, state_dict: dict[str, Tensor]) -> bool:
    with torch.device("meta"):  # shapes only: the largest would need gigabytes
        wanted = {k: v.shape for k, v in create(name).state_dict().items()}
    return wanted == {k: v.shape for k, v in _translated(name, state_dict).items()}
