"""Deterministic weights, inputs and frames, by which the authors' code made the numbers in
tests/goldens.

A tensor is drawn from PCG64 seeded with the CRC-32 of its name, and scaled by what its name says it
is.
"""

from __future__ import annotations

import fnmatch
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FOLDER = Path(__file__).parent / "goldens"


def golden(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def _uniform(name: str, shape) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).random(tuple(shape))


def entry(name: str, shape) -> Tensor:
    """A checkpoint entry: weights of variance 1 / fan-in, norm weights around 1, variances in [0.5,
    1.5).
    """
    if name.endswith("num_batches_tracked"):
        return torch.zeros(tuple(shape), dtype=torch.long)
    u = _uniform(name, shape)
    if name.endswith("running_var"):
        values = 0.5 + u
    elif name.endswith("running_mean"):
        values = 0.2 * (u - 0.5)
    elif len(shape) >= 2 and name.endswith("weight"):
        values = (u - 0.5) * 2.0 * math.sqrt(3.0 / max(1, math.prod(shape[1:])))
    elif name.endswith("weight"):
        values = 1.0 + 0.2 * (u - 0.5)
    else:
        values = 0.1 * (u - 0.5)
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).reshape(tuple(shape))


def state_dict(keys: dict[str, list[int]], scale: dict[str, float]) -> dict[str, Tensor]:
    """All entries of a checkpoint; `scale` maps patterns of names to factors."""
    entries = {}
    for key, shape in keys.items():
        factor = math.prod(f for pattern, f in scale.items() if fnmatch.fnmatchcase(key, pattern))
        entries[key] = entry(key, shape) if factor == 1 else entry(key, shape) * factor
    return entries


def image(name: str, shape) -> Tensor:
    """An input in [-2, 2)."""
    return torch.from_numpy(((_uniform("image:" + name, shape) - 0.5) * 4.0).astype(np.float32))


def mosaic(name: str, height: int, width: int) -> Tensor:
    """A frame of random 8 x 8 squares, uint8 (3, height, width)."""
    squares = (
        ((image(name, (height // 8, width // 8, 3)) + 2) * 64).floor().clamp(0, 255).to(torch.uint8)
    )
    return squares.repeat_interleave(8, 0).repeat_interleave(8, 1).permute(2, 0, 1)


def clouds(name: str, height: int, width: int) -> Tensor:
    """A frame of smooth random colours, uint8 (3, height, width)."""
    colours = F.interpolate(
        image(name, (1, 3, height // 16 + 1, width // 16 + 1)),
        (height, width),
        mode="bilinear",
        align_corners=True,
    )
    return ((colours[0] + 2) / 4 * 255).round().to(torch.uint8)


def frames(name: str, count: int, height: int, width: int) -> tuple[list[Tensor], list[list[int]]]:
    """A video of a textured square over a rolling background, and its boxes xywh, all integers."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(("frames:" + name).encode())))

    def texture(h: int, w: int, cell: int) -> np.ndarray:
        grid = rng.integers(0, 256, size=(-(-h // cell), -(-w // cell), 3), dtype=np.int64)
        return np.kron(grid, np.ones((cell, cell, 1), dtype=np.int64))[:h, :w]

    ground = (
        texture(height, width, 40) + texture(height, width, 12) + 2 * texture(height, width, 4)
    ) // 4
    w, h = int(rng.integers(40, 90)), int(rng.integers(40, 90))
    target = (2 * texture(h, w, 10) + texture(h, w, 3)) // 3
    x0, y0 = int(rng.integers(20, width - w - 100)), int(rng.integers(20, height - h - 60))
    vx, vy = int(rng.integers(-4, 9)), int(rng.integers(-3, 6))
    images, boxes = [], []
    for t in range(count):
        picture = np.roll(ground, (t, 2 * t), axis=(0, 1)).copy()
        x, y = min(max(x0 + vx * t, 0), width - w), min(max(y0 + vy * t, 0), height - h)
        picture[y : y + h, x : x + w] = target
        images.append(torch.from_numpy(picture.astype(np.uint8)).permute(2, 0, 1))
        boxes.append([x, y, w, h])
    return images, boxes


def away(value: Tensor, expected: list) -> float:
    """Largest difference from a list of numbers."""
    return (
        (value.detach().double() - torch.tensor(expected, dtype=torch.float64)).abs().max().item()
    )


def summary_error(value: Tensor, summary: dict, bits: str = "") -> float:
    """Largest difference from the moments and entries that a golden file keeps of a tensor: those
    at "index", or all. Infinite for another shape. `bits="64"` takes the numbers of 64-bit floats.
    """
    if list(value.shape) != summary["shape"]:
        return math.inf
    flat = value.detach().double().flatten()
    moments = {
        "mean": flat.mean(),
        "std": flat.std(unbiased=False),
        "min": flat.min(),
        "max": flat.max(),
    }
    kept = [name for name in moments if name + bits in summary]
    entries = flat[torch.tensor(summary["index"])] if "index" in summary else flat
    got = torch.cat([entries, *(moments[name][None] for name in kept)])
    return away(got, summary["value" + bits] + [summary[name + bits] for name in kept])


def certified(
    found: dict[str, float], allowed: dict[str, float], file: str
) -> dict[str, tuple[float, float, str]]:
    """What was compared -> deviation, tolerance and golden file; the tolerance is that of the
    longest end of the description.
    """

    def tolerance(what: str) -> float:
        return next(
            allowed[end] for end in sorted(allowed, key=len, reverse=True) if what.endswith(end)
        )

    return {what: (value, tolerance(what), file) for what, value in found.items()}


def too_far(deviations: dict[str, tuple[float, float, str]]) -> dict[str, tuple[float, float, str]]:
    """Those that exceed their tolerance, or are no numbers."""
    return {what: entry for what, entry in deviations.items() if not entry[0] <= entry[1]}


def failed(found: dict[str, float], allowed: dict[str, float], file: str) -> bool:
    """Whether the certificate sees a mistake."""
    return too_far(certified(found, allowed, file)) != {}


def worst(*several: dict[str, float]) -> dict[str, float]:
    """The largest deviation of each kind."""
    return {
        kind: max(found[kind] for found in several if kind in found)
        for kind in dict.fromkeys(k for found in several for k in found)
    }
