"""The machinery of checks, on a toy exercise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

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
        (lambda v: v.numpy() / 2, "a ndarray was returned; a torch tensor"),
        (lambda v: (v / 2, v), "1 values were expected and 2 returned"),
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


def test_a_learners_own_exception_is_not_touched():
    with pytest.raises(ZeroDivisionError):
        run_check(TOY, lambda v: 1 / 0)


def test_a_function_that_changes_its_input_does_not_disturb_the_check():
    def in_place(values):
        return values.div_(2)

    run_check(TOY, in_place)


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
