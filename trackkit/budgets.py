"""What a frame of DASTM costs, part by part, and how its memory is fitted to a budget (DASTM, Table
4).

A frame is encoded twice, as query and as memory. The "34.7 % less overhead" of the paper's abstract
is (1.99 - 1.30) / 1.99, from the table's column of peak GPU memory, not of operations.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from trackkit.errors import TrackkitError
from trackkit.profiling import macs
from trackkit.trackers.dastm import DASTM, DASTMConfig, read

TABLE_4 = {  # its first and fourth rows, and Table 2
    DASTMConfig.stmtrack(): {"peak_memory_bytes": 1_240_000_000, "frames_per_second": 37},
    DASTMConfig.sastm(): {"peak_memory_bytes": 1_990_000_000, "frames_per_second": 31},
    DASTMConfig.dastm(): {
        "peak_memory_bytes": 1_300_000_000,
        "frames_per_second": 36,
        "high_computation_share": 0.335,
    },
    # the last is how often the gate chose the "high-computation mode"; its text calls CBAM that,
    # though coordinate attention costs more
}


@cache
def part_macs(config: DASTMConfig) -> dict[str, int]:
    """Multiply-accumulates of "memory", "query" and "head", of the read-out of one memory frame
    ("read"), and for one memory frame of the "gate" and of each attention module. Counted on
    tensors without values, so nothing is computed.
    """
    with torch.device("meta"), torch.no_grad():
        twin = DASTM(config).eval()
        crop, query = (
            torch.empty(1, 3, size, size, dtype=torch.uint8)
            for size in (config.size, config.query_size)
        )
        label = torch.empty(1, config.size, config.size)
        past, seen = twin.memory(crop, config.trim, label), twin.query(query, config.query_trim)
        tokens = [features.flatten(2).transpose(1, 2) for features in (seen, past)]
        parts = {
            "memory": macs(lambda: twin.memory(crop, config.trim, label)),
            "query": macs(lambda: twin.query(query, config.query_trim)),
            "head": macs(lambda: twin.head(torch.cat([seen, seen], 1))),
            "read": macs(lambda: read(*tokens)),
        }
        if config.gate != "none":
            parts["gate"] = macs(lambda: twin.attention.gate(past))
        for name in config.attention:
            parts[name] = macs(lambda branch=twin.attention.branches[name]: branch(past))
    return parts


def frame_macs(config: DASTMConfig) -> int:
    """Multiply-accumulates of a tracked frame with all the memory frames that may be looked at; of
    a gate's modules the dearest.
    """
    parts, looked_at = part_macs(replace(config, segments=1)), config.segments + 2
    costs = [parts[name] for name in config.attention] or [0]
    attention = (
        parts["gate"] + max(costs)
        if config.gate in ("hard", "random")
        else parts.get("gate", 0) + sum(costs)
    )
    network = parts["memory"] + parts["query"] + parts["head"] + looked_at * parts["read"]
    return network + (looked_at if config.granularity == "memory" else 1) * attention


def within(config: DASTMConfig, budget: int) -> DASTMConfig:
    """The config with fewer memory frames, then fewer modules (the dearest go first), so that a
    frame costs at most `budget`.

    Table 4 has budgets of 8 and 7 GFLOPs and does not say what of. All attention together is less
    than a thousandth of the tracker, so a gate alone can keep no such budget; and only a query of
    160 pixels comes near it, as the head costs 7.4 G multiply-accumulates for one of 289.
    TrackkitError, with what is needed at least, when the rest costs more.
    """
    plans = [replace(config, segments=count) for count in range(config.segments, 0, -1)]
    cheap_first = sorted(config.attention, key=part_macs(replace(config, segments=1)).get)
    for count in range(len(cheap_first) - 1, 0, -1):
        plans.append(
            replace(
                plans[-1],
                attention=tuple(name for name in config.attention if name in cheap_first[:count]),
            )
        )
    for plan in plans:
        if (least := frame_macs(plan)) <= budget:
            return plan
    text = (
        f"no memory is small enough for {budget:,} multiply-accumulates a frame: the least is "
        f"{least:,}"
    )
    raise TrackkitError(f"{text}; take a smaller query_size or trunk")
