"""Training samples per second from a folder of JPEGs: `trackkit.sampling` beside the authors' way.

Both make the same crops of the same frames of the same GOT-10k-layout folder, one process and one
thread each, in turns, in this run; CPU time. The authors' pipelines are restated with OpenCV:
decode each frame whole, pad, cut, resize; and for STARK what its loader does besides: read the
sequence's labels, grey and mirror whole frames, resize two masks, brighten, normalise. Which crops
to make is known to them beforehand; ours draw them within the time, and normalise later. As that
side work decides much of STARK's ratio, `equal` is the ratio without it: the authors' way to the
outputs that ours have too, crops as bytes and their masks. `packed` is what a loader worker does
when crops are made on a GPU, which then has the rest to do; its ratio compares workers, not work.
The frames are procedural, compressed towards the 50 KB that a frame of GOT-10k's train split has on
average (66 GB for 1.4 million frames); `mean KB` says what came out. Targets of 4 to 40 % of the
frame's side, log-uniform, so that no size hits the steps of JPEG scaling every time.

    python benchmarks/sampling_speed.py     # opencv-python-headless, for the comparison only
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from trackkit import images, rectangles, sampling, sequences
from trackkit.boxes import xywh_to_cxcywh
from trackkit.frames import FrameRule
from trackkit.got10k import GOT10k
from trackkit.sampling import Samples
from trackkit.synth import SynthConfig, SynthDataset, write_dataset
from trackkit.trackers.siamfc import SiamFC
from trackkit.weights import create

WIDTH, HEIGHT, SEQUENCES, FRAMES = 1280, 720, 6, 10
RANGES, COUNT, TURNS = 4, 10, 5
TO_REACH = 3.0


def main() -> None:
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = SynthConfig(width=WIDTH, height=HEIGHT, frames=FRAMES, noise=0.0)
        write_dataset(folder, "train", SynthDataset(config, seed=0, length=SEQUENCES), quality=60)
        sizes = [path.stat().st_size / 1024 for path in Path(folder).rglob("*.jpg")]
        print(f"{WIDTH}x{HEIGHT}, {np.mean(sizes):.0f} mean KB; OpenCV {cv2.__version__}")
        data = GOT10k(folder, "train")
        for name in ("siamfc", "stark-s50", "stark-st50"):
            tracker = create(name)
            if isinstance(tracker, SiamFC):  # has no side work
                theirs = equal = partial(_siamfc, cv2)
            else:
                theirs, equal = partial(_stark, cv2), partial(_stark, cv2, side_work=False)
            compare(name, tracker.recipe("paper")[0].sample, data, theirs, equal)


def compare(name: str, spec, data: GOT10k, theirs: Callable, equal: Callable) -> None:
    """Print samples per second of both, and where the time of ours goes."""
    spec = dataclasses.replace(spec, rule=FrameRule())
    print(
        f"\n{name:<12} {'target':>13} {'authors':>8} {'ours':>8} {'ratio':>6} {'equal':>6} "
        f"{'packed':>7}"
    )
    edges = np.geomspace(0.04, 0.4, RANGES + 1) * (WIDTH * HEIGHT) ** 0.5
    seconds = np.zeros(4)
    shares: dict[str, float] = defaultdict(float)
    for low, high in itertools.pairwise(edges):
        sides = np.geomspace(low, high, 2 * len(data) + 1)[1::2]
        resized = [_with_side(s, side) for s, side in zip(data, sides, strict=True)]
        ours = Samples(resized, spec, 0, COUNT * TURNS)
        packed = Samples(resized, spec, 0, COUNT * TURNS, packed=True)
        times = []
        for turn in range(TURNS):
            numbers = range(turn * COUNT, (turn + 1) * COUNT)
            plans = [_plan(ours, i) for i in numbers]
            makers = [(lambda i: theirs(*i), plans), (lambda i: equal(*i), plans)]
            makers += [(ours.__getitem__, numbers), (packed.__getitem__, numbers)]
            times.append([_time(*m) for m in makers])
        middle = np.median(times, 0)
        # ratios in pairs: a neighbour on the machine disturbs both of a turn
        ratio, same = np.median([(a / c, b / c) for a, b, c, _ in times], 0)
        seconds += middle
        authors, _, mine, bare = COUNT / middle
        print(
            f"{'':<12} {low:>4.0f} to {high:>3.0f} px {authors:>8.1f} {mine:>8.1f} {ratio:>6.2f} "
            f"{same:>6.2f} {bare:>7.1f}"
        )
        for key, value in _shares(ours, range(COUNT)).items():
            shares[key] += value
    whole = sum(shares.values())
    print("of ours: " + ", ".join(f"{k} {100 * v / whole:.0f} %" for k, v in shares.items()))
    print(
        f"all together {seconds[0] / seconds[2]:.2f} times the samples per second "
        f"(to reach: {TO_REACH:g}), for equal outputs {seconds[1] / seconds[2]:.2f}, "
        f"packed {seconds[0] / seconds[3]:.2f}"
    )


def _with_side(sequence, side: float):
    """The same frames with targets of side x side pixels around the same centres, kept inside the
    frame.
    """
    boxes = sequence.boxes_xywh.clone()
    centre = xywh_to_cxcywh(boxes)[:, :2].clamp(min=side / 2)
    centre = torch.minimum(centre, torch.tensor([WIDTH, HEIGHT]) - side / 2)
    sequence.boxes_xywh = torch.cat([centre - side / 2, torch.full_like(centre, side)], 1)
    sequence.absent[:], sequence.cover[:] = False, 8
    return sequence


def _plan(samples: Samples, index: int) -> tuple:
    """What `samples[index]` is made of: files, windows, and the style of the crops."""
    rng, places = np.random.default_rng([samples.seed, index]), None
    while places is None:
        shots, _ = samples._shots(rng)
        places = samples._places(shots, rng)
    style = samples._augment(places, rng)[2]
    files = [str(shot.still.path) for shot in shots]
    windows = [(*p.window.rows[0].tolist(), p.window.size) for p in places]
    return files, windows, style


def _siamfc(cv2, files, windows, style) -> list[np.ndarray]:
    made = []
    for file, (left, top, side, size) in zip(files, windows, strict=True):
        image = cv2.cvtColor(cv2.imread(file), cv2.COLOR_BGR2RGB)
        height, width = image.shape[:2]
        pad = max(0, -left, -top, left + side - width, top + side - height)
        if pad:
            mean = image.mean((0, 1))
            image = cv2.copyMakeBorder(image, *[pad] * 4, cv2.BORDER_CONSTANT, value=mean)
        left, top = left + pad, top + pad
        made.append(cv2.resize(image[top : top + side, left : left + side], (size, size)))
    return made


def _stark(cv2, files, windows, style, side_work: bool = True) -> list[tuple[torch.Tensor, ...]]:
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    if side_work:
        _read_labels(Path(files[-1]).parent)
    frames = [cv2.cvtColor(cv2.imread(file), cv2.COLOR_BGR2RGB) for file in files]
    # two coins, of the sample and of the crop: here the first one's crop alone follows the sample's
    all_flipped, made = side_work and bool(style.flips[0]), []
    for i, (image, (left, top, side, size)) in enumerate(zip(frames, windows, strict=True)):
        height, width = image.shape[:2]
        objects = torch.zeros(height, width) if side_work else None
        if style.greys[i]:
            image = np.stack([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)] * 3, 2)
        if all_flipped:
            image, objects = np.fliplr(image).copy(), objects.flip(1)
            left = width - left - side
        right, bottom = left + side, top + side
        pads = max(0, -top), max(0, bottom - height + 1), max(0, -left), max(0, right - width + 1)
        rows = slice(top + pads[0], max(bottom - pads[1], 0))
        columns = slice(left + pads[2], max(right - pads[3], 0))
        part = cv2.copyMakeBorder(image[rows, columns], *pads, cv2.BORDER_CONSTANT)
        mask = np.ones(part.shape[:2])
        mask[pads[0] : side - pads[1], pads[2] : side - pads[3]] = 0
        part = cv2.resize(part, (size, size))
        mask = torch.from_numpy(cv2.resize(mask, (size, size)).astype(bool))
        crop = torch.from_numpy(part.transpose(2, 0, 1))
        crop = crop.float().mul(float(style.factors[i]) / 255.0).clamp(0.0, 1.0)
        flipped = bool(style.flips[i]) != all_flipped
        if flipped:
            crop, mask = crop.flip(2), mask.flip(1)
        if not side_work:
            made.append(((crop * 255).to(torch.uint8), mask))
            continue
        objects = F.pad(objects[rows, columns], (pads[2], pads[3], pads[0], pads[1]))
        objects = F.interpolate(objects[None, None], (size, size), mode="bilinear")[0, 0]
        made.append(((crop - mean) / std, mask, objects.flip(1) if flipped else objects))
    return made


def _read_labels(folder: Path) -> None:
    """The labels of a whole sequence, as the authors read them for each sample."""
    with open(folder / "groundtruth.txt") as lines:
        torch.tensor([[float(value) for value in row] for row in csv.reader(lines)])
    for label in ("absence", "cover"):
        with open(folder / f"{label}.label") as lines:
            torch.tensor([int(row[0]) for row in csv.reader(lines)], dtype=torch.uint8)


def _time(make: Callable, what: Iterable) -> float:
    began = time.process_time()
    for one in what:
        make(one)
    return time.process_time() - began


def _shares(samples: Samples, numbers: Iterable[int]) -> dict[str, float]:
    """Seconds of ours by what they are spent on."""
    spent: dict[str, float] = defaultdict(float)
    parts = {
        "decoding": (images, "_decode"),
        "reading": (images.Picture, "__init__"),
        "mean colour": (sequences, "mean_colour"),
        "cutting": (rectangles, "resize"),
        "style": (rectangles, "restyle"),
    }
    kept = {key: getattr(*place) for key, place in parts.items()}

    def timed(key: str, function: Callable) -> Callable:
        def run(*args):
            began = time.process_time()
            try:
                return function(*args)
            finally:
                spent[key] += time.process_time() - began

        return run

    for key, (owner, attribute) in parts.items():
        setattr(owner, attribute, timed(key, kept[key]))
    sampling.restyle = rectangles.restyle  # its own name for it
    try:
        whole = _time(samples.__getitem__, numbers)
    finally:
        for key, (owner, attribute) in parts.items():
            setattr(owner, attribute, kept[key])
        sampling.restyle = kept["style"]
    return {**spent, "other": whole - sum(spent.values())}


if __name__ == "__main__":
    main()
