"""What training is made of: stages, each a stretch with one loss, one kind of sample, one set of
trainable parameters.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from trackkit.errors import TrackkitError
from trackkit.frames import SampleSpec

SCALES = ("tiny", "laptop", "gpu", "paper")
HOLD_AND_FALL = (-1.5, 1.0)  # as a stage's cosine: three fifths at one rate, then it falls


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one loss, one kind of sample and one set of trainable parameters.

    Attributes:
        name: shown in the progress bar and the log.
        steps: optimiser steps. batch: samples in a step, over all processes together.
        sample: what a sample is.
        lr: learning rate at the start. It falls exponentially to `lr_end`; without `lr_end` it
            falls to a tenth after each of `drops` (steps of this stage), and without either it
            stays.
        cosine: the rate falls along half a cosine instead, `lr` at its top and `lr_end` at its
            bottom, of which the stage covers the part from the first to the second of these shares.
            (0, 1) is all of it; below 0 the rate stays at the top.
        schedule_steps: the exponential rate changes once in so many steps (an epoch, in the papers'
            words).
        warmup: steps over which the rate rises linearly from 0.
        rates: (pattern, factor): the rate of the parameters whose names match (`fnmatch`) is
            multiplied. The first pattern that matches counts.
        momentum: of SGD with weight decay; None means AdamW.
        weight_decay: on all trainable parameters.
        clip: largest gradient norm, or None.
        trainable: patterns (`fnmatch`) of parameter names; all others are frozen, with their norms'
            statistics.
        loss: handed to the tracker's `loss`.
    """

    name: str
    steps: int
    batch: int
    sample: SampleSpec
    lr: float
    lr_end: float | None = None
    drops: tuple[int, ...] = ()
    cosine: tuple[float, float] | None = None
    schedule_steps: int = 1
    warmup: int = 0
    rates: tuple[tuple[str, float], ...] = ()
    momentum: float | None = None
    weight_decay: float = 0.0
    clip: float | None = None
    trainable: tuple[str, ...] = ("*",)
    loss: str = ""

    def __post_init__(self):
        if min(self.steps, self.batch, self.schedule_steps) < 1:
            raise TrackkitError(
                f"stage {self.name}: steps, batch and schedule_steps must be at least 1"
            )
        if not 0 < (self.lr if self.lr_end is None else self.lr_end) <= self.lr:
            raise TrackkitError(
                f"stage {self.name}: need 0 < lr_end <= lr, got {self.lr_end} and {self.lr}"
            )
        if self.drops and (self.lr_end is not None or min(self.drops) < 1):
            raise TrackkitError(
                f"stage {self.name}: drops are steps from 1 on, in place of lr_end; got "
                f"{self.drops}, {self.lr_end}"
            )
        if self.cosine and (self.lr_end is None or not self.cosine[0] < self.cosine[1] <= 1):
            raise TrackkitError(
                f"stage {self.name}: a cosine needs lr_end and two shares up to 1, the smaller "
                f"first; got {self.cosine}"
            )
        if any(factor <= 0 for _, factor in self.rates):
            raise TrackkitError(
                f"stage {self.name}: rates must be factors above 0 (`trainable` freezes); got "
                f"{self.rates}"
            )

    def rate(self, step: int) -> float:
        """Learning rate of a step, 0-based."""
        if self.lr_end is None:
            fall = 0.1 ** sum(step >= drop for drop in self.drops)
        elif self.cosine:
            first, last = self.cosine
            share = max(0.0, first + (last - first) * step / self.steps)
            end = self.lr_end / self.lr
            fall = end + (1 - end) * (1 + math.cos(math.pi * share)) / 2
        else:
            epochs = math.ceil(self.steps / self.schedule_steps)
            fall = (self.lr_end / self.lr) ** (step // self.schedule_steps / epochs)
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * fall * rise

    def resized(self, steps: int) -> Stage:
        """The same stage in another number of steps; its warm-up and its drops keep their shares of
        them.
        """
        drops = tuple(max(1, round(drop * steps / self.steps)) for drop in self.drops)
        return dataclasses.replace(
            self, steps=steps, drops=drops, warmup=round(self.warmup * steps / self.steps)
        )


def held(stages: list[Stage]) -> list[Stage]:
    """The stages without the fall of the rate at their end, for a network that is to learn on."""
    return [dataclasses.replace(s, lr_end=None, drops=(), cosine=None) for s in stages]


def shortened(stages: list[Stage], steps: int) -> list[Stage]:
    """The stages in the same proportion, the longest of them with `steps` steps (>= 1, else
    TrackkitError).
    """
    if steps < 1:
        raise TrackkitError(f"the number of steps must be at least 1; got {steps}")
    longest = max(stage.steps for stage in stages)
    return [stage.resized(max(1, round(stage.steps * steps / longest))) for stage in stages]
