"""Notebook tools: build, lint, student version."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from trackkit.cli import main
from trackkit.course.lessons import (
    LessonError,
    build,
    check,
    lint,
    same_code,
    solution_cells,
    start,
    student,
)
from trackkit.errors import TrackkitError
from trackkit.trackers.siamfc import cross_correlation

ROOT = Path(__file__).parents[1]


def grader(grade_id, solution=False, grade=False, **more):
    values = {
        "schema_version": 3,
        "solution": solution,
        "grade": grade,
        "locked": not solution,
        "task": False,
    }
    return {"nbgrader": values | {"grade_id": grade_id, "cell_type": "code"} | more}


SOLUTION = (
    'def half(x):\n    """x / 2."""\n    if True:\n        ### BEGIN SOLUTION\n        y = '
    "x / 2\n "
    "       return y\n        ### END SOLUTION"
)
CHECK = (
    "def check(name, f, seed=0):\n    f(3)\n    print(name, 'correct')\n\n\ncheck('half', half)\n"
    "### BEGIN HIDDEN TESTS\ncheck('half', half, seed=1)\n### END HIDDEN TESTS"
)
PICTURE = """from IPython.display import display
from trackkit_toy import bar, picture
white = {"image/png": picture, "text/plain": "Picture: white."}
display(white, metadata={"image/png": {"alt": "white"}}, raw=True)
bar"""
HELPER = """import base64
import ipywidgets
picture = base64.b64encode(b"\\x89PNG").decode()
bar = ipywidgets.IntProgress(description="one")
"""


def lesson():
    """A lesson as an author writes it: not executed, random cell ids."""
    return new_notebook(
        cells=[
            new_markdown_cell("# Half\n\nText."),
            new_code_cell(
                "import os\nprint(os.environ['TRACKKIT_SCALE'], os.environ['OMP_NUM_THREADS'])"
            ),
            new_code_cell(PICTURE),
            new_code_cell(SOLUTION, metadata=grader("half", solution=True) | {"collapsed": True}),
            new_code_cell(CHECK, metadata=grader("check_half", grade=True, points=1)),
            new_markdown_cell(
                "Because.",
                metadata=grader("why", solution=True, grade=True, points=1, cell_type="markdown"),
            ),
        ]
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The lesson after `build`, which starts a kernel; the tests below copy it."""
    folder = tmp_path_factory.mktemp("lessons")
    (folder / "trackkit_toy.py").write_text(HELPER)
    path = folder / "00_half.ipynb"
    nbformat.write(lesson(), path)
    build(path, timeout=60)
    return path


def read(path):
    return nbformat.read(path, as_version=4)


# ---- build ----


def test_build_gives_the_normal_form(built):
    notebook = read(built)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4]
    assert [cell.id for cell in notebook.cells] == [f"cell-{i}" for i in range(1, 7)]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.language_info == {
        "name": "python"
    }
    assert set(code[2].metadata) == {"nbgrader"} and not code[0].metadata
    assert code[0].outputs[0].text == "tiny 1\n"
    picture, widget = code[1].outputs
    assert picture.metadata == {"image/png": {"alt": "white"}}
    assert set(widget.data) == {"text/plain"}
    assert code[3].outputs[0].text == "half correct\nhalf correct\n"
    assert lint(built) == [] and [p.name for p in built.parent.glob("*.part")] == []


def test_rebuild_changes_nothing_and_strict_nbval_passes(built, capsys):
    before = built.read_bytes()
    build(built)
    assert re.fullmatch(rf"{built}: built in \d+ s, 3 kB\n", capsys.readouterr().out)
    assert built.read_bytes() == before
    command = [sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-current-env"]
    command += ["--nbval-sanitize-with", str(ROOT / "lessons" / "nbval.cfg")]
    command += ["-p", "no:cacheprovider", "-p", "no:randomly", "-c", os.devnull, built.name]
    environment = os.environ | {"TRACKKIT_SCALE": "tiny", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=built.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout


def test_a_failing_cell_is_named_and_the_file_stays(tmp_path):
    path = tmp_path / "bad.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Bad"), new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    with pytest.raises(
        LessonError, match=r"bad.ipynb: cell 2 failed: ZeroDivisionError: division by zero"
    ) as caught:
        build(path)
    assert path.read_bytes() == before and "\x1b" not in str(caught.value)


def test_build_refuses_what_lint_finds(tmp_path):
    path = tmp_path / "warns.ipynb"
    nbformat.write(
        new_notebook(cells=[new_code_cell("import sys\nprint('careful', file=sys.stderr)")]), path
    )
    before = path.read_bytes()
    with pytest.raises(LessonError, match=r"warns.ipynb: cell 1: output on stderr: 'careful'"):
        build(path)
    assert path.read_bytes() == before


# ---- lint ----


def code_cell(notebook, number):
    return [cell for cell in notebook.cells if cell.cell_type == "code"][number]


def source(text):
    def change(notebook):
        code_cell(notebook, 0).source = text

    return change


def output(*args, **values):
    def change(notebook):
        code_cell(notebook, 0).outputs = [new_output(*args, **values)]

    return change


def markdown(text):
    def change(notebook):
        notebook.cells[0].source = text

    return change


def edit(expression):
    def change(notebook):
        exec(expression, {"nb": notebook, "cells": notebook.cells})

    return change


BROKEN = {
    "execution count None, expected 1": edit("cells[1].execution_count = None"),
    "execution count 7, expected 4": edit("cells[4].execution_count = 7"),
    "metadata.widgets is there": edit("nb.metadata['widgets'] = {}"),
    "kernelspec is not python3": edit("nb.metadata.kernelspec.name = 'torch'"),
    "cell ids are missing or not unique": edit("cells[1].id = cells[2].id"),
    "kB; at most 300 kB": markdown("x" * 300_001),
    "an error output (ValueError)": output("error", ename="ValueError", evalue="", traceback=[]),
    "output on stderr: 'warning: slow'": output(
        "stream", name="stderr", text="warning: slow\nat ..."
    ),
    "a picture without alt text": output("display_data", {"image/png": "iVBO"}),
    "an output of type image/svg+xml": output("display_data", {"image/svg+xml": "<svg/>"}),
    "widget-view+json; pictures are PNG": output(
        "display_data", {"application/vnd.jupyter.widget-view+json": {}}
    ),
    "an absolute path in the output": output(
        "stream", name="stdout", text="saved to /home/me/run\n"
    ),
    "an absolute path; use": source("open('/home/me/data')"),
    "Output() fails strict nbval": source("import ipywidgets\nipywidgets.Output()"),
    "interact() fails strict nbval": source("interact(print, x=3)"),
    "clear_output() fails strict nbval": source("clear_output(wait=True)"),
    "plain tqdm": source("from tqdm import tqdm"),
    "the last expression ends in a semicolon": source("x = 1\nprint(x);  # quiet"),
    "not plain Python": source("%matplotlib inline"),
    "a TODO is left": source("x = 1  # TODO"),
    "the tag 'hide' is not among": edit("cells[1].metadata['tags'] = ['hide']"),
    "has no alt text": markdown("![](attachment:cell.png)"),
    "is remote": markdown('<img alt="logo" src="https://example.org/logo.png">'),
    "the image missing.png does not exist": markdown("![a picture](missing.png)"),
    "grade_id 'half' is used twice": edit("cells[4].metadata.nbgrader.grade_id = 'half'"),
    "exercise 'half' has no graded check": edit(
        "cells[4].metadata.pop('nbgrader'); cells[4].source = 'pass'"
    ),
    "a graded cell without check(": edit("cells[4].source = 'assert half(2) == 1'"),
    "a graded cell without points": edit("cells[4].metadata.nbgrader.pop('points')"),
    "nbgrader metadata lacks locked": edit("cells[4].metadata.nbgrader.pop('locked')"),
    "a solution cell without ### BEGIN SOLUTION": edit("cells[3].source = 'x = 1'"),
    "BEGIN SOLUTION without its END": edit(
        "cells[3].source = cells[3].source.replace('### END', '### end')"
    ),
    "END SOLUTION without its BEGIN": edit(
        "cells[3].source = cells[3].source.replace('### BEGIN', '### begin')"
    ),
    "a solution region in a cell without": edit("cells[3].metadata.pop('nbgrader')"),
    "hidden tests in a cell without": edit("cells[4].metadata.pop('nbgrader')"),
    "student version of this cell is not valid": edit(
        "cells[3].source = 'def f():\\n### BEGIN SOLUTION\\n    return 1\\n### END SOLUTION'"
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_lint_finds(message, built, tmp_path):
    notebook = copy.deepcopy(read(built))
    BROKEN[message](notebook)
    path = tmp_path / "broken.ipynb"
    path.write_text(nbformat.v4.writes(notebook))  # nbformat.write would mend some of it
    found = [str(finding) for finding in lint(path)]
    assert any(message in text for text in found), found
    assert len(found) == 1 or message.startswith(
        ("a solution region", "hidden tests", "nbgrader", "END", "a graded")
    )


@pytest.mark.parametrize(
    "text",
    [
        "from tqdm.auto import tqdm",
        "import tqdm.auto",
        "from tqdm import auto",
        "x = 'a;'\nx",
        "url = 'https://example.org/home/x'",
        "x = 1;",
    ],
)
def test_lint_lets_pass(text, built, tmp_path):
    notebook = copy.deepcopy(read(built))
    source(text)(notebook)
    path = tmp_path / "fine.ipynb"
    nbformat.write(notebook, path)
    assert lint(path) == []


def test_check_lists_all_findings(built, tmp_path, capsys):
    check(built, built)
    assert capsys.readouterr().out == "2 lessons: nothing found\n"
    notebook = read(built)
    notebook.cells[1].execution_count = 9
    notebook.cells[2].source += "  # TODO"
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    with pytest.raises(LessonError, match="name at least one notebook"):
        check()
    with pytest.raises(LessonError, match="there is no notebook"):
        build(tmp_path / "bad")
    with pytest.raises(
        LessonError, match=r"bad.ipynb: cell 2: execution count 9.*\n.*bad.ipynb: cell 3: a TODO"
    ):
        check(built, tmp_path / "bad.ipynb")


# ---- student version: what nbgrader's ClearSolutions, ClearHiddenTests, LockCells and ClearOutput
# would make ----


def test_student_version(built, tmp_path):
    path = student(built, tmp_path / "student" / built.name)
    notebook = read(path)
    master = read(built)
    assert notebook.cells[3].source == (
        'def half(x):\n    """x / 2."""\n    if True:\n        # YOUR CODE HERE\n        raise '
        "NotImplementedError()"
    )
    assert notebook.cells[4].source == CHECK[: CHECK.index("\n### BEGIN")]
    assert notebook.cells[5].source == "YOUR ANSWER HERE"
    assert [cell.source for cell in notebook.cells[:3]] == [
        cell.source for cell in master.cells[:3]
    ]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    locks = [
        (cell.metadata.get("deletable"), cell.metadata.get("editable")) for cell in notebook.cells
    ]
    assert locks == [(None, None)] * 3 + [(False, None), (False, False), (False, None)]
    assert [c.metadata.get("nbgrader") for c in notebook.cells] == [
        c.metadata.get("nbgrader") for c in master.cells
    ]


def test_several_regions_and_a_solution_cell_without_markers(tmp_path):
    regions = (
        "a = 1\n### BEGIN SOLUTION\nb = 2\n### END SOLUTION\nc = 3\n\tif c:\n\t\t### BEGIN "
        "SOLUTION\n\t\td = 4\n\t\t### END SOLUTION"
    )
    cells = [
        new_code_cell(regions, metadata=grader("a", solution=True)),
        new_code_cell("x = 1", metadata=grader("b", solution=True)),
        new_code_cell("x = 2", metadata=grader("c")),
    ]
    path = tmp_path / "in.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    made = read(student(path, tmp_path / "out.ipynb")).cells
    stub = "# YOUR CODE HERE\n{0}raise NotImplementedError()"
    assert (
        made[0].source == f"a = 1\n{stub.format('')}\nc = 3\n\tif c:\n\t\t{stub.format(chr(9) * 2)}"
    )
    assert made[1].source == stub.format("")
    assert made[2].source == "x = 2" and made[2].metadata.editable is False


def test_each_exercise_of_the_student_version_raises_and_nothing_else(built, tmp_path):
    notebook = read(student(built, tmp_path / "s.ipynb"))
    names, raised = {}, []
    for cell in notebook.cells[3:5]:
        try:
            exec(cell.source, names)
        except NotImplementedError:
            raised.append(cell.metadata.nbgrader.grade_id)
    assert raised == ["check_half"]


@pytest.mark.parametrize(
    ("text", "metadata", "message"),
    [
        (
            "### BEGIN SOLUTION\n### BEGIN SOLUTION\n### END SOLUTION",
            grader("a", solution=True),
            "inside of another",
        ),
        ("### BEGIN SOLUTION", grader("a", solution=True), "without its END"),
        ("### BEGIN SOLUTION\n### END SOLUTION", {}, "without nbgrader's solution metadata"),
        (
            "### BEGIN HIDDEN TESTS\n### END HIDDEN TESTS",
            grader("a"),
            "without nbgrader's grade metadata",
        ),
    ],
)
def test_student_rejects_broken_markers(text, metadata, message, tmp_path):
    path = tmp_path / "in.ipynb"
    nbformat.write(
        new_notebook(cells=[new_markdown_cell("#"), new_code_cell(text, metadata=metadata)]), path
    )
    with pytest.raises(LessonError, match=rf"in.ipynb: cell 2: .*{message}"):
        student(path, tmp_path / "out.ipynb")
    assert not (tmp_path / "out.ipynb").exists()


def test_start_takes_the_number_of_a_lesson(built, tmp_path, monkeypatch):
    monkeypatch.setattr("trackkit.course.assignments.LESSONS", tmp_path / "lessons")
    (tmp_path / "lessons").mkdir()
    (tmp_path / "lessons" / built.name).write_bytes(built.read_bytes())
    assert start("0", tmp_path / "work").name == "00_half.ipynb"
    with pytest.raises(LessonError, match="has no lesson 03; there are: 00"):
        start("3", tmp_path / "work")
    with pytest.raises(LessonError, match=r"there is no notebook nowhere\.ipynb"):
        start("nowhere.ipynb", tmp_path / "work")


def test_start_never_overwrites_work(built, tmp_path):
    copy_of = start(built, tmp_path / "work")
    assert (
        copy_of == tmp_path / "work" / "00_half.ipynb" and "YOUR CODE HERE" in copy_of.read_text()
    )
    copy_of.write_text("my work")
    with pytest.raises(LessonError, match="already there"):
        start(built, tmp_path / "work")
    assert copy_of.read_text() == "my work"


# ---- solutions against the library ----


def test_solution_cells_are_the_code_between_the_markers(built):
    cells = solution_cells(built)
    assert list(cells) == ["half"] and "SOLUTION" not in cells["half"]
    names = {}
    exec(cells["half"], names)
    assert names["half"](4) == 2


def hann_window(size: int) -> torch.Tensor:
    """Of the text below."""
    hann = torch.hann_window(size, periodic=False)
    window = hann[:, None] * hann[None, :]
    return window / window.sum()


def test_same_code_ignores_words_but_not_code():
    text = """
def hann_window(size):
    # a comment
    hann = torch.hann_window(size, periodic=False)

    window = (hann[:, None]
              * hann[None, :])
    return window / window.sum()
"""
    assert same_code(text, hann_window)
    assert not same_code(text.replace("window.sum()", "window.max()"), hann_window)
    assert not same_code(text.replace("(size):", "(size, extra):"), hann_window)
    with pytest.raises(ValueError, match="no function cross_correlation"):
        same_code(text, cross_correlation)


# ---- files that are no lessons ----

SECRET = "root:x:0:0"


def start_in(folder):
    return lambda path: start(path, folder / "work")


COMMANDS = {
    "start": start_in,
    "student": lambda folder: lambda path: student(path, folder / "student.ipynb"),
    "build": lambda folder: lambda path: build(path),
    "check": lambda folder: lambda path: check(path),
}


def changed(change):
    """A lesson's JSON after a change, as a file has it."""
    content = json.loads(nbformat.writes(lesson()))
    change(content, content["cells"])
    return json.dumps(content).encode()


def nested(levels):
    return b'{"cells": [], "nbformat": 4, "nbformat_minor": 5, "metadata": {"x": %s}}' % (
        b"[" * levels + b"]" * levels
    )


NO_LESSONS = {
    "text": (f"{SECRET}\n".encode(), "not a Jupyter notebook"),
    "bytes": (bytes(range(256)), "not a Jupyter notebook"),
    "nothing": (b"", "not a Jupyter notebook"),
    "other JSON": (f'{{"{SECRET}": 1}}'.encode(), "not a Jupyter notebook"),
    "a list": (f'["{SECRET}"]'.encode(), "not a Jupyter notebook"),
    "half of it": (changed(lambda nb, cells: None)[:-50], "not a Jupyter notebook"),
    "a number of 5000 digits": (b'{"cells": ' + b"1" * 5000 + b"}", "not a Jupyter notebook"),
    "endless nesting": (b"[" * 200_000, "not a Jupyter notebook"),
    "deep nesting": (nested(500), "more than 100 levels"),
    "format 3": (changed(lambda nb, cells: nb.update(nbformat=3)), "not of notebook format 4"),
    "format null": (changed(lambda nb, cells: nb.update(nbformat=None)), "notebook format 4"),
    "minor null": (changed(lambda nb, cells: nb.update(nbformat_minor=None)), "nbformat_minor"),
    "cells null": (changed(lambda nb, cells: nb.update(cells=None)), "at cells"),
    "a cell null": (changed(lambda nb, cells: cells.append(None)), "at cells 7"),
    "a cell of text": (changed(lambda nb, cells: cells.append(SECRET)), "at cells 7"),
    "metadata null": (changed(lambda nb, cells: nb.update(metadata=None)), "at metadata"),
    "metadata missing": (changed(lambda nb, cells: nb.pop("metadata")), "at its top"),
    "cell metadata null": (changed(lambda nb, cells: cells[1].update(metadata=None)), "cells 2"),
    "cell type 7": (changed(lambda nb, cells: cells[1].update(cell_type=7)), "at cells 2"),
    "source of numbers": (changed(lambda nb, cells: cells[1].update(source=[1])), "at cells 2"),
    "source missing": (changed(lambda nb, cells: cells[0].pop("source")), "at cells 1"),
    "outputs null": (changed(lambda nb, cells: cells[1].update(outputs=None)), "at cells 2"),
    "odd output": (changed(lambda nb, cells: cells[1].update(outputs=[{"a": 1}])), "cells 2"),
    "id a list": (changed(lambda nb, cells: cells[1].update(id=[])), "at cells 2 id"),
    "nbgrader null": (
        changed(lambda nb, cells: cells[3]["metadata"].update(nbgrader=None)),
        "at cells 4 metadata nbgrader",
    ),
    "grade_id a list": (
        changed(lambda nb, cells: cells[3]["metadata"]["nbgrader"].update(grade_id=[SECRET])),
        "at cells 4 metadata nbgrader",
    ),
    "half a surrogate": (
        changed(lambda nb, cells: cells[0].update(source="\ud800")),
        "half of a surrogate pair",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", NO_LESSONS)
def test_a_file_that_is_no_lesson_is_named_in_one_line_without_its_content(kind, command, tmp_path):
    data, says = NO_LESSONS[kind]
    path = tmp_path / "odd.ipynb"
    path.write_bytes(data)
    with pytest.raises(LessonError, match=says) as caught:
        COMMANDS[command](tmp_path)(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and SECRET not in text
    assert path.read_bytes() == data and os.listdir(tmp_path) == ["odd.ipynb"]


@pytest.mark.parametrize("command", COMMANDS)
def test_paths_that_are_no_files_are_named(command, tmp_path, monkeypatch):
    run = COMMANDS[command](tmp_path / "out")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "pipe", tmp_path / ("x" * 300)):
        with pytest.raises(LessonError, match=rf"there is no notebook {path}"):
            run(path)
    (tmp_path / "closed.ipynb").write_text("{}")
    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(LessonError, match=r"closed.ipynb cannot be read: Permission denied"):
        run(tmp_path / "closed.ipynb")


def denied(*args, **options):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "large.ipynb", "wb") as file:
        file.truncate(10**9)
    with pytest.raises(LessonError, match=r"large.ipynb: more than 50 MB"):
        check(tmp_path / "large.ipynb")


def test_the_command_prints_one_line_for_a_file_of_the_system(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["start"], ["build"], ["check"]):
        assert main(["lessons", *words, "/etc/passwd"]) == 1
        error = capsys.readouterr().err
        assert error == "trackkit lessons: /etc/passwd: not a Jupyter notebook (.ipynb)\n"
    assert os.listdir() == []


def test_an_older_notebook_without_ids_is_handed_out(tmp_path):
    content = json.loads(nbformat.writes(lesson()))
    content["nbformat_minor"] = 2
    for cell in content["cells"]:
        del cell["id"]
    (tmp_path / "old.ipynb").write_text(json.dumps(content))
    assert any("ids are missing" in finding.message for finding in lint(tmp_path / "old.ipynb"))
    made = read(student(tmp_path / "old.ipynb", tmp_path / "made.ipynb"))
    assert made.nbformat_minor == 5 and made.cells[0].id == "cell-1"


@pytest.mark.parametrize("number", ["7", "007", "9" * 5000])
def test_numbers_of_no_lesson_name_those_there_are(number, tmp_path):
    with pytest.raises(LessonError, match="there are: 00, 01"):
        start(number, tmp_path)
    with pytest.raises(LessonError, match="there is no notebook ²"):
        start("²", tmp_path)


def test_output_places_that_are_in_the_way_are_named(built, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for out in ("file/x.ipynb", "folder"):
        with pytest.raises(TrackkitError, match=rf"cannot write .*{out}"):
            student(built, tmp_path / out)
    with pytest.raises(TrackkitError, match=r"file is a file where a folder is needed"):
        start(built, tmp_path / "file")
    (tmp_path / built.name).symlink_to("nowhere")
    with pytest.raises(LessonError, match="already there"):
        start(built, tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_student_version_never_replaces_the_lesson(built, tmp_path):
    path = tmp_path / "a.ipynb"
    path.write_bytes(built.read_bytes())
    (tmp_path / "b.ipynb").symlink_to(path)
    for out in (path, tmp_path / "b.ipynb"):
        with pytest.raises(LessonError, match="is the lesson itself"):
            student(path, out)
    assert path.read_bytes() == built.read_bytes()


def test_odd_but_valid_metadata_is_a_finding_and_no_traceback(built, tmp_path):
    for about in (None, 3, {"alt": None}, {"alt": ["white"]}):
        notebook = copy.deepcopy(read(built))
        code_cell(notebook, 0).outputs = [
            new_output("display_data", {"image/png": "iVBO"}, metadata={"image/png": about})
        ]
        (tmp_path / "odd.ipynb").write_text(nbformat.v4.writes(notebook))
        with pytest.raises(LessonError, match="a picture without alt text"):
            check(tmp_path / "odd.ipynb")
    for text in ("x = '\0'", "(" * 500, "-" * 100_000 + "1"):
        notebook = copy.deepcopy(read(built))
        code_cell(notebook, 0).source = text
        (tmp_path / "odd.ipynb").write_text(nbformat.v4.writes(notebook))
        with pytest.raises(LessonError, match="not plain Python"):
            check(tmp_path / "odd.ipynb")


def test_a_kernel_that_dies_and_a_timeout_are_named(tmp_path):
    path = tmp_path / "dies.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("import os\nos._exit(1)")]), path)
    with pytest.raises(LessonError, match=r"dies.ipynb: the kernel died"):
        build(path)
    with pytest.raises(LessonError, match="--timeout 0"):
        build(path, timeout=0)
