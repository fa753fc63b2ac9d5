"""Broken data: each error names the file (and line), says how it is broken, and what to do."""

from __future__ import annotations

import os
import random
import struct
import zlib

import pytest
import torch
from PIL import Image

from trackkit.boxes import xywh_to_cxcywh
from trackkit.crops import Windows
from trackkit.errors import DataError, TrackkitError
from trackkit.evaluation import evaluate
from trackkit.got10k import GOT10k, read_sequence, write_sequence
from trackkit.images import encode_jpeg, image_size, read_image
from trackkit.sequences import FolderSequence
from trackkit.trackers.references import StayTracker
from trackkit.video import VideoSequence, open_sequence, write_video


def picture(seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture
def root(tmp_path):
    """A training split of two sequences of three frames."""
    for name in ("camel", "swan"):
        frames, boxes = [picture(i) for i in range(3)], torch.tensor([[10.0, 10, 8, 6]] * 3)
        write_sequence(
            tmp_path / "train" / name, frames, boxes,
            absent=torch.zeros(3), cover=torch.full((3,), 8), cut=torch.zeros(3),
        )  # fmt: skip
    (tmp_path / "train" / "list.txt").write_text("camel\nswan\n")
    return tmp_path


def fails(says: str):
    return pytest.raises(DataError, match=says)


def test_errors_are_value_errors_and_trackkit_errors():
    assert issubclass(DataError, ValueError) and issubclass(DataError, TrackkitError)


# ------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("reduce", [1, 4])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9])
def test_a_jpeg_that_is_cut_short(root, reduce, keep):
    file = root / "train" / "swan" / "00000002.jpg"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    swan = GOT10k(root)[1]
    with fails(
        r"cannot read frame .*swan/00000002.jpg: .*(empty|truncated|Truncated|not an image).*again"
    ):
        swan.frame(1, reduce)
    assert swan.frame(0, reduce).dtype == torch.uint8


def test_a_png_that_is_cut_short_and_a_text_file(tmp_path):
    Image.fromarray(picture().permute(1, 2, 0).contiguous().numpy()).save(tmp_path / "1.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:800])
    (tmp_path / "2.jpg").write_text("<html>404</html>")
    for index, says in ((0, "1.png"), (1, "2.jpg: it is not an image")):
        with fails(says):
            FolderSequence(tmp_path).frame(index)
    with fails("2.jpg: it is not an image"):
        FolderSequence(tmp_path).frame_size(1)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tif", "ppm"])
def test_damaged_images_of_all_formats_are_named(tmp_path, suffix):
    """Flipped bits give another picture or an error that names the file; nothing else."""
    draw, file = random.Random(suffix), tmp_path / f"swan.{suffix}"
    options = {"compression": "tiff_lzw"} if suffix == "tif" else {}
    Image.fromarray(picture().permute(1, 2, 0).contiguous().numpy()).save(file, **options)
    data = file.read_bytes()
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 4)):  # mostly where the header is
            place = draw.randrange(draw.choice([40, 200, len(data)])) % len(data)
            damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged[: draw.choice([len(data), draw.randrange(len(data))])])
        for attempt in (read_image, image_size, lambda f: read_image(f, 4)):
            try:
                attempt(file)
            except DataError as error:
                assert f"cannot read frame {file}" in str(error)


@pytest.mark.parametrize("size", [(20_000, 5_000), (60_000, 60_000)])
@pytest.mark.filterwarnings("error")
def test_decompression_bombs_are_refused(tmp_path, size):
    """A few bytes that would become gigabytes; Pillow refuses the larger one by itself."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    chunks = (b"IHDR" + header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND")
    file = tmp_path / "1.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    ))  # fmt: skip
    for attempt in (read_image, image_size):
        with fails(r"cannot read frame .*1.png: .*pixels"):
            attempt(file)


def test_a_frame_that_vanishes_after_opening(root):
    swan = GOT10k(root)[1]
    (root / "train" / "swan" / "00000003.jpg").unlink()
    for attempt in (lambda: swan.frame(2), lambda: swan.frame(2, 2), lambda: swan.frame_size(2)):
        with fails("00000003.jpg: there is no such file"):
            attempt()


def test_a_frame_that_is_missing(root):
    (root / "train" / "swan" / "00000002.jpg").unlink()
    with fails(
        r"(?s)1 of 2 sequences.*swan: 1 of the frames up to 00000003.jpg are missing, by number: "
        r"2.*exclude"
    ):
        GOT10k(root)
    (root / "train" / "swan" / "00000001.jpg").unlink()
    with fails("swan: the first frame is 00000003.jpg"):
        read_sequence(root / "train" / "swan")


def test_two_frames_with_one_number(root):
    folder = root / "train" / "swan"
    (folder / "00000002.jpg").rename(folder / "2.jpg")
    (folder / "2.png").write_bytes(encode_jpeg(picture()))
    with fails("two images have the number 2"):
        read_sequence(root / "train" / "swan")


def test_the_first_frame_is_looked_at_when_the_set_is_opened(root):
    (root / "train" / "swan" / "00000001.jpg").write_bytes(b"")
    with fails("swan/00000001.jpg: the file is empty"):
        GOT10k(root)


# ------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "file, text, says",
    [
        (
            "groundtruth.txt",
            "1,2,3,4\n1,2,3,4\n",
            "groundtruth.txt has 2 lines, but there are 3 frames",
        ),
        ("groundtruth.txt", "1,2,3,4\n" * 4, "has 4 lines, but there are 3 frames"),
        (
            "groundtruth.txt",
            "1,2,3,4\n1,2,inf,4\n1,2,3,4\n",
            "groundtruth.txt, line 2: expected left,top",
        ),
        (
            "groundtruth.txt",
            "1,2,3,4\n1,2,3\n1,2,3,4,5\n",
            "line 2: expected left,top,width,height in pixels, found '1,2,3'",
        ),
        ("groundtruth.txt", "1,2,3,4\n\n1,2,3,4\n", "line 2: expected .* found ''"),
        ("groundtruth.txt", "1,2,3,4\n1,2,3,4\nx,y,w,h\n", "line 3: .* found 'x,y,w,h'"),
        ("groundtruth.txt", "", "groundtruth.txt is empty"),
        ("groundtruth.txt", None, "groundtruth.txt is missing"),
        ("absence.label", "0\n0\n", "absence.label has 2 lines, but there are 3 frames"),
        ("absence.label", "0\n0\n2\n", "absence.label, line 3: 2 is not one of the numbers 0 to 1"),
        ("cover.label", "8\n9\n8\n", "cover.label, line 2: 9 is not one of the numbers 0 to 8"),
        ("cover.label", "8\n7.5\n8\n", "line 2: 7.5 is not one of"),
        ("cut_by_image.label", "0\n-1\n0\n", "line 2: -1 is not one of"),
        ("cut_by_image.label", "0\nno\n0\n", "line 2: expected one number, found 'no'"),
        ("cut_by_image.label", "", "cut_by_image.label is empty"),
        ("groundtruth.txt", "1,2,3,4\n1,2,nan,4\n1,2,3,4\n", "line 2: expected left,top"),
        (
            "groundtruth.txt",
            "1,2,3,4\n1,2,1e6,4\n1,2,3,4\n",
            r"groundtruth.txt, line 2: a box of 1e\+06 x 4 pixels in a frame of 64 x 48",
        ),
        ("groundtruth.txt", "1,2,3,4\n" * 2 + "1,2,3,1e10\n", "line 3: a box of 3 x 1e"),
        ("cover.label", "8\n1e300\n8\n", "line 2: 1e.300 is not one of"),
    ],
)
def test_label_files(root, file, text, says):
    path = root / "train" / "swan" / file
    path.unlink()
    if text is not None:
        path.write_text(text)
    with fails(says) as caught:
        GOT10k(root)
    assert "swan" in str(caught.value) and "exclude=[names]" in str(caught.value)
    assert GOT10k(root, exclude=["swan"]).names == ["camel"]


def test_other_separators_line_ends_and_a_byte_order_mark_are_read(root):
    path = root / "train" / "swan" / "groundtruth.txt"
    path.write_bytes(b"\xef\xbb\xbf1 2 3 4\r\n5\t6\t7\t8\r\n9, 10, 11, 12\r\n\r\n")
    assert read_sequence(path.parent).boxes_xywh.tolist() == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
        [9, 10, 11, 12],
    ]


def test_all_broken_sequences_are_listed_at_once(root):
    for name in ("camel", "swan"):
        (root / "train" / name / "cover.label").write_text("x\n")
    (root / "train" / "list.txt").write_text("camel\nswan\nghost\n")
    with fails(
        r"(?s)3 of 3 sequences .*camel.*swan.*ghost: listed in list.txt, but there is no such "
        r"folder.*Unpack"
    ):
        GOT10k(root)


def test_text_in_utf_16_is_read(root):
    folder = root / "train"
    for file in (folder / "list.txt", *(folder / "swan").glob("*.[tli]*")):
        file.write_text(file.read_text(), "utf-16")
    swan = GOT10k(root)[1]
    assert (
        swan.boxes_xywh.tolist() == [[10, 10, 8, 6]] * 3 and swan.meta["resolution"] == "(64, 48)"
    )


@pytest.mark.parametrize("name", ["x" * 300, "\ud800"])
def test_a_listed_name_that_no_file_system_has(root, name):
    with (root / "train" / "list.txt").open("a", encoding="utf-8", errors="surrogatepass") as file:
        file.write(name)
    with fails("there is no such folder"):
        GOT10k(root)
    with fails("does not exist|no such folder"):
        GOT10k(root / ("x" * 300))


def test_links_that_lead_nowhere_or_to_themselves(root, tmp_path):
    folder = root / "train"
    (folder / "list.txt").unlink()
    for name, target in (("self", "self"), ("dead", "nowhere"), ("up", ".."), ("here", ".")):
        os.symlink(target, folder / name)
    assert GOT10k(root).names == ["camel", "swan"]
    (folder / "swan" / "00000002.jpg").unlink()
    os.symlink("nowhere.jpg", folder / "swan" / "00000002.jpg")
    swan = GOT10k(root)[1]
    for attempt in (lambda: swan.frame(1), swan.fingerprint):
        with fails("cannot read .*00000002.jpg"):
            attempt()
    with fails("00000002.jpg"):
        evaluate(StayTracker(), GOT10k(root), tmp_path / "results", "stay")
    (folder / "swan" / "00000001.jpg").unlink()
    os.symlink("00000001.jpg", folder / "swan" / "00000001.jpg")
    with fails("00000001.jpg"):
        GOT10k(root)


def test_a_long_list_of_broken_sequences_is_cut(root):
    (root / "train" / "list.txt").write_text("".join(f"ghost{i}\n" for i in range(50)))
    with fails(r"(?s)50 of 50 sequences.*ghost19.*and 30 more"):
        GOT10k(root)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "is empty"),
        ("swan\ncamel\nswan\n", "swan is listed twice"),
        ("swan\n./camel\nswan/\n", "swan is listed twice"),
        ("swan\n../train/swan\n", "'../train/swan' leads out of"),
        ("swan\ncamel/../swan\n", "'camel/../swan' leads out of"),
        ("swan\n/tmp\n", "'/tmp' leads out of"),
        (".\n", "'.' leads out of"),
        ("swan\0\n", "leads out of"),
    ],
)
def test_list_txt(root, text, says):
    (root / "train" / "list.txt").write_text(text)
    with fails(f"list.txt.* {says}"):
        GOT10k(root)


# -------------------------------------------------------------------------------------------- boxes


def test_negative_and_empty_boxes_are_read_and_never_visible(root):
    path = root / "train" / "swan" / "groundtruth.txt"
    path.write_text("-1,-1,-1,-1\n10,10,0,5\n10,10,1,1\n")
    assert GOT10k(root)[1].visible.tolist() == [False, False, True]


@pytest.mark.parametrize("box, says", [
    ([0, 0, float("nan"), 5], "not finite"), ([5, 5, 0, 5], "no area"), ([5, 5, -2, 5], "no area"),
    ([64, 0, 5, 5], "outside its 64x48 frame"), ([1, 2, 3], "shape"),
    ([1, 2, 1e6, 5], "more than 10 times as large as its 64x48 frame"),
    ([1, 2, 5, 1e10], "more than 10 times"),
])  # fmt: skip
def test_a_first_box_that_no_tracker_can_start_from(root, box, says):
    with fails(says):
        open_sequence(root / "train" / "swan", box)


def test_a_target_of_one_pixel_can_be_cropped(root):
    sequence = open_sequence(root / "train" / "swan", [63, 47, 1, 1])
    window = Windows.around(xywh_to_cxcywh(sequence.boxes_xywh)[:, :2], torch.tensor([2.0]), 127)
    assert sequence.crop(0, window).shape == (3, 127, 127)


# ------------------------------------------------------------------------------------ folders and
# videos


def test_paths_that_hold_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "root" / "val").mkdir(parents=True)
    for attempt, says in (
        (lambda: GOT10k(tmp_path / "root", "val"), "val: no sequences in this folder"),
        (lambda: open_sequence(tmp_path / "empty"), "no frames in this folder"),
        (
            lambda: open_sequence(tmp_path / "nowhere"),
            "nowhere does not exist; expected a video file",
        ),
        (lambda: FolderSequence(tmp_path / "nowhere"), "no such folder"),
        (lambda: GOT10k(tmp_path / "nowhere"), "nowhere does not exist.*trackkit synth"),
        (lambda: GOT10k(tmp_path / "empty"), "found neither a folder train/ nor sequences"),
        (lambda: VideoSequence(tmp_path / "no.mp4"), "no.mp4: no such video file"),
    ):
        with fails(says):
            attempt()


def test_a_single_image_is_no_sequence(root):
    with fails("is one image; give the folder"):
        open_sequence(root / "train" / "swan" / "00000001.jpg")


def test_files_that_are_no_video(tmp_path):
    for name, data in (("text.mp4", b"hello " * 100), ("empty.mp4", b"")):
        (tmp_path / name).write_bytes(data)
        with fails(f"{name}: cannot be decoded as video .*ffmpeg"):
            open_sequence(tmp_path / name)


def test_a_video_without_frames_and_one_that_is_cut_short(tmp_path):
    import wave

    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 800, "NONE", ""))
        sound.writeframes(bytes(1600))
    with fails("no video stream"):
        open_sequence(tmp_path / "sound.wav")
    file = write_video(tmp_path / "v.mkv", [picture(i) for i in range(12)], 10)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    video = VideoSequence(file)
    assert 0 < len(video) < 12
    assert all(video.frame(i).shape == (3, 48, 64) for i in range(len(video) - 1))


def test_a_broken_frame_inside_a_video_is_named(tmp_path, monkeypatch):
    video = VideoSequence(write_video(tmp_path / "v.mp4", [picture(i) for i in range(6)], 10))
    video._stamps.append(video._stamps[-1] + 512)  # a packet without a picture
    video._frames += 1
    with fails("frame 6 of 7: cannot be decoded"):
        video.frame(6)
    assert video.frame(5).shape == (3, 48, 64)
