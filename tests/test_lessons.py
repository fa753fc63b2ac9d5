"""The lessons themselves: their form, their exercises, and that they and the library do not drift
apart.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from trackkit import attention, boxes, losses
from trackkit.course import lessons
from trackkit.course.checks import exercises
from trackkit.trackers import siamfc

ROOT = Path(__file__).parent.parent
LESSONS = sorted((ROOT / "lessons").glob("*.ipynb"))

# The library functions that an exercise builds and that stand on their own; the others (NCC by
# Fourier transform, the geometry of windows) are the same numbers by another way, which `check` in
# the lesson proves.
BUILT = {
    "iou": boxes.iou,
    "cross_correlation": siamfc.cross_correlation,
    "label_map": siamfc.label_map,
    "balanced_bce": losses.balanced_bce,
    "peak_shift": siamfc.peak_shift,
    "damped": siamfc.damped,
    "sine_position": attention.sine_position,
    "giou": boxes.giou,
}

pytestmark = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)


def sources(path: Path) -> str:
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)


def test_form(path):
    """Executed in order, no stderr, no widget state, alt texts, size, exercise metadata: see
    course/lint.py.
    """
    assert [str(finding) for finding in lessons.lint(path)] == []


def test_at_least_three_exercises_each_with_a_check(path):
    solved = lessons.solution_cells(path)
    checked = re.findall(r'check\("(\w+)"', sources(path))
    assert len(set(checked)) >= 3
    assert set(checked) <= set(exercises())
    assert len(solved) >= len(set(checked))


def test_solutions_are_the_librarys_code(path):
    for name, source in lessons.solution_cells(path).items():
        if name in BUILT:
            assert lessons.same_code(source, BUILT[name]), (
                f"{name}: the lesson's solution and the library differ"
            )


def test_student_version_has_no_answers(path, tmp_path):
    out = lessons.student(path, tmp_path / path.name)
    text = sources(out)
    assert (
        "BEGIN SOLUTION" not in text
        and "BEGIN HIDDEN TESTS" not in text
        and not re.search(r"check\(.*seed=1\)", text)
    )
    stubs = {
        c.metadata.nbgrader.grade_id: c.source
        for c in nbformat.read(out, as_version=4).cells
        if "nbgrader" in c.metadata
    }
    for cell in nbformat.read(path, as_version=4).cells:
        for answer in re.findall(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", cell.source, re.S):
            kept = {line.strip() for line in stubs[cell.metadata.nbgrader.grade_id].splitlines()}
            assert "raise NotImplementedError()" in kept
            assert not kept & {line.strip() for line in answer.splitlines() if line.strip()}


def test_named_in_the_readme(path):
    assert f"(lessons/{path.name})" in (ROOT / "README.md").read_text()
