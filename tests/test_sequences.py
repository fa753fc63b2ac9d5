"""Where frames come from: image files, folders, videos; and where files go: paths and atomic
writes.
"""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import trackkit.paths as paths
from trackkit import weights
from trackkit.boxes import xywh_to_cxcywh
from trackkit.crops import Windows, cut, reduction
from trackkit.errors import DataError, TrackkitError
from trackkit.got10k import read_sequence, write_sequence
from trackkit.images import Picture, encode_jpeg, image_size, read_image
from trackkit.sequences import ArraySequence, FolderSequence, block_mean, natural_key
from trackkit.trackers.references import StayTracker
from trackkit.video import VideoSequence, open_sequence, write_video


def scene(height: int = 60, width: int = 90, shift: int = 0) -> torch.Tensor:
    """A smooth picture (JPEG keeps it almost as it is) that moves with `shift`."""
    y, x = np.mgrid[:height, :width]
    x = x + 2 * shift
    channels = [
        128 + 100 * np.sin(x / 9),
        128 + 90 * np.cos(y / 7),
        128 + 80 * np.sin((x + y) / 15),
    ]
    return torch.from_numpy(np.stack(channels, -1).round().astype(np.uint8)).permute(2, 0, 1)


def array(frame: torch.Tensor) -> np.ndarray:
    return frame.permute(1, 2, 0).numpy()


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8
    return (a.float() - b.float()).abs().mean().item()


# ------------------------------------------------------------------------------------------- images


def test_a_jpeg_is_read_as_pillow_reads_it_with_channels_innermost(tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(encode_jpeg(scene()))
    frame = read_image(file)
    assert torch.equal(frame, torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    assert frame.stride()[0] == 1 and image_size(file) == (90, 60) and off(frame, scene()) < 2


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("reduce", [1, 2, 4])
def test_a_part_is_cut_from_the_frame(tmp_path, suffix, reduce):
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(array(scene())).save(file)
    left, top, right, bottom = part = (3, 2, 14, 13)
    assert torch.equal(
        read_image(file, reduce, part), read_image(file, reduce)[:, top:bottom, left:right]
    )


@pytest.mark.parametrize("size", [(90, 60), (97, 33), (17, 16), (16, 130)])
@pytest.mark.parametrize(
    "how",
    [
        {"subsampling": "4:2:0"}, {"subsampling": "4:2:2"}, {"subsampling": "4:4:4"},
        {"subsampling": "4:2:0", "restart_marker_blocks": 2}, {"keep_rgb": True},
        {"progressive": True}, {"grey": True}, {"cmyk": True},
    ],
    ids=str,
)  # fmt: skip
def test_parts_of_jpegs_of_all_kinds_are_pillows_pixels(tmp_path, size, how):
    """To the byte, in particular in the last rows before the decoder is stopped."""
    file, how = tmp_path / "a.jpg", dict(how)
    mode = "L" if how.pop("grey", 0) else "CMYK" if how.pop("cmyk", 0) else "RGB"
    width, height = size
    Image.fromarray(array(scene(height, width))).convert(mode).save(file, quality=60, **how)
    assert image_size(file) == Picture(file).size == size
    for reduce in (1, 2, 4, 8):
        image = Image.open(file)
        image.draft("RGB", (max(width // reduce, 1), max(height // reduce, 1)))
        frame = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        if frame.shape[2] != -(-width // reduce):
            continue  # Pillow scales only what is no CMYK
        assert torch.equal(read_image(file, reduce), frame)
        for bottom in range(1, frame.shape[1] + 1):
            part = read_image(file, reduce, (1, 0, frame.shape[2], bottom))
            assert torch.equal(part, frame[:, :bottom, 1:])


def test_a_frame_is_opened_once_for_a_crop_and_never_for_a_known_size(tmp_path, monkeypatch):
    frames, boxes = [scene(60, 90, shift) for shift in range(3)], torch.tensor([[5.0, 6, 7, 8]] * 3)
    write_sequence(tmp_path / "s", frames, boxes)
    sequence, opened = read_sequence(tmp_path / "s"), []
    monkeypatch.setattr(
        "builtins.open",
        lambda path, *a, _open=open, **k: opened.append(path) or _open(path, *a, **k),
    )
    assert sequence.frame_size(0) == (90, 60) and not opened
    sequence.crop(1, Windows(*torch.tensor([[-5], [0], [30]]), 30))
    assert len(opened) == 1
    assert sequence.frame_size(2) == sequence.frame_size(2) == (90, 60) and len(opened) == 2


@pytest.mark.parametrize(
    "box", [(20, 10, 40), (-30, -20, 70), (60, 40, 90), (200, 10, 16), (-99, 5, 8), (40, 0, 40)]
)
@pytest.mark.parametrize("fill", [None, (9.0, 50.0, 200.0)])
def test_a_crop_is_what_cut_makes_of_the_whole_frame(tmp_path, box, fill):
    Image.fromarray(array(scene())).save(tmp_path / "1.png")
    left, top, side = box
    # too large to reduce
    window = Windows(torch.tensor([left]), torch.tensor([top]), torch.tensor([side]), 90)
    fill = None if fill is None else torch.tensor(fill)
    sequence = FolderSequence(tmp_path)
    assert torch.equal(sequence.crop(0, window, fill), cut([sequence.frame(0)], window, fill)[0])


def test_jpeg_bytes_are_the_same_for_any_memory_layout():
    assert encode_jpeg(scene()) == encode_jpeg(scene().contiguous())
    with pytest.raises(DataError, match="uint8"):
        encode_jpeg(scene().float())


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("size", [(60, 90), (61, 93), (15, 7), (3, 3), (1, 1)])
def test_reduced_frames_are_block_means(tmp_path, suffix, size):
    file = tmp_path / f"a.{suffix}"
    frame = scene(*size)
    Image.fromarray(array(frame)).save(file, quality=95, subsampling=0)
    for reduce in (1, 2, 4, 8):
        small = read_image(file, reduce)
        assert small.shape == (3, -(-size[0] // reduce), -(-size[1] // reduce)), reduce
        assert off(small, block_mean(frame, reduce)) < (4 if suffix == "jpg" else 0.51)


def test_reduce_takes_1_2_4_8_only(tmp_path):
    with pytest.raises(DataError, match="by 1, 2, 4 or 8, not by 3"):
        read_image(tmp_path / "a.jpg", 3)


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("reduce", [1, 4])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, reduce):
    picture = Image.fromarray(array(scene()))
    file = tmp_path / ("a.jpg" if mode in ("CMYK",) else "a.png")
    if mode == "I;16":
        grey = np.asarray(picture.convert("L"))
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
        expected = torch.from_numpy(grey.copy())[None].expand(3, -1, -1)
    else:
        picture = picture.convert(mode)
        expected = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    picture.save(file)
    frame = read_image(file, reduce)
    assert off(frame, block_mean(expected, reduce)) < 3


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGBA", "png"),
        ("LA", "png"),
        ("PA", "png"),
        ("RGBA", "webp"),
        ("RGBA", "tif"),
        ("LA", "tif"),
    ],
)
@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
def test_colours_are_those_without_alpha(tmp_path, mode, suffix, reduce):
    picture = Image.fromarray(array(scene()))
    if mode == "LA":
        picture = picture.convert("L")
    elif mode == "PA":
        picture = picture.quantize(64)
    plain = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    alpha = Image.new("L", (90, 60))  # one half is transparent
    alpha.paste(255, (0, 0, 45, 60))
    if mode == "PA":  # a palette with an entry for what is transparent
        picture.info["transparency"] = bytes(255 * (i % 2) for i in range(256))
    else:
        picture.putalpha(alpha)
    file, exact = tmp_path / f"a.{suffix}", {"exact": True, "lossless": True}
    picture.save(file, **(exact if suffix == "webp" else {}))
    assert off(read_image(file, reduce), block_mean(plain, reduce)) < 0.51


def test_grey_jpeg_becomes_rgb(tmp_path):
    Image.fromarray(array(scene())).convert("L").save(tmp_path / "a.jpg")
    frame = read_image(tmp_path / "a.jpg")
    assert (
        frame.shape == (3, 60, 90)
        and torch.equal(frame[0], frame[2])
        and read_image(tmp_path / "a.jpg", 2).shape[0] == 3
    )


# ------------------------------------------------------------------------------------------ folders


def test_a_folder_is_read_in_natural_order(tmp_path):
    for number in (1, 2, 10):
        Image.fromarray(array(scene(shift=number))).save(tmp_path / f"img{number}.png")
    for stray in (".DS_Store", "._img1.png", "notes.txt", "meta_info.ini.bak2"):
        (tmp_path / stray).write_text("x")
    sequence = FolderSequence(tmp_path)
    assert (
        sequence.files == ["img1.png", "img2.png", "img10.png"] and sequence.name == tmp_path.name
    )
    assert torch.equal(sequence.frame(2), scene(shift=10)) and sequence.frame_size(0) == (90, 60)
    assert len(sequence.boxes_xywh) == 0 and not sequence.labelled and not sequence.visible.any()
    assert sequence.path(1) == tmp_path / "img2.png"
    for index in (3, -1):
        with pytest.raises(IndexError, match="0 to 2"):
            sequence.frame(index)


def test_digits_that_are_not_decimal_are_letters(tmp_path):
    for name in ("²1.png", "²10.png", "²2.png", "①.png", "٣.png", "03.png", "3.png"):
        Image.fromarray(array(scene())).save(tmp_path / name)
    files = FolderSequence(tmp_path).files
    assert files[:2] == ["03.png", "3.png"] and set(files[2:]) == {
        "²1.png", "²2.png", "²10.png", "①.png", "٣.png",
    }  # fmt: skip
    assert [n for n in files if n[0] == "²"] == ["²1.png", "²2.png", "²10.png"]


def test_natural_key():
    assert sorted(["b10", "b9", "a", "10", "9"], key=natural_key) == ["9", "10", "a", "b9", "b10"]


def test_frames_may_change_size_inside_a_sequence(tmp_path):
    for number, size in enumerate(((60, 90), (30, 45)), 1):
        (tmp_path / f"{number}.jpg").write_bytes(encode_jpeg(scene(*size)))
    sequence = FolderSequence(tmp_path)
    assert [sequence.frame_size(i) for i in (0, 1)] == [(90, 60), (45, 30)]
    assert sequence.frame(1).shape == (3, 30, 45)


def test_visible_needs_a_real_box():
    boxes = torch.tensor(
        [
            [5.0, 5, 9, 9],
            [-1, -1, -1, -1],
            [-9, 5, 9, 9],
            [-9, 5, 10, 9],
            [5, 5, 9, 9],
            [5, 5, 9, 9],
        ]
    )
    sequence = ArraySequence(
        "a",
        [scene()] * 6,
        boxes,
        absent=torch.tensor([0, 0, 0, 0, 1, 0]),
        cover=torch.tensor([8, 8, 8, 1, 8, 0]),
    )
    assert sequence.visible.tolist() == [True, False, False, True, False, False]
    only_first = ArraySequence("b", [scene()] * 3, boxes[:1])
    assert only_first.visible.tolist() == [True, False, False] and not only_first.labelled


def test_labels_must_fit_the_frames():
    with pytest.raises(DataError, match="2 frames but 3 boxes"):
        ArraySequence("a", [scene()] * 2, torch.ones(3, 4))
    with pytest.raises(DataError, match="2 frames but 3 labels `absent`"):
        ArraySequence("a", [scene()] * 2, torch.ones(2, 4), absent=torch.zeros(3))
    with pytest.raises(DataError, match="no frames"):
        ArraySequence("a", [], torch.ones(0, 4))


@pytest.mark.parametrize("side, size", [(40, 32), (400, 60), (400, 50)])
def test_a_crop_from_a_reduced_frame_shows_the_same(tmp_path, side, size):
    frame = scene(400, 600)
    file = tmp_path / "1.png"
    Image.fromarray(array(frame)).save(file)
    sequence = FolderSequence(tmp_path, torch.tensor([[280.0, 180, 40, 40]]))
    centre = xywh_to_cxcywh(sequence.boxes_xywh)[:, :2]
    window = Windows.around(centre, torch.tensor([float(side)]), size, grid=reduction(side, size))
    crop = sequence.crop(0, window, torch.zeros(3))
    assert off(crop, cut([frame], window, torch.zeros(3))[0]) < 3


def test_open_sequence_takes_a_layout_folder_images_or_a_video(tmp_path):
    frames = [scene(60, 90, shift) for shift in range(4)]
    folder = write_sequence(tmp_path / "s", frames, torch.tensor([[5.0, 6, 7, 8]] * 4))
    assert open_sequence(folder).labelled
    given = open_sequence(folder, [1, 2, 30, 40])
    assert given.boxes_xywh.tolist() == [[1, 2, 30, 40]] and len(given) == 4
    (folder / "groundtruth.txt").unlink()
    assert len(open_sequence(str(folder)).boxes_xywh) == 0
    video = open_sequence(write_video(tmp_path / "v.mp4", frames, 10), (1, 2, 30, 40))
    assert isinstance(video, VideoSequence) and len(video) == 4 and video.boxes_xywh.shape == (1, 4)


# ------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video_gives_its_frames_in_any_order(tmp_path, suffix):
    frames = [scene(64, 96, shift) for shift in range(40)]
    file = write_video(tmp_path / f"v{suffix}", frames, fps=12.5)
    video = VideoSequence(file, torch.tensor([[1.0, 2, 3, 4]]))
    assert (len(video), video.frame_size(3), video.name) == (
        40,
        (96, 64),
        "v",
    ) and video.fps == pytest.approx(12.5)
    in_order = [video.frame(i) for i in range(40)]
    assert max(off(a, b) for a, b in zip(frames, in_order, strict=True)) < 4
    for i in (39, 0, 20, 20, 7, 8, 38, 3):
        assert torch.equal(video.frame(i), in_order[i]), i
    assert video.frame(5, 2).shape == (3, 32, 48)
    travelled = pickle.loads(pickle.dumps(video))
    assert torch.equal(travelled.frame(17), in_order[17])


def test_odd_sides_are_padded(tmp_path):
    video = VideoSequence(write_video(tmp_path / "v.mp4", [scene(61, 91)] * 2, 10))
    assert video.frame_size(0) == (92, 62) and off(video.frame(0)[:, :61, :91], scene(61, 91)) < 4


def test_the_rotation_of_a_phone_is_applied(tmp_path):
    import av

    file = tmp_path / "v.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.set_display_rotation(90)
        for _ in range(3):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        np.ascontiguousarray(array(scene(64, 96))), format="rgb24"
                    )
                )
            )
        container.mux(stream.encode())
    video = VideoSequence(file)
    assert video.frame_size(0) == (64, 96)
    assert off(video.frame(0), torch.rot90(scene(64, 96), 1, (1, 2))) < 4


def test_write_video_says_what_is_wrong_and_leaves_nothing(tmp_path):
    for frames, name, says in (
        ([], "v.mp4", "no frames to write"),
        ([scene(), scene(30, 40)], "v.mp4", r"frame 1 is \(3, 30, 40\)"),
        ([scene()], "v.gif", ".mp4, .mov, .mkv"),
    ):
        with pytest.raises(DataError, match=says):
            write_video(tmp_path / name, frames, 10)
    assert not list(tmp_path.glob("**/*v*"))


# -------------------------------------------------------------------------------------------- paths


def test_home_and_data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKKIT_HOME", str(tmp_path / "h"))
    assert paths.home() == tmp_path / "h" and not paths.home().exists()
    monkeypatch.delenv("TRACKKIT_HOME")
    assert paths.home().parts[-2:] == (".cache", "trackkit")
    monkeypatch.setenv("TRACKKIT_GOT10K", str(tmp_path))
    assert paths.data_root() == tmp_path
    (tmp_path / "other").mkdir()
    assert paths.data_root(tmp_path / "other") == tmp_path / "other"
    monkeypatch.delenv("TRACKKIT_GOT10K")
    monkeypatch.setattr(paths, "SAMPLES", tmp_path / "other")
    with pytest.raises(DataError, match=r"other is empty.*trackkit synth"):
        paths.data_root()
    (tmp_path / "other" / "train").mkdir()
    assert paths.data_root() == tmp_path / "other"


def test_a_wrong_data_root_is_never_replaced_by_another(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKKIT_GOT10K", str(tmp_path / "typo"))
    with pytest.raises(DataError, match=r"typo does not exist.*TRACKKIT_GOT10K.*trackkit synth"):
        paths.data_root()
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        paths.data_root(tmp_path / "file")


def test_atomic_write_replaces_all_or_nothing(tmp_path):
    file = tmp_path / "a" / "b.txt"
    with paths.atomic_write(file) as partial:
        partial.write_text("one")
        assert partial.suffix == ".txt" and not file.exists()
    with pytest.raises(RuntimeError, match="crash"), paths.atomic_write(file) as partial:
        partial.write_text("half")
        raise RuntimeError("crash")
    assert file.read_text() == "one" and os.listdir(file.parent) == ["b.txt"]
    plain = tmp_path / "plain"
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    "code",
    ["EDQUOT", "EFBIG", "EIO", "ESTALE", "ENAMETOOLONG", "EINVAL", "ENOENT", "ENOSPC", "EROFS"],
)
@pytest.mark.parametrize("call", ["replace", "fsync", "mkdir", "open", "write"])
def test_every_error_while_writing_is_one_line_that_names_the_file(
    tmp_path, monkeypatch, code, call
):
    def fail(*_, **__):
        number = getattr(errno, code)
        raise OSError(number, os.strerror(number))

    target, text = tmp_path / "new" / "a.txt", os.strerror(getattr(errno, code))
    if call in ("mkdir", "open", "write"):
        method = {"mkdir": "mkdir", "open": "touch", "write": "write_text"}[call]
        monkeypatch.setattr(Path, method, fail)
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(DataError) as caught, paths.atomic_write(target) as partial:
        partial.write_text("x")
    message = str(caught.value)
    assert message.startswith(f"cannot write {target}: {text}. Choose") and "\n" not in message
    monkeypatch.undo()
    assert not target.exists() and not any(file.is_file() for file in tmp_path.rglob("*"))


@pytest.mark.parametrize("name", ["x" * 256, "x" * 252 + ".txt", "ü" * 128])
def test_names_that_no_file_can_have(tmp_path, name):
    def write(path):
        with paths.atomic_write(path) as partial:
            partial.write_text("x")

    def hold(path):
        with paths.alone(path, "writes"):
            pass

    frames, box = [scene()], torch.ones(1, 4)
    for attempt in (
        write, paths.writable, hold,
        lambda path: write(path / "below" / "a.txt"),
        lambda path: write_sequence(path, frames, box),
        lambda path: weights.save(StayTracker(), path),
    ):  # fmt: skip
        with pytest.raises(DataError, match="cannot write") as caught:
            attempt(tmp_path / name)
        assert str(caught.value).count("\n") == 0
    for attempt in (read_image, FolderSequence, paths.data_root, weights.load):
        with pytest.raises(TrackkitError, match=r"no |not exist"):
            attempt(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_the_longest_names_can_be_written(tmp_path):
    for name in ("x" * 251 + ".txt", "ü" * 125 + ".txt"):
        with paths.atomic_write(tmp_path / name) as partial:
            partial.write_text("x")
        assert (tmp_path / name).read_text() == "x"


def test_a_home_of_nobody_is_a_plain_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paths.writable("~nobody-of-this-name/a").resolve() == tmp_path / "~nobody-of-this-name/a"


def test_an_error_of_the_block_that_is_none_of_writing_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), paths.atomic_write(tmp_path / "a"):
        (tmp_path / "elsewhere").read_text()


def test_a_sequence_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(DataError, match=f"cannot write {tmp_path / 's'}: Disk quota exceeded"):
        write_sequence(tmp_path / "s", [scene()], torch.ones(1, 4))
    assert os.listdir(tmp_path) == []


def test_a_folder_is_held_by_one_process(tmp_path):
    """A lock that a killed process left does not count, not even if its children live on."""
    code = """
import os, signal, sys, time
from trackkit.paths import alone
with alone(sys.argv[1], "trains"):
    if os.fork() == 0:
        print("held", flush=True)
        os.closerange(0, 3)
        time.sleep(30)
        os._exit(0)
    time.sleep(30)
"""
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match="run: another process trains here now; wait"):  # noqa: SIM117
            with paths.alone(folder, "trains"):
                pass
        holder.kill()
        holder.wait()
        for _ in range(2):
            with paths.alone(folder, "trains"):
                assert (folder / ".lock").exists()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for attempt in (
        lambda: paths.writable(tmp_path / "file" / "runs"),
        lambda: paths.writable(tmp_path / "file"),
    ):
        with pytest.raises(DataError, match=r"cannot write .*file"):
            attempt()
    with (
        pytest.raises(DataError, match=r"file is a file where a folder is needed"),
        paths.atomic_write(tmp_path / "file" / "a"),
    ):
        pass
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(DataError, match=r"cannot write .*folder"),
        paths.atomic_write(tmp_path / "folder"),
    ):
        pass

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(DataError, match=r"cannot write .*Permission denied.*TRACKKIT_HOME"):
        paths.writable(tmp_path / "closed")
    with (
        pytest.raises(DataError, match="Permission denied"),
        paths.atomic_write(tmp_path / "closed" / "a"),
    ):
        pass
