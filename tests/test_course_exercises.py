"""Every registered exercise accepts the library's function, names each mistake, and is not fooled
by noise.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from trackkit.course.checks import CheckFailed, NotDone, check, exercises

EXERCISES = exercises()
MISTAKES = [
    (name, index) for name, item in EXERCISES.items() for index in range(len(item.mistakes))
]


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_librarys_function_passes(name, seed, capsys):
    check(name, EXERCISES[name].reference, seed)
    assert (
        capsys.readouterr().out
        == f"{name}: correct on {len(EXERCISES[name].inputs(torch.Generator()))} inputs\n"
    )


@pytest.mark.parametrize(("name", "index"), MISTAKES)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_mistake_gets_exactly_its_hint(name, index, seed):
    mistake = EXERCISES[name].mistakes[index]
    with pytest.raises(CheckFailed) as failure:
        check(name, mistake.function, seed)
    assert str(failure.value) == f"{name}: not yet. {mistake.hint}"


@pytest.mark.parametrize("name", EXERCISES)
def test_random_answers_get_the_smallest_failing_input(name):
    reference = EXERCISES[name].reference
    generator = torch.Generator().manual_seed(3)

    def noisy(value):
        if dataclasses.is_dataclass(value):
            return dataclasses.replace(value, **{k: noisy(v) for k, v in vars(value).items()})
        return (
            torch.as_tensor(value).double()
            + torch.rand(torch.as_tensor(value).shape, generator=generator)
            + 0.1
        )

    with pytest.raises(CheckFailed, match=rf"^{name}: not yet. Wrong on input 1 of ") as failure:
        check(name, lambda *args: noisy(reference(*args)))
    assert "expected" in str(failure.value) and "got" in str(failure.value)
    assert "Mistake" not in str(failure.value) and len(str(failure.value)) < 1500


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_not_done_yet_says_so(name):
    def stub(*args):
        raise NotImplementedError

    with pytest.raises(NotDone, match=f"{name}: not done yet"):
        check(name, stub)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_forgotten_return_says_so(name):
    with pytest.raises(CheckFailed, match="return"):
        check(name, lambda *args: None)


def test_nothing_but_finite_numbers_comes_from_the_references():
    for item in EXERCISES.values():
        for case in item.inputs(torch.Generator().manual_seed(0)):
            assert torch.isfinite(torch.as_tensor(item.reference(*case))).all(), item.name
