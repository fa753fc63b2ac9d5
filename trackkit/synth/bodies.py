"""Bodies: the things in a procedural world, of one part or of several that swing at hinges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Part:
    """One rigid piece of a body, hinged at (x, y) in the body's square from -1 to 1.

    It reaches `length` from the hinge along `turn` (turns, 0.25 is down) and is `width` wide to
    each side of that line; it swings by up to `swing` turns, `phase` turns of the body's rhythm
    behind.
    """

    x: float
    y: float
    length: float
    width: float
    turn: float = 0.25
    swing: float = 0.0
    phase: float = 0.0
    plain: bool = True  # a limb or a trunk rather than a wavy blob
    dress: int = 0  # parts with the same number share a texture


# Their parts are drawn from the first to the last.
SKELETONS: dict[str, tuple[Part, ...]] = {
    "walker": (
        Part(0.05, -0.5, 0.75, 0.12, 0.25, 0.12, 0.5, dress=1),
        Part(0.05, 0.0, 1.0, 0.15, 0.25, 0.09, 0.0, dress=2),
        Part(-0.05, 0.0, 1.0, 0.15, 0.25, 0.09, 0.5, dress=2),
        Part(0.0, -0.62, 0.78, 0.3, 0.25, 0.015, 0.0, dress=1),
        Part(0.0, -0.55, 0.42, 0.2, 0.75, 0.03, 0.2, dress=3),
        Part(-0.05, -0.5, 0.75, 0.12, 0.25, 0.12, 0.0, dress=1),
    ),
    "quadruped": (
        Part(0.55, 0.0, 0.8, 0.12, 0.25, 0.08, 0.4),
        Part(-0.55, 0.0, 0.8, 0.12, 0.25, 0.08, 0.9),
        Part(-0.75, -0.2, 0.55, 0.09, 0.55, 0.1, 0.3, dress=1),
        Part(-0.85, -0.1, 1.7, 0.36, 0.0, 0.01, 0.0),
        Part(0.6, -0.2, 0.55, 0.26, 0.9, 0.05, 0.6, dress=1),
        Part(0.45, 0.0, 0.8, 0.12, 0.25, 0.08, 0.0),
        Part(-0.45, 0.0, 0.8, 0.12, 0.25, 0.08, 0.5),
    ),
    "flier": (
        Part(0.1, 0.0, 0.95, 0.32, 0.88, 0.12, 0.0, plain=False),
        Part(-0.1, 0.0, 0.95, 0.32, 0.62, 0.12, 0.5, plain=False),
        Part(0.0, -0.55, 1.1, 0.26, 0.25, 0.02, 0.3, dress=1),
    ),
    "chain": (
        Part(0.0, -0.95, 0.8, 0.24, 0.25, 0.09, 0.0),
        Part(0.0, -0.35, 0.8, 0.3, 0.25, 0.11, 0.3),
        Part(0.0, 0.2, 0.75, 0.24, 0.25, 0.13, 0.6, dress=1),
    ),
}
RIGID = (Part(0.0, -1.0, 2.0, 1.0, plain=False),)


@dataclass
class Body:
    """A thing in the world: what it looks like. Where it is lies in the world's arrays, part by
    part.
    """

    role: str  # clutter, distractor, target or occluder
    skeleton: tuple[Part, ...]
    shapes: list[int]
    textures: list[tuple[int, int, int]]  # per part: texture, left and top of the piece it wears
    later: list[tuple[int, int, int]]  # what it wears in the end, under the dial `appearance`
    tint: np.uint64
    tint_weight: np.uint64
