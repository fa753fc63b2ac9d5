"""Hand lessons out: the student version, a copy to work on, and the solutions for tests.

The rules for markers are those of nbgrader's ClearSolutions, ClearHiddenTests and LockCells, so a
course that uses nbgrader gets the same cells from the same file; nbgrader itself is not needed.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.validator import get_validator

from trackkit.errors import TrackkitError
from trackkit.paths import LESSONS, atomic_write, command

LARGEST = 50_000_000  # bytes of a notebook; a lesson has at most 300,000
DEEPEST = 100  # levels of its JSON; real ones have about ten

_STUB = {
    "code": ["# YOUR CODE HERE", "raise NotImplementedError()"],
    "markdown": ["YOUR ANSWER HERE"],
}


class LessonError(TrackkitError):
    """A lesson that cannot be built or handed out; the message names the file or the cell."""


def read(path: str | Path) -> NotebookNode:
    """A notebook of format 4, as it is: nothing is mended, cell ids may be missing.

    Raises LessonError that names the file, and the place in it, but nothing of what the file holds:
    it may be any file.
    """
    if not os.path.isfile(path):
        raise LessonError(f"there is no notebook {path}")
    try:
        if os.path.getsize(path) > LARGEST:
            raise LessonError(f"{path}: more than {LARGEST // 10**6} MB; not a lesson")
        with open(path, "rb") as file:
            content = json.loads(file.read(LARGEST).decode("utf-8-sig"))
        if not isinstance(content, dict) or "cells" not in content or "nbformat" not in content:
            raise ValueError("not a notebook")
    except OSError as error:
        raise LessonError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, LessonError):
            raise
        # no "from": the message of the cause quotes the file
        raise LessonError(f"{path}: not a Jupyter notebook (.ipynb)") from None
    if content["nbformat"] != 4:
        raise LessonError(f"{path}: not of notebook format 4; open it in Jupyter and save it")
    if problem := _malformed(content):
        raise LessonError(f"{path}: {problem}; open it in Jupyter and save it")
    return nbformat.v4.to_notebook(content)


def _malformed(content: dict[str, Any]) -> str:
    """What is wrong with a notebook's JSON and where, in words; empty if nothing is."""
    level: list[Any] = [content]
    for _ in range(DEEPEST):
        level = [
            part
            for value in level
            if isinstance(value, (dict, list))
            for part in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        return f"its JSON has more than {DEEPEST} levels"
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "it has half of a surrogate pair, which cannot be written"
    if type(content.get("nbformat_minor")) is not int:
        return "not as notebooks are at nbformat_minor"
    # ids are for lint, and made by `number`
    cells = content["cells"] if isinstance(content["cells"], list) else []
    named = [
        {**cell, "id": f"cell-{i}"} if isinstance(cell, dict) else cell
        for i, cell in enumerate(cells)
    ]
    plain = content | {"cells": named if cells else content["cells"], "nbformat_minor": 5}
    # nbformat.validate raises TypeError for cells of odd types, and quotes the file
    for error in get_validator(4, 5, name="jsonschema").iter_errors(plain):
        place = [str(part + 1) if isinstance(part, int) else part for part in error.relative_path]
        return f"not as notebooks are at {' '.join(place) or 'its top'}"
    for i, cell in enumerate(cells, start=1):
        grader = cell["metadata"].get("nbgrader", {})
        fine = isinstance(grader, dict) and isinstance(grader.get("grade_id", ""), str)
        if not fine or not isinstance(cell.get("id", ""), str):
            return f"not as notebooks are at cells {i} {'id' if fine else 'metadata nbgrader'}"
    return ""


def student(path: Path, out: Path, /) -> Path:
    """Write the version of a lesson that learners get, and return its path.

    As nbgrader's generate_assignment: what stands between BEGIN SOLUTION and END SOLUTION becomes a
    stub with the same indentation, a solution cell without markers becomes a stub as a whole, what
    stands between BEGIN HIDDEN TESTS and END HIDDEN TESTS goes, outputs go, and graded cells cannot
    be deleted or (tests) edited.

    Raises LessonError for a file that is no notebook, for unbalanced markers or markers in a cell
    without the metadata for them, and if it would replace the lesson; DataError when it cannot be
    written.

    Args:
        path: the lesson.
        out: the notebook to write.
    """
    out, notebook = Path(out), read(path)
    if os.path.exists(out) and os.path.samefile(path, out):
        raise LessonError(f"{out} is the lesson itself; name another file to write")
    clear(notebook)
    number(notebook)
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
    path = _numbered(lesson) if re.fullmatch("[0-9]+", str(lesson)) else Path(lesson)
    out = Path(folder) / path.name
    if os.path.lexists(out):
        raise LessonError(f"{out} is already there; open it, or move it away to start anew")
    print(f"{student(path, out)} is yours: {command('jupyter')} lab {shlex.quote(str(out))}")
    return out


def _numbered(number: str) -> Path:
    lessons = {path.name[:2]: path for path in sorted(LESSONS.glob("[0-9][0-9]_*.ipynb"))}
    number = number.lstrip("0").zfill(2)
    if number not in lessons:
        known = ", ".join(lessons) or "none"
        raise LessonError(f"{LESSONS} has no lesson {number}; there are: {known}")
    return lessons[number]


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
    for cell in read(path).cells:
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
    """Write a valid notebook in one step, so that an interrupted run leaves the old file. Raises
    DataError when it cannot be written.
    """
    nbformat.validate(notebook)
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        nbformat.write(notebook, file)


def number(notebook: NotebookNode) -> None:
    """Give the cells the ids cell-1..n, as format 4.5 wants them, in place."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{index}"


def clear(notebook: NotebookNode) -> None:
    """Remove outputs, execution counts and times, in place."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
