"""What crosses between the CPU and a GPU: constants once, answers in one piece.

A copy to the CPU waits until the GPU has done all that it was given, and while it waits nothing new
is given to it. So a tracked frame goes over once, its answer comes back once, and nothing else does
(`tests/test_device.py` counts).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=256)
def constant(make: Callable[..., Tensor], *given: Hashable, device: torch.device) -> Tensor:
    """`make(*given)`, made on the CPU and kept on the device: for windows, labels and statistics
    that do not depend on the data. It is shared, so it must not be changed in place.
    """
    # a plain tensor of numbers, whatever mode the first to ask is in
    with torch.inference_mode(False), torch.device("cpu"):
        return make(*given).to(device)


def to_host(*values: Tensor) -> list[Tensor]:
    """Tensors (B, ...) that lie on one device, as float64 on the CPU, in one copy."""
    if values[0].device.type == "cpu":
        return [value.double() for value in values]
    rows = torch.cat(
        [
            value.double().flatten(1) if value.ndim > 1 else value.double()[:, None]
            for value in values
        ],
        1,
    ).cpu()
    parts = rows.split([value[0].numel() for value in values], 1)
    return [part.reshape(value.shape) for part, value in zip(parts, values, strict=True)]
