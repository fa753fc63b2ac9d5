"""GOT-10k: the data set on disk (Huang, Zhao, Huang, TPAMI 2021), read lazily and checked exactly.

    ROOT/{train,val,test}/list.txt            names of the sequences, in order
    ROOT/train/GOT-10k_Train_000001/00000001.jpg ...
        groundtruth.txt                       N lines x,y,w,h in pixels; one line in the test split
        absence.label, cut_by_image.label     N lines 0 or 1; cover.label: N lines 0 (hidden) .. 8 (fully visible)
        meta_info.ini                         [METAINFO], then `key: value`

Labels of all sequences are read once, checked, and kept in one file under `TRACKKIT_HOME`, so that opening the
9,335 training sequences again takes a moment. Frames are never cached.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from trackkit.boxes import area, clip_xywh
from trackkit.errors import DataError
from trackkit.images import encode_jpeg, image_size
from trackkit.paths import atomic_write, data_root, home, writable
from trackkit.sequences import FolderSequence, list_images

SPLITS = ("train", "val", "test")
LABELS = {"absence": 1, "cover": 8, "cut_by_image": 1}  # label files and their largest value
FORMAT = 1  # of the index file; raise it when the content changes
CACHED_FROM = 100  # sequences; smaller sets are read in a moment and leave nothing in the user's home

# Training sequences whose boxes are wrong or whose picture freezes: got-10k/toolkit issue 10,
# HonglinChu/SiamTrackers issue 35. The widely used lists drop four of them; these are all that were reported.
BROKEN = frozenset(f"GOT-10k_Train_{n:06d}" for n in (*range(8623, 8638), 9058, 9059))
# Foreign frames inside a sequence, as numbers of the files, both ends included: got-10k/toolkit issue 29.
WRONG_FRAMES = {"GOT-10k_Train_001636": (43, 53), "GOT-10k_Train_001638": (25, 33)}


@dataclass(frozen=True)
class _Labels:
    """What is known about one sequence without its pixels; arrays as `Sequence` has them."""

    files: list[str] | None  # None: 00000001.jpg and on
    frames: int
    boxes: np.ndarray
    absent: np.ndarray
    cover: np.ndarray
    cut: np.ndarray
    meta: dict[str, str]


class GOT10k:
    """A split of GOT-10k, or any folder of sequences in its layout: `len(d)`, `d[i]` -> FolderSequence.

    Where the sequences are: `root/split` if that folder exists; else `root` itself, when it is a folder of
    sequences (a split folder, or a collection of one's own) and is not named after another split. `root` None means
    `TRACKKIT_GOT10K`, else the embedded samples. Which sequences: the lines of list.txt; without that file all
    folders that hold groundtruth.txt or frames, by name. Hidden files, backups and other strays are ignored.

    `exclude` are names to leave out. The default leaves out `BROKEN` from the train split and nothing elsewhere;
    pass () to have all.

    Labels: a missing absence, cover or cut_by_image file means present, fully visible, not cut; a missing
    meta_info.ini an empty `meta`; its value `attributes: a, b` becomes `attributes`. `absent` is also set where the box
    lies outside the frame and in `WRONG_FRAMES`, so `visible` is False there. The train and val splits need a box
    for each frame; elsewhere one box, the first, is enough. Sizes always come from the images.

    Attributes:
        name: for tables and result folders, as "GOT-10k-val". names: of the sequences, in order.
        folder: where the sequences lie.

    Raises DataError that lists every broken file with its line and what to do; FileNotFoundError never.
    """

    def __init__(self, root: str | os.PathLike | None = None, split: str = "train", exclude: Collection[str] | None = None):
        if split not in SPLITS:
            raise DataError(f"there is no split {split!r}; choose train, val or test")
        root = data_root(root)
        self.folder = _split_folder(root, split)
        own = self.folder.name in SPLITS
        self.name = f"{self.folder.resolve().parent.name}-{split}" if own else self.folder.resolve().name
        exclude = (BROKEN if split == "train" else ()) if exclude is None else exclude
        names = [name for name in _names(self.folder) if name not in set(exclude)]
        if not names:
            raise DataError(f"{self.folder}: no sequences left after leaving out {len(exclude)} by name")
        self.names = names
        self._labels = _Index.open(self.folder, names, one_box=not (own and split != "test"))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> FolderSequence:
        return _sequence(self.folder / self.names[index], self._labels[index])

    def __repr__(self) -> str:
        return f"GOT10k({str(self.folder)!r}, {len(self)} sequences)"


def read_sequence(folder: str | os.PathLike) -> FolderSequence:
    """Open one folder in the GOT-10k layout, with its labels as `GOT10k` reads them. Raises DataError."""
    return _sequence(Path(folder), _read_labels(Path(folder), one_box=True))


def _sequence(folder: Path, labels: _Labels) -> FolderSequence:
    words = labels.meta.get("attributes", "").split(",")
    return FolderSequence(
        folder,
        torch.from_numpy(labels.boxes),
        files=labels.files or [f"{i:08d}.jpg" for i in range(1, labels.frames + 1)],
        absent=torch.from_numpy(labels.absent),
        cover=torch.from_numpy(labels.cover),
        cut_by_image=torch.from_numpy(labels.cut),
        attributes=tuple(word.strip() for word in words if word.strip()),
        meta=labels.meta,
    )

def _split_folder(root: Path, split: str) -> Path:
    if (root / split).is_dir():
        return root / split
    if root.resolve().name in SPLITS and root.resolve().name != split:
        raise DataError(
            f"{root} is the {root.resolve().name} split, but {split} was asked for; give the folder above it: {root.resolve().parent}"
        )
    if (root / "groundtruth.txt").is_file():
        raise DataError(f"{root} is one sequence; give the folder above it, or open it with open_sequence({str(root)!r})")
    if (root / "list.txt").is_file() or next(_sequence_folders(root), None):
        return root
    raise DataError(
        f"{root}: found neither a folder {split}/ nor sequences. Give the folder that holds train/, val/ and test/ "
        "of GOT-10k, or a folder of sequences (each with frames and groundtruth.txt), or make one: trackkit synth --samples DIR"
    )


def _sequence_folders(folder: Path) -> Iterable[str]:
    for entry in os.scandir(folder):
        if entry.is_dir() and not entry.name.startswith("."):
            if os.path.exists(os.path.join(entry.path, "groundtruth.txt")) or list_images(Path(entry.path)):
                yield entry.name


def _names(folder: Path) -> list[str]:
    listed = folder / "list.txt"
    if not listed.is_file():
        return sorted(_sequence_folders(folder))
    names = [line.strip() for line in _text(listed).splitlines() if line.strip()]
    if not names:
        raise DataError(f"{listed} is empty; write one sequence name per line, or remove it to use all folders beside it")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"{listed}: {twice} is listed twice; keep one of the lines")
    return names


class _Index:
    """The labels of many sequences, packed end to end in a few arrays (which is also the form of the cache file)."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        self.texts = json.loads(arrays["texts"].tobytes())  # of each sequence [files or None, meta]
        self.frame_ends, self.box_ends = arrays["frames"].cumsum(), arrays["box_counts"].cumsum()

    def __getitem__(self, i: int) -> _Labels:
        files, meta = self.texts[i]
        frames, boxes = int(self.arrays["frames"][i]), int(self.arrays["box_counts"][i])
        f = slice(self.frame_ends[i] - frames, self.frame_ends[i])
        b = slice(self.box_ends[i] - boxes, self.box_ends[i])
        absent, cover, cut = (self.arrays[k][f].copy() for k in ("absent", "cover", "cut"))
        return _Labels(files, frames, self.arrays["boxes"][b].copy(), absent, cover, cut, dict(meta))

    @classmethod
    def open(cls, folder: Path, names: list[str], one_box: bool) -> _Index:
        if len(names) < CACHED_FROM:
            return cls(_pack(_read_all(folder, names, one_box)))
        key = hashlib.sha256("\n".join([str(folder.resolve()), str(one_box), *names]).encode()).hexdigest()
        cache, state = home() / "index" / f"{key[:24]}.npz", _state(folder, names)
        try:
            with np.load(cache, allow_pickle=False) as stored:
                if stored["state"].tobytes() == state:
                    return cls({k: stored[k] for k in stored.files})
        except Exception as error:  # whatever is wrong with a cache, it can be made again
            if cache.exists():
                warnings.warn(f"the index {cache} is damaged ({error}) and is made again", stacklevel=3)
        arrays = _pack(_read_all(folder, names, one_box)) | {"state": np.frombuffer(state, np.uint8)}
        try:
            with atomic_write(cache) as partial:
                np.savez(partial, **arrays)
        except DataError as error:
            warnings.warn(f"labels are read again next time: {error}", stacklevel=3)
        return cls(arrays)


def _state(folder: Path, names: list[str]) -> bytes:
    """Changes when a file comes or goes in a sequence, or a label file is edited; a few microseconds a file."""
    digest = hashlib.sha256(str(FORMAT).encode())
    for name in names:
        for file in ("", "groundtruth.txt", "meta_info.ini", *(f"{label}.label" for label in LABELS)):
            try:
                stat = os.stat(f"{folder}/{name}/{file}")
                digest.update(b"%d %d;" % (stat.st_mtime_ns, 0 if file == "" else stat.st_size))
            except FileNotFoundError:
                digest.update(b"-;")
    return digest.digest()


def _read_all(folder: Path, names: list[str], one_box: bool) -> list[_Labels]:
    labels, problems = [], []
    for name in tqdm(names, desc=f"reading labels of {folder.name}", unit="sequence", disable=len(names) < CACHED_FROM):
        try:
            labels.append(_read_labels(folder / name, one_box))
        except DataError as error:
            problems.append(f"  {error}")
    if problems:
        shown = problems[:20] + [f"  and {len(problems) - 20} more"] * (len(problems) > 20)
        raise DataError(
            f"{len(problems)} of {len(names)} sequences in {folder} cannot be used:\n" + "\n".join(shown) + "\n"
            "Unpack or download them again, or take their names out of list.txt, or leave them out: exclude=[names]"
        )
    return labels


def _pack(labels: list[_Labels]) -> dict[str, np.ndarray]:
    texts = json.dumps([[x.files, x.meta] for x in labels]).encode()
    return {
        "frames": np.array([x.frames for x in labels]),
        "box_counts": np.array([len(x.boxes) for x in labels]),
        "texts": np.frombuffer(texts, np.uint8),
        **{k: np.concatenate([getattr(x, k) for x in labels]) for k in ("boxes", "absent", "cover", "cut")},
    }


def _read_labels(folder: Path, one_box: bool) -> _Labels:
    """Read and check the labels of one sequence. Raises DataError with the file and line."""
    if not folder.is_dir():
        raise DataError(f"{folder.name}: listed in list.txt, but there is no such folder in {folder.parent}")
    files, count = _frame_files(folder)
    boxes = _table(folder / "groundtruth.txt", 4)
    if len(boxes) != count and not (one_box and len(boxes) == 1):
        raise DataError(f"{folder}: groundtruth.txt has {len(boxes)} lines, but there are {count} frames")
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
            raise DataError(f"{path}, line {line + 1}: {column[line]:g} is not one of the numbers 0 to {largest}")
        values[label] = column.astype(np.uint8)
    absent = values["absence"].astype(bool) | _outside(folder, files, boxes, count)
    if folder.name in WRONG_FRAMES:
        first, last = WRONG_FRAMES[folder.name]
        absent[first - 1 : last] = True
    meta = _read_meta(folder / "meta_info.ini")
    return _Labels(files, count, boxes, absent, values["cover"], values["cut_by_image"].astype(bool), meta)


def _frame_files(folder: Path) -> tuple[list[str] | None, int]:
    """Names of the frames (None for 00000001.jpg and on) and their number.

    Frames are the images whose name is a number, so a stray cover.jpg does no harm; without any, all images.
    """
    plain = sorted(n for n in os.listdir(folder) if len(n) == 12 and n.endswith(".jpg") and n[:8].isdigit())
    if plain and plain[-1] == f"{len(plain):08d}.jpg" and plain[0] == "00000001.jpg":
        return None, len(plain)
    images = list_images(folder)
    numbered = [n for n in images if os.path.splitext(n)[0].isdigit()]
    numbers = [int(os.path.splitext(n)[0]) for n in numbered]
    if len(set(numbers)) < len(numbers):
        twice = next(b for a, b in zip(numbers, numbers[1:]) if a == b)
        raise DataError(f"{folder}: two images have the number {twice}; remove one")
    if numbers and numbers[-1] - numbers[0] + 1 != len(numbers):
        have = set(numbers)
        lost = [n for n in range(numbers[0], numbers[-1]) if n not in have]
        some = ", ".join(str(n) for n in lost[:5]) + (", ..." if len(lost) > 5 else "")
        raise DataError(f"{folder}: {len(lost)} of the frames up to {numbered[-1]} are missing, by number: {some}")
    if numbers and numbers[0] > 1:
        raise DataError(f"{folder}: the first frame is {numbered[0]}; those before it are missing")
    if not images:
        raise DataError(f"{folder}: no frames in this folder")
    return numbered or images, len(numbered or images)


def _outside(folder: Path, files: list[str] | None, boxes: np.ndarray, count: int) -> np.ndarray:
    """(N,) bool: frames whose box has an area but none of it inside the frame."""
    outside = np.zeros(count, bool)
    x, y, w, h = boxes.T
    width, height = image_size(folder / (files[0] if files else "00000001.jpg"))
    suspect = (w > 0) & (h > 0) & ~((x < width) & (y < height) & (x + w > 0) & (y + h > 0))
    for i in np.flatnonzero(suspect):  # a few frames: the size may change inside a sequence, so look at each
        size = image_size(folder / (files[i] if files else f"{i + 1:08d}.jpg"))
        outside[i] = area(clip_xywh(torch.from_numpy(boxes[i]), *size)) <= 0
    return outside


def _table(path: Path, columns: int) -> np.ndarray:
    """Numbers of a text file, float64 (N, columns); separated by commas (or blanks, as other tools write them)."""
    if not path.is_file():
        raise DataError(f"{path} is missing")
    lines = _text(path).rstrip().splitlines()
    rows = [line.replace(",", " ").split() for line in lines]
    try:
        table = np.array(rows, np.float64).reshape(len(rows), columns)
        if len(rows) and np.isfinite(table).all():
            return table
    except ValueError:
        pass  # found below, line by line
    for number, row in enumerate(rows, 1):
        try:
            if len(row) == columns and np.isfinite(np.array(row, np.float64)).all():
                continue
        except ValueError:
            pass  # reported like any other line that is not as expected
        expected = "left,top,width,height in pixels" if columns == 4 else "one number"
        raise DataError(f"{path}, line {number}: expected {expected}, found {lines[number - 1]!r}")
    raise DataError(f"{path} is empty")


def _read_meta(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    # the first line is [METAINFO]; a line without a colon says nothing
    pairs = (line.split(":", 1) for line in _text(path).splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig", errors="replace")


def write_sequence(
    folder: str | os.PathLike,
    frames: Iterable[Tensor],
    boxes_xywh: Tensor,
    absent: Tensor | None = None,
    cover: Tensor | None = None,
    cut: Tensor | None = None,
    meta: dict[str, str] | None = None,
    quality: int = 90,
) -> Path:
    """Write one sequence in the GOT-10k layout and return its folder.

    `frames` are uint8 (3, H, W), RGB, and are consumed one by one. `boxes_xywh` is (N, 4), pixels, or (1, 4)
    for a test sequence. `absent`, `cut` (N,) bool and `cover` (N,) 0..8 are left out of the folder when None.
    `meta` becomes meta_info.ini; `resolution` is added from the first frame when it is missing. JPEG 4:2:0,
    the same bytes for the same frames. The folder appears only when it is complete.

    Raises DataError when the folder exists and is not empty, or labels and frames do not fit.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists already; remove it or choose another folder")
    boxes = torch.as_tensor(boxes_xywh, dtype=torch.float64).reshape(-1, 4)
    work = writable(folder.parent) / f".{folder.name}.{os.getpid()}.partial"
    try:
        work.mkdir()
        count, size = 0, (0, 0)
        for count, frame in enumerate(frames, 1):
            (work / f"{count:08d}.jpg").write_bytes(encode_jpeg(frame, quality))
            size = size if count > 1 else (frame.shape[2], frame.shape[1])
        _write_labels(work, folder.name, count, boxes, {"absence": absent, "cover": cover, "cut_by_image": cut})
        lines = [f"{key}: {value}" for key, value in ((meta or {}) | {"resolution": str(size)} | (meta or {})).items()]
        (work / "meta_info.ini").write_text("\n".join(["[METAINFO]", *lines]) + "\n", "utf-8", newline="\n")
        if folder.exists():
            folder.rmdir()
        os.replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return folder


def _write_labels(work: Path, name: str, count: int, boxes: Tensor, labels: dict[str, Tensor | None]) -> None:
    if count == 0:
        raise DataError(f"sequence {name}: no frames to write")
    if len(boxes) not in (1, count):
        raise DataError(f"sequence {name}: {count} frames but {len(boxes)} boxes; give {count}, or 1 for a test sequence")
    rows = "\n".join(",".join(f"{v:.4f}" for v in row) for row in boxes.tolist())
    (work / "groundtruth.txt").write_text(rows + "\n", "utf-8", newline="\n")
    for label, values in labels.items():
        if values is None:
            continue
        if len(values) != count:
            raise DataError(f"sequence {name}: {count} frames but {len(values)} values for {label}.label")
        text = "\n".join(str(int(v)) for v in values)
        (work / f"{label}.label").write_text(text + "\n", "utf-8", newline="\n")
