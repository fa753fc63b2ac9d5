"""Tracking results as text files in the layout of the GOT-10k server, and the archive that is
uploaded.

    FOLDER/.trackkit.json                  which tracker these are the results of
    FOLDER/<sequence>/<sequence>_001.txt   N lines left,top,width,height; line 1 is the given box
    FOLDER/<sequence>/<sequence>_time.txt  N lines, seconds per frame
    FOLDER/<sequence>/.trackkit.json       digests of the two, and of what was tracked

Written by the rules of the toolkit (got-10k/toolkit, experiments/got10k.py): commas, 3 and 8
decimals.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trackkit.errors import DataError
from trackkit.labels import read_text
from trackkit.paths import atomic_write, expanded

MARKER = ".trackkit.json"


def claim(folder: str | os.PathLike, tracker: str, identity: str) -> Path:
    """Make `folder` the results folder of one tracker and return it; call it before a run starts.

    `tracker` is its name, `identity` a string that changes when its results would (a hash of
    configuration and weights). Both are kept in `.trackkit.json`.

    Raises DataError when the folder belongs to another tracker or holds files of unknown origin.
    """
    folder = expanded(folder)
    mine = {"tracker": tracker, "identity": identity}
    marker = folder / MARKER
    if not os.path.isfile(marker):
        if os.path.isdir(folder) and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise DataError(
                f"{folder} has files but no {MARKER}, so their tracker is unknown; choose another "
                "folder"
            )
        with atomic_write(marker) as partial:
            partial.write_text(json.dumps(mine, indent=1) + "\n", "utf-8")
        return folder
    found = _owner(folder)
    if found != mine:
        raise DataError(
            f"{folder} holds results of {found['tracker']} ({found['identity']}), not of {tracker} "
            f"({identity}); "
            "choose another folder, or remove this one to run again"
        )
    return folder


def write_results(
    folder: str | os.PathLike,
    sequence: str,
    boxes_xywh: Tensor,
    seconds: Tensor,
    tracker: str,
    identity: str,
    data: str = "",
) -> None:
    """Write the boxes (N, 4), in pixels, and seconds (N,) of one sequence; the first box is the
    given one. `data` says what they were computed on (`Sequence.fingerprint`).

    The folder is claimed for the tracker first. All files are atomic, and a seal with their digest
    comes last, so `has_results` is True only for a sequence that is complete.

    Raises DataError for a folder of another tracker, wrong shapes, or numbers that are not finite.
    """
    boxes, seconds = (
        torch.as_tensor(boxes_xywh).double().cpu(),
        torch.as_tensor(seconds).double().cpu(),
    )
    if boxes.ndim != 2 or boxes.shape[1] != 4 or seconds.shape != boxes.shape[:1]:
        shapes = f"{tuple(boxes.shape)} and {tuple(seconds.shape)}"
        raise DataError(
            f"results of {sequence}: expected boxes (N, 4) and seconds (N,), got {shapes}"
        )
    if not (torch.isfinite(boxes).all() and torch.isfinite(seconds).all()):
        bad = int((~torch.isfinite(boxes).all(1) | ~torch.isfinite(seconds)).nonzero()[0])
        raise DataError(
            f"results of {sequence}: frame {bad} is not finite; the tracker has diverged"
        )
    boxes_file, times_file = _files(claim(folder, tracker, identity), sequence)
    with atomic_write(boxes_file) as partial:
        np.savetxt(partial, boxes.numpy(), fmt="%.3f", delimiter=",", newline="\n")
    with atomic_write(times_file) as partial:
        np.savetxt(partial, seconds.numpy(), fmt="%.8f", delimiter=",", newline="\n")
    seal = {
        "data": data,
        "digest": _digest(boxes_file.parents[len(Path(sequence).parts)], sequence),
    }
    with atomic_write(boxes_file.parent / MARKER) as partial:
        partial.write_text(json.dumps(seal) + "\n", "utf-8")


def has_results(folder: str | os.PathLike, sequence: str, data: str = "") -> bool:
    """Whether the results of a sequence are complete and as they were written, so that a run that
    was cut off can go on.

    `data` is what they must have been computed on, see `write_results`; where it has changed, or
    the files have, a warning says that the sequence is tracked again.
    """
    folder = expanded(folder)
    seal = folder / sequence / MARKER
    if not all(os.path.isfile(file) for file in (*_files(folder, sequence), seal)):
        return False
    try:
        found = json.loads(seal.read_text("utf-8"))
        changed = "the data have" if found["data"] != data else "the result files have"
        if found["data"] == data and found["digest"] == _digest(folder, sequence):
            return True
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        changed = f"{seal} has"
    text = f"{sequence}: {changed} changed since it was tracked; it is tracked again"
    warnings.warn(text, stacklevel=2)
    return False


def read_results(
    folder: str | os.PathLike, sequence: str, frames: int | None = None
) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4), pixels, and seconds (N,) of one sequence, float64.

    Reads what `write_results` or the toolkit wrote. Raises DataError, with file and line, for a
    missing or damaged file, or when there are not `frames` rows.
    """
    boxes_file, times_file = _files(expanded(folder), sequence)
    boxes, seconds = _rows(boxes_file, 4), _rows(times_file, 1)
    frames = len(boxes) if frames is None else frames
    for file, rows in ((boxes_file, boxes), (times_file, seconds)):
        if len(rows) != frames:
            raise DataError(f"{file}: {len(rows)} lines for {frames} frames; run the tracker again")
    return boxes, seconds[:, 0]


def submission_zip(folder: str | os.PathLike, dataset, out: str | os.PathLike) -> Path:
    """Check the results of all sequences of `dataset` and pack them for the GOT-10k server; returns
    `out`.

    The sequence folders lie at the top of the archive. Server pages stay empty without a message
    when a file is missing, short or separated by blanks (got-10k/toolkit issues 21 and 74), so all
    of that is checked here.

    Raises DataError that lists what is wrong, before anything is written.
    """
    folder, out = expanded(folder), expanded(out)
    problems, files = [], []
    for sequence in dataset:
        try:
            read_results(folder, sequence.name, len(sequence))
            _check_seal(folder, sequence.name)
            files += _files(folder, sequence.name)
        except DataError as error:
            problems.append(f"  {error}")
    if problems:
        shown = problems[:20] + [f"  and {len(problems) - 20} more"] * (len(problems) > 20)
        raise DataError(
            f"{folder} is not ready to submit, {len(problems)} of {len(dataset)} sequences are "
            "missing or damaged:\n" + "\n".join(shown)
        )
    with (
        atomic_write(out) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for file in files:  # a fixed date, so that the same results give the same bytes
            info = zipfile.ZipInfo(file.relative_to(folder).as_posix(), (1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, file.read_bytes())
    return out


def _files(folder: Path, sequence: str) -> tuple[Path, Path]:
    """Of a sequence by its listed name, which may be a path such as cam1/clip."""
    name = Path(sequence).name
    return folder / sequence / f"{name}_001.txt", folder / sequence / f"{name}_time.txt"


def _check_seal(folder: Path, sequence: str) -> None:
    """Raise DataError if the files of a sequence are not as `write_results` left them; those of
    other tools have no seal.
    """
    seal = folder / sequence / MARKER
    try:
        same = json.loads(seal.read_text("utf-8"))["digest"] == _digest(folder, sequence)
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        same = False
    if not same:
        raise DataError(f"{seal.parent}: changed since it was tracked; run the tracker again")


def _digest(folder: Path, sequence: str) -> str:
    """Of the two files of a sequence."""
    digest = hashlib.sha256()
    for file in _files(folder, sequence):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _owner(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / MARKER).read_text("utf-8"))
        return {"tracker": found["tracker"], "identity": found["identity"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{folder / MARKER} is damaged; remove it together with the results beside it"
        ) from error


def _rows(path: Path, columns: int) -> Tensor:
    if not os.path.isfile(path):
        raise DataError(f"{path} is missing; run the tracker on this sequence")
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            row = [float(value) for value in line.split(",")]
        except ValueError:
            row = []
        # further columns of a time file are further runs (toolkit); the first run counts
        if not (len(row) == columns or columns == 1 < len(row)) or not np.isfinite(row).all():
            raise DataError(
                f"{path}, line {number}: expected {columns} numbers separated by commas, found "
                f"{line!r}"
            )
        rows.append(row[:columns])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, columns)
