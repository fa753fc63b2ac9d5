"""Video files <-> sequences, through PyAV (ffmpeg): any container and codec that ffmpeg reads."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from trackkit.boxes import check_boxes
from trackkit.errors import DataError
from trackkit.got10k import read_sequence
from trackkit.images import SUFFIXES
from trackkit.paths import atomic_write
from trackkit.sequences import FolderSequence, Sequence, block_mean

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}


class VideoSequence(Sequence):
    """The first video stream of a file.

    Frames are counted from the packets, without decoding. Reading in order decodes each frame once;
    any other frame is reached from the last key frame before it, so `frame(i)` is the same picture
    in whatever order frames are asked for. The display rotation that phones store is applied.

    Attributes:
        fps: mean frame rate, frames per second.

    Raises DataError when the file is missing, no video, or has no frame that can be decoded.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        boxes_xywh: Tensor | None = None,
        name: str | None = None,
        **labels,
    ):
        self.path = Path(path)
        self._reset()
        try:
            with self._open() as container:
                stream = container.streams.video[0]
                packets = [
                    p
                    for p in container.demux(stream)
                    if p.size and not p.is_discard and _stamp(p) is not None
                ]
                self.fps = float(stream.average_rate or 0)
        except (av.FFmpegError, OSError) as error:
            raise self._broken(error) from error
        self._stamps = sorted({_stamp(p) for p in packets})
        self._keys = sorted({_stamp(p) for p in packets if p.is_keyframe})
        if not self._stamps:
            raise DataError(f"{path}: the video has no frames; record or convert it again")
        boxes = torch.zeros(0, 4) if boxes_xywh is None else boxes_xywh
        super().__init__(name or self.path.stem, len(self._stamps), boxes, **labels)
        # also finds out now whether it can be decoded
        self._size = tuple(self.frame(0).shape[:0:-1])

    def frame(self, index: int, reduce: int = 1) -> Tensor:
        index = self._check_index(index)
        if index != self._index:
            try:
                self._decode(index)
            except (av.FFmpegError, OSError, StopIteration) as error:
                self._reset()
                raise self._broken(error, index) from error
        return block_mean(self._picture, reduce)

    def frame_size(self, index: int) -> tuple[int, int]:
        self._check_index(index)
        return self._size

    def _decode(self, index: int) -> None:
        wanted = self._stamps[index]
        key = (
            self._keys[max(bisect.bisect_right(self._keys, wanted) - 1, 0)]
            if self._keys
            else self._stamps[0]
        )
        # go on decoding unless the frame lies behind, or a key frame ahead is a shorter way
        if self._pictures is None or index <= self._index or key > self._stamps[self._index]:
            self._seek(key)
        for picture in self._pictures:
            if (picture.pts if picture.pts is not None else picture.dts) >= wanted:
                break
        else:
            raise StopIteration("the stream ends before this frame")
        pixels = torch.from_numpy(picture.to_ndarray(format="rgb24")).permute(2, 0, 1)
        turns = round(picture.rotation / 90) % 4  # counter-clockwise degrees
        self._picture = torch.rot90(pixels, turns, (1, 2)) if turns else pixels
        self._index = index

    def _seek(self, key: int) -> None:
        if self._container is None:
            self._container = self._open()
            self._container.streams.video[0].thread_type = "AUTO"
        stream = self._container.streams.video[0]
        self._container.seek(key, stream=stream, backward=True)
        self._pictures = self._container.decode(stream)

    def _open(self) -> av.container.InputContainer:
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such video file")
        container = av.open(str(self.path))
        if not container.streams.video:
            container.close()
            raise DataError(f"{self.path}: the file has no video stream")
        return container

    def _broken(self, error: Exception, index: int | None = None) -> DataError:
        where = "" if index is None else f"frame {index} of {len(self._stamps)}: "
        reason = getattr(error, "strerror", None) or str(error)
        return DataError(
            f"{self.path}: {where}cannot be decoded as video ({reason}). "
            "Convert it with `ffmpeg -i FILE -c:v libx264 out.mp4`"
        )

    def _reset(self) -> None:
        self._container, self._pictures, self._picture, self._index = None, None, None, -1

    # an open file does not travel to a worker process; it is opened again there
    def __getstate__(self) -> dict:
        return self.__dict__ | {
            "_container": None,
            "_pictures": None,
            "_picture": None,
            "_index": -1,
        }


def write_video(path: str | os.PathLike, frames: Iterable[Tensor], fps: float) -> Path:
    """Write uint8 (3, H, W) frames of one size as H.264 (yuv420p, which browsers play) and return
    the path.

    The suffix .mp4, .mov or .mkv chooses the container. H.264 in 4:2:0 needs even sides, so the
    last row or column is repeated where a side is odd. The file appears only when it is complete.

    Raises DataError for no frames, frames of different sizes, another suffix, or a place that
    cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in CONTAINERS:
        raise DataError(f"{path}: write a video as {', '.join(CONTAINERS)}")
    size = None
    with atomic_write(path) as partial:
        options = {"movflags": "+faststart"} if path.suffix.lower() != ".mkv" else {}
        with av.open(
            str(partial), "w", format=CONTAINERS[path.suffix.lower()], container_options=options
        ) as container:
            stream = container.add_stream(
                "libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"}
            )
            stream.pix_fmt = "yuv420p"
            for index, frame in enumerate(frames):
                if size is None:
                    size = frame.shape
                    stream.height, stream.width = size[1] + size[1] % 2, size[2] + size[2] % 2
                if frame.shape != size:
                    raise DataError(
                        f"{path}: frame {index} is {tuple(frame.shape)}, the first is {tuple(size)}"
                    )
                pixels = frame.cpu().permute(1, 2, 0).numpy()
                pixels = np.pad(pixels, ((0, size[1] % 2), (0, size[2] % 2), (0, 0)), mode="edge")
                container.mux(
                    stream.encode(
                        av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                    )
                )
            if size is None:
                raise DataError(f"{path}: no frames to write")
            container.mux(stream.encode())
    return path


def _stamp(packet: av.Packet) -> int | None:
    return packet.pts if packet.pts is not None else packet.dts


def open_sequence(
    path: str | os.PathLike, first_box_xywh: Tensor | list[float] | None = None
) -> Sequence:
    """Open what a user has: a folder in the GOT-10k layout, a folder of images, or a video file.

    With `first_box_xywh` (left, top, width, height in pixels of the first frame) the sequence has
    this box only, even if the folder has labels. Without it the labels are read; images and videos
    then have no box.

    Raises DataError for a path that is none of these, or a box that no tracker can start from.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix.lower() in SUFFIXES:
            raise DataError(
                f"{path} is one image; give the folder that holds all frames, or a video file"
            )
        sequence = VideoSequence(path)
    elif not path.is_dir():
        raise DataError(
            f"{path} does not exist; expected a video file, a folder of images or a GOT-10k "
            "sequence"
        )
    elif first_box_xywh is None and (path / "groundtruth.txt").is_file():
        return read_sequence(path)
    else:
        sequence = FolderSequence(path)
    if first_box_xywh is not None:
        box = torch.as_tensor(first_box_xywh, dtype=torch.float64).reshape(1, -1)
        sequence.boxes_xywh = check_boxes(box, f"first box of {path}", sequence.frame_size(0))
    return sequence
