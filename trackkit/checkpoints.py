"""Files of weights: safetensors with a description, written whole or not at all, never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from trackkit.errors import CheckpointError
from trackkit.paths import atomic_write

FORMAT = 2


class Damaged(CheckpointError):
    """A checkpoint whose contents are lost, so that nothing is lost if it is written anew."""


def write(path: str | Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Write tensors and a description (anything JSON holds) as one safetensors file, atomically."""
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    about = json.loads(json.dumps({**about, "format": FORMAT}))
    about["digest"] = _digest(contiguous, about)
    metadata = {"trackkit": json.dumps(about)}
    with atomic_write(path) as partial:
        # save_file would make a private file of its own
        partial.write_bytes(serialize(contiguous, metadata))


def read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors (on the CPU) and description of a file that `write` made.

    Raises CheckpointError if the file is missing, `Damaged`, not safetensors (a pickle is
    recognised and never opened as one) or made by a newer trackkit.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such checkpoint; `trackkit train` makes one")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    # safetensors begins with the length of its header in 8 bytes, then "{"; torch.save with PK or a
    # pickle opcode
    if head[:2] == b"PK" or (head[:1] == b"\x80" and head[8:] != b"{"):
        raise CheckpointError(
            f"{path}: a pickle (as torch.save writes it), not safetensors; it was not opened, "
            "because loading a pickle "
            "runs code. For an authors' checkpoint: `trackkit import`"
        )
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
        # with memory of their own: a mapped file that another program cuts would end this one
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise Damaged(
            f"{path}: damaged or not a safetensors file ({error}); train again or copy it anew"
        ) from error
    if "trackkit" not in metadata:
        raise CheckpointError(
            f"{path}: safetensors, but not made by trackkit; for an authors' checkpoint: `trackkit "
            "import`"
        )
    try:
        about = json.loads(metadata["trackkit"])
        written = about["format"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise Damaged(
            f"{path}: damaged, its description cannot be read ({error}); train again or copy it "
            "anew"
        ) from error
    if written != FORMAT:
        raise CheckpointError(
            f"{path}: format {written}, this trackkit reads {FORMAT}; update trackkit or train "
            "again"
        )
    if about.pop("digest", None) != _digest(tensors, about):
        raise Damaged(
            f"{path}: damaged, its contents have changed since they were written; train again or "
            "copy it anew"
        )
    return tensors, about


def _digest(tensors: dict[str, Tensor], about: dict) -> str:
    """Of all that a file says: a changed bit in weights, in a step count or in a config shows.

    The weights by CRC-32: any flipped bit changes it, and it takes a third of the time of SHA-256,
    which would be felt where a state of gigabytes is saved twice a minute.
    """
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        crc = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy())
        digest.update(crc.to_bytes(4))
    return digest.hexdigest()


def load_strictly(module: torch.nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Fill a module, or raise CheckpointError that names the first entries which are missing, extra
    or misshapen.
    """
    sizes = {key: value.shape for key, value in module.state_dict().items()}
    check_fit(type(module).__name__, sizes, tensors, what)
    module.load_state_dict(tensors)


def check_fit(
    name: str, sizes: dict[str, torch.Size], tensors: dict[str, Tensor], what: str
) -> None:
    """What `load_strictly` raises, for a module called `name` of which the sizes are known."""
    if problems := differences(sizes, tensors):
        raise CheckpointError(f"{what} does not fit {name} with this config; {'; '.join(problems)}")


def differences(
    wanted: dict[str, torch.Size],
    found: dict[str, Tensor],
    note: Callable[[str], str] | None = None,
) -> list[str]:
    """The entries which are missing, extra or misshapen, a text for each kind that there is; `note`
    adds to an entry's name.
    """
    texts = [
        listed("missing", [key for key in wanted if key not in found], note),
        listed("not expected", [key for key in found if key not in wanted], note),
    ]
    misshapen = {
        k: f"{k} is {tuple(found[k].shape)}, needs {tuple(wanted[k])}"
        for k in wanted
        if k in found and found[k].shape != wanted[k]
    }
    texts.append(listed("of another size", list(misshapen), note, misshapen))
    return [text for text in texts if text]


def listed(
    kind: str,
    keys: list[str],
    note: Callable[[str], str] | None = None,
    texts: dict[str, str] | None = None,
) -> str:
    """What is wrong, the first three entries with that, and how many more there are; empty without
    any.
    """
    first = [(texts or {}).get(key, key) + (note(key) if note else "") for key in keys[:3]]
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{kind}: {', '.join(first)}{more}" if keys else ""
