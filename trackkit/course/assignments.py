"""Hand lessons out: the student version, a copy to work on, and the solutions for tests.

The rules for markers are those of nbgrader's ClearSolutions, ClearHiddenTests and LockCells, so a
course that uses nbgrader gets the same cells from the same file; nbgrader itself is not needed.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from trackkit.errors import TrackkitError

_STUB = {
    "code": ["# YOUR CODE HERE", "raise NotImplementedError()"],
    "markdown": ["YOUR ANSWER HERE"],
}


class LessonError(TrackkitError):
    """A lesson that cannot be built or handed out; the message names the cell."""


def student(path: Path, out: Path, /) -> Path:
    """Write the version of a lesson that learners get, and return its path.

    As nbgrader's generate_assignment: what stands between BEGIN SOLUTION and END SOLUTION becomes a
    stub with the same indentation, a solution cell without markers becomes a stub as a whole, what
    stands between BEGIN HIDDEN TESTS and END HIDDEN TESTS goes, outputs go, and graded cells cannot
    be deleted or (tests) edited.

    Raises LessonError for unbalanced markers or markers in a cell without the metadata for them.

    Args:
        path: the lesson.
        out: the notebook to write.
    """
    out = Path(out)
    notebook = nbformat.read(path, as_version=4)
    clear(notebook)
    for index, cell in enumerate(notebook.cells, start=1):
        try:
            cell.source = student_source(cell)
        except ValueError as error:
            raise LessonError(f"{path}: cell {index}: {error}") from error
        grader = cell.metadata.get("nbgrader", {})
        if grader.get("solution") or grader.get("grade") or grader.get("locked"):
            cell.metadata["deletable"] = False
            if not grader.get("solution"):
                cell.metadata["editable"] = False
    out.parent.mkdir(parents=True, exist_ok=True)
    write(notebook, out)
    return out


def start(lesson: str, folder: Path = Path("work"), /) -> Path:
    """Give a learner a copy of a lesson to work on, under its own name; prints and returns its
    path.

    Raises LessonError if there is no such lesson, or if the copy is already there, so that no work
    is lost.

    Args:
        lesson: its number, such as 01, or a notebook.
        folder: where the copy goes.
    """
    path = _numbered(int(lesson)) if str(lesson).isdigit() else Path(lesson)
    if not path.is_file():
        raise LessonError(f"there is no lesson {path}")
    out = Path(folder) / path.name
    if out.exists():
        raise LessonError(f"{out} is already there; open it, or move it away to start anew")
    print(f"{student(path, out)} is yours: jupyter lab {out}")
    return out


def _numbered(number: int) -> Path:
    folder = Path(__file__).parents[2] / "lessons"
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        if int(path.name[:2]) == number:
            return path
    known = ", ".join(path.name[:2] for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))) or "none"
    raise LessonError(f"{folder} has no lesson {number:02d}; there are: {known}")


def student_source(cell: NotebookNode) -> str:
    """Source of a cell in the student version. Raises ValueError for markers that nbgrader would
    reject.
    """
    grader = cell.metadata.get("nbgrader", {})
    stub = _STUB["code" if cell.cell_type == "code" else "markdown"]
    source, solved = _replace(
        cell.source, "SOLUTION", lambda indent: [indent + line for line in stub]
    )
    if solved and not grader.get("solution"):
        raise ValueError("a solution region in a cell without nbgrader's solution metadata")
    if grader.get("solution") and not solved:
        source = "\n".join(stub)
    source, hidden = _replace(source, "HIDDEN TESTS", lambda indent: [])
    if hidden and not grader.get("grade"):
        raise ValueError("hidden tests in a cell without nbgrader's grade metadata")
    return source


def _replace(source: str, what: str, stub: Callable[[str], list[str]]) -> tuple[str, bool]:
    lines, inside, found = [], False, False
    for line in source.split("\n"):
        if f"BEGIN {what}" in line:
            if inside:
                raise ValueError(f"BEGIN {what} inside of another one")
            inside = found = True
            lines += stub(line[: len(line) - len(line.lstrip())])
        elif f"END {what}" in line:
            if not inside:
                raise ValueError(f"END {what} without its BEGIN")
            inside = False
        elif not inside:
            lines.append(line)
    if inside:
        raise ValueError(f"BEGIN {what} without its END")
    return "\n".join(lines), found


def solution_cells(path: str | Path) -> dict[str, str]:
    """grade_id -> source of each code cell with a solution, without the marker lines."""
    cells = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("solution"):
            kept = [
                line
                for line in cell.source.split("\n")
                if not re.search(r"(BEGIN|END) SOLUTION", line)
            ]
            cells[cell.metadata.nbgrader.grade_id] = "\n".join(kept)
    return cells


def same_code(source: str, function: Callable[..., Any]) -> bool:
    """Whether `source` defines a function of the same name, arguments and statements as a library
    function.

    Comments, docstrings, annotations and layout do not count. Raises ValueError if it defines no
    such function.
    """
    name = function.__name__
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            library = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
            return _bare(node) == _bare(library)
    raise ValueError(f"the cell defines no function {name}")


def _bare(function: ast.FunctionDef) -> str:
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    args = function.args
    for argument in [*args.posonlyargs, *args.args, *args.kwonlyargs]:
        argument.annotation = None
    return "\n".join([ast.dump(args), *map(ast.dump, body)])


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a valid notebook in one step, so that an interrupted run leaves the old file."""
    nbformat.validate(notebook)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            nbformat.write(notebook, file)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def clear(notebook: NotebookNode) -> None:
    """Remove outputs and execution counts, in place."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
