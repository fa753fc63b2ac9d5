"""The static rules for lessons; each is there because another course has failed without it.

`lint` reads a built notebook and runs nothing. What it cannot see, strict nbval does.
"""

from __future__ import annotations

import ast
import io
import os
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from trackkit.course.assignments import read, student_source

MAX_BYTES = 300_000
TAGS = {"nbval-ignore-output"}
_GRADER_KEYS = {"schema_version", "solution", "grade", "locked", "task", "grade_id"}
_ABSOLUTE = re.compile(
    r"(?<![\w.:/])/(home|Users|root|tmp|work|mnt|content|var|opt)/|\b[A-Za-z]:\\\\?\w"
)
_IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<target>[^)\s]+)[^)]*\)")
_TAG = re.compile(r"<img\b[^>]*>", re.IGNORECASE)
_MARK = re.compile(r"\b(TODO|FIXME|XXX)\b")


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a lesson. `cell` counts from 1; 0 is the notebook as a whole."""

    path: str
    cell: int
    message: str

    def __str__(self) -> str:
        return (
            f"{self.path}: cell {self.cell}: {self.message}"
            if self.cell
            else f"{self.path}: {self.message}"
        )


def lint(path: str | Path) -> list[Finding]:
    """All findings in a built lesson, in the order of its cells; empty for one that may be
    committed. Raises LessonError for a file that is no notebook.
    """
    return findings(read(path), Path(path))


def findings(notebook: NotebookNode, path: Path) -> list[Finding]:
    """`lint` for a notebook in memory that is, or will be, at `path`."""
    found = [Finding(str(path), 0, message) for message in _notebook(notebook)]
    count = 0
    for index, cell in enumerate(notebook.cells, start=1):
        messages = [*_any_cell(cell), *_metadata(cell)]
        if cell.cell_type == "code":
            count += 1
            messages += [*_count(cell, count), *_code(cell), *_outputs(cell)]
        else:
            messages += _markdown(cell, path.parent)
        found += [Finding(str(path), index, message) for message in messages]
    return found + [Finding(str(path), *pair) for pair in _exercises(notebook)]


def _notebook(notebook: NotebookNode) -> Iterator[str]:
    if "widgets" in notebook.metadata:
        yield "metadata.widgets is there (GitHub may refuse the file); build the lesson"
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernelspec is not python3; build the lesson"
    size = len(nbformat.v4.writes(notebook).encode())
    if size > MAX_BYTES:
        yield (
            f"{size // 1000} kB; at most {MAX_BYTES // 1000} kB are allowed (fewer or smaller "
            "pictures)"
        )
    ids = [cell.get("id") for cell in notebook.cells]
    if len(set(ids)) != len(ids):
        yield "cell ids are missing or not unique; build the lesson"


def _any_cell(cell: NotebookNode) -> Iterator[str]:
    if _ABSOLUTE.search(cell.source):
        yield "an absolute path; use a path relative to the lesson or an environment variable"
    if _MARK.search(cell.source):
        yield f"a {_MARK.search(cell.source).group()} is left"
    for tag in cell.metadata.get("tags", []):
        if tag not in TAGS:
            yield f"the tag {tag!r} is not among the allowed ones ({', '.join(sorted(TAGS))})"


def _metadata(cell: NotebookNode) -> Iterator[str]:
    try:
        student = student_source(cell)
    except ValueError as error:
        yield str(error)
        return
    grader = cell.metadata.get("nbgrader")
    if grader is None:
        return
    if missing := _GRADER_KEYS - set(grader):
        yield f"nbgrader metadata lacks {', '.join(sorted(missing))}"
    if grader.get("grade") and "points" not in grader:
        yield "a graded cell without points"
    if cell.cell_type == "code" and grader.get("solution"):
        if student == cell.source or "BEGIN SOLUTION" not in cell.source:
            yield "a solution cell without ### BEGIN SOLUTION and ### END SOLUTION"
        elif _tree(student) is None:
            yield "the student version of this cell is not valid Python"


def _count(cell: NotebookNode, expected: int) -> Iterator[str]:
    if cell.execution_count != expected:
        yield (
            f"execution count {cell.execution_count}, expected {expected}; "
            "build the lesson (nbval skips it otherwise)"
        )


def _tree(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # NUL; nested too deep
        return None


def _code(cell: NotebookNode) -> Iterator[str]:
    tree = _tree(cell.source)
    if tree is None:
        yield "not plain Python: no magics and no shell commands in lessons"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", "")
            )
            if name in (
                "Output",
                "interact",
                "interactive",
                "interactive_output",
                "interact_manual",
                "clear_output",
            ):
                yield f"{name}() fails strict nbval and hides exceptions; use Explorer"
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        auto = isinstance(node, ast.ImportFrom) and [a.name for a in node.names] == ["auto"]
        if {"tqdm", "tqdm.std"} & set(modules) and not auto:
            yield "plain tqdm prints rates to stderr; import it from tqdm.auto"
    if tree.body and isinstance(tree.body[-1], ast.Expr) and _last_token(cell.source) == ";":
        yield (
            "the last expression ends in a semicolon, which nbval ignores; assign it, or use show()"
        )


def _last_token(source: str) -> str:
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type not in skipped][-1]


def _outputs(cell: NotebookNode) -> Iterator[str]:
    for output in cell.outputs:
        if output.output_type == "error":
            yield f"an error output ({output.ename})"
        if output.output_type == "stream" and output.name == "stderr":
            first = output.text.strip().partition("\n")[0]
            yield f"output on stderr: {first[:80]!r}"
        data = output.get("data", {})
        texts = [output.get("text", ""), *(v for k, v in data.items() if k.startswith("text/"))]
        if any(_ABSOLUTE.search(text) for text in texts):
            yield "an absolute path in the output"
        for kind in data:
            if kind == "image/png":
                about = output.get("metadata", {}).get("image/png")
                alt = about.get("alt") if isinstance(about, dict) else None
                if not isinstance(alt, str) or not alt.strip():
                    yield "a picture without alt text; use show(), animation() or a panel"
            elif kind.startswith("image/") or kind == "application/vnd.jupyter.widget-view+json":
                yield f"an output of type {kind}; pictures are PNG, and build drops widget views"


def _markdown(cell: NotebookNode, folder: Path) -> Iterator[str]:
    images = [(m["alt"], m["target"]) for m in _IMAGE.finditer(cell.source)]
    for tag in _TAG.findall(cell.source):
        fields = dict(re.findall(r"""(\w+)\s*=\s*["']([^"']*)["']""", tag))
        images.append((fields.get("alt", ""), fields.get("src", "")))
    for alt, target in images:
        if not alt.strip():
            yield f"the image {target} has no alt text"
        if re.match(r"(https?:)?//", target):
            yield f"the image {target} is remote; lessons work offline"
        elif not target.startswith(("attachment:", "data:")) and not os.path.exists(
            folder / target
        ):
            yield f"the image {target} does not exist"


def _exercises(notebook: NotebookNode) -> Iterator[tuple[int, str]]:
    seen: set[str] = set()
    open_exercise: tuple[int, str] | None = None
    for index, cell in enumerate(notebook.cells, start=1):
        grader = cell.metadata.get("nbgrader", {})
        name = grader.get("grade_id", "")
        if grader and name in seen:
            yield index, f"grade_id {name!r} is used twice; nbgrader rejects every submission"
        seen.add(name)
        if cell.cell_type == "code" and grader.get("solution"):
            if open_exercise:
                yield (
                    open_exercise[0],
                    f"exercise {open_exercise[1]!r} has no graded check cell after it",
                )
            open_exercise = (index, name)
        elif cell.cell_type == "code" and grader.get("grade"):
            if "check(" not in cell.source:
                yield index, "a graded cell without check(...)"
            open_exercise = None
    if open_exercise:
        yield open_exercise[0], f"exercise {open_exercise[1]!r} has no graded check cell after it"
