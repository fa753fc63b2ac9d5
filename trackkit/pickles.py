"""Files of torch.save from elsewhere, which are pickles: their tensors and numbers are read, and
nothing in them is executed.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import (
    add_safe_globals,
    clear_safe_globals,
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
)

from trackkit.errors import CheckpointError


def read(path: str | Path, within: tuple[str, ...] = ()) -> Any:
    """What a file of torch.save holds: tensors on the CPU, numbers (NumPy's too), strings, and
    plain containers of these.

    Raises CheckpointError if the file is missing or damaged, or if it holds anything else: then it
    says what, and how to get at the tensors. `within` are keys under which those may be, which
    helps to say how.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        # by handle: from a path, torch goes by the suffix
        with path.open("rb") as file, _numbers_allowed(), warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what damaged bytes lead to cannot be foreseen
        refused = _refused(path, error)
        if refused:
            raise CheckpointError(_how_to_extract(path, refused, within)) from error
        raise CheckpointError(
            f"{path}: damaged or not a torch checkpoint as torch.save writes it by default "
            f"({_reason(error)})"
        ) from error


class _NumberType:
    """Stands in for numpy.dtype while a file is read. It knows types of numbers only, so no file
    reaches NumPy's own unpickling.
    """

    CODES = frozenset({"b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"})

    def __init__(self, code: str, *_: bool):
        if code not in self.CODES:
            raise ValueError(f"a NumPy value of the type {code!r} is no number")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")


def _number(kind: _NumberType, data: bytes) -> np.generic:
    """Stands in for NumPy's function that rebuilds a scalar."""
    return np.frombuffer(data, kind.order + kind.code).reshape(())[()]


@contextmanager
def _numbers_allowed() -> Iterator[None]:
    """Inside it torch rebuilds tensors and NumPy's numbers and nothing else, whatever the program
    has allowed before.

    The authors' training loops keep best scores as NumPy scalars, which torch alone refuses. NumPy
    1 and 2 name them differently.
    """
    before = get_safe_globals()
    clear_safe_globals()
    add_safe_globals(
        [
            (_NumberType, "numpy.dtype"),
            *((_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        ]
    )
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def _refused(path: Path, error: Exception) -> list[str]:
    """Full names of the classes and functions in a file that are neither tensors nor numbers, found
    without running anything.
    """
    if not isinstance(error, pickle.UnpicklingError):
        return []
    named = re.findall(r"GLOBAL ([\w.]+)", str(error))
    if named and zipfile.is_zipfile(path):  # the error names one of them
        with path.open("rb") as file, _numbers_allowed(), suppress(Exception):  # damaged behind it
            named = sorted(get_unsafe_globals_in_checkpoint(file)) or named
    # they may hold anything, and end on a terminal
    return [re.sub(r"[^\w.]", "?", name) for name in named]


def _reason(error: Exception) -> str:
    """What is wrong, without torch's advice to load the file all the same."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    return re.split(r"\.? In PyTorch 2\.6|\n", text.strip())[0] or type(error).__name__


def _how_to_extract(path: Path, refused: list[str], within: tuple[str, ...]) -> str:
    key = next((f"[{text!r}]" for text in _strings(path) if text in within), "")
    more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
    command = (
        f"torch.save(torch.load({path.name!r}, map_location='cpu', "
        f"weights_only=False){key}, "
        "'weights.pth')"
    )
    return (
        f"{path}: holds objects other than tensors ({', '.join(refused[:4])}{more}). Rebuilding "
        "them can run any code, so nothing was loaded. "
        "If you trust where the file is from, take the tensors out in a separate environment that "
        "has the authors' code "
        f"(best a container without network and without your data): {command} and read weights.pth "
        "here. "
        "If what you save is a whole network, save its state_dict()"
    )


def _strings(path: Path) -> Iterator[str]:
    """The strings that are pickled in a torch file, in order; read only as far as the file is
    sound.
    """
    with path.open("rb") as file, suppress(Exception):  # a hint is all this is for
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(file) as parts:
                pickles = [
                    parts.read(name) for name in parts.namelist() if name.endswith("data.pkl")
                ]
        else:
            # before torch 1.6: a magic number, a version, facts about the machine, the content
            pickles = [file] * 4
        for one in pickles:
            yield from (arg for _, arg, _ in pickletools.genops(one) if isinstance(arg, str))
