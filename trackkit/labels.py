"""The label files of GOT-10k sequences: parsed, checked line by line, and packed into one index.

`trackkit.got10k` is the way in; this file knows what a correct folder looks like and how to say
what is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch

from trackkit.boxes import LARGEST, area, clip_xywh
from trackkit.errors import DataError
from trackkit.images import image_size
from trackkit.paths import atomic_write, home
from trackkit.progress import bar
from trackkit.sequences import list_images

LABELS = {"absence": 1, "cover": 8, "cut_by_image": 1}  # label files and their largest value
FORMAT = 2  # of the index file; raise it when the content changes
# sequences; smaller sets are read in a moment and leave nothing in the user's home
CACHED_FROM = 100
BELOW = ("img", "imgs", "color", "frames", "images")  # where OTB, LaSOT, VOT, ... keep the frames
# the boxes: of GOT-10k, LaSOT and VOT, of OTB
TRUTH = ("groundtruth.txt", "groundtruth_rect.txt")

# Foreign frames inside a sequence, as numbers of the files, both ends included: got-10k/toolkit
# issue 29.
WRONG_FRAMES = {"GOT-10k_Train_001636": (43, 53), "GOT-10k_Train_001638": (25, 33)}


@dataclass(frozen=True)
class Labels:
    """What is known about one sequence without its pixels; arrays as `Sequence` has them."""

    files: list[str] | None  # None: 00000001.jpg and on
    frames: int
    boxes: np.ndarray
    absent: np.ndarray
    cover: np.ndarray
    cut: np.ndarray
    meta: dict[str, str]
    size: tuple[int, int]  # width and height of the first frame


class Index:
    """The labels of many sequences, packed end to end in a few arrays (which is also the form of
    the cache file).
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        self.texts = json.loads(arrays["texts"].tobytes())  # of each sequence [files or None, meta]
        self.frame_ends, self.box_ends = arrays["frames"].cumsum(), arrays["box_counts"].cumsum()

    def __getitem__(self, i: int) -> Labels:
        files, meta = self.texts[i]
        frames, boxes = int(self.arrays["frames"][i]), int(self.arrays["box_counts"][i])
        f = slice(self.frame_ends[i] - frames, self.frame_ends[i])
        b = slice(self.box_ends[i] - boxes, self.box_ends[i])
        absent, cover, cut = (self.arrays[k][f].copy() for k in ("absent", "cover", "cut"))
        boxes, size = self.arrays["boxes"][b].copy(), tuple(self.arrays["sizes"][i].tolist())
        return Labels(files, frames, boxes, absent, cover, cut, dict(meta), size)

    @classmethod
    def open(cls, folder: Path, names: list[str], one_box: bool) -> Index:
        """Of the sequences in the folders `names`, relative to `folder`."""
        if len(names) < CACHED_FROM:
            return cls(_pack(_read_all(folder, names, one_box)))
        key = hashlib.sha256(
            "\n".join([str(folder.resolve()), str(one_box), *names]).encode()
        ).hexdigest()
        cache, state = home() / "index" / f"{key[:24]}.npz", _state(folder, names)
        try:
            with np.load(cache, allow_pickle=False) as stored:
                if stored["state"].tobytes() == state:
                    return cls({k: stored[k] for k in stored.files})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            if cache.exists():
                warnings.warn(
                    f"the index {cache} is damaged ({error}) and is made again", stacklevel=3
                )
        arrays = _pack(_read_all(folder, names, one_box)) | {
            "state": np.frombuffer(state, np.uint8)
        }
        try:
            with atomic_write(cache) as partial:
                np.savez(partial, **arrays)
        except DataError as error:
            warnings.warn(f"labels are read again next time: {error}", stacklevel=3)
        return cls(arrays)


def _state(folder: Path, names: list[str]) -> bytes:
    """Changes when a file comes or goes in a sequence, or a label file is edited; a few
    microseconds a file.
    """
    folders = ("", *BELOW)
    digest = hashlib.sha256(str(FORMAT).encode())
    for name in names:
        for file in (
            *folders,
            *TRUTH,
            "meta_info.ini",
            *(f"{label}.label" for label in LABELS),
        ):
            try:
                stat = os.stat(f"{folder}/{name}/{file}")
                digest.update(
                    b"%d %d;" % (stat.st_mtime_ns, 0 if file in folders else stat.st_size)
                )
            except OSError:
                digest.update(b"-;")
    return digest.digest()


def _read_all(folder: Path, names: list[str], one_box: bool) -> list[Labels]:
    labels, problems = [], []
    title, many = f"reading labels of {folder.name}", len(names) >= CACHED_FROM
    with bar(names, desc=title, unit="sequence", shown=many) as shown:
        for name in shown:
            try:
                labels.append(read_labels(folder / name, one_box))
            except DataError as error:
                problems.append(f"  {error}")
    if problems:
        shown = problems[:20] + [f"  and {len(problems) - 20} more"] * (len(problems) > 20)
        raise DataError(
            f"{len(problems)} of {len(names)} sequences in {folder} cannot be used:\n"
            + "\n".join(shown)
            + "\n"
            "Unpack or download them again, or take their names out of list.txt, or leave them "
            "out: exclude=[names]"
        )
    return labels


def _pack(labels: list[Labels]) -> dict[str, np.ndarray]:
    texts = json.dumps([[x.files, x.meta] for x in labels]).encode()
    return {
        "frames": np.array([x.frames for x in labels]),
        "box_counts": np.array([len(x.boxes) for x in labels]),
        "texts": np.frombuffer(texts, np.uint8),
        "sizes": np.array([x.size for x in labels]),
        **{
            k: np.concatenate([getattr(x, k) for x in labels])
            for k in ("boxes", "absent", "cover", "cut")
        },
    }


def read_labels(folder: Path, one_box: bool) -> Labels:
    """Read and check the labels of one sequence. Raises DataError with the file and line."""
    if not os.path.isdir(folder):
        raise DataError(
            f"{folder.name}: listed in list.txt, but there is no such folder in {folder.parent}"
        )
    files, count, gaps = _frame_files(folder)
    truth = groundtruth(folder)
    boxes = _table(truth, 4)
    single = one_box and len(boxes) == 1
    if len(boxes) != count and not single:
        raise DataError(
            gaps or f"{folder}: {truth.name} has {len(boxes)} lines, but there are {count} frames"
        )
    if single and gaps and count > 1:
        raise DataError(gaps)
    values = {label: np.full(count, 8 if label == "cover" else 0, np.uint8) for label in LABELS}
    for label, largest in LABELS.items() if len(boxes) == count else ():
        path = folder / f"{label}.label"
        if not path.is_file():
            continue
        column = _table(path, 1)[:, 0]
        if len(column) != count:
            raise DataError(f"{path} has {len(column)} lines, but there are {count} frames")
        wrong = (column < 0) | (column > largest) | (column != column.round())
        if wrong.any():
            line = int(wrong.argmax())
            raise DataError(
                f"{path}, line {line + 1}: {column[line]:g} is not one of the numbers 0 to "
                f"{largest}"
            )
        values[label] = column.astype(np.uint8)
    unknown = np.isnan(boxes).any(1)  # how UAV123 and VOT say that the target is not there
    boxes[unknown] = 0
    size = image_size(folder / (files[0] if files else "00000001.jpg"))
    absent = values["absence"].astype(bool) | _outside(folder, files, boxes, count, size)
    absent[: len(boxes)] |= unknown
    values["cover"][: len(boxes)][unknown] = 0
    if folder.name in WRONG_FRAMES:
        first, last = WRONG_FRAMES[folder.name]
        absent[first - 1 : last] = True
    meta = _read_meta(folder / "meta_info.ini")
    cut = values["cut_by_image"].astype(bool)
    return Labels(files, count, boxes, absent, values["cover"], cut, meta, size)


def _frame_files(folder: Path) -> tuple[list[str] | None, int, str]:
    """Names of the frames (None for 00000001.jpg and on), their number, and what is odd about their
    numbering ("" if nothing), which matters if the labels do not fit them.

    Frames are the images whose name is a number, so a stray cover.jpg does no harm; without any,
    all images; without any image, those of a folder below (`BELOW`).
    """
    plain = sorted(
        n for n in os.listdir(folder) if len(n) == 12 and n.endswith(".jpg") and _number(n) > 0
    )
    if plain and plain[-1] == f"{len(plain):08d}.jpg" and plain[0] == "00000001.jpg":
        return None, len(plain), ""
    images = list_images(folder)
    if not images and (below := frames_below(folder)):
        images = [f"{below.name}/{name}" for name in list_images(below)]
    numbered = [n for n in images if _number(n) >= 0]
    numbers = [_number(n) for n in numbered]
    gaps = ""
    if len(set(numbers)) < len(numbers):
        twice = next(b for a, b in pairwise(numbers) if a == b)
        raise DataError(f"{folder}: two images have the number {twice}; remove one")
    steps = [b - a for a, b in pairwise(numbers)]
    # every fifth number is a numbering too
    step = min(steps) if len(steps) > 1 and not any(s % min(steps) for s in steps) else 1
    if lost := numbers and (numbers[-1] - numbers[0]) // step + 1 - len(numbers):
        have = set(numbers)
        gone = (n for n in range(numbers[0], numbers[-1], step) if n not in have)
        some = ", ".join(map(str, islice(gone, 5))) + (", ..." if lost > 5 else "")
        gaps = f"{folder}: {lost} of the frames up to {numbered[-1]} are missing, by number: {some}"
    elif numbers and numbers[0] > 1:
        gaps = f"{folder}: the first frame is {numbered[0]}; those before it are missing"
    if not images:
        raise DataError(f"{folder}: no frames in this folder")
    return numbered or images, len(numbered or images), gaps


def groundtruth(folder: Path) -> Path:
    """The file with the boxes of a sequence; where there is none, the one that is missing."""
    return next((folder / n for n in TRUTH if os.path.isfile(folder / n)), folder / TRUTH[0])


def frames_below(folder: Path) -> Path | None:
    """The folder below one without images that has the frames, by its usual names (`BELOW`)."""
    return next(
        (folder / n for n in BELOW if (folder / n).is_dir() and list_images(folder / n)), None
    )


def _number(name: str) -> int:
    """What a file is numbered, -1 if its name is no number."""
    stem = os.path.splitext(os.path.basename(name))[0]
    return int(stem) if stem.isascii() and stem.isdigit() and len(stem) < 19 else -1


def _outside(
    folder: Path,
    files: list[str] | None,
    boxes: np.ndarray,
    count: int,
    size: tuple[int, int],
) -> np.ndarray:
    """(N,) bool: frames whose box has an area but none of it inside the frame. `size` of the first
    one.
    """
    outside = np.zeros(count, bool)
    x, y, w, h = boxes.T
    width, height = size
    huge = np.maximum(w, h) > LARGEST * max(width, height)
    if huge.any():
        line = int(huge.argmax())
        raise DataError(
            f"{groundtruth(folder)}, line {line + 1}: a box of {w[line]:g} x {h[line]:g} "
            f"pixels in a frame of {width} x {height}; correct the line"
        )
    suspect = (w > 0) & (h > 0) & ~((x < width) & (y < height) & (x + w > 0) & (y + h > 0))
    # a few frames: the size may change inside a sequence, so look at each
    for i in np.flatnonzero(suspect):
        size = image_size(folder / (files[i] if files else f"{i + 1:08d}.jpg"))
        outside[i] = area(clip_xywh(torch.from_numpy(boxes[i]), *size)) <= 0
    return outside


def _table(path: Path, columns: int) -> np.ndarray:
    """Numbers of a text file, float64 (N, columns); separated by commas (or blanks, as other tools
    write them). A box (4 columns) may be NaN as a whole.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing")
    lines = read_text(path).rstrip().splitlines()
    rows = [line.replace(",", " ").split() for line in lines]

    def fine(numbers: np.ndarray) -> bool:
        nothing = np.isnan(numbers).all(-1) & (columns == 4)
        return bool((np.isfinite(numbers).all(-1) | nothing).all())

    try:
        table = np.array(rows, np.float64).reshape(len(rows), columns)
        if len(rows) and fine(table):
            return table
    except ValueError:
        pass  # found below, line by line
    for number, row in enumerate(rows, 1):
        try:
            if len(row) == columns and fine(np.array(row, np.float64)):
                continue
        except ValueError:
            pass  # reported like any other line that is not as expected
        expected = "left,top,width,height in pixels" if columns == 4 else "one number"
        if len(row) == 8 and columns == 4:
            expected += " (this is a polygon, as VOT has; to track it give the first box: --box)"
        found = lines[number - 1][:80]
        raise DataError(f"{path}, line {number}: expected {expected}, found {found!r}")
    raise DataError(f"{path} is empty")


def _read_meta(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    # the first line is [METAINFO]; a line without a colon says nothing
    pairs = (line.split(":", 1) for line in read_text(path).splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def read_text(path: Path) -> str:
    """A text file as editors of all systems write it: UTF-8, or UTF-16 with its mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend or remove it") from error
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    return data.decode("utf-16" if utf16 else "utf-8-sig", errors="replace")
