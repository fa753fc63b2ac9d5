"""Checks that name the mistake: `check("iou", iou)` compares a learner's function with the
library's.

An exercise has a reference (the library's function), seeded inputs from small to large, and the
mistakes that learners are likely to make, each as a function that makes it and a hint. When an
answer is wrong and equals what one of those functions returns on every input, the hint is shown;
otherwise the first, so the smallest, input on which it is wrong. The exercises of each lesson are
registered in `trackkit.course.exercises`.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
    """

    name: str
    reference: Callable[..., Any]
    inputs: Callable[[torch.Generator], list[tuple]]
    mistakes: tuple[Mistake, ...] = ()
    tolerance: float = 1e-5


_EXERCISES: dict[str, Exercise] = {}


def exercise(
    name: str,
    *,
    reference: Callable[..., Any],
    mistakes: dict[str, Callable[..., Any]],
    tolerance: float = 1e-5,
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
        _EXERCISES[name] = Exercise(name, reference, inputs, pairs, tolerance)
        return inputs

    return register


def exercises() -> dict[str, Exercise]:
    """All registered exercises by name."""
    importlib.import_module("trackkit.course.exercises")
    return dict(_EXERCISES)


def check(name: str, function: Callable[..., Any], seed: int = 0) -> None:
    """Compare a learner's function with the library's and print one line if they agree.

    Hidden tests pass another `seed`, so an answer that only knows the visible inputs does not pass.

    Raises CheckFailed with a hint or the smallest failing input; NotDone while the function raises
    NotImplementedError. Any other exception of the function comes out as it is.
    """
    known = exercises()
    if name not in known:
        raise ValueError(f"there is no exercise {name!r}; there are: {', '.join(sorted(known))}")
    run_check(known[name], function, seed)


def run_check(item: Exercise, function: Callable[..., Any], seed: int = 0) -> None:
    """`check` for an `Exercise` that need not be registered."""
    cases = item.inputs(torch.Generator().manual_seed(seed))
    expected = [item.reference(*copy.deepcopy(case)) for case in cases]
    answers = [_answer(item, function, case) for case in cases]
    problems = [_difference(a, e, item.tolerance) for a, e in zip(answers, expected, strict=True)]
    if not any(problems):
        print(f"{item.name}: correct on {len(cases)} inputs")
        return
    for mistake in item.mistakes:
        wrong = [mistake.function(*copy.deepcopy(case)) for case in cases]
        if not any(_difference(a, w, item.tolerance) for a, w in zip(answers, wrong, strict=True)):
            raise CheckFailed(f"{item.name}: not yet. {mistake.hint}")
    index = next(i for i, problem in enumerate(problems) if problem)
    inputs = _describe_inputs(item.reference, cases[index])
    raise CheckFailed(
        f"{item.name}: not yet. Wrong on input {index + 1} of {len(cases)}: "
        f"{problems[index]}\n{inputs}\n"
        f"  expected {_describe(expected[index])}\n  got      {_describe(answers[index])}"
    )


def _answer(item: Exercise, function: Callable[..., Any], case: tuple) -> Any:
    try:
        answer = function(*copy.deepcopy(case))
    except NotImplementedError:
        raise NotDone(
            f"{item.name}: not done yet. Replace `raise NotImplementedError()` with your code and "
            "run both cells."
        ) from None
    if answer is None:
        raise CheckFailed(f"{item.name}: your function returned None. Is the `return` missing?")
    return answer


def _parts(value: Any) -> list[Any]:
    """The numbers of an answer: a tensor, a number, a tuple of them, or a dataclass of them."""
    if dataclasses.is_dataclass(value):
        value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    if isinstance(value, (tuple, list)):
        return [part for entry in value for part in _parts(entry)]
    return [value]


def _difference(answer: Any, expected: Any, tolerance: float) -> str:
    """What is wrong with an answer, in words; empty if nothing is."""
    got, want = _parts(answer), _parts(expected)
    if len(got) != len(want):
        return f"{len(want)} values were expected and {len(got)} returned."
    for g, w in zip(got, want, strict=True):
        problem = _tensor_difference(g, w, tolerance)
        if problem:
            return problem
    return ""


def _tensor_difference(answer: Any, expected: Any, tolerance: float) -> str:
    number = (int, float, bool, np.number)
    if not isinstance(answer, (Tensor, *number)):
        return f"a {type(answer).__name__} was returned; a torch tensor or number was expected."
    got, want = torch.as_tensor(answer), torch.as_tensor(expected)
    if got.shape != want.shape:
        return f"the shape is {_shape(got)}; {_shape(want)} was expected."
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
