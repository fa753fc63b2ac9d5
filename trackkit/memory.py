"""A memory of past frames: which of them are kept, and which are looked at (STMTrack).

Frames are numbered from 1. The authors of STMTrack keep all frames and look at a few; a bounded
memory keeps those that will be looked at, or frames close to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def wanted(count: int, segments: int) -> list[int]:
    """Which of `count` past frames STMTrack looks at: the first, and the middle of each of
    `segments` parts.

    Up to `segments` frames: all of them.
    """
    if count <= segments:
        return list(range(1, count + 1))
    length = count // segments
    return sorted({1, *(part * length + length // 2 + 1 for part in range(segments))})


def nearest(held: list[int], frame: int) -> int:
    """The held frame that is nearest to the wanted one, of two equally near ones the older."""
    return min(held, key=lambda h: (abs(h - frame), h))


def victim(held: list[int], segments: int) -> int:
    """Which frame a full memory forgets; `held`, in order, ends with the new frame, which stays, as
    does the first.

    What is `wanted` only moves forward: while the video grows from n frames to n + 1, the middle of
    the first part, n / 8 for four parts, passes each frame once, and what is before it is never
    wanted again. So of the frames up to it the oldest goes, unless there is only one, which may
    still be the nearest. If none can go for that reason, the frame goes whose two neighbours are
    nearest to each other, of several the oldest: the others stay evenly spread.

    Until frame 5 / 4 K, a memory of K frames is the authors'. From then on it looks at frames that
    are at most n / K away from theirs: with 64, within a sixteenth of the length of a part.
    """
    middle = held[-1] // segments // 2 + 1
    passed = [frame for frame in held[1:] if frame <= middle]
    if len(passed) > 1:
        return passed[0]
    between = zip(held[:-2], held[1:-1], held[2:], strict=True)
    return min((after - before, frame) for before, frame, after in between)[1]


@dataclass(frozen=True)
class Memory:
    """Features of past frames of B sequences, in a row of K slots.

    A slot holds a frame of each sequence, not the same one. Storing a frame replaces one slot and
    shares the others with the memory before it.
    """

    held: Tensor  # (B, K) int64 on the CPU, numbers of the frames in the slots, 0 for none
    slots: tuple[Tensor, ...] = ()  # K x (B, ...), their features

    def stored(
        self, features: Tensor, numbers: Tensor, segments: int, capacity: int | None
    ) -> Memory:
        """With the features (B, ...) of the latest frames, `numbers` (B,); None for the capacity:
        nothing is forgotten.
        """
        held, places = self.held.tolist(), []
        for row, number in zip(held, numbers.tolist(), strict=True):
            if 0 not in row and (capacity is None or len(row) < capacity):
                row.append(0)
            places.append(row.index(0 if 0 in row else victim([*sorted(row), number], segments)))
            row[places[-1]] = number
        width = max(map(len, held))
        slots = [*self.slots, *[torch.zeros_like(features)] * (width - len(self.slots))]
        for place in set(places):
            mine = torch.tensor([p == place for p in places])
            here = mine.to(features.device).view(-1, *[1] * (features.ndim - 1))
            slots[place] = features if mine.all() else torch.where(here, features, slots[place])
        return Memory(torch.tensor([row + [0] * (width - len(row)) for row in held]), tuple(slots))

    def looked_at(self, count: Tensor, latest: Tensor, segments: int) -> Tensor:
        """The frames to look at (B, T) when `count` (B,) have been seen, 0 for none; the latest too
        where `latest` (B,) says so.
        """
        rows = []
        for held, seen, also in zip(
            self.held.tolist(), count.tolist(), latest.tolist(), strict=True
        ):
            frames = set(held) - {0}
            rows.append(
                sorted(
                    {nearest(frames, frame) for frame in wanted(seen, segments)}
                    | ({seen} if also else set())
                )
            )
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    def recalled(self, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, T, ...) of the frames `numbers` (B, T), and which of them are real (B, T),
        None if all are.
        """
        features = []
        for sequence, (row, held) in enumerate(
            zip(numbers.tolist(), self.held.tolist(), strict=True)
        ):
            features += [
                self.slots[held.index(number) if number else 0][sequence] for number in row
            ]
        features, real = torch.stack(features).unflatten(0, numbers.shape), numbers > 0
        return features, None if real.all() else real.to(features.device)

    def fitted(self, other: Memory) -> Memory:
        """The same with as many slots as `other` at least; for `trackers.join`."""
        missing = max(0, len(other.slots) - len(self.slots))
        empty = torch.zeros_like(self.slots[0])
        return Memory(F.pad(self.held, (0, missing)), self.slots + (empty,) * missing)
