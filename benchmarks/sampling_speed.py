"""Training pairs per second from a folder of JPEGs: `trackkit.sampling` against the usual OpenCV
pipeline.

Both make the full SiamFC crops (127 and 255 px) of the same frames of the same GOT-10k-layout
folder, one process and one thread each, in turns, in this run. The OpenCV pipeline is what the
public code does: decode the whole frame, pad, cut, resize. Ours reads only the size of the frame
that the crop needs (scaled JPEG decoding). The frames are procedural, compressed to about the 50 KB
that a frame of GOT-10k's train split has on average (66 GB for 1.4 million frames); `mean KB` says
what came out.

    python benchmarks/sampling_speed.py             # needs opencv-python-headless, for the
    comparison only
"""

from __future__ import annotations

import itertools
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from trackkit.boxes import xywh_to_cxcywh
from trackkit.crops import context_side
from trackkit.frames import FrameRule, choose_frames
from trackkit.got10k import GOT10k
from trackkit.sampling import CropSpec, Samples, SampleSpec
from trackkit.synth import SynthConfig, SynthDataset, write_dataset

SPEC = SampleSpec(
    template=CropSpec(127, 1.0, 0.5),
    search=CropSpec(255, 255 / 127, 0.5),
    rule=FrameRule(min_side=20),
)
SEQUENCES, FRAMES, PAIRS, TURNS = 6, 10, 40, 5


def main() -> None:
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(f"pairs per second, one process and one thread each; OpenCV {cv2.__version__}")
    print(f"{'frame':>11} {'target':>14} {'OpenCV':>8} {'trackkit':>9} {'ratio':>6}")
    total = np.zeros(2)
    for width, height in ((1920, 1080), (1280, 720)):
        with tempfile.TemporaryDirectory() as folder:
            config = SynthConfig(width=width, height=height, frames=FRAMES, noise=0.0)
            write_dataset(
                folder, "train", SynthDataset(config, seed=0, length=SEQUENCES), quality=60
            )
            sizes = [path.stat().st_size / 1024 for path in Path(folder).rglob("*.jpg")]
            print(f"{width:>6}x{height:<4} {np.mean(sizes):.0f} mean KB")
            data = GOT10k(folder, "train")
            # sides from 4 to 40 % of the frame's, log-uniform: no size hits the steps of JPEG
            # scaling every time
            edges = np.geomspace(0.04, 0.4, 5) * (width * height) ** 0.5
            for low, high in itertools.pairwise(edges):
                sides = np.geomspace(low, high, 2 * len(data) + 1)[1::2]
                ours = Samples(
                    [
                        _with_side(sequence, side)
                        for sequence, side in zip(data, sides, strict=True)
                    ],
                    SPEC,
                    0,
                    PAIRS * TURNS,
                )
                theirs, mine = [], []
                for turn in range(TURNS):
                    numbers = range(turn * PAIRS, (turn + 1) * PAIRS)
                    theirs.append(_time(partial(_opencv_pair, ours, cv2), numbers))
                    mine.append(_time(ours.__getitem__, numbers))
                seconds = np.median(theirs), np.median(mine)
                total += seconds
                a, b = PAIRS / seconds[0], PAIRS / seconds[1]
                print(
                    f"{width:>6}x{height:<4} {low:>4.0f} to {high:>4.0f} px {a:>8.1f} {b:>9.1f} "
                    f"{b / a:>6.2f}"
                )
    print(f"all together: {total[0] / total[1]:.2f} times the pairs per second (to reach: 2)")


def _with_side(sequence, side: float):
    """The same frames with targets of side x side pixels around the same centres, kept inside the
    frame.
    """
    boxes = sequence.boxes_xywh.clone()
    width, height = sequence.frame_size(0)
    centre = xywh_to_cxcywh(boxes)[:, :2].clamp(min=side / 2)
    centre = torch.minimum(centre, torch.tensor([width, height]) - side / 2)
    sequence.boxes_xywh = torch.cat([centre - side / 2, torch.full_like(centre, side)], 1)
    sequence.absent[:], sequence.cover[:] = False, 8
    return sequence


def _opencv_pair(samples: Samples, cv2, index: int) -> list[np.ndarray]:
    """The same frames as `samples[index]`, the usual way."""
    rng = np.random.default_rng([samples.seed, index])
    sequence, usable = samples._draw(rng)
    crops = []
    for frame, spec in zip(
        choose_frames(SPEC, usable, rng), (SPEC.template, SPEC.search), strict=True
    ):
        image = cv2.cvtColor(
            cv2.imread(str(sequence.folder / sequence.files[frame])), cv2.COLOR_BGR2RGB
        )
        box = sequence.boxes_xywh[frame : frame + 1]
        n = round(float(context_side(box, spec.context) * spec.factor))
        x, y = (round(float(c) - n / 2) for c in xywh_to_cxcywh(box)[0, :2])
        height, width = image.shape[:2]
        pad = max(0, -x, -y, x + n - width, y + n - height)
        if pad:
            image = cv2.copyMakeBorder(
                image, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=image.mean((0, 1))
            )
        crops.append(
            cv2.resize(image[y + pad : y + pad + n, x + pad : x + pad + n], (spec.size, spec.size))
        )
    return crops


def _time(make, numbers) -> float:
    began = time.perf_counter()
    for i in numbers:
        make(i)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
