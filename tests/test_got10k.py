"""The GOT-10k layout: written, read back, indexed; results and the archive for the server."""

from __future__ import annotations

import os
import shutil
import warnings
import zipfile

import pytest
import torch

import trackkit.labels as labels
from trackkit.errors import DataError
from trackkit.got10k import BROKEN, GOT10k, read_sequence, write_sequence
from trackkit.paths import remove_partials
from trackkit.results import claim, has_results, read_results, submission_zip, write_results
from trackkit.sequences import identity

BOXES = torch.tensor(
    [[10.0, 12, 20, 15], [11.1234, 12, 20, 15], [-1, -1, -1, -1], [50, 30, 20, 15]],
    dtype=torch.float64,
)


def frames(count: int = 4, height: int = 40, width: int = 64) -> list[torch.Tensor]:
    return [torch.full((3, height, width), 20 * i, dtype=torch.uint8) for i in range(count)]


def put(folder, boxes=BOXES, count=4, **options):
    options = {
        "absent": torch.tensor([0, 0, 1, 0]),
        "cover": torch.tensor([8, 5, 0, 7]),
        "cut": torch.tensor([0, 0, 0, 1]),
        "meta": {
            "url": "https://x.y/z: q",
            "object_class": "swan",
            "attributes": "fast motion, occlusion",
        },
    } | options
    return write_sequence(folder, frames(count), boxes, **options)


def fake_root(root, split: str, count: int, listed: bool = True, **options):
    names = [f"GOT-10k_{split.capitalize()}_{i:06d}" for i in range(1, count + 1)]
    for name in names:
        put(root / split / name, **options)
    if listed:
        (root / split / "list.txt").write_text("\n".join(names) + "\n")
    return root


# ------------------------------------------------------------------------------------------ writing


def test_the_files_are_those_of_the_data_set(tmp_path):
    folder = put(tmp_path / "s")
    assert sorted(os.listdir(folder)) == [
        "00000001.jpg", "00000002.jpg", "00000003.jpg", "00000004.jpg",
        "absence.label", "cover.label", "cut_by_image.label", "groundtruth.txt", "meta_info.ini",
    ]  # fmt: skip
    assert (folder / "groundtruth.txt").read_bytes().splitlines()[
        1
    ] == b"11.1234,12.0000,20.0000,15.0000"
    assert (folder / "cover.label").read_bytes() == b"8\n5\n0\n7\n"
    assert (folder / "meta_info.ini").read_text().splitlines()[:2] == [
        "[METAINFO]",
        "url: https://x.y/z: q",
    ]
    assert (folder / "meta_info.ini").read_text().splitlines()[-1] == "resolution: (64, 40)"


def test_the_same_sequence_gives_the_same_bytes(tmp_path):
    a, b = put(tmp_path / "a"), put(tmp_path / "b")
    assert all((a / f).read_bytes() == (b / f).read_bytes() for f in os.listdir(a))


@pytest.mark.parametrize(
    "count, options, says",
    [
        (0, {}, "no frames"),
        (3, {}, "3 frames but 4 boxes"),
        (4, {"cover": torch.ones(3)}, "4 frames but 3 values for cover.label"),
    ],
)
def test_nothing_is_left_of_a_sequence_that_could_not_be_written(tmp_path, count, options, says):
    with pytest.raises(DataError, match=says):
        put(tmp_path / "s", count=count, **options)
    assert os.listdir(tmp_path) == []


def test_an_existing_sequence_is_not_overwritten(tmp_path):
    put(tmp_path / "s")
    with pytest.raises(DataError, match="exists already"):
        put(tmp_path / "s")


# ------------------------------------------------------------------------------------------ reading


def test_a_sequence_comes_back(tmp_path):
    s = read_sequence(put(tmp_path / "swan"))
    assert (s.name, len(s), s.labelled, s.attributes) == (
        "swan",
        4,
        True,
        ("fast motion", "occlusion"),
    )
    assert torch.equal(s.boxes_xywh, BOXES)
    assert s.absent.tolist() == [False, False, True, False] and s.cover.tolist() == [8, 5, 0, 7]
    assert s.cut.tolist() == [False, False, False, True] and s.cover.dtype == torch.int64
    assert s.visible.tolist() == [True, True, False, True]
    assert s.meta["url"] == "https://x.y/z: q" and s.meta["resolution"] == "(64, 40)"
    assert s.frame(1).shape == (3, 40, 64) and s.frame(2).float().mean() == pytest.approx(40, abs=1)


def test_missing_optional_files_mean_present_and_fully_visible(tmp_path):
    folder = put(tmp_path / "s", absent=None, cover=None, cut=None)
    (folder / "meta_info.ini").unlink()
    s = read_sequence(folder)
    assert (
        not s.absent.any()
        and (s.cover == 8).all()
        and not s.cut.any()
        and s.meta == {}
        and s.attributes == ()
    )
    assert s.visible.tolist() == [True, True, False, True]  # a box of -1,-1,-1,-1 is none


def test_splits_names_and_order(tmp_path):
    root = fake_root(fake_root(tmp_path / "GOT-10k", "train", 3), "val", 2)
    train, val = GOT10k(root), GOT10k(root, "val")
    assert (train.name, len(train), val.name, len(val)) == ("GOT-10k-train", 3, "GOT-10k-val", 2)
    assert (
        val[1].name == "GOT-10k_Val_000002" == val[-1].name and [s.name for s in val] == val.names
    )
    with pytest.raises(IndexError):
        val[2]
    (root / "val" / "list.txt").write_text("GOT-10k_Val_000002\r\n")
    assert GOT10k(root, "val").names == ["GOT-10k_Val_000002"]
    changed = train[0]
    changed.boxes_xywh += 1
    assert torch.equal(train[0].boxes_xywh, BOXES), (
        "a sequence must not share memory with its data set"
    )


def test_the_test_split_has_one_box_and_other_splits_may_not(tmp_path):
    root = fake_root(tmp_path / "r", "test", 2, boxes=BOXES[:1], absent=None, cover=None, cut=None)
    s = GOT10k(root, "test")[0]
    assert (
        s.boxes_xywh.shape == (1, 4)
        and len(s) == 4
        and not s.labelled
        and s.visible.tolist() == [True] + [False] * 3
    )
    (root / "test").rename(root / "val")
    with pytest.raises(
        DataError, match=r"Test_000001: groundtruth.txt has 1 lines, but there are 4 frames"
    ):
        GOT10k(root, "val")


def test_a_root_may_be_a_split_or_a_folder_of_sequences(tmp_path):
    root = fake_root(tmp_path / "r", "val", 2)
    assert GOT10k(root / "val", "val").name == "r-val"
    with pytest.raises(DataError, match="is the val split, but train was asked for"):
        GOT10k(root / "val", "train")
    (root / "val").rename(root / "mine")
    mine = GOT10k(root / "mine", "test")
    assert (mine.name, len(mine)) == ("mine", 2)
    with pytest.raises(
        DataError, match=r"found neither a folder train/ nor sequences.*trackkit synth"
    ):
        GOT10k(root)
    with pytest.raises(DataError, match="is one sequence"):
        GOT10k(root / "mine" / "GOT-10k_Val_000001")
    with pytest.raises(DataError, match="no split 'training'"):
        GOT10k(root, "training")


def test_without_list_txt_and_with_strays(tmp_path):
    root = fake_root(tmp_path / "r", "train", 2, listed=False)
    folder = root / "train" / "GOT-10k_Train_000001"
    for stray in ("meta_info.ini.bak2", ".DS_Store", "._00000001.jpg", "cover.jpg", "Thumbs.db"):
        (folder / stray).write_text("stray")
    (root / "train" / "empty").mkdir()
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "readme.txt").write_text("x")
    train = GOT10k(root)
    assert train.names == ["GOT-10k_Train_000001", "GOT-10k_Train_000002"] and len(train[0]) == 4


def test_other_names_of_frames(tmp_path):
    folder = put(tmp_path / "s")
    for i in range(1, 5):
        (folder / f"{i:08d}.jpg").rename(folder / f"{i - 1}.JPG")
    s = read_sequence(folder)
    assert s.files == ["0.JPG", "1.JPG", "2.JPG", "3.JPG"] and s.frame(3).shape == (3, 40, 64)


@pytest.mark.parametrize("numbers", [range(300, 304), range(5, 25, 5)], ids=["0300 on", "fifths"])
def test_frames_may_begin_late_or_skip_numbers_if_each_has_a_label(tmp_path, numbers):
    folder = put(tmp_path / "s")
    for i, number in enumerate(numbers, 1):
        (folder / f"{i:08d}.jpg").rename(folder / f"{number:04d}_.jpg")
    for number in numbers:
        (folder / f"{number:04d}_.jpg").rename(folder / f"{number:04d}.jpg")
    s = read_sequence(folder)
    assert len(s) == 4 and torch.equal(s.boxes_xywh, BOXES)
    assert s.frame(3).float().mean() == pytest.approx(60, abs=1)
    (folder / f"{numbers[2]:04d}.jpg").unlink()  # now one is really missing
    with pytest.raises(DataError, match=rf"missing, by number: .*\b{numbers[2]}|first frame is"):
        read_sequence(folder)


def test_frames_named_by_the_time_are_frames(tmp_path):
    """Numbers may be far apart: what lies between is not counted one by one."""
    folder = put(tmp_path / "s")
    for i, number in enumerate((10**17, 10**17 + 33, 10**17 + 67, 9 * 10**17), 1):
        (folder / f"{i:08d}.jpg").rename(folder / f"{number}.jpg")
    assert len(read_sequence(folder)) == 4
    (folder / "groundtruth.txt").write_text("1,1,9,9\n" * 5)
    with pytest.raises(DataError, match=r"missing, by number: 1\d+1, 1\d+2, .*, \.\.\."):
        read_sequence(folder)


def test_frames_in_a_folder_below_are_found(tmp_path, counted):
    folder = put(tmp_path / "r" / "train" / "s")
    (folder / "img").mkdir()
    for i in range(1, 5):
        (folder / f"{i:08d}.jpg").rename(folder / "img" / f"{i:04d}.jpg")
    s = GOT10k(tmp_path / "r")[0]
    assert s.files[0] == "img/0001.jpg" and s.frame(1).float().mean() == pytest.approx(20, abs=1)
    (folder / "img" / "0004.jpg").unlink()  # and not only in the cached index
    with pytest.raises(DataError, match="4 lines, but there are 3 frames"):
        GOT10k(tmp_path / "r")


@pytest.mark.parametrize("listed", [True, False])
def test_archives_unpacked_one_folder_too_deep_are_found(tmp_path, listed):
    root = fake_root(tmp_path / "r", "train", 3, listed)
    (root / "train" / "GOT-10k_Train_split_01").mkdir()
    moved = ("1", "2") if listed else ("1", "2", "3")
    for name in (f"GOT-10k_Train_00000{i}" for i in moved):
        (root / "train" / name).rename(root / "train" / "GOT-10k_Train_split_01" / name)
    train = GOT10k(root)
    assert train.names == [f"GOT-10k_Train_00000{i}" for i in (1, 2, 3)]
    assert [s.name for s in train] == train.names and train[0].frame(0).shape == (3, 40, 64)
    shutil.copytree(root / "train" / "GOT-10k_Train_split_01", root / "train" / "again")
    with pytest.raises(DataError, match="have the same name; list the paths"):
        GOT10k(root)
    (root / "train" / "list.txt").write_text("again/GOT-10k_Train_000001\n")
    assert GOT10k(root).names == ["again/GOT-10k_Train_000001"]


def test_rows_of_nan_are_absent_and_hidden(tmp_path):
    """As UAV123 and VOT say that the target is not there; labels beside them are not needed."""
    folder = put(tmp_path / "s", absent=None, cover=None, cut=None)
    lines = (folder / "groundtruth.txt").read_text().splitlines()
    (folder / "groundtruth.txt").write_text("\n".join([*lines[:3], "NaN,NaN,NaN,NaN"]))
    s = read_sequence(folder)
    assert s.absent.tolist() == [False, False, False, True] and s.cover.tolist() == [8, 8, 8, 0]
    assert torch.isfinite(s.boxes_xywh).all() and not s.visible[3]


# -----------------------------------------------------------------------------------------------
# identity


def test_the_identity_of_data_is_its_content(tmp_path, monkeypatch):
    root = fake_root(tmp_path / "r", "train", 2)
    mine = GOT10k(root).identity
    os.symlink(root, tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    for same in ("r", "r/../r", "link", "./link/train", tmp_path / "r" / "train"):
        assert GOT10k(same).identity == mine
    root.rename(tmp_path / "moved")
    assert GOT10k("moved").identity == mine
    label = tmp_path / "moved" / "train" / "GOT-10k_Train_000002" / "cover.label"
    label.write_text("8\n5\n0\n6\n")
    other = GOT10k("moved").identity
    assert other != mine
    assert GOT10k("moved", exclude=["GOT-10k_Train_000001"]).identity not in (mine, other)
    (label.parent / "00000004.jpg").unlink()
    for file in label.parent.glob("*.[tl]*[tl]"):
        file.write_text("\n".join(file.read_text().splitlines()[:3]))
    assert GOT10k("moved").identity not in (mine, other)
    train = GOT10k("moved")  # a list of sequences too is what is in them, not where they lie
    assert identity(list(train)) == identity([read_sequence(s.folder) for s in train])
    assert identity(list(train)) != identity(list(train)[:1])


def test_broken_training_sequences_are_left_out_and_foreign_frames_marked(tmp_path, monkeypatch):
    assert len(BROKEN) == 17 and "GOT-10k_Train_009058" in BROKEN
    for name in ("GOT-10k_Train_008630", "GOT-10k_Train_001638"):
        put(tmp_path / "r" / "train" / name)
    monkeypatch.setitem(labels.WRONG_FRAMES, "GOT-10k_Train_001638", (2, 2))
    train = GOT10k(tmp_path / "r")
    assert train.names == ["GOT-10k_Train_001638"] and train[0].absent.tolist() == [
        False,
        True,
        True,
        False,
    ]
    assert len(GOT10k(tmp_path / "r", exclude=())) == 2
    with pytest.raises(DataError, match="no sequences left"):
        GOT10k(tmp_path / "r", exclude=["GOT-10k_Train_008630", "GOT-10k_Train_001638"])


def test_a_visible_box_outside_its_frame_counts_as_absent(tmp_path):
    boxes = BOXES.clone()
    # beside, and on the last pixel
    boxes[1], boxes[3] = torch.tensor([64.0, 5, 9, 9]), torch.tensor([63.0, 39, 9, 9])
    s = read_sequence(put(tmp_path / "s", boxes=boxes))
    assert s.absent.tolist() == [False, True, True, False] and s.visible.tolist() == [
        True,
        False,
        False,
        True,
    ]
    # in a frame that is larger than the first the same box is inside
    bigger = write_sequence(tmp_path / "t", [*frames(1), *frames(3, 80, 128)], boxes)
    assert read_sequence(bigger).visible.tolist() == [True, True, False, True]


# -------------------------------------------------------------------------------------------- index


@pytest.fixture
def counted(monkeypatch):
    """How many sequences are read from their label files, with every set large enough for the
    cache.
    """
    calls = []
    read = labels.read_labels
    monkeypatch.setattr(labels, "CACHED_FROM", 1)
    monkeypatch.setattr(labels, "read_labels", lambda *a: calls.append(a) or read(*a))
    return calls


def test_the_index_is_kept_and_renewed_when_labels_change(tmp_path, counted):
    root = fake_root(tmp_path / "r", "train", 3)
    first = GOT10k(root)
    again = GOT10k(root)
    assert len(counted) == 3
    for a, b in zip(first, again, strict=True):
        assert (
            torch.equal(a.boxes_xywh, b.boxes_xywh)
            and torch.equal(a.absent, b.absent)
            and a.meta == b.meta
        )
        assert a.files == b.files and torch.equal(a.cover, b.cover) and torch.equal(a.cut, b.cut)
    label = root / "train" / "GOT-10k_Train_000002" / "absence.label"
    label.write_text("0\n1\n1\n0\n")
    os.utime(label, ns=(1, 1))
    assert GOT10k(root)[1].absent.tolist() == [False, True, True, False] and len(counted) == 6
    (root / "train" / "GOT-10k_Train_000003" / "00000004.jpg").unlink()
    with pytest.raises(DataError, match="Train_000003"):
        GOT10k(root)


def test_a_damaged_index_is_made_again(tmp_path, counted):
    root = fake_root(tmp_path / "r", "train", 2)
    GOT10k(root)
    (cache,) = (tmp_path / "home" / "index").glob("*.npz")
    cache.write_bytes(cache.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is damaged"):
        assert len(GOT10k(root)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GOT10k(root)
    assert len(counted) == 4


def test_a_home_that_cannot_be_written_only_costs_time(tmp_path, counted, monkeypatch):
    root = fake_root(tmp_path / "r", "train", 2)
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("TRACKKIT_HOME", str(tmp_path / "file"))
    for _ in range(2):
        with pytest.warns(UserWarning, match="labels are read again next time: cannot write"):
            assert len(GOT10k(root)) == 2
    assert len(counted) == 4


def test_a_small_set_leaves_nothing_in_the_home(tmp_path):
    GOT10k(fake_root(tmp_path / "r", "train", 2))
    assert not (tmp_path / "home").exists()


# ------------------------------------------------------------------------------------------ results


def result(
    folder, sequence: str = "a", rows: int = 4, tracker: str = "siamfc", identity: str = "123"
):
    boxes = torch.arange(4.0 * rows).reshape(rows, 4) + 0.12345
    write_results(folder, sequence, boxes, torch.full((rows,), 0.015), tracker, identity)
    return boxes


def test_results_have_the_servers_format_and_come_back(tmp_path):
    boxes = result(tmp_path / "siamfc")
    text = (tmp_path / "siamfc" / "a" / "a_001.txt").read_bytes()
    assert text.startswith(b"0.123,1.123,2.123,3.123\n") and text.count(b"\n") == 4
    assert (tmp_path / "siamfc" / "a" / "a_time.txt").read_bytes().splitlines()[0] == b"0.01500000"
    read, seconds = read_results(tmp_path / "siamfc", "a", 4)
    torch.testing.assert_close(read, boxes.double(), atol=5e-4, rtol=0)
    assert seconds.tolist() == [0.015] * 4 and has_results(tmp_path / "siamfc", "a")
    assert not has_results(tmp_path / "siamfc", "b")


def test_a_results_folder_belongs_to_one_tracker(tmp_path):
    result(tmp_path / "out")
    claim(tmp_path / "out", "siamfc", "123")
    with pytest.raises(
        DataError,
        match=r"holds results of siamfc \(123\), not of stark \(456\).*choose another folder",
    ):
        result(tmp_path / "out", tracker="stark", identity="456")
    with pytest.raises(DataError, match=r"not of siamfc \(other weights\)"):
        claim(tmp_path / "out", "siamfc", "other weights")
    (tmp_path / "out" / ".trackkit.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        claim(tmp_path / "out", "siamfc", "123")
    (tmp_path / "out" / ".trackkit.json").unlink()
    with pytest.raises(DataError, match="their tracker is unknown"):
        claim(tmp_path / "out", "siamfc", "123")


def test_results_that_are_not_numbers_are_refused(tmp_path):
    boxes = torch.ones(3, 4)
    boxes[1, 2] = float("nan")
    with pytest.raises(DataError, match="frame 1 is not finite"):
        write_results(tmp_path / "o", "a", boxes, torch.ones(3), "t", "i")
    with pytest.raises(DataError, match="expected boxes"):
        write_results(tmp_path / "o", "a", torch.ones(3, 4), torch.ones(2), "t", "i")
    assert not (tmp_path / "o").exists()


def test_the_archive_for_the_server(tmp_path):
    root = fake_root(tmp_path / "r", "test", 2, boxes=BOXES[:1], absent=None, cover=None, cut=None)
    test = GOT10k(root, "test")
    out = tmp_path / "o"
    for name in test.names:
        result(out, name)
    archive = submission_zip(out, test, tmp_path / "siamfc.zip")
    names = zipfile.ZipFile(archive).namelist()
    assert names == [f"{n}/{n}_{kind}.txt" for n in test.names for kind in ("001", "time")]
    first = archive.read_bytes()
    submission_zip(out, test, archive)
    assert archive.read_bytes() == first
    write_results(out, test.names[0], torch.ones(3, 4), torch.ones(3), "siamfc", "123")
    (out / test.names[1] / f"{test.names[1]}_time.txt").unlink()
    with pytest.raises(
        DataError, match=r"2 of 2 sequences(.|\n)*3 lines for 4 frames(.|\n)*_time.txt is missing"
    ):
        submission_zip(out, test, tmp_path / "not.zip")
    assert not (tmp_path / "not.zip").exists()


def test_a_sequence_listed_as_a_path_has_files_of_its_own(tmp_path):
    root = tmp_path / "r"
    for camera in ("cam1", "cam2"):
        put(root / "test" / camera / "clip", boxes=BOXES[:1], absent=None, cover=None, cut=None)
    (root / "test" / "list.txt").write_text("cam1/clip\n./cam2//clip/\n")
    test, out = GOT10k(root, "test"), tmp_path / "o"
    assert [s.name for s in test] == ["cam1/clip", "cam2/clip"]
    boxes = [result(out, s.name) + i for i, s in enumerate(test)]
    write_results(out, "cam2/clip", boxes[1], torch.ones(4), "siamfc", "123")
    for name, expected in zip(test.names, boxes, strict=True):
        torch.testing.assert_close(read_results(out, name)[0], expected.double(), atol=1e-3, rtol=0)
    assert zipfile.ZipFile(submission_zip(out, test, tmp_path / "s.zip")).namelist() == [
        f"{camera}/clip/clip_{kind}.txt" for camera in ("cam1", "cam2") for kind in ("001", "time")
    ]


def test_results_with_cut_digits_are_not_packed(tmp_path):
    root = fake_root(tmp_path / "r", "test", 1, boxes=BOXES[:1], absent=None, cover=None, cut=None)
    test = GOT10k(root, "test")
    result(tmp_path / "o", test.names[0])
    file = tmp_path / "o" / test.names[0] / f"{test.names[0]}_001.txt"
    file.write_text(file.read_text()[:-3] + "\n")  # still four numbers
    assert len(read_results(tmp_path / "o", test.names[0], 4)[0]) == 4
    with pytest.warns(UserWarning, match="the result files have changed .*tracked again"):
        assert not has_results(tmp_path / "o", test.names[0])
    with pytest.raises(DataError, match="changed since it was tracked"):
        submission_zip(tmp_path / "o", test, tmp_path / "s.zip")
    (file.parent / ".trackkit.json").unlink()  # another tool's results have no seal
    submission_zip(tmp_path / "o", test, tmp_path / "s.zip")


@pytest.mark.parametrize("seal", ["", "{", "[]", "null", "\xff", "[" * 99999])
def test_a_damaged_seal_is_tracked_again(tmp_path, seal):
    result(tmp_path / "o")
    (tmp_path / "o" / "a" / ".trackkit.json").write_text(seal, "latin-1")
    with pytest.warns(UserWarning, match="trackkit.json has changed .*tracked again"):
        assert not has_results(tmp_path / "o", "a")


def test_partial_files_are_told_from_others(tmp_path):
    ours = [".a_001.4711-0a1b2c3d.txt", ".state.1-ffffffff.safetensors", ".noend.2-00000000"]
    others = [".lock", ".trackkit.json", "._a-20240101.txt", "a_001.1-0a1b2c3d.txt", ".x.bak"]
    for name in ours + others:
        (tmp_path / name).write_text("")
    remove_partials(tmp_path.rglob(".*"))
    assert sorted(os.listdir(tmp_path)) == sorted(others)


@pytest.mark.parametrize("line", ["1 2 3 4", "1\t2\t3\t4", "1,2,3", "1,2,nan,4", "a,b,c,d", ""])
def test_a_damaged_result_is_named_by_line(tmp_path, line):
    result(tmp_path / "o")
    file = tmp_path / "o" / "a" / "a_001.txt"
    file.write_text(file.read_text().replace("4.123,5.123,6.123,7.123", line))
    with pytest.raises(
        DataError, match=r"a_001.txt, line 2: expected 4 numbers separated by commas"
    ):
        read_results(tmp_path / "o", "a")


def test_a_time_file_of_several_runs_is_read(tmp_path):
    result(tmp_path / "o")
    (tmp_path / "o" / "a" / "a_time.txt").write_text("0.5,0.6\n" * 4)
    assert read_results(tmp_path / "o", "a")[1].tolist() == [0.5] * 4
