"""Every number of every tracker's config: what makes no sense is refused, by its name."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from trackkit.errors import Range, check_fields, nearest
from trackkit.weights import TRACKERS

ODD = (math.nan, math.inf, -math.inf, -1, -255, 1e9, 10**9, 10**400, "3", None, True, ())


def put(value, odd):
    """`odd` in place of a number, or of the last number of a list."""
    if isinstance(value, tuple) and value:
        return (*value[:-1], put(value[-1], "()" if odd == () else odd))
    return odd


def numbers(config):
    kinds = {field.name: str(field.type) for field in dataclasses.fields(config)}
    return [name for name, kind in kinds.items() if "int" in kind or "float" in kind]


@pytest.mark.parametrize("name", TRACKERS)
def test_odd_numbers_are_refused_by_name_or_make_a_network(name):
    """None makes a network that cannot be built, as -255 channels or a billion layers."""
    cls, config = TRACKERS[name]
    for field in numbers(config):
        for odd in ODD:
            try:
                changed = dataclasses.replace(config, **{field: put(getattr(config, field), odd)})
            except ValueError as error:
                assert field in str(error), f"{odd} in {field}: {error}"
                continue
            assert odd not in ("3", True) and odd == odd and abs(odd or 0) < math.inf, field
            with torch.device("meta"):
                cls(changed)


def test_what_may_be_any_size_is_known():
    """All other numbers have an upper end too."""
    unlimited = set()
    for cls, config in TRACKERS.values():
        for field in numbers(config):
            try:
                dataclasses.replace(config, **{field: put(getattr(config, field), 10**9)})
                unlimited.add(f"{cls.Config.__name__}.{field}")
            except ValueError:
                pass
    names = {each.partition(".")[2] for each in unlimited}
    any_size = {"update_interval", "pretrained_blocks", "capacity", "epoch_steps", "seed"}
    assert names == {*any_size, "response_scale"}


def test_switches_are_true_or_false_and_lists_are_lists():
    _, config = TRACKERS["stark-tiny"]
    for odd in ("no", 1, None):
        with pytest.raises(ValueError, match="exact must be True or False"):
            dataclasses.replace(config, exact=odd)
    with pytest.raises(ValueError, match="width must be a single value"):
        dataclasses.replace(config, width=(64,))
    with pytest.raises(ValueError, match="channels must be a list"):
        dataclasses.replace(TRACKERS["siamfc"][1], channels=64)


def test_ranges_are_shown_in_full():
    assert str(Range(0, 2**32 - 1)) == "at least 0 and at most 4,294,967,295"
    assert str(Range(0, 0.5, above=True)) == "above 0 and at most 0.5"
    assert 10**400 not in Range(0) and math.nan not in Range() and True not in Range()


def test_the_nearest_name():
    assert nearest("siamfc-tny", TRACKERS) == " (did you mean siamfc-tiny?)"
    assert nearest("zzz", TRACKERS) == ""
    assert check_fields(TRACKERS["ncc"][1], template_size=Range(2)) is None
