"""Frame i of a video is the i-th picture of plain decoding, whatever the container says; what is
written keeps its times; a file name is only ever a file name.
"""

from __future__ import annotations

import logging
import os
import pickle
import random
import re
import struct
import sys

import av
import numpy as np
import pytest
import torch

from trackkit import cli
from trackkit.errors import DataError
from trackkit.tracking import track
from trackkit.video import VideoSequence, open_sequence, write_video
from trackkit.weights import create

SIZE = (48, 64)


def picture(index: int) -> torch.Tensor:
    """A texture that moves, with a bar that counts: no two frames are alike."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    x = x + 2 * index
    channels = [128 + 100 * np.sin(x / 5), 128 + 90 * np.cos(y / 4), 128 + 80 * np.sin((x + y) / 7)]
    pixels = np.stack(channels).round().astype(np.uint8)
    pixels[:, :8, : index + 1] = 255
    return torch.from_numpy(pixels)


def record(path, codec="libx264", frames=32, format=None, **options) -> None:
    """`frames` pictures at 10 frames per second; `options` are the encoder's."""
    with av.open(str(path), "w", format=format) as container:
        rate = 25 if codec == "mpeg2video" else 10  # MPEG-2 knows no 10
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        for index in range(frames):
            pixels = np.ascontiguousarray(picture(index).permute(1, 2, 0).numpy())
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def trim(source, target, start: float, format=None) -> None:
    """`ffmpeg -ss START -i SOURCE -c copy TARGET`: from the key frame before, stamps from START."""
    with av.open(str(source)) as given, av.open(str(target), "w", format=format) as container:
        stream = given.streams.video[0]
        copy = container.add_stream_from_template(stream)
        shift = round(start / stream.time_base)
        given.seek(shift, stream=stream, backward=True)
        for packet in given.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = copy
                container.mux(packet)


def decoded(path) -> tuple[list[torch.Tensor], int]:
    """Pictures of plain decoding, and the number of packets that could not be decoded."""
    pictures, errors = [], 0
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.video[0]):
            try:
                pictures += [p.to_ndarray(format="rgb24") for p in packet.decode()]
            except av.InvalidDataError:
                errors += 1
    return [torch.from_numpy(p).permute(2, 0, 1) for p in pictures], errors


B = {"bf": "3", "g": "12"}
FILES = {
    "plain.mp4": {},
    "short groups.mp4": B,
    "trimmed.mp4": B | {"start": 0.7},
    "trimmed without b-frames.mp4": {"bf": "0", "g": "20", "start": 0.7},
    "trimmed.mkv": B | {"start": 0.7},
    "trimmed.mov": B | {"start": 1.5},
    "stream.ts": B,
    "trimmed.ts": B | {"start": 0.7},
    "program.mpg": {"codec": "mpeg2video", "bf": "2", "g": "8"},
    "h264.mpg": {"format": "mpeg"} | B,
    "b-frames.avi": B,
    "xvid.avi": {"codec": "mpeg4", "bf": "2", "g": "8"},
    "groups.mkv": B,
    "refresh.mkv": {"x264-params": "intra-refresh=1:keyint=10:bframes=0"},
    "refresh.mp4": {"x264-params": "intra-refresh=1:keyint=10:bframes=0"},
    "refresh.ts": {"x264-params": "intra-refresh=1:keyint=10:bframes=0"},
    "raw.h264": B,
    "raw.m2v": {"codec": "mpeg2video", "bf": "2", "g": "8"},
    "open.mp4": {"x264-params": "open-gop=1:keyint=10:bframes=3:b-adapt=0"},
    "open.mkv": {"x264-params": "open-gop=1:keyint=10:bframes=3:b-adapt=0"},
    "open.ts": {"x264-params": "open-gop=1:keyint=10:bframes=3:b-adapt=0"},
    "open trimmed.mp4": {"x264-params": "open-gop=1:keyint=10:bframes=3:b-adapt=0", "start": 1.4},
    # its key frames bring their own headers
    "open trimmed.ts": {
        "x264-params": "open-gop=1:keyint=10:bframes=3:b-adapt=0:repeat-headers=1",
        "start": 1.4,
    },
    "hevc.mp4": {"codec": "libx265", "x265-params": "keyint=10:log-level=none"},
    "hevc trimmed.mkv": {
        "codec": "libx265",
        "x265-params": "keyint=10:log-level=none",
        "start": 1.4,
    },
    "vp8.webm": {"codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"},
    "vp9.webm": {"codec": "libvpx-vp9", "lag-in-frames": "16", "cpu-used": "8", "g": "10"},
}


@pytest.mark.parametrize("name", FILES)
def test_frame_i_is_the_ith_picture_of_plain_decoding(tmp_path, name, caplog):
    options = dict(FILES[name])
    start, file = options.pop("start", None), tmp_path / name
    base = file if start is None else tmp_path / "base.mp4"
    record(base, **options)
    if start is not None:
        trim(base, file, start)
    expected, errors = decoded(file)
    assert len(expected) > 12
    video = VideoSequence(file)
    assert len(video) == len(expected) == len(video.times)
    for i in (*range(len(expected)), *random.Random(0).choices(range(len(expected)), k=12)):
        assert torch.equal(video.frame(i), expected[i]), f"frame {i} after frames in order"
    for i in (len(expected) - 1, 2, 11):
        assert torch.equal(VideoSequence(file).frame(i), expected[i]), f"frame {i} at first"
    assert len(caplog.records) == (errors > 0), "a warning is for damage only"


def test_frames_that_a_key_frame_gives_are_reached_without_decoding_the_whole_file(tmp_path):
    record(tmp_path / "v.mp4", **B)
    video = VideoSequence(tmp_path / "v.mp4")
    starts, decode = [], video._decode
    video._decode = lambda start: starts.append(start) or decode(start)
    for i in (30, 5, 29, 30, 31):
        video.frame(i)
    assert starts == [24, 0, 24]


def test_packets_that_lie_about_the_frames_are_found_out_while_reading(tmp_path):
    """A group of pictures made unreadable in the middle: the frames that remain keep their order,
    and the sequence ends with the last of them.
    """
    record(tmp_path / "v.mp4", **B)
    with av.open(str(tmp_path / "v.mp4")) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        places = [(p.pos, p.size) for p in packets if 12 <= p.pts * p.time_base * 10 < 24]
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    for place, size in places:
        data[place : place + size] = b"\xff" * size
    (tmp_path / "v.mp4").write_bytes(data)
    expected, errors = decoded(tmp_path / "v.mp4")
    assert errors and len(expected) < 32
    for order in (range(32), (31, 20, 13, 3)):
        video = open_sequence(tmp_path / "v.mp4", (2, 2, 20, 20))
        for i in order:
            if i < len(video):
                try:
                    video.frame(i)
                except DataError as error:
                    assert "cannot be decoded" in str(error) and i >= len(video)
        assert len(video) == len(expected) == len(video.absent) == len(video.times)
        assert torch.equal(pickle.loads(pickle.dumps(video)).frame(15), expected[15])
        assert all(torch.equal(video.frame(i), e) for i, e in enumerate(expected))


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.avi", "v.ts", "v.mpg"])
@pytest.mark.parametrize("share", [0.7, 0.83])
def test_a_truncated_video_is_tracked_to_its_end_with_one_warning(tmp_path, name, share, caplog):
    fast = {"movflags": "+faststart"} if name == "v.mp4" else {}
    source = tmp_path / "whole" / name
    source.parent.mkdir()
    if fast:
        write_video(source, [picture(i) for i in range(32)], 10)
    else:
        record(source, **({"codec": "mpeg2video"} if name == "v.mpg" else B))
    file = tmp_path / name
    data = source.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    expected = decoded(file)[0]
    argv = ["track", str(file), "--box", "8,8,20,20", "--tracker", "stay", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    # the tracked file and not what is written; one line on the terminal, see below
    lines = [record.getMessage() for record in caplog.records]
    if name in ("v.mp4", "v.mkv", "v.avi"):  # the others do not state a length
        assert len(lines) == 1 and lines[0].startswith(f"{file}: the video is damaged")
    assert len(lines) <= 1
    assert len((tmp_path / "v-stay.txt").read_text().splitlines()) == len(expected) > 5
    assert len(VideoSequence(tmp_path / "v-stay.mp4")) == len(expected)


def test_tracking_ends_where_a_video_turns_out_to_end(tmp_path):
    record(tmp_path / "v.mp4", **B)
    with av.open(str(tmp_path / "v.mp4")) as container:
        last = [p for p in container.demux(video=0) if p.size][-1]
        place, size = last.pos, last.size
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    data[place : place + size] = b"\xff" * size
    (tmp_path / "v.mp4").write_bytes(data)
    video = open_sequence(tmp_path / "v.mp4", (2, 2, 20, 20))
    assert len(video) == 32
    frames = len(decoded(tmp_path / "v.mp4")[0])
    assert frames == 31 and len(track(create("stay"), video).boxes_xywh) == frames == len(video)


@pytest.mark.parametrize("matrix", [(a, b, c, d) for a, b, c, d in (
    (1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
    (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0),
)])  # fmt: skip
def test_a_display_matrix_turns_and_mirrors(tmp_path, matrix):
    file = tmp_path / "v.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        stream.set_display_rotation(90)
        pixels = np.ascontiguousarray(picture(9).permute(1, 2, 0).numpy())
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data, (a, b, c, d) = file.read_bytes(), matrix
    # rows of 16.16 fixed point numbers in `tkhd`; 90 degrees are 0, -1, 1, 0
    rows = lambda a, b, c, d: struct.pack(">5i", a << 16, b << 16, 0, c << 16, d << 16)  # noqa: E731
    assert data.count(rows(0, -1, 1, 0)) == 1
    file.write_bytes(data.replace(rows(0, -1, 1, 0), rows(*matrix)))
    # pixel (x, y) is shown at (a * x + c * y, b * x + d * y), moved into the frame
    plain = decoded(file)[0][0]
    height, width = plain.shape[1:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = a * x + c * y, b * x + d * y
    expected = torch.empty(3, *((width, height) if a == 0 else (height, width)), dtype=torch.uint8)
    expected[:, y - y.min(), x - x.min()] = plain
    video = VideoSequence(file)
    assert torch.equal(video.frame(0), expected)
    assert video.frame_size(0) == (expected.shape[2], expected.shape[1])


# ----------------------------------------------------------------------------------------------
# writing


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_variable_frame_rate_keeps_its_times(tmp_path, suffix):
    times = [0, 0.04, 0.1, 0.5, 0.500_001, 1.25]
    file = write_video(tmp_path / f"v{suffix}", [picture(i) for i in range(6)], 6 / 1.25, times)
    assert VideoSequence(file).times == pytest.approx(times, abs=0.001)
    argv = ["track", str(file), "--box", "8,8,20,20", "--tracker", "stay", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    video = VideoSequence(tmp_path / "v-stay.mp4")
    assert video.times == pytest.approx(times, abs=0.001)


def test_times_that_do_not_fit_the_frames_are_refused(tmp_path):
    for times, says in (([0, 0.1], "2 times"), ([0, 1, 1], "rise"), ([0, 1, 2, 3], "4 times")):
        with pytest.raises(DataError, match=says):
            write_video(tmp_path / "v.mp4", [picture(i) for i in range(3)], 10, times)
    assert not list(tmp_path.iterdir())


def test_writing_shows_a_bar(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    write_video(tmp_path / "v.mp4", [picture(i) for i in range(3)], 10)
    argv = ["track", str(tmp_path / "v.mp4"), "--box", "8,8,20,20", "--tracker", "stay"]
    assert cli.main([*argv, "--out", str(tmp_path)]) == 0
    assert re.search(r"video: 100%.* 3/3 ", capfd.readouterr().err)


# ----------------------------------------------------------------------------------------------
# names


@pytest.mark.parametrize(
    "name", ["12:30.mp4", "file:x.mp4", "http:v.mkv", "a%03d.mp4", "pipe:0.mp4"]
)
def test_a_file_name_with_a_colon_is_a_file_name(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(name, [picture(i) for i in range(3)], 10)
    assert os.listdir(tmp_path) == [name] and len(open_sequence(name)) == 3
    argv = ["track", name, "--box", "8,8,20,20", "--tracker", "stay"]
    assert cli.main(argv) == 0 and (tmp_path / f"{name[:-4]}-stay.mp4").is_file()


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.txt", "list.ffconcat"])
@pytest.mark.parametrize("kind", ["hls", "concat", "dash"])
def test_a_playlist_is_refused_whatever_its_name(tmp_path, name, kind):
    record(tmp_path / "other.ts", frames=12)
    text = {
        "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\nother.ts\n#EXT-X-ENDLIST\n",
        "concat": "ffconcat version 1.0\nfile other.ts\n",
        "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" '
        'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><BaseURL>other.ts</BaseURL></MPD>',
    }[kind]
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}: this is a playlist.*give the video file itself"):
        open_sequence(tmp_path / name)


def test_damage_is_one_line_on_the_terminal(tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "whole.mp4", [picture(i) for i in range(12)], 10)
    data, file = (tmp_path / "whole.mp4").read_bytes(), tmp_path / "v.mp4"
    file.write_bytes(data[: len(data) * 2 // 3])
    monkeypatch.setattr(logging.root, "handlers", [])  # as on the command line, without pytest's
    argv = ["track", str(file), "--box", "8,8,20,20", "--tracker", "stay", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith(f"{file}: the video is damaged or cut short; ")
