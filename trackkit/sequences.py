"""A sequence is a named list of frames with boxes; where the frames come from is the sequence's own
business.

Frames are decoded when asked for and never kept, so a sequence of 10,000 frames costs nothing to
open.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from trackkit.crops import Windows, mean_colour, reduction, shown
from trackkit.errors import DataError
from trackkit.images import SUFFIXES, Picture, image_size, read_image
from trackkit.rectangles import Rectangle

BLACK = torch.zeros(3)


class Sequence:
    """Base class: labels in memory, frames on demand.

    Attributes:
        name: unique inside its data set; result files are named after it.
        boxes_xywh: (N, 4) float64, pixels. Only (1, 4) when just the first box is given (a test
            sequence), (0, 4) when there is none (a video of one's own before a box is drawn).
        absent, cut: (N,) bool. cover: (N,) int64, visible share of the target in GOT-10k's levels
            0..8.
        attributes: words for tables by attribute. meta: the data set's own remarks.
    """

    def __init__(
        self,
        name: str,
        frames: int,
        boxes_xywh: Tensor,
        absent: Tensor | None = None,
        cover: Tensor | None = None,
        cut_by_image: Tensor | None = None,
        attributes: tuple[str, ...] = (),
        meta: dict[str, str] | None = None,
    ):
        self.name = name
        self.boxes_xywh = torch.as_tensor(boxes_xywh, dtype=torch.float64).reshape(-1, 4)
        if frames < 1:
            raise DataError(f"sequence {name} has no frames")
        if len(self.boxes_xywh) not in (0, 1, frames):
            raise DataError(
                f"sequence {name}: {frames} frames but {len(self.boxes_xywh)} boxes; give "
                f"{frames}, or 1"
            )
        self._frames = frames
        self.absent = torch.zeros(frames, dtype=torch.bool) if absent is None else absent.bool()
        self.cover = torch.full((frames,), 8) if cover is None else cover.long()
        self.cut = (
            torch.zeros(frames, dtype=torch.bool) if cut_by_image is None else cut_by_image.bool()
        )
        for what in ("absent", "cover", "cut"):
            if getattr(self, what).shape != (frames,):
                raise DataError(
                    f"sequence {name}: {frames} frames but {len(getattr(self, what))} labels "
                    f"`{what}`"
                )
        self.attributes = attributes
        self.meta = meta or {}

    def __len__(self) -> int:
        return self._frames

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self)} frames)"

    @property
    def labelled(self) -> bool:
        """True when every frame has a box."""
        return len(self.boxes_xywh) == len(self)

    @property
    def visible(self) -> Tensor:
        """(N,) bool: frames whose target can be trained on: present, not fully covered, with a real
        box.

        Real: finite, with positive width and height, and not entirely left of or above the frame.
        Frames without a box are not visible.
        """
        boxes = self.boxes_xywh
        real = (
            torch.isfinite(boxes).all(-1)
            & (boxes[:, 2:] > 0).all(-1)
            & (boxes[:, :2] + boxes[:, 2:] > 0).all(-1)
        )
        known = torch.zeros(len(self), dtype=torch.bool)
        known[: len(boxes)] = real
        return known & ~self.absent & (self.cover > 0)

    def frame(self, index: int, reduce: int = 1) -> Tensor:
        """Frame `index` as uint8 (3, H, W), RGB. `reduce` in 1, 2, 4, 8 asks for 1/reduce of the
        size, rounded up.
        """
        raise NotImplementedError

    def frame_size(self, index: int) -> tuple[int, int]:
        """Width and height of frame `index`, without decoding it where the format allows."""
        raise NotImplementedError

    def still(self, index: int) -> Still | Picture:
        """Frame `index`, opened once for its size and its pixels."""
        return Still(self, self._check_index(index))

    def crop(self, index: int, window: Windows, fill: Tensor | None = None) -> Tensor:
        """The pixels of `window` (a batch of one) in frame `index`: uint8 (3, size, size); see
        `rectangle`.
        """
        return self.rectangle(self.still(index), window, fill).crop()

    def rectangle(
        self, still: Still | Picture, window: Windows, fill: Tensor | None = None
    ) -> Rectangle:
        """What the crop of `window` (a batch of one) in a frame is made of.

        Decodes at the smallest size that still has a pixel for each pixel of the crop and in which
        the window lies on whole pixels. `fill` is the colour outside the frame, (3,); None: the
        frame's mean.
        """
        left, top, side = (int(v) for v in (window.left, window.top, window.side))
        reduce = reduction(side, window.size)
        while left % reduce or top % reduce or side % reduce:
            reduce //= 2
        left, top, side = left // reduce, top // reduce, side // reduce
        width, height = (-(-v // reduce) for v in still.size)
        part = shown(left, top, side, width, height)
        inside = part == (left, top, left + side, top + side)
        if fill is None and not inside:  # the mean colour needs the whole frame
            whole = still.pixels(reduce)
            pixels = whole[:, part[1] : part[3], part[0] : part[2]]
            fill = mean_colour(whole)
        else:
            pixels = still.pixels(reduce, part)
        fill = BLACK if inside else fill
        return Rectangle(pixels, left - part[0], top - part[1], side, window.size, fill)

    def fingerprint(self) -> str:
        """Changes when a frame or a label does: what results are results of."""
        digest = hashlib.sha256()
        for part in self._source():
            digest.update(part)
        for values in (self.boxes_xywh, self.absent, self.cover):
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()[:16]

    def _source(self) -> Iterator[bytes]:
        """What tells this sequence's frames from others."""
        for frame in map(self.frame, range(len(self))):
            yield repr(tuple(frame.shape)).encode()
            yield frame.numpy().tobytes()

    def _check_index(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {self.name} has frames 0 to {len(self) - 1}, not {index}")
        return int(index)


class Still:
    """A frame of a sequence that is in memory, or decoded by its sequence.

    Attributes:
        size: width and height in pixels.
    """

    def __init__(self, sequence: Sequence, index: int):
        self.sequence, self.index = sequence, index
        self.size = sequence.frame_size(index)

    def pixels(self, reduce: int = 1, part: tuple[int, int, int, int] | None = None) -> Tensor:
        """Of `Sequence.frame(index, reduce)` all, or left, top, right, bottom (`part`)."""
        left, top, right, bottom = part or (0, 0, None, None)
        return self.sequence.frame(self.index, reduce)[:, top:bottom, left:right]


class ArraySequence(Sequence):
    """A sequence over frames that are already in memory: a list of uint8 (3, H, W) tensors."""

    def __init__(self, name: str, images: list[Tensor], boxes_xywh: Tensor, **labels):
        super().__init__(name, len(images), boxes_xywh, **labels)
        self.images = images

    def frame(self, index: int, reduce: int = 1) -> Tensor:
        return block_mean(self.images[self._check_index(index)], reduce)

    def frame_size(self, index: int) -> tuple[int, int]:
        image = self.images[self._check_index(index)]
        return image.shape[2], image.shape[1]


class FolderSequence(Sequence):
    """The images of a folder, in the natural order of their names (2.png before 10.png).

    Frames may differ in size. `files` are the names of the frames when they are known already; else
    the folder is listed, where hidden files and files that are no images are left out. `size` is
    that of the first frame if it is known. `labels` are those of `Sequence`.

    Raises DataError when the folder does not exist or holds no image.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        boxes_xywh: Tensor | None = None,
        name: str | None = None,
        files: list[str] | None = None,
        size: tuple[int, int] | None = None,
        **labels,
    ):
        self.folder = Path(folder)
        self._sizes = {} if size is None else {0: size}
        self.files = list_images(self.folder) if files is None else files
        if not self.files:
            raise DataError(
                f"{folder}: no frames in this folder; expected images "
                f"({', '.join(sorted(SUFFIXES))})"
            )
        boxes = torch.zeros(0, 4) if boxes_xywh is None else boxes_xywh
        # of the folder as it was given, not of what a link leads to
        name = name or Path(os.path.abspath(self.folder)).name
        super().__init__(name, len(self.files), boxes, **labels)

    def frame(self, index: int, reduce: int = 1) -> Tensor:
        return read_image(self.path(index), reduce)

    def still(self, index: int) -> Picture:
        return Picture(self.path(index))

    def frame_size(self, index: int) -> tuple[int, int]:
        if index not in self._sizes:
            self._sizes[index] = image_size(self.path(index))
        return self._sizes[index]

    def _source(self) -> Iterator[bytes]:
        for index in range(len(self)):
            yield file_state(self.path(index))

    def path(self, index: int) -> Path:
        """File of frame `index`."""
        return self.folder / self.files[self._check_index(index)]


def file_state(path: Path) -> bytes:
    """Size and time of a file. Raises DataError if it has gone."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; extract it again") from error
    return b"%d %d;" % (stat.st_size, stat.st_mtime_ns)


def identity(sequences) -> str:
    """What a training on a data set is a training on: the sequences and their labels, wherever
    they lie. A data set may know it (`identity`); of any other it is that of its sequences.
    """
    known = getattr(sequences, "identity", None)
    if known is not None:
        return known
    digest = hashlib.sha256()
    for sequence in (sequences[i] for i in range(len(sequences))):
        digest.update(repr((sequence.name, len(sequence))).encode())
        for values in (sequence.boxes_xywh, sequence.absent, sequence.cover, sequence.cut):
            digest.update(values.numpy().tobytes())
    return f"{len(sequences)} sequences, {digest.hexdigest()[:16]}"


def list_images(folder: Path) -> list[str]:
    """Names of the images in a folder in natural order. Raises DataError when there is no such
    folder.
    """
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder of frames")
    names = (
        n
        for n in os.listdir(folder)
        if os.path.splitext(n)[1].lower() in SUFFIXES and not n.startswith(".")
    )
    return sorted(sorted(names), key=natural_key)  # 1.jpg before 01.jpg, however they are listed


def natural_key(name: str) -> list:
    """Sort key that compares the digits in a name as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def block_mean(image: Tensor, reduce: int) -> Tensor:
    """Mean over blocks of reduce x reduce pixels: uint8 (3, H, W) -> (3, ceil(H / reduce), ceil(W /
    reduce)).
    """
    if reduce == 1:
        return image
    pooled = F.avg_pool2d(image[None].float(), reduce, ceil_mode=True, count_include_pad=False)
    return pooled[0].round().to(torch.uint8)
