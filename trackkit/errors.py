"""The errors that trackkit raises on purpose: each message names the file or value and says what to
do.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class TrackkitError(ValueError):
    """Base of all errors that a user can mend; the command line prints them without a traceback."""


class DataError(TrackkitError):
    """A data set, sequence, frame, label file or box that cannot be used as it is."""


class CheckpointError(TrackkitError):
    """A checkpoint or result that is missing, damaged, or of another tracker or version."""


class Stopped(KeyboardInterrupt):
    """A signal has ended a training, which was saved first; `signal` is its number."""

    def __init__(self, text: str, signal: int):
        super().__init__(text)
        self.signal = int(signal)


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`; `above` and `below` leave the ends out. For
    `check_fields`.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        low = self.low < value if self.above else self.low <= value
        high = value < self.high if self.below else value <= self.high
        return low and high and abs(value) <= sys.float_info.max  # so neither NaN nor infinite

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {_digits(self.low)}"
        high = f"{'below' if self.below else 'at most'} {_digits(self.high)}"
        if math.isinf(self.high):
            return low
        return high if math.isinf(self.low) else f"{low} and {high}"


def _digits(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and abs(value) > 10**6 else f"{value:g}"


def nearest(name: str, names: Iterable[str]) -> str:
    """ " (did you mean X?)" if one of the names is like this one, else nothing; for messages."""
    found = difflib.get_close_matches(str(name), list(names), 1)
    return f" (did you mean {found[0]}?)" if found else ""


def check_fields(config: Any, **rules: Range | tuple) -> None:
    """Check fields of a config: each rule is a `Range` or a tuple of choices.

    Of a field that is a tuple each entry is checked; fields declared int take whole numbers only,
    those declared bool, named or not, are True or False. Raises ValueError with the field, what it
    must be, and what it is.
    """
    types = {field.name: str(field.type) for field in dataclasses.fields(config)}
    for name, kind in types.items():
        value = getattr(config, name)
        if kind == "bool" and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False; got {value!r}")
        if kind.startswith("tuple") != isinstance(value, (tuple, list)):
            kind = "a list" if kind.startswith("tuple") else "a single value"
            raise ValueError(f"{name} must be {kind}; got {value!r}")
    for name, rule in rules.items():
        value = getattr(config, name)
        for entry in _entries(value):
            whole = not types[name].startswith(("int", "tuple[int")) or isinstance(entry, int)
            if not (entry in rule and whole):
                must = (
                    str(rule) if isinstance(rule, Range) else f"one of {', '.join(map(str, rule))}"
                )
                kind = "" if whole else "a whole number, "
                raise ValueError(f"{name} must be {kind}{must}; got {value!r}")


def _entries(value: Any) -> list:
    """The entries of a tuple, nested or not, or the value itself."""
    if not isinstance(value, tuple):
        return [value]
    return [entry for part in value for entry in _entries(part)]
