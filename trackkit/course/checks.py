"""Checks that name the mistake: `iou = check("iou", iou)` compares a learner's function with the
library's and returns the one to go on with.

An exercise has a reference (the library's function), seeded inputs from small to large, and the
mistakes that learners are likely to make, each as a function that makes it and a hint. When an
answer is wrong and equals what one of those functions returns on every input, or on all but one of
several, the hint is shown; otherwise the first, so the smallest, input on which it is wrong. The
exercises of each lesson are registered in `trackkit.course.exercises`.

In a notebook a wrong answer is printed and does not stop Run All: the cells behind go on with the
library's function. Wherever somebody counts (nbgrader, `trackkit lessons build`, plain Python) it
is raised.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class CheckFailed(AssertionError):
    """A check that did not pass. A notebook shows only the message."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


class NotDone(CheckFailed, NotImplementedError):
    """The exercise still raises NotImplementedError."""


@dataclass(frozen=True)
class Mistake:
    """A likely wrong answer: `function` has the exercise's signature, `hint` tells the learner what
    is wrong.
    """

    function: Callable[..., Any]
    hint: str


@dataclass(frozen=True)
class Exercise:
    """What `check` needs to know about one exercise.

    Attributes:
        reference: the library's function. Its parameter names are used in messages.
        inputs: generator -> list of argument tuples, the smallest first, so that the shown failure
            is readable.
        mistakes: tried in this order; the first one that returns the learner's answers on all
            inputs is named.
        tolerance: allowed absolute difference, and relative to the largest expected number.
        gradient: whether what flows back through the answer is compared too, for what is trained.
    """

    name: str
    reference: Callable[..., Any]
    inputs: Callable[[torch.Generator], list[tuple]]
    mistakes: tuple[Mistake, ...] = ()
    tolerance: float = 1e-5
    gradient: bool = False


TRIES = 3  # wrong answers before `solution` shows the library's
_EXERCISES: dict[str, Exercise] = {}
_solved: dict[str, bool] = {}  # of this session, in the order in which they were checked
_tries: Counter[str] = Counter()


def exercise(
    name: str,
    *,
    reference: Callable[..., Any],
    mistakes: dict[str, Callable[..., Any]],
    tolerance: float = 1e-5,
    gradient: bool = False,
) -> Callable[[Callable], Callable]:
    """Register an exercise; decorates the function that makes its inputs.

        @exercise("iou", reference=boxes.iou, mistakes={"The boxes are read as corners.":
        iou_of_corners}) def _(generator):
            return [(a, b), ...]  # argument tuples, the smallest first

    Raises ValueError when the name is taken.
    """

    def register(inputs: Callable[[torch.Generator], list[tuple]]) -> Callable:
        if name in _EXERCISES:
            raise ValueError(f"exercise {name!r} is registered twice")
        pairs = tuple(Mistake(function, hint) for hint, function in mistakes.items())
        _EXERCISES[name] = Exercise(name, reference, inputs, pairs, tolerance, gradient)
        return inputs

    return register


def exercises() -> dict[str, Exercise]:
    """All registered exercises by name."""
    importlib.import_module("trackkit.course.exercises")
    return dict(_EXERCISES)


def check(name: str, function: Callable[..., Any], seed: int = 0) -> Callable[..., Any]:
    """Compare a learner's function with the library's, print what came out, and return the function
    to go on with: the learner's if it is right, else the library's.

    Hidden tests pass another `seed`, so an answer that only knows the visible inputs does not pass.

    Outside of a notebook, under nbgrader and with TRACKKIT_CHECKS=strict a wrong answer raises:
    CheckFailed with a hint, the learner's own exception or the smallest failing input; NotDone
    while the function raises NotImplementedError. ValueError for an unknown exercise.
    """
    item = _known(name)
    try:
        run_check(item, function, seed)
    except CheckFailed as failure:
        _solved[name] = False
        _tries[name] += not isinstance(failure, NotDone)
        if _strict():
            raise
        print(f"{failure}\nThe cells below go on with the library's {name}.")
        if _tries[name] >= TRIES:
            print(f'solution("{name}") shows it.')
        return item.reference
    _solved.setdefault(name, True)
    _solved[name] |= seed == 0
    return function


def summary() -> None:
    """Print which of the exercises that were checked in this session are solved, which open."""
    opened = [name for name, solved in _solved.items() if not solved]
    print(f"{len(_solved) - len(opened)} of {len(_solved)} exercises solved", end="")
    print(f"; open: {', '.join(opened)}" if opened else "")


def solution(name: str) -> None:
    """Print the library's function for an exercise, after `TRIES` wrong answers in this session or
    a right one; before that, how many are left. ValueError for an unknown exercise.
    """
    left = TRIES - _tries[name]
    reference = _known(name).reference
    if left > 0 and not _solved.get(name):
        print(f"{name}: {left} more {'try' if left == 1 else 'tries'} first")
    else:
        print(inspect.getsource(reference))


def _known(name: str) -> Exercise:
    known = exercises()
    if name not in known:
        raise ValueError(f"there is no exercise {name!r}; there are: {', '.join(sorted(known))}")
    return known[name]


def _strict() -> bool:
    """Whether a wrong answer is an error: it is not where a learner works in a notebook."""
    graded = "NBGRADER_EXECUTION" in os.environ or os.environ.get("TRACKKIT_CHECKS") == "strict"
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return graded or not hasattr(shell, "kernel")


def run_check(item: Exercise, function: Callable[..., Any], seed: int = 0) -> None:
    """`check` for an `Exercise` that need not be registered; raises wherever it is called."""
    cases = item.inputs(torch.Generator().manual_seed(seed))
    given = [copy.deepcopy(case) for case in cases]
    expected = [item.reference(*case) for case in given]
    # an exercise may be about changing something
    free = [
        {i for i, (a, b) in enumerate(zip(case, used, strict=True)) if not _same(a, b)}
        for case, used in zip(cases, given, strict=True)
    ]
    answers = [_answer(item, function, *pair) for pair in zip(cases, free, strict=True)]
    problems = [_difference(a, e, item.tolerance) for a, e in zip(answers, expected, strict=True)]
    if not any(problems):
        if item.gradient:
            _check_gradients(item, function, cases)
        print(f"{item.name}: correct on {len(cases)} inputs")
        return
    if hint := _hint(item, cases, answers, problems):
        raise CheckFailed(f"{item.name}: not yet. {hint}")
    index = next(i for i, problem in enumerate(problems) if problem)
    inputs = _describe_inputs(item.reference, cases[index])
    raise CheckFailed(
        f"{item.name}: not yet. Wrong on input {index + 1} of {len(cases)}: "
        f"{problems[index]}\n{inputs}\n"
        f"  expected {_describe(expected[index])}\n  got      {_describe(answers[index])}"
    )


def _hint(item: Exercise, cases: list[tuple], answers: list[Any], problems: list[str]) -> str:
    """The hint of the mistake that gives these answers; else of one that gives them on all inputs
    but one, and on two wrong ones at least; else empty.
    """
    near = ""
    for mistake in item.mistakes:
        wrong = [mistake.function(*copy.deepcopy(case)) for case in cases]
        same = [not _difference(a, w, item.tolerance) for a, w in zip(answers, wrong, strict=True)]
        if all(same):
            return mistake.hint
        explained = sum(s and bool(p) for s, p in zip(same, problems, strict=True))
        if sum(same) == len(same) - 1 and explained >= 2:
            near = near or mistake.hint
    return near


def _answer(item: Exercise, function: Callable[..., Any], case: tuple, free: set[int]) -> Any:
    """The learner's answer. The arguments outside of `free` must come back as they were given."""
    given = copy.deepcopy(case)
    answer = _called(item, function, given, case)
    if answer is None:
        raise CheckFailed(f"{item.name}: your function returned None. Is the `return` missing?")
    names = list(inspect.signature(item.reference).parameters)
    for index, (before, after) in enumerate(zip(case, given, strict=True)):
        if index not in free and not _same(before, after):
            raise CheckFailed(
                f"{item.name}: not yet. Your function changes its input {names[index]}, which its "
                f"caller still needs. Make something new ({names[index]} - 1, not -= 1), or work "
                f"on a copy ({names[index]}.clone())."
            )
    return answer


def _called(item: Exercise, function: Callable[..., Any], given: tuple, case: tuple) -> Any:
    """function(*given). An exception of the learner's code becomes a CheckFailed with the line."""
    try:
        return function(*given)
    except NotImplementedError:
        raise NotDone(
            f"{item.name}: not done yet. Replace `raise NotImplementedError()` with your code and "
            "run both cells."
        ) from None
    except Exception as error:  # whatever it is, the learner wants to see where
        file = getattr(getattr(function, "__code__", None), "co_filename", None)
        own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        where = f"\n  line {own[-1].lineno}: {own[-1].line}" if own else ""
        raise CheckFailed(
            f"{item.name}: your function raised {type(error).__name__}: {error}{where}\n"
            f"{_describe_inputs(item.reference, case)}"
        ) from error


def _same(a: Any, b: Any) -> bool:
    """Whether an argument is still what it was, to the bit."""
    if isinstance(a, (Tensor, np.ndarray)):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, nn.Module):
        return _same(list(a.state_dict().values()), list(b.state_dict().values()))
    return True


def _check_gradients(item: Exercise, function: Callable[..., Any], cases: list[tuple]) -> None:
    """What flows back to the inputs, for a fixed random direction, is as in the reference."""
    names = list(inspect.signature(item.reference).parameters)
    for index, case in enumerate(cases):
        want, got = (_gradients(call, case) for call in (item.reference, function))
        for place, expected in want.items():
            answer = got.get(place)
            start = f"{item.name}: the numbers are right"
            if answer is None:
                raise CheckFailed(
                    f"{start}, but no gradient flows back to {names[place]}, so nothing could be "
                    "learned. What cuts it: detach(), item(), tolist(), numpy(), argmax, "
                    "torch.tensor(...) of a tensor?"
                )
            if problem := _tensor_difference(answer, expected, 100 * item.tolerance):
                raise CheckFailed(
                    f"{start}, but not what flows back to {names[place]} on input {index + 1}: "
                    f"{problem} Is a part of the computation cut off, by detach() perhaps?"
                )


def _gradients(function: Callable[..., Any], case: tuple) -> dict[int, Tensor]:
    """Argument's index -> gradient, of those that any comes to."""
    given = list(copy.deepcopy(case))
    leaves = {
        i: value.requires_grad_()
        for i, value in enumerate(given)
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    parts = [part for part in _parts(function(*given)) if getattr(part, "requires_grad", False)]
    if not parts:
        return {}
    generator = torch.Generator().manual_seed(0)
    total = sum((p * torch.rand(p.shape, generator=generator).to(p)).sum() for p in parts)
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {i: grad for i, grad in zip(leaves, found, strict=True) if grad is not None}


def _parts(value: Any) -> list[Any]:
    """The numbers of an answer: a tensor, a number, a tuple of them, or a dataclass of them."""
    if dataclasses.is_dataclass(value):
        value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    if isinstance(value, (tuple, list)):
        return [part for entry in value for part in _parts(entry)]
    return [value]


def _difference(answer: Any, expected: Any, tolerance: float) -> str:
    """What is wrong with an answer, in words; empty if nothing is."""
    if isinstance(answer, (list, tuple, np.ndarray)) and isinstance(expected, Tensor):
        answer = _as_tensor(answer)
    got, want = _parts(answer), _parts(expected)
    if len(got) != len(want):
        return f"{len(want)} values were expected and {len(got)} returned."
    for g, w in zip(got, want, strict=True):
        problem = _tensor_difference(g, w, tolerance)
        if problem:
            return problem
    return ""


def _as_tensor(answer: Any) -> Any:
    """Numbers in a list, a tuple or an array as a tensor; anything else as it is."""
    try:
        return torch.as_tensor(np.asarray(answer))
    except (TypeError, ValueError, RuntimeError):
        return answer


def _tensor_difference(answer: Any, expected: Any, tolerance: float) -> str:
    number = (int, float, bool, np.number)
    if not isinstance(answer, (Tensor, *number)):
        return f"a {type(answer).__name__} was returned; a torch tensor or number was expected."
    got, want = torch.as_tensor(answer), torch.as_tensor(expected)
    if got.shape != want.shape:
        return f"the shape is {_shape(got)}; {_shape(want)} was expected."
    if isinstance(expected, Tensor) and want.dtype == torch.bool != got.dtype:
        return f"True and False were expected (torch.bool), and {got.dtype} came."
    got, want = got.detach().double(), want.detach().double()
    if torch.isfinite(want).all() and not torch.isfinite(got).all():
        count = int((~torch.isfinite(got)).sum())
        return f"{count} of {got.numel()} numbers are NaN or infinite. Is there a division by zero?"
    if want.numel() == 0:
        return ""
    # a mistake may return NaN, and then so does the learner
    same = (got == want) | (got.isnan() & want.isnan())
    gap = torch.where(same, 0.0, (got - want).abs()).nan_to_num(nan=torch.inf)
    if gap.max() <= tolerance * max(1.0, float(want.nan_to_num().abs().max())):
        return ""
    if want.numel() == 1:
        return "the number differs."
    place = np.unravel_index(int(gap.argmax()), tuple(want.shape))
    at = ", ".join(str(int(i)) for i in place)
    return (
        f"the largest difference is at [{at}]: {want[place]:.4g} was expected, "
        f"{got[place]:.4g} "
        "returned."
    )


def _shape(value: Tensor) -> str:
    return "that of a single number, ()" if value.ndim == 0 else str(tuple(value.shape))


def _describe_inputs(reference: Callable[..., Any], case: tuple) -> str:
    names = list(inspect.signature(reference).parameters)
    return "\n".join(
        f"  {name} = {_describe(value)}" for name, value in zip(names, case, strict=False)
    )


def _describe(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        fields = ", ".join(f"{name}={_describe(getattr(value, name))}" for name in names)
        return f"{type(value).__name__}({fields})"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_describe(entry) for entry in value) + ")"
    if not isinstance(value, Tensor):
        return f"{value:.4g}" if isinstance(value, (float, np.floating)) else repr(value)
    if value.numel() <= 25:
        return _nested(value.detach().tolist())
    return (
        f"tensor of shape {tuple(value.shape)}, {float(value.min()):.4g} to "
        f"{float(value.max()):.4g}"
    )


def _nested(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_nested(entry) for entry in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
