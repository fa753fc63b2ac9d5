"""The pool: procedural video for training, written once to the cache in GOT-10k's layout.

A tiny training then reads frames as a training on GOT-10k does, by the same code, and waits less
for pixels than if it drew each of them. The videos are recorded as by cameras of many kinds: some
are small pictures made larger, all are JPEG files with colours at half the resolution, and the
quality differs from video to video.
"""

from __future__ import annotations

from pathlib import Path

import filelock
import joblib
import torch
import torch.nn.functional as F
from torch import Tensor

from trackkit.errors import DataError
from trackkit.got10k import GOT10k, write_sequence
from trackkit.paths import atomic_write, cores, home, writable
from trackkit.progress import bar
from trackkit.synth import (
    EMBEDDED,
    SAMPLE_QUALITY,
    SynthConfig,
    SynthDataset,
    SynthSequence,
    labels_of,
    sample,
)
from trackkit.synth.textures import Draw

VIDEOS, FRAMES = 160, 60
WORLD = {"size": 1.0, "team": 0.7, "camouflage": True}  # beside the dials that are on by default
EDITION = 1  # one more with each change of the bytes


def pool(videos: int = VIDEOS, seed: int = 0, processes: int | None = None) -> GOT10k:
    """The train split of `videos` procedural videos of 60 frames, 320 x 240 pixels.

    They lie under `TRACKKIT_HOME`/pool and are made at first use; 160 of them take two minutes of
    one core and 120 MB. Video i depends on (seed, i) alone, so a pool is the same with any
    number of `processes` (default: one a core); one whose making was interrupted goes on.

    Raises DataError if the place cannot be written.
    """
    if videos < 1 or seed < 0:
        raise DataError(f"a pool needs a video and a seed of at least 0; got {videos}, {seed}")
    dataset = SynthDataset(SynthConfig(frames=FRAMES, **WORLD), seed, videos)
    names = [dataset.name_of(index) for index in range(videos)]
    jobs = [(_record, dataset, index) for index in range(videos)]
    return _written(f"synth-{EDITION}-{seed}-{videos}", "train", names, jobs, processes)


def held_out(each: int = 8, processes: int | None = None) -> GOT10k:
    """The val split of `each` further videos of each of the 13 kinds in data_samples/val, in the
    same textures and outlines, which no training sees: 104, for comparisons that 13 cannot decide.

    Made at first use, as a pool is; 104 take half a minute of one core and 41 MB.
    """
    kinds = [(kind, 1001 + k) for kind in EMBEDDED["val"] for k in range(each)]
    names = [f"synth_val_{kind}_{seed}" for kind, seed in kinds]
    jobs = [(_record_sample, kind, seed) for kind, seed in kinds]
    return _written(f"held-out-{EDITION}-{each}", "val", names, jobs, processes)


def _written(
    name: str, split: str, names: list[str], jobs: list[tuple], processes: int | None
) -> GOT10k:
    """The data set `name` under TRACKKIT_HOME/pool, whose sequences the jobs write."""
    root = home() / "pool" / name
    folder = root / split
    # list.txt comes last: a data set without it is not whole
    if not (folder / "list.txt").exists():
        # of several processes that want it one writes, and the others wait
        with filelock.FileLock(writable(root) / ".lock"):
            left = [
                job for job, own in zip(jobs, names, strict=True) if not (folder / own).exists()
            ]
            made = joblib.Parallel(processes or cores(), return_as="generator_unordered")(
                joblib.delayed(record)(folder, *rest) for record, *rest in left
            )
            options = {"total": len(jobs), "initial": len(jobs) - len(left), "unit": "video"}
            with bar(desc="procedural videos", **options) as shown:
                for _ in made:
                    shown.update()
            with atomic_write(folder / "list.txt") as partial:
                partial.write_text("\n".join(names) + "\n", "utf-8", newline="\n")
    dataset = GOT10k(root, split)
    dataset.procedural = True
    return dataset


def _record(folder: Path, dataset: SynthDataset, index: int) -> None:
    """Write one video of a pool."""
    draw = Draw(23, dataset.seed, index)
    quality = 40 + draw.below(56)
    _write(folder, dataset[index], quality, (1.0, 1.0, 1.0, 1.5, 2.0)[draw.below(5)])


def _record_sample(folder: Path, kind: str, seed: int) -> None:
    _write(folder, sample("val", kind, seed), SAMPLE_QUALITY)


def _write(folder: Path, video: SynthSequence, quality: int, coarse: float = 1.0) -> None:
    frames = (enlarged(video.frame(t), coarse) for t in range(len(video)))
    labels = labels_of(video)
    write_sequence(folder / video.name, frames, meta=video.meta, quality=quality, **labels)


def enlarged(frame: Tensor, coarse: float) -> Tensor:
    """A frame uint8 (3, H, W) as a camera with `coarse` times fewer pixels along each side would
    have given it: averaged, and made as large as before.
    """
    if coarse == 1:
        return frame
    height, width = frame.shape[1:]
    small = (round(height / coarse), round(width / coarse))
    pixels = F.interpolate(frame[None].float(), small, mode="bilinear", antialias=True)
    pixels = F.interpolate(pixels, (height, width), mode="bicubic")
    return pixels[0].round().clamp(0, 255).to(torch.uint8)
