"""GOT-10k: the data set on disk (Huang, Zhao, Huang, TPAMI 2021), read lazily and checked exactly.

    ROOT/{train,val,test}/list.txt            names of the sequences, in order
    ROOT/train/GOT-10k_Train_000001/00000001.jpg ...
        groundtruth.txt                       N lines x,y,w,h in pixels; one line in the test split
        absence.label, cut_by_image.label     N lines 0 or 1; cover.label: N lines 0 (hidden) .. 8
        (fully visible) meta_info.ini                         [METAINFO], then `key: value`

Labels of all sequences are read once, checked, and kept in one file under `TRACKKIT_HOME`, so that
opening the 9,335 training sequences again takes a moment. Frames are never cached.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from trackkit.errors import DataError
from trackkit.images import encode_jpeg
from trackkit.labels import WRONG_FRAMES, Index, Labels, groundtruth, read_labels, read_text
from trackkit.paths import cannot_write, data_root, writable
from trackkit.sequences import FolderSequence, list_images

__all__ = ["BROKEN", "SPLITS", "WRONG_FRAMES", "GOT10k", "read_sequence", "write_sequence"]

SPLITS = ("train", "val", "test")

# Training sequences whose boxes are wrong or whose picture freezes: got-10k/toolkit issue 10,
# HonglinChu/SiamTrackers issue 35. The widely used lists drop four of them; these are all that were
# reported.
BROKEN = frozenset(f"GOT-10k_Train_{n:06d}" for n in (*range(8623, 8638), 9058, 9059))


class GOT10k:
    """A split of GOT-10k, or any folder of sequences in its layout: `len(d)`, `d[i]` ->
    FolderSequence.

    Where the sequences are: `root/split` if that folder exists; else `root` itself, when it is a
    folder of sequences (a split folder, or a collection of one's own) and is not named after
    another split. `root` None means `TRACKKIT_GOT10K`, else the embedded samples. Which sequences:
    the lines of list.txt; without that file all folders that hold groundtruth.txt or frames, by
    name. Hidden files, backups and other strays are ignored.

    `exclude` are names to leave out. The default leaves out `BROKEN` from the train split and
    nothing elsewhere; pass () to have all.

    Labels: a missing absence, cover or cut_by_image file means present, fully visible, not cut; a
    missing meta_info.ini an empty `meta`; its value `attributes: a, b` becomes `attributes`.
    `absent` is also set where the box lies outside the frame and in `WRONG_FRAMES`, so `visible` is
    False there. The train and val splits need a box for each frame; elsewhere one box, the first,
    is enough. Sizes always come from the images.

    Attributes:
        name: for tables and result folders, as "GOT-10k-val". names: of the sequences, in order.
        folder: where the sequences lie. procedural: whether they were drawn by `trackkit.synth`.

    Raises DataError that lists every broken file with its line and what to do; FileNotFoundError
    never.
    """

    procedural = False

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        split: str = "train",
        exclude: Collection[str] | None = None,
    ):
        if split not in SPLITS:
            raise DataError(f"there is no split {split!r}; choose train, val or test")
        root = data_root(root)
        self.folder = _split_folder(root, split)
        own = self.folder.name in SPLITS
        self.name = (
            f"{self.folder.resolve().parent.name}-{split}" if own else self.folder.resolve().name
        )
        exclude = (BROKEN if split == "train" else ()) if exclude is None else exclude
        places = {name: at for name, at in _places(self.folder).items() if name not in set(exclude)}
        if not places:
            raise DataError(
                f"{self.folder}: no sequences left after leaving out {len(exclude)} by name"
                if exclude
                else f"{self.folder}: no sequences in this folder; unpack them there"
            )
        self.names, self._places = list(places), list(places.values())
        self._labels = Index.open(self.folder, self._places, one_box=not (own and split != "test"))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> FolderSequence:
        name, place = self.names[index], self._places[index]
        return _sequence(self.folder / place, self._labels[index], name)

    @property
    def identity(self) -> str:
        """What a training on this data is a training on: the sequences and their labels, wherever
        they lie.
        """
        digest = hashlib.sha256(json.dumps(self.names).encode())
        for name in ("frames", "boxes", "absent", "cover", "cut"):
            digest.update(self._labels.arrays[name].tobytes())
        return f"{len(self)} sequences, {digest.hexdigest()[:16]}"

    def __repr__(self) -> str:
        return f"GOT10k({str(self.folder)!r}, {len(self)} sequences)"


def read_sequence(folder: str | os.PathLike) -> FolderSequence:
    """Open one folder in the GOT-10k layout, with its labels as `GOT10k` reads them. Raises
    DataError.
    """
    return _sequence(Path(folder), read_labels(Path(folder), one_box=True))


def _sequence(folder: Path, labels: Labels, name: str | None = None) -> FolderSequence:
    words = labels.meta.get("attributes", "").split(",")
    return FolderSequence(
        folder,
        torch.from_numpy(labels.boxes),
        name,
        files=labels.files or [f"{i:08d}.jpg" for i in range(1, labels.frames + 1)],
        size=labels.size,
        absent=torch.from_numpy(labels.absent),
        cover=torch.from_numpy(labels.cover),
        cut_by_image=torch.from_numpy(labels.cut),
        attributes=tuple(word.strip() for word in words if word.strip()),
        meta=labels.meta,
    )


def _split_folder(root: Path, split: str) -> Path:
    if os.path.isdir(root / split):
        return root / split
    if root.resolve().name in SPLITS and root.resolve().name != split:
        raise DataError(
            f"{root} is the {root.resolve().name} split, but {split} was asked for; "
            f"give the folder above it: {root.resolve().parent}"
        )
    if groundtruth(root).is_file():
        raise DataError(
            f"{root} is one sequence; give the folder above it, or use open_sequence({str(root)!r})"
        )
    if (root / "list.txt").is_file() or next(_sequence_folders(root), None):
        return root
    raise DataError(
        f"{root}: found neither a folder {split}/ nor sequences. Give the folder that holds "
        "train/, val/ and test/ of "
        "GOT-10k, or a folder of sequences (each with frames and groundtruth.txt), or make one: "
        "trackkit synth --samples DIR"
    )


def _sequence_folders(folder: Path) -> Iterator[str]:
    """Names of the folders in `folder` that hold groundtruth.txt or frames."""
    for name in _folders(folder):
        if groundtruth(folder / name).is_file() or list_images(folder / name):
            yield name


def _folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, in order; without hidden ones and links to it or above."""
    names, above = [], {folder.resolve(), *folder.resolve().parents}
    for entry in os.scandir(folder):
        with suppress(OSError, RuntimeError):  # a link that ends nowhere, or at itself
            loop = entry.is_symlink() and Path(entry.path).resolve() in above
            if entry.is_dir() and not entry.name.startswith(".") and not loop:
                names.append(entry.name)
    return sorted(names)


def _places(folder: Path) -> dict[str, str]:
    """Name of each sequence -> where it lies in `folder`: in the folder of its name, or one folder
    deeper, as GOT-10k's archives of parts of a split are often unpacked.
    """
    listed = folder / "list.txt"
    if not listed.is_file():
        names = list(_sequence_folders(folder))
        if names or folder.name not in SPLITS:
            return {name: name for name in names}
        return _deeper(folder)
    lines = [line.strip() for line in read_text(listed).splitlines() if line.strip()]
    # clip/ and ./clip are clip: one sequence has one name
    names = [os.path.normpath(line) for line in lines]
    if not names:
        raise DataError(
            f"{listed} is empty; write one sequence name per line, or remove it to use all folders "
            "here"
        )
    for name, line in zip(names, lines, strict=True):
        if name == "." or Path(name).is_absolute() or ".." in Path(line).parts or "\0" in name:
            raise DataError(
                f"{listed}: {line!r} leads out of {folder}; list the names of folders in it"
            )
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"{listed}: {twice} is listed twice; keep one of the lines")
    places = {name: name for name in names}
    if lost := [name for name in names if not os.path.isdir(folder / name)]:
        deeper = _deeper(folder)
        places |= {name: deeper[name] for name in lost if name in deeper}
    return places


def _deeper(folder: Path) -> dict[str, str]:
    """Sequences one folder further down than they should be, by name. Raises DataError where two
    have the same.
    """
    found: dict[str, str] = {}
    for part in _folders(folder):
        for name in _sequence_folders(folder / part):
            if name in found:
                raise DataError(
                    f"{folder}: {found[name]} and {part}/{name} have the same name; list the paths "
                    "to use in list.txt, one a line"
                )
            found[name] = f"{part}/{name}"
    return found


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

    `frames` are uint8 (3, H, W), RGB, and are consumed one by one. `boxes_xywh` is (N, 4), pixels,
    or (1, 4) for a test sequence. `absent`, `cut` (N,) bool and `cover` (N,) 0..8 are left out of
    the folder when None. `meta` becomes meta_info.ini; `resolution` is added from the first frame
    when it is missing. JPEG 4:2:0, the same bytes for the same frames. The folder appears only when
    it is complete.

    Raises DataError when the folder exists and is not empty, or labels and frames do not fit.
    """
    folder = Path(folder)
    if os.path.exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists already; remove it or choose another folder")
    boxes = torch.as_tensor(boxes_xywh, dtype=torch.float64).reshape(-1, 4)
    work = writable(folder.parent) / f".{folder.name[:50]}.{os.getpid()}.partial"
    try:
        work.mkdir()
        count, size = 0, (0, 0)
        for count, frame in enumerate(frames, 1):
            (work / f"{count:08d}.jpg").write_bytes(encode_jpeg(frame, quality))
            size = size if count > 1 else (frame.shape[2], frame.shape[1])
        _write_labels(
            work,
            folder.name,
            count,
            boxes,
            {"absence": absent, "cover": cover, "cut_by_image": cut},
        )
        lines = [
            f"{key}: {value}"
            for key, value in ((meta or {}) | {"resolution": str(size)} | (meta or {})).items()
        ]
        (work / "meta_info.ini").write_text(
            "\n".join(["[METAINFO]", *lines]) + "\n", "utf-8", newline="\n"
        )
        if folder.exists():
            folder.rmdir()
        os.replace(work, folder)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            raise cannot_write(folder, error) from error
        raise
    return folder


def _write_labels(
    work: Path, name: str, count: int, boxes: Tensor, labels: dict[str, Tensor | None]
) -> None:
    if count == 0:
        raise DataError(f"sequence {name}: no frames to write")
    if len(boxes) not in (1, count):
        raise DataError(
            f"sequence {name}: {count} frames but {len(boxes)} boxes; give {count}, or 1 (test "
            "split)"
        )
    rows = "\n".join(",".join(f"{v:.4f}" for v in row) for row in boxes.tolist())
    (work / "groundtruth.txt").write_text(rows + "\n", "utf-8", newline="\n")
    for label, values in labels.items():
        if values is None:
            continue
        if len(values) != count:
            raise DataError(
                f"sequence {name}: {count} frames but {len(values)} values for {label}.label"
            )
        text = "\n".join(str(int(v)) for v in values)
        (work / f"{label}.label").write_text(text + "\n", "utf-8", newline="\n")
