"""The notebook tools; `trackkit lessons build | check | student | start` calls them.

A lesson's .ipynb is its source, its test (strict nbval) and its assignment (nbgrader's cell
metadata). `build` runs a notebook and writes it back in the one form in which it is committed,
`check` finds what will break, `student` takes the solutions out, `start` gives a learner a copy to
work on.
"""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path

import tyro
from nbformat import NotebookNode

from trackkit.course.assignments import (
    LessonError,
    clear,
    number,
    read,
    same_code,
    solution_cells,
    start,
    student,
    write,
)
from trackkit.course.lint import Finding, findings, lint

__all__ = [
    "Finding",
    "LessonError",
    "build",
    "check",
    "lint",
    "normalise",
    "same_code",
    "solution_cells",
    "start",
    "student",
]

# One thread and the tiny scale: what strict nbval and CI use too, so outputs agree to the printed
# digit.
ENVIRONMENT = {
    "TRACKKIT_SCALE": "tiny",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "TRACKKIT_CHECKS": "strict",
}


def build(*paths: tyro.conf.Positional[Path], timeout: int = 120) -> None:
    """Run lessons in fresh kernels and write them back in normal form; prints a line for each.

    A kernel works in the lesson's folder at TRACKKIT_SCALE=tiny with one thread. A file is replaced
    only if all went well. Raises LessonError when a cell fails, or when the result has findings of
    `lint`.

    Args:
        paths: notebooks.
        timeout: seconds that a cell may take.
    """
    if timeout < 1:
        raise LessonError(f"--timeout {timeout}: give at least 1 second")
    for path in _named(paths):
        seconds = _build(path, timeout)
        print(f"{path}: built in {seconds:.0f} s, {path.stat().st_size // 1000} kB")


def check(*paths: tyro.conf.Positional[Path]) -> None:
    """Look for what will break in built lessons, without running them; prints a line if there is
    nothing.

    Raises LessonError that lists all findings.

    Args:
        paths: notebooks.
    """
    found = [str(finding) for path in _named(paths) for finding in lint(path)]
    if found:
        raise LessonError("\n".join(found))
    print(f"{len(paths)} lessons: nothing found")


def _named(paths: tuple[Path, ...]) -> list[Path]:
    if not paths:
        raise LessonError("name at least one notebook, for example lessons/*.ipynb")
    return list(map(Path, paths))


def _build(path: Path, timeout: int) -> float:
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = read(path)
    clear(notebook)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        store_widget_state=False,
        resources={"metadata": {"path": str(path.resolve().parent)}},
    )
    try:
        client.execute(env={**os.environ, **ENVIRONMENT})
    except (CellExecutionError, DeadKernelError):
        raise LessonError(_failure(path, notebook)) from None
    except CellTimeoutError as error:
        raise LessonError(f"{path}: a cell took more than {timeout} s") from error
    seconds = sum(_seconds(cell) for cell in notebook.cells)
    normalise(notebook)
    found = findings(notebook, path)
    if found:
        raise LessonError("\n".join(map(str, found)))
    write(notebook, path)
    return seconds


def normalise(notebook: NotebookNode) -> None:
    """Bring an executed notebook into the form in which it is committed, in place.

    Cell ids become cell-1..n, kernelspec python3, volatile metadata goes. Widget views, which mean
    nothing without their kernel, go too, so that every page shows the PNG beside them.
    """
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    number(notebook)
    for cell in notebook.cells:
        cell.metadata = NotebookNode(
            {k: v for k, v in cell.metadata.items() if k in ("tags", "nbgrader", "jupyter")}
        )
        if cell.cell_type == "code":
            cell.outputs = _merged(cell.outputs)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)


def _merged(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Neighbouring pieces of one stream as one: where a slow cell's text is cut depends on the
    moment.
    """
    merged: list[NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def _failure(path: Path, notebook: NotebookNode) -> str:
    for index, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output.traceback))
                return f"{path}: cell {index} failed: {output.ename}: {output.evalue}\n{trace}"
    return f"{path}: the kernel died"


def _seconds(cell: NotebookNode) -> float:
    times = cell.metadata.get("execution", {})
    if "shell.execute_reply" not in times:
        return 0.0
    begin, end = (
        datetime.fromisoformat(times[key]) for key in ("iopub.execute_input", "shell.execute_reply")
    )
    return (end - begin).total_seconds()
