"""What is installed, which devices there are, where the data is: the first thing to ask when
something fails.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import sys
from pathlib import Path

from trackkit.errors import TrackkitError
from trackkit.paths import command, data_root, home, writable


def report() -> str:
    """A few lines of plain text; a line that starts with "!" names a problem and the command that
    mends it.
    """
    return "\n".join([*_versions(), *_command(), *_devices(), *_paths()])


def _versions() -> list[str]:
    lines = [f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    try:
        requirements = importlib.metadata.requires("trackkit") or []
    except importlib.metadata.PackageNotFoundError:
        return [
            *lines,
            "! trackkit is not installed: python -m pip install -c requirements.lock -e '.[test]'",
        ]
    for requirement in (r for r in requirements if "extra" not in r):
        name, minimum = re.match(r"([\w-]+)(?:>=([\d.]+))?", requirement).groups()
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"! {name} is missing: python -m pip install '{requirement}'")
            continue
        older = minimum and _numbers(version) < _numbers(minimum)
        lines.append(
            f"! {name} {version} is older than {minimum}: python -m pip install -U '{requirement}'"
            if older
            else f"  {name} {version}"
        )
    return lines


def _command() -> list[str]:
    here, activate = command("trackkit"), Path(sys.executable).with_name("activate")
    if here == "trackkit":
        return []
    way = f"; to type trackkit alone: source {shlex.quote(str(activate))}"
    return [f"trackkit: not on the PATH, here it is {here}{way if activate.is_file() else ''}"]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])


def _devices() -> list[str]:
    try:
        import torch
    except ImportError as error:
        return [
            f"! torch cannot be imported ({error}): python -m pip install -c requirements.lock -e "
            "'.[test]'"
        ]
    lines = [f"CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append(
            "GPU: torch sees none; everything runs on the CPU, full-size training is for a GPU"
        )
    return lines


def _paths() -> list[str]:
    lines = []
    try:
        root = data_root()
        found = [split for split in ("train", "val", "test") if (root / split).is_dir()]
        lines.append(f"data: {root} ({', '.join(found) or 'no splits'})")
        if not os.environ.get("TRACKKIT_GOT10K"):
            lines.append(
                "  for GOT-10k: export TRACKKIT_GOT10K=/folder/with/train/val/test, or --data"
            )
    except TrackkitError as error:
        lines.append(f"! data: {error}")
    try:
        lines.append(f"runs, results, caches: {writable(home())}")
    except TrackkitError as error:
        lines.append(f"! home: {error}; export TRACKKIT_HOME=/a/folder/of/yours")
    return lines
