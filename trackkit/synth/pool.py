"""The pool: procedural video for training, written once to the cache in GOT-10k's layout.

A tiny training then reads frames as a training on GOT-10k does, by the same code, and waits less
for pixels than if it drew each of them. The videos are recorded as by cameras of many kinds: some
are small pictures made larger, all are JPEG files with colours at half the resolution, and the
quality differs from video to video.
"""

from __future__ import annotations

from pathlib import Path

import joblib
import torch
import torch.nn.functional as F
from torch import Tensor

from trackkit.errors import DataError
from trackkit.got10k import GOT10k, write_sequence
from trackkit.paths import alone, atomic_write, cores, home
from trackkit.progress import bar
from trackkit.synth import SynthConfig, SynthDataset, labels_of
from trackkit.synth.textures import Draw

VIDEOS, FRAMES = 320, 60
EDITION = 1  # one more with each change of the bytes


def pool(videos: int = VIDEOS, seed: int = 0, processes: int | None = None) -> GOT10k:
    """The train split of `videos` procedural videos of 60 frames, 320 x 240 pixels.

    They lie under `TRACKKIT_HOME`/pool and are made at first use, in about two minutes on two
    cores, 0.4 MB each. Video i depends on (seed, i) alone, so a pool is the same with any number
    of `processes` (default: one a core); one whose making was interrupted goes on.

    Raises DataError if the place cannot be written.
    """
    if videos < 1 or seed < 0:
        raise DataError(f"a pool needs a video and a seed of at least 0; got {videos}, {seed}")
    dataset = SynthDataset(SynthConfig(frames=FRAMES), seed, videos)
    root = home() / "pool" / f"synth-{EDITION}-{seed}-{videos}"
    folder = root / "train"
    # list.txt comes last: a pool without it is not whole
    if not (folder / "list.txt").exists():
        names = [dataset.name_of(index) for index in range(videos)]
        with alone(root, "makes a pool"):
            left = [index for index, name in enumerate(names) if not (folder / name).exists()]
            made = joblib.Parallel(processes or cores(), return_as="generator_unordered")(
                joblib.delayed(_record)(dataset, index, folder) for index in left
            )
            options = {"total": videos, "initial": videos - len(left), "unit": "video"}
            with bar(desc="procedural videos", **options) as shown:
                for _ in made:
                    shown.update()
            with atomic_write(folder / "list.txt") as partial:
                partial.write_text("\n".join(names) + "\n", "utf-8", newline="\n")
    return GOT10k(root, "train")


def _record(dataset: SynthDataset, index: int, folder: Path) -> None:
    """Write one video of a pool."""
    torch.set_num_threads(1)
    sequence, draw = dataset[index], Draw(23, dataset.seed, index)
    quality = 40 + draw.below(56)
    coarse = (1.0, 1.0, 1.0, 1.5, 2.0)[draw.below(5)]
    frames = (enlarged(sequence.frame(t), coarse) for t in range(len(sequence)))
    write_sequence(
        folder / sequence.name, frames, meta=sequence.meta, quality=quality, **labels_of(sequence)
    )


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
