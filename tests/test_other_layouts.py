"""Sequences as other data sets keep them: frames one folder below, other label files, NaN rows."""

from __future__ import annotations

import pytest
import torch

from trackkit.cli import main
from trackkit.errors import DataError
from trackkit.got10k import GOT10k
from trackkit.images import encode_jpeg
from trackkit.tracking import track
from trackkit.video import open_sequence
from trackkit.weights import create

ROWS = ["10,10,8,6", "11,10,8,6", "12,10,8,6"]


def put(folder, below, rows, truth="groundtruth.txt"):
    """A sequence of three frames, which are in the folder `below`, and its label file."""
    (folder / below).mkdir(parents=True)
    for i in range(3):
        picture = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
        (folder / below / f"{i + 1:04d}.jpg").write_bytes(encode_jpeg(picture))
    if rows:
        (folder / truth).write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize(
    ("below", "truth", "separator"),
    [
        ("img", "groundtruth.txt", ","),
        ("color", "groundtruth.txt", ","),
        ("img", "groundtruth_rect.txt", ","),
        ("img", "groundtruth_rect.txt", "\t"),
        ("img", "groundtruth_rect.txt", " "),
    ],
)
def test_lasot_vot_and_otb_folders_open_with_their_labels(tmp_path, below, truth, separator):
    rows = [row.replace(",", separator) for row in ROWS]
    folder = put(tmp_path / "all" / "Ball", below, rows, truth)
    for sequence in (open_sequence(folder), GOT10k(tmp_path / "all", "val")[0]):
        assert sequence.name == "Ball" and sequence.labelled and len(sequence) == 3
        assert sequence.boxes_xywh[2].tolist() == [12, 10, 8, 6]
        assert sequence.frame(2).shape == (3, 48, 64)


def test_frames_below_are_tracked_from_a_box_or_by_the_command(tmp_path, capsys):
    folder = put(tmp_path / "Ball", "color", [])
    sequence = open_sequence(folder, [1, 2, 30, 40])
    assert sequence.name == "Ball" and sequence.frame(0).shape == (3, 48, 64)
    assert len(open_sequence(folder).boxes_xywh) == 0
    arguments = ["track", str(folder), "--tracker", "stay", "--out", str(tmp_path)]
    assert main(arguments) == 1 and "--box" in capsys.readouterr().err
    assert main([*arguments, "--box", "1,2,30,40"]) == 0
    assert len((tmp_path / "Ball-stay.txt").read_text().splitlines()) == 3


def test_a_folder_above_sequences_says_where_frames_are(tmp_path):
    put(tmp_path / "otb" / "Ball", "img", ROWS)
    put(tmp_path / "plain" / "camel", ".", ROWS)
    for name, near in (("otb", "Ball"), ("plain", "camel")):
        with pytest.raises(
            DataError, match=f"no frames in this folder; there are some in .*{near}"
        ):
            open_sequence(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no frames in this folder; expected images"):
        open_sequence(tmp_path / "empty")


def test_a_row_of_a_polygon_is_named_and_what_to_do(tmp_path):
    folder = put(tmp_path / "Ball", "color", ["1,1,9,1,9,9,1,9"] * 3)
    with pytest.raises(DataError, match=r"groundtruth.txt, line 1: .*polygon.*--box"):
        open_sequence(folder)
    assert len(open_sequence(folder, [1, 1, 8, 8])) == 3


def test_labels_that_do_not_fit_are_named_by_their_file(tmp_path):
    folder = put(tmp_path / "Ball", "img", ROWS[:2], "groundtruth_rect.txt")
    with pytest.raises(
        DataError, match=r"groundtruth_rect.txt has 2 lines, but there are 3 frames"
    ):
        open_sequence(folder)


def test_nan_rows_are_absent_targets(tmp_path):
    folder = put(tmp_path / "all" / "Ball", ".", [ROWS[0], "NaN,NaN,NaN,NaN", ROWS[2]])
    for sequence in (open_sequence(folder), GOT10k(tmp_path / "all", "val")[0]):
        assert sequence.absent.tolist() == [False, True, False]
        assert sequence.visible.tolist() == [True, False, True]
        assert torch.isfinite(sequence.boxes_xywh).all()
        assert track(create("stay"), sequence).boxes_xywh.shape == (3, 4)
