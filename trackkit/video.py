"""Video files <-> sequences, through PyAV (ffmpeg): any container and codec that ffmpeg reads."""

from __future__ import annotations

import bisect
import itertools
import logging
import os
import struct
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData
from torch import Tensor

from trackkit.boxes import check_boxes
from trackkit.errors import DataError
from trackkit.got10k import read_sequence
from trackkit.images import SUFFIXES
from trackkit.labels import frames_below, groundtruth
from trackkit.paths import atomic_write
from trackkit.sequences import (
    FolderSequence,
    Sequence,
    block_mean,
    file_state,
    list_images,
)

log = logging.getLogger("trackkit")

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
# These make a video of other files, which whoever sent the file may have chosen.
_READERS_OF_OTHER_FILES = {
    *("concat", "dash", "hls", "image2", "imf", "rtp", "rtsp", "sdp", "tty", "vobsub"),
    "webm_dash_manifest",
}
_PLAYLISTS = (b"#EXTM3U", b"ffconcat version", b"<MPD")
_OPEN = {
    "protocol_whitelist": "file",
    "format_whitelist": ",".join(sorted(av.formats_available - _READERS_OF_OTHER_FILES)),
}


class VideoSequence(Sequence):
    """The first video stream of a file.

    `frame(i)` is the i-th picture that decoding the file from its start gives, in whatever order
    frames are asked for. Reading in order decodes each frame once. Another frame is reached from
    the last key frame before it where the container has an index (.mp4, .mov, .mkv, .webm) and
    where the landing proves right, else from the start of the file. Rotation and mirroring that the
    file asks for are applied.

    How many frames there are is known from the packets of a sound .mp4 or .mkv; any other file is
    decoded once to count them. A file that is damaged or cut short has the frames that can be
    decoded, and a warning says so once (logger "trackkit"). Damage that shows only while frames are
    read may make the sequence shorter; `frame` raises DataError for one that is not there.

    Attributes:
        fps: mean frame rate, frames per second; 0 when the file does not say.

    Raises DataError when the file is missing, no video, a playlist, or has no frame that can be
    decoded.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        boxes_xywh: Tensor | None = None,
        name: str | None = None,
        **labels,
    ):
        self.path = Path(path)
        self._container = None
        self._reset()
        self._frames = 0
        self._stamps: list[int | None] = []  # of the frames, in the order of decoding
        self._keys: list[int] = []  # frames that a seek may go to
        self._counted, self._threads, self._packets_read = False, True, 0
        self._damage: Exception | None = None
        try:
            if not self._scan():
                self._count()
        except (av.FFmpegError, OSError) as error:
            raise self._broken(error) from error
        if not self._stamps:
            if self._damage is not None:
                raise self._broken(self._damage)
            raise DataError(f"{path}: the video has no frames; record or convert it again")
        boxes = torch.zeros(0, 4) if boxes_xywh is None else boxes_xywh
        super().__init__(name or self.path.stem, len(self._stamps), boxes, **labels)
        # also finds out now whether it can be decoded
        self._size = tuple(self.frame(0).shape[:0:-1])

    @property
    def times(self) -> list[float]:
        """Seconds from the first frame to each frame, as the file says, or evenly spaced by `fps`
        where it does not say.
        """
        stamps = self._stamps
        if not _rising(stamps):
            return [i / (self.fps or 10) for i in range(len(stamps))]
        return [float((stamp - stamps[0]) * self._unit) for stamp in stamps]

    def frame(self, index: int, reduce: int = 1) -> Tensor:
        index = self._check_index(index)
        if self._picture is None or index != self._index:
            try:
                self._read(index)
            except (av.FFmpegError, OSError) as error:
                self._reset()
                raise self._broken(error, index) from error
        return block_mean(self._picture, reduce)

    def _source(self) -> Iterator[bytes]:
        yield file_state(self.path)

    def frame_size(self, index: int) -> tuple[int, int]:
        self._check_index(index)
        return self._size

    def _scan(self) -> bool:
        """Read the stamps and key frames of all packets, without decoding. Returns whether they
        tell which frames there are.
        """
        packets, end = [], 0.0  # (stamp, key, discarded), seconds
        with self._open() as container:
            stream = container.streams.video[0]
            self.fps, self._unit = float(stream.average_rate or 0), stream.time_base
            kind = {"mp4", "matroska", "avi"} & set(container.format.name.split(","))
            if not kind:
                return False  # no index, no stated length
            try:
                # of all streams, because the longest makes the duration that the file states
                for packet in container.demux():
                    stamp = packet.dts if packet.pts is None else packet.pts
                    if stamp is not None:
                        last = (stamp + (packet.duration or 0)) * packet.time_base
                        end = max(end, float(last))
                    if packet.stream.index == stream.index and packet.size:
                        packets.append((packet.pts, packet.is_keyframe, packet.is_discard))
                        if packet.is_corrupt:
                            self._damage = EOFError("a part of a frame is missing")
            except av.FFmpegError as error:
                self._damage = error
            codec, stated = stream.codec_context.name, (container.duration or 0) / av.time_base
        # A slow-motion edit states more than the packets last, with no packet missing.
        whole = 0 < stream.frames <= len(packets)
        if end < stated - 0.25 and not whole:  # rounding is less
            self._damage = EOFError(f"the file ends after {end:.1f} of {stated:.1f} s")
        self._stamps = [stamp for stamp, _, discarded in packets if not discarded]
        if None in self._stamps or kind == {"avi"}:  # AVI has stamps of packets only
            self._stamps = []
            return False
        self._stamps.sort()
        keys = {stamp for stamp, key, discarded in packets if key and not discarded}
        self._keys = [i for i, stamp in enumerate(self._stamps) if stamp in keys]
        # A packet is not a frame where an edit list hides frames, where pictures come before the
        # first key frame, and in VP8, which has packets that are never shown.
        return (
            self._damage is None
            and len(self._stamps) == len(packets)
            and _rising(self._stamps)
            and self._keys[:1] == [0]
            and codec != "vp8"
        )

    def _count(self) -> None:
        """Decode the file once to know its frames."""
        said, keys = len(self._stamps), {self._stamps[i] for i in self._keys}
        self._counted = True
        # With several threads pictures may get lost at damage, at the end without an error.
        several = [True, False] if self._damage is None and not self._frames else [False]
        for threads in several:
            self._reset()
            self._threads = threads
            self._packets_read = 0
            self._stamps = [picture.pts for picture in self._decode(0)]
            if self._damage is None and len(self._stamps) == (said or self._packets_read):
                break
        self._reset()
        # without such stamps it cannot be checked where a seek has landed
        sought = _rising(self._stamps) and self._damage is None
        self._keys = [i for i, s in enumerate(self._stamps) if s in keys] if sought else []
        fewer = False
        if self._frames:  # the labels have been given; more frames would have none
            self._stamps = self._stamps[: self._frames]
            frames = len(self._stamps)
            if len(self.boxes_xywh) == self._frames:
                self.boxes_xywh = self.boxes_xywh[:frames]
            self.absent, self.cover, self.cut = (
                labels[:frames] for labels in (self.absent, self.cover, self.cut)
            )
            fewer, self._frames = frames < self._frames, frames
        if self._stamps and (fewer or self._damage is not None):
            of = f" of {said}" if said > len(self._stamps) else ""
            log.warning(
                f"{self.path}: the video is damaged or cut short; the {len(self._stamps)}{of} "
                "frames that can be decoded are used"
            )

    def _read(self, index: int) -> None:
        """Make `index` the current frame. All pictures on the way must bear the stamps expected of
        them.
        """
        key = self._keys[bisect.bisect_right(self._keys, index) - 1] if self._keys else 0
        key = min(key, index)
        # go on decoding unless the frame lies behind, or a key frame ahead is a shorter way
        going_on = self._pictures is not None and self._index < index and key <= self._index + 1
        for start in ([None] if going_on else []) + ([key, 0] if key else [0]):
            if start is not None:
                self._reset(close=start == 0)
                self._index, self._pictures = start - 1, self._decode(start)
            for picture in self._pictures:
                if picture.pts != self._stamps[self._index + 1]:
                    break
                if self._damage is not None and not self._counted:
                    break
                self._index += 1
                if self._index == index:
                    self._picture = _upright(picture)
                    return
        said, error = len(self), self._damage or EOFError("the stream ends before this frame")
        if not self._counted:
            self._count()  # the packets said something else than the decoder gives
            if index < len(self):
                return self._read(index)
        self._reset()
        raise self._broken(error, index, said) from error

    def _decode(self, start: int) -> Iterator[av.VideoFrame]:
        """The pictures from frame `start` to the end of the file; none where a seek to `start` does
        not land there. Packets that cannot be decoded are left out, and make `_damage`.
        """
        if self._container is None:
            self._container = self._open()
            stream = self._container.streams.video[0]
            if self._threads:
                stream.thread_type = "AUTO"
            else:
                stream.codec_context.thread_count = 1
        stream = self._container.streams.video[0]
        wanted = self._stamps[start] if start else None
        if wanted is not None:
            self._container.seek(wanted, stream=stream, backward=True)
        landed = wanted is None
        for packet in self._packets(stream):
            self._packets_read += packet is not None and packet.size > 0
            try:
                pictures = stream.decode(packet)
            except av.FFmpegError as error:
                if landed:
                    self._damage = error
                continue
            for picture in pictures:
                if not landed:
                    if picture.pts is not None and picture.pts < wanted:
                        continue  # from before the key frame: some of these may lack references
                    # a decoder that starts inside an intra-refresh has no intra picture to start at
                    if (
                        picture.pts != wanted
                        or not picture.key_frame
                        or picture.pict_type != av.video.frame.PictureType.I
                    ):
                        return
                    landed = True
                if picture.is_corrupt:
                    self._damage = ValueError("a picture is damaged")
                yield picture

    def _packets(self, stream: av.VideoStream) -> Iterator[av.Packet | None]:
        try:
            yield from self._container.demux(stream)
        except av.FFmpegError as error:
            self._damage = error
            yield None  # what the decoder still holds

    def _open(self) -> av.container.InputContainer:
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such video file")
        try:
            container = av.open(_url(self.path), container_options=_OPEN)
        except av.FFmpegError:
            with self.path.open("rb") as file:
                start = file.read(4096)
            if any(mark in start for mark in _PLAYLISTS):
                raise DataError(
                    f"{self.path}: this is a playlist, which would read other files; give the "
                    "video file itself"
                ) from None
            raise
        if not container.streams.video:
            container.close()
            raise DataError(f"{self.path}: the file has no video stream")
        return container

    def _broken(
        self, error: Exception, index: int | None = None, frames: int | None = None
    ) -> DataError:
        where = "" if index is None else f"frame {index} of {frames or len(self._stamps)}: "
        reason = getattr(error, "strerror", None) or str(error)
        return DataError(
            f"{self.path}: {where}cannot be decoded as video ({reason}). "
            "Convert it with `ffmpeg -i FILE -c:v libx264 out.mp4`"
        )

    def _reset(self, close: bool = True) -> None:
        self._pictures, self._picture, self._index = None, None, -1
        if close and self._container is not None:
            self._container.close()
        if close:
            self._container = None

    # an open file does not travel to a worker process; it is opened again there
    def __getstate__(self) -> dict:
        return self.__dict__ | {
            "_container": None,
            "_pictures": None,
            "_picture": None,
            "_index": -1,
        }


def _url(path: Path) -> str:
    """A name that ffmpeg takes for a file, whatever colons are in it."""
    return f"file:{os.path.abspath(path)}"


def _rising(stamps: list[float | None]) -> bool:
    return None not in stamps and all(a < b for a, b in itertools.pairwise(stamps))


def _upright(picture: av.VideoFrame) -> Tensor:
    """Pixels of a picture as it is to be shown: uint8 (3, H, W), turned by quarters and mirrored as
    its display matrix says.
    """
    pixels = torch.from_numpy(picture.to_ndarray(format="rgb24")).permute(2, 0, 1)
    matrix = picture.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return pixels
    # shown x = a * x + c * y, shown y = b * x + d * y, y down
    a, b, _, c, d = struct.unpack("5i", bytes(matrix)[:20])
    if abs(a) < abs(b):
        pixels, a, d = pixels.transpose(1, 2), c, b
    mirrored = [dim for dim, sign in ((2, a), (1, d)) if sign < 0]
    return pixels.flip(mirrored) if mirrored else pixels


def write_video(
    path: str | os.PathLike,
    frames: Iterable[Tensor],
    fps: float,
    times: list[float] | None = None,
) -> Path:
    """Write uint8 (3, H, W) frames of one size as H.264 (yuv420p, which browsers play) and return
    the path.

    The suffix .mp4, .mov or .mkv chooses the container. `times`, seconds at which each frame is
    shown, rising, keeps a variable frame rate; `fps` is then the mean rate. H.264 in 4:2:0 needs
    even sides, so the last row or column is repeated where a side is odd. The file appears only
    when it is complete.

    Raises DataError for no frames, frames of different sizes, times that do not fit the frames,
    another suffix, or a place that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in CONTAINERS:
        raise DataError(f"{path}: write a video as {', '.join(CONTAINERS)}")
    stamps, tick = None, Fraction(1, 1000 if path.suffix.lower() == ".mkv" else 90_000)
    if times is not None:
        if not _rising(times):
            raise DataError(f"{path}: the times of the frames must rise")
        stamps = []
        for time in times:  # rounding must not make two times one
            stamps.append(max(round(time / tick), stamps[-1] + 1 if stamps else 0))
    size, index = None, -1
    with atomic_write(path) as partial:
        options = {"movflags": "+faststart"} if path.suffix.lower() != ".mkv" else {}
        with av.open(
            _url(partial), "w", format=CONTAINERS[path.suffix.lower()], container_options=options
        ) as container:
            # slower presets make a smaller file and cost several times the tracking
            stream = container.add_stream(
                "libx264",
                rate=Fraction(fps).limit_denominator(1001),
                options={"crf": "18", "preset": "ultrafast"},
            )
            stream.pix_fmt = "yuv420p"
            if stamps is not None:
                stream.codec_context.time_base = tick
            for index, frame in enumerate(frames):
                if size is None:
                    size = frame.shape
                    stream.height, stream.width = size[1] + size[1] % 2, size[2] + size[2] % 2
                if frame.shape != size:
                    raise DataError(
                        f"{path}: frame {index} is {tuple(frame.shape)}, the first is {tuple(size)}"
                    )
                pixels = frame.cpu().permute(1, 2, 0).numpy()
                if size[1] % 2 or size[2] % 2:
                    pad = ((0, size[1] % 2), (0, size[2] % 2), (0, 0))
                    pixels = np.pad(pixels, pad, mode="edge")
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                if stamps is not None:
                    if index == len(stamps):
                        break
                    picture.pts, picture.time_base = stamps[index], tick
                container.mux(stream.encode(picture))
            if size is None:
                raise DataError(f"{path}: no frames to write")
            if stamps is not None and index != len(stamps) - 1:
                raise DataError(f"{path}: {len(stamps)} times do not fit the frames")
            container.mux(stream.encode())
    return path


def open_sequence(
    path: str | os.PathLike, first_box_xywh: Tensor | list[float] | None = None
) -> Sequence:
    """Open what a user has: a folder in the GOT-10k layout, a folder of images, or a video file.
    The frames may lie one folder below, where OTB (img), VOT (color) and LaSOT (img) have them.

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
    elif first_box_xywh is None and groundtruth(path).is_file():
        return read_sequence(path)
    else:
        sequence = FolderSequence(path, files=_frames(path))
    if first_box_xywh is not None:
        box = torch.as_tensor(first_box_xywh, dtype=torch.float64).reshape(1, -1)
        sequence.boxes_xywh = check_boxes(box, f"first box of {path}", sequence.frame_size(0))
    return sequence


def _frames(folder: Path) -> list[str]:
    """The images of a folder, or those below, by their paths in it. Raises DataError that says
    where the nearest are if there are none.
    """
    if images := list_images(folder):
        return images
    if below := frames_below(folder):
        return [f"{below.name}/{name}" for name in list_images(below)]
    parts = (part for part in sorted(folder.iterdir()) if os.path.isdir(part))
    near = next((part for part in parts if list_images(part) or frames_below(part)), None)
    raise DataError(
        f"{folder}: no frames in this folder; "
        + (
            f"there are some in {near}"
            if near
            else f"expected images ({', '.join(sorted(SUFFIXES))})"
        )
    )
