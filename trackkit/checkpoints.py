"""Files of weights: safetensors with a description, written whole or not at all, never a pickle."""
from __future__ import annotations

import json
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from trackkit.errors import CheckpointError
from trackkit.paths import atomic_write

FORMAT = 1


def write(path: str | Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Write tensors and a description (anything JSON holds) as one safetensors file, atomically."""
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    metadata = {"trackkit": json.dumps({"format": FORMAT, **about})}
    with atomic_write(path) as partial:
        partial.write_bytes(serialize(contiguous, metadata))  # save_file would make a private file of its own


def read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors (on the CPU) and description of a file that `write` made.

    Raises CheckpointError if the file is missing, cut short, not safetensors (a pickle is recognised and never
    opened as one) or made by a newer trackkit.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; `trackkit train` makes one")
    with path.open("rb") as file:
        head = file.read(9)
    # safetensors begins with the length of its header in 8 bytes, then "{"; torch.save with PK or a pickle opcode
    if head[:2] == b"PK" or (head[:1] == b"\x80" and head[8:] != b"{"):
        raise CheckpointError(
            f"{path}: a pickle (as torch.save writes it), not safetensors; it was not opened, because loading a pickle "
            "runs code. For an authors' checkpoint use trackkit.official"
        )
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error}); train again or copy it anew") from error
    if "trackkit" not in metadata:
        raise CheckpointError(f"{path}: safetensors, but not made by trackkit; for an authors' checkpoint use trackkit.official")
    about = json.loads(metadata["trackkit"])
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {about.get('format')}, this trackkit reads {FORMAT}; update trackkit or train again")
    return tensors, about


def load_strictly(module: torch.nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Fill a module, or raise CheckpointError that names the first entries which are missing, extra or misshapen."""
    wanted = module.state_dict()
    missing = [k for k in wanted if k not in tensors]
    extra = [k for k in tensors if k not in wanted]
    misshapen = [
        f"{k} is {tuple(tensors[k].shape)}, needs {tuple(wanted[k].shape)}"
        for k in wanted
        if k in tensors and tensors[k].shape != wanted[k].shape
    ]
    problems = []
    for label, names in (("missing", missing), ("not expected", extra), ("of another size", misshapen)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{label}: {', '.join(names[:3])}{more}")
    if problems:
        raise CheckpointError(f"{what} does not fit {type(module).__name__} with this config; " + "; ".join(problems))
    module.load_state_dict(tensors)
