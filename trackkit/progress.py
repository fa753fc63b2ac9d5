"""The progress bars of all commands: a bar on a terminal or in a notebook, elsewhere a line now and
then.

Always `with bar(...) as shown:`, so that a bar is closed before an error is printed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm
from tqdm.std import tqdm as plain

# between two lines where a bar would fill a log file with thousands; a shorter job writes none
SECONDS = 30.0
_IN_NOTEBOOK = any(cls.__name__ == "tqdm_notebook" for cls in tqdm.__mro__)


class _Lines(plain):
    """Each display is a line of its own."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        self.fp.write(f"{msg or self}\n")
        self.fp.flush()
        return True

    def close(self) -> None:
        self.delay = math.inf  # else it would write one more line, and an empty one
        super().close()


def bar(steps: Iterable | None = None, *, shown: bool | None = True, **options: Any) -> plain:
    """A tqdm with its `options` (total, initial, desc, unit). `shown` None: not in a notebook."""
    if shown is False or (shown is None and _IN_NOTEBOOK):
        return tqdm(steps, disable=True, **options)
    if _IN_NOTEBOOK or sys.stderr.isatty():
        return tqdm(steps, **options)
    every = {"mininterval": SECONDS, "maxinterval": SECONDS, "miniters": 1, "delay": SECONDS}
    return _Lines(
        steps,
        **every,
        **options,
        bar_format="{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed}"
        " done, {remaining} to go{postfix}",
    )
