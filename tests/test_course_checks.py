"""The machinery of checks, on a toy exercise."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from trackkit.boxes import iou
from trackkit.course import checks
from trackkit.course.checks import (
    CheckFailed,
    Exercise,
    Mistake,
    NotDone,
    check,
    exercise,
    run_check,
)


def halves(values):
    return values / 2


def inputs(generator):
    return [(torch.tensor([2.0, 4.0]),), (torch.rand(4, 20, generator=generator),)]


TOY = Exercise(
    "halves",
    halves,
    inputs,
    (Mistake(lambda v: v * 2, "You doubled."), Mistake(lambda v: v / 0, "You divided by zero.")),
)


def failure(function, item=TOY):
    with pytest.raises(CheckFailed) as caught:
        run_check(item, function)
    return str(caught.value)


def test_success_prints_one_line(capsys):
    run_check(TOY, lambda v: 0.5 * v)
    assert capsys.readouterr().out == "halves: correct on 2 inputs\n"


def test_a_known_mistake_is_named():
    assert failure(lambda v: v + v) == "halves: not yet. You doubled."
    assert failure(lambda v: v * torch.inf) == "halves: not yet. You divided by zero."


def test_an_unknown_mistake_shows_the_smallest_failing_input():
    text = failure(lambda v: v / 2 + (v > 3) * 1.0)
    assert text == (
        "halves: not yet. Wrong on input 1 of 2: the largest difference is at [1]: 2 was expected, "
        "3 returned.\n"
        "  values = [2, 4]\n  expected [1, 2]\n  got      [1, 3]"
    )
    text = failure(lambda v: v / 2 if v.ndim == 1 else v)
    assert "Wrong on input 2 of 2" in text and "tensor of shape (4, 20)" in text


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda v: v[:1] / 2, r"the shape is \(1,\); \(2,\) was expected"),
        (lambda v: (v / 2).sum(), r"that of a single number, \(\); \(2,\) was expected"),
        (lambda v: "half", "a str was returned; a torch tensor"),
        (lambda v: (v / 2, v[:1]), "1 values were expected and 2 returned"),
        (lambda v: torch.where(v > 3, torch.nan, v / 2), "1 of 2 numbers are NaN or infinite"),
        (lambda v: None, "returned None. Is the `return` missing"),
    ],
)
def test_other_answers_get_a_message_of_their_own(function, words):
    with pytest.raises(CheckFailed, match=words):
        run_check(TOY, function)


def test_not_done_yet():
    def stub(values):
        raise NotImplementedError()

    with pytest.raises(NotDone, match="halves: not done yet") as caught:
        run_check(TOY, stub)
    assert isinstance(caught.value, (NotImplementedError, AssertionError))


def test_a_learners_exception_comes_with_its_line_and_the_input():
    def broken(values):
        wanted = 0
        return values[0] + 1 // wanted

    text = failure(broken)
    assert text.startswith("halves: your function raised ZeroDivisionError: ")
    assert text.count("\n") == 2 and "return values[0] + 1 // wanted" in text
    assert text.endswith("values = [2, 4]")


def test_lists_and_arrays_of_right_numbers_pass():
    run_check(TOY, lambda v: (v / 2).tolist())
    run_check(TOY, lambda v: v.numpy() / 2)


def test_a_mask_of_numbers_is_no_mask():
    item = Exercise("mask", lambda v: v > 3, inputs)
    assert "True and False were expected" in failure(lambda v: (v > 3).float(), item)
    run_check(item, lambda v: torch.where(v > 3, True, False))


def test_a_function_that_changes_its_input_is_told_so():
    assert "Your function changes its input values" in failure(lambda v: v.div_(2))
    item = Exercise("in place", lambda v: v.div_(2), inputs)
    run_check(item, lambda v: v.div_(2))  # where the exercise is to do so


def test_a_mistake_is_named_although_one_input_differs():
    item = Exercise("three", halves, lambda g: [*inputs(g), (torch.ones(2),)], TOY.mistakes)
    assert failure(lambda v: v * 2 if v.mean() != 1 else v * 3, item).endswith("You doubled.")
    assert "Wrong on input 1" in failure(lambda v: v * 2 if v.ndim == 1 else v * 3)


def test_cut_and_wrong_gradients_are_found():
    item = Exercise("halves", halves, inputs, gradient=True)
    run_check(item, halves)
    for cut in (lambda v: (v / 2).detach(), lambda v: torch.tensor((v / 2).tolist())):
        assert "no gradient flows back to values" in failure(cut, item)
    assert "not what flows back to values" in failure(lambda v: v - v.detach() / 2, item)


def in_a_notebook(monkeypatch, name, function):
    """`check` as in a learner's notebook, where nobody counts."""
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)
    monkeypatch.delenv("TRACKKIT_CHECKS", raising=False)
    shell = type("Shell", (), {"kernel": None})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    return check(name, function)


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr(checks, "_solved", {})
    monkeypatch.setattr(checks, "_tries", Counter())


def test_in_a_notebook_run_all_goes_on_with_the_librarys_function(monkeypatch, session, capsys):
    def stub(a, b):
        raise NotImplementedError

    def mine(a, b):
        return iou(a, b)

    assert in_a_notebook(monkeypatch, "iou", stub) is iou
    assert "The cells below go on with the library's iou." in capsys.readouterr().out
    checks.summary()
    assert capsys.readouterr().out == "0 of 1 exercises solved; open: iou\n"
    assert in_a_notebook(monkeypatch, "iou", mine) is mine
    checks.summary()
    assert capsys.readouterr().out.endswith("1 of 1 exercises solved\n")


@pytest.mark.parametrize("grader", ["NBGRADER_EXECUTION", "TRACKKIT_CHECKS"])
def test_where_somebody_counts_a_wrong_answer_is_an_error(grader, monkeypatch, session):
    in_a_notebook(monkeypatch, "iou", lambda a, b: a)
    monkeypatch.setenv(grader, "strict")
    with pytest.raises(CheckFailed):
        check("iou", lambda a, b: a)


def test_the_solution_is_shown_after_three_tries(monkeypatch, session, capsys):
    for left in (3, 2, 1):
        checks.solution("iou")
        assert f"iou: {left} more tr" in capsys.readouterr().out
        in_a_notebook(monkeypatch, "iou", lambda a, b: a)
    assert 'solution("iou") shows it.' in capsys.readouterr().out
    checks.solution("iou")
    assert capsys.readouterr().out.startswith("def iou(")


def test_numbers_tuples_and_dataclasses_are_compared():
    @dataclass
    class Pair:
        a: torch.Tensor
        b: float

    item = Exercise("pair", lambda x: Pair(torch.ones(2) * x, x), lambda generator: [(3.0,)])
    run_check(item, lambda x: Pair(torch.full((2,), 3.0), np.float64(3)))
    assert "the number differs" in failure(lambda x: Pair(torch.ones(2) * x, 2.0), item)


def test_seed_changes_the_inputs():
    item = Exercise("seed", halves, inputs)
    seen = set()
    for seed in (0, 1):
        run_check(item, lambda v: seen.add(float(v.flatten()[-1])) or v / 2, seed)
    assert len(seen) == 3  # the first input is fixed


def test_unknown_and_repeated_names():
    with pytest.raises(ValueError, match=r"no exercise 'nonsense'; there are: .*iou"):
        check("nonsense", halves)
    with pytest.raises(ValueError, match="'iou' is registered twice"):
        exercise("iou", reference=halves, mistakes={})(inputs)


def test_a_notebook_shows_only_the_message(capsys):
    shell = InteractiveShell()
    try:
        raise CheckFailed("halves: not yet. You doubled.")
    except CheckFailed:
        shell.showtraceback()
    assert capsys.readouterr().out.strip() == "halves: not yet. You doubled."
