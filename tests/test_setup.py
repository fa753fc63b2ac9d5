"""The set-up files say the same thing."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN = re.compile(r"([\w.-]+)==([\w.+]+)")


def key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0]))


def pins(text: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip().removeprefix("- ") for line in text.splitlines())
    return {key(m[1]): m[2] for line in lines if (m := PIN.fullmatch(line))}


LOCK = pins((ROOT / "requirements.lock").read_text())
CONDA = pins((ROOT / "environment.yml").read_text())
BOUNDS = dict(
    re.fullmatch(r"([\w-]+)>=([\d.]+)", d).groups()
    for d in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
)


def test_conda_has_the_pins_of_the_lock():
    assert set(CONDA) == {key(name) for name in BOUNDS}
    assert {name: LOCK[name] for name in CONDA} == CONDA


@pytest.mark.parametrize("name", list(BOUNDS))
def test_the_lock_keeps_the_lower_bounds(name):
    assert version(LOCK[key(name)]) >= version(BOUNDS[name])


def test_the_lock_is_plain_pins():
    text = (ROOT / "requirements.lock").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(PIN.fullmatch(line) for line in lines), "no URLs, no options"
    assert not any(line.startswith(("nvidia", "triton", "cuda")) for line in lines), (
        "torch asks for these itself, on Linux"
    )


def test_every_import_is_declared():
    names = {"PIL": "pillow"}
    declared = {key(name) for name in BOUNDS}
    for path in (ROOT / "trackkit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for module in modules:
                top = module.split(".")[0]
                standard = top in sys.stdlib_module_names or top == "trackkit"
                # jupyterlab brings IPython, nbformat and nbclient
                assert standard or key(names.get(top, top)) in declared | {
                    "ipython",
                    "nbformat",
                    "nbclient",
                    "nbconvert",
                    "traitlets",
                }, f"{path}: {top}"


def test_versions_agree():
    import trackkit

    assert trackkit.__version__ == PROJECT["version"]
    assert f"version: {PROJECT['version']}" in (ROOT / "CITATION.cff").read_text()
