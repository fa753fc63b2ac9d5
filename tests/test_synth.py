"""Procedural video: the same everywhere, labels that are true, dials that do what they say."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import pytest
import torch

from trackkit.crops import Windows, cut
from trackkit.errors import DataError
from trackkit.got10k import read_sequence
from trackkit.paths import SAMPLES as SAMPLES_ROOT
from trackkit.sequences import Sequence, block_mean
from trackkit.synth import (
    ATTRIBUTES,
    EMBEDDED,
    SAMPLE_QUALITY,
    SynthConfig,
    SynthDataset,
    SynthSequence,
    make_samples,
    sample,
    write_dataset,
)

# GOT-10k's levels of the visible share
LEVELS = [
    (0, 0),
    (0, 0.15),
    (0.15, 0.3),
    (0.3, 0.45),
    (0.45, 0.6),
    (0.6, 0.75),
    (0.75, 0.9),
    (0.9, 1),
    (1, 1),
]
SMALL = {"width": 160, "height": 120, "frames": 16}


def window(left: int, top: int, side: int, size: int) -> Windows:
    return Windows(torch.tensor([left]), torch.tensor([top]), torch.tensor([side]), size)


def true_cover(scene, t: int) -> float:
    """Visible share of the target's area, from masks of a scene whose target lies inside the
    frame.
    """
    target, hidden = scene.target_mask(t) >= 128, scene.hidden_mask(t) >= 128
    return (target & ~hidden).sum() / target.sum()


def mask_box(mask: np.ndarray) -> np.ndarray:
    """Left, top, right, bottom of the pixels that are on."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)


CHECKSUMS = [2696334147, 2039269403, 901081739, 2603092185, 382631402, 307369274]


def test_pixels_and_labels_are_the_same_on_every_machine():
    sums = []
    for config in (SynthConfig(**SMALL), SynthConfig.only(*ATTRIBUTES, split="val", **SMALL)):
        for number in range(3):
            sequence = SynthSequence(config, 7, number)
            crc = zlib.crc32(sequence.frame(5).numpy().tobytes())
            crc = zlib.crc32(sequence.crop(9, window(20, 10, 90, 64)).numpy().tobytes(), crc)
            crc = zlib.crc32(
                sequence.boxes_xywh.numpy().tobytes() + sequence.cover.numpy().tobytes(), crc
            )
            sums.append(crc)
    assert sums == CHECKSUMS


def test_a_sequence_depends_on_its_number_alone():
    config = SynthConfig(**SMALL)
    several = SynthDataset(config, seed=3, length=100)
    for number in (5, 0, 9):
        several[number].frame(2)
    alone = SynthDataset(config, seed=3, length=6)[5]
    assert torch.equal(several[5].frame(2), alone.frame(2))
    assert torch.equal(several[5].boxes_xywh, alone.boxes_xywh)
    assert several[5].name == alone.name
    assert not torch.equal(several[6].boxes_xywh, alone.boxes_xywh)
    assert not torch.equal(SynthDataset(config, seed=4)[5].boxes_xywh, alone.boxes_xywh)
    assert several[-1].name == several[99].name
    with pytest.raises(IndexError):
        several[100]


@pytest.mark.parametrize(
    "attributes", [(), ("deformation",), ("articulation", "deformation"), ("rotation", "aspect")]
)
def test_boxes_are_tight(attributes):
    for number in range(5):
        scene = SynthSequence(SynthConfig.only(*attributes, **SMALL), 5, number).scene
        for t in (0, 8, 15):
            if not scene.cut[t]:
                box = scene.outline_xywh[t]
                assert (
                    np.abs(
                        mask_box(scene.target_mask(t) >= 128) - [*box[:2], *(box[:2] + box[2:])]
                    ).max()
                    < 1.25
                )
                assert np.array_equal(scene.boxes_xywh[t], box) or np.allclose(
                    scene.boxes_xywh[t], box, atol=1e-9
                )


def test_cover_is_the_visible_share_of_the_area():
    seen = set()
    for number in range(10):
        config = SynthConfig.only(
            "occlusion", "motion", *(["articulation"] if number % 2 else []), **SMALL
        )
        scene = SynthSequence(config, 6, number).scene
        for t in range(0, 16, 3):
            if scene.cut[t]:
                continue
            share, level = true_cover(scene, t), int(scene.cover[t])
            lowest, highest = LEVELS[level]
            # which limb hides which is measured as if all were plain
            slack = 0.1 if number % 2 else 0.03
            assert lowest - slack <= share <= highest + slack, (number, t, share, level)
            seen.add(level)
    assert {0, 8} <= seen and len(seen) >= 6


def test_a_target_that_leaves_the_frame_is_cut_then_absent():
    sequence = SynthSequence(SynthConfig.only("out_of_view", **SMALL | {"frames": 40}), 1, 0)
    assert sequence.absent.any() and not sequence.absent[0] and not sequence.absent[-1]
    assert torch.equal(sequence.absent, sequence.cover == 0)
    assert sequence.cut.any() and sequence.cut[sequence.absent].all()
    assert (sequence.boxes_xywh[sequence.absent] == 0).all()
    boxes = sequence.boxes_xywh
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 0] + boxes[:, 2] <= 160).all()
    partly = sequence.cut & ~sequence.absent
    assert partly.any() and (sequence.cover[partly] < 8).all()
    assert torch.equal(sequence.visible, Sequence.visible.fget(sequence))


def test_dials_off_is_a_still_picture():
    sequence = SynthSequence(SynthConfig.still(**SMALL), 2, 1)
    assert sequence.attributes == ()
    assert all(torch.equal(sequence.frame(0), sequence.frame(t)) for t in (1, 7, 15))
    assert (sequence.boxes_xywh == sequence.boxes_xywh[0]).all()
    assert (sequence.cover == 8).all()


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_dial_is_labelled_and_changes_the_video(name):
    off, on = (
        SynthSequence(c, 4, 0)
        for c in (SynthConfig.still(**SMALL), SynthConfig.only(name, **SMALL))
    )
    assert on.attributes == (name,)
    assert on.scene.strengths == dict.fromkeys(ATTRIBUTES, 0.0) | {name: 1.0}
    assert any(not torch.equal(off.frame(t), on.frame(t)) for t in (0, 9, 15))
    moving = {
        "motion", "fast", "camera", "scale", "rotation",
        "aspect", "deformation", "articulation", "appearance", "out_of_view",
    }  # fmt: skip
    assert (on.boxes_xywh != on.boxes_xywh[0]).any() == (name in moving)


def test_a_window_shows_what_the_frame_shows():
    for number in range(6):
        config = SynthConfig(noise=0.0, **SMALL)
        sequence = SynthSequence(config, 8, number)
        frame = sequence.frame(6)
        for where in (
            window(0, 0, 120, 120),
            window(30, 15, 64, 64),
            window(40, 20, 60, 90),
            window(10, 0, 120, 60),
        ):
            drawn, taken = sequence.crop(6, where).float(), cut([frame], where)[0].float()
            assert (drawn - taken).abs().mean() < (0.1 if where.size == where.side else 9)
        assert torch.equal(sequence.crop(6, window(0, 0, 120, 120)), frame[:, :, :120])
        half, pooled = sequence.frame(6, 2).float(), block_mean(frame, 2).float()
        assert half.shape == pooled.shape and (half - pooled).abs().mean() < 9
        assert sequence.frame(6, 8).shape == (3, 15, 20)


def test_a_training_world_has_targets_of_all_sizes():
    videos = SynthDataset(SynthConfig(frames=1, size=1.0), seed=5, length=300)
    outlines = [videos[i].scene.outline_xywh[0] for i in range(len(videos))]
    sides = torch.tensor([float(box[2:].prod() ** 0.5) for box in outlines])
    assert sides.min() < 20 and sides.max() > 170
    assert (sides < 40).float().mean() > 0.05 and (sides > 110).float().mean() > 0.05


def test_a_team_is_dressed_alike():
    scene = SynthSequence(SynthConfig.only("team", **SMALL), 3, 1).scene
    mates = [body for body in scene.bodies if body.role == "distractor"]
    target = scene.bodies[scene.target]
    assert len(mates) == 5
    assert all(mate.shapes == target.shapes and mate.tint == target.tint for mate in mates)
    first = scene.boxes_xywh[0]
    assert (scene.cover == 8).all() and first[2:].min() > 0


def test_pictures_have_the_statistics_of_natural_images():
    """Power falls as 1 / f^2 (Field 1987: slopes of -1.8 to -2.4 in most photographs), differences
    of neighbours have heavy tails (Huang and Mumford 1999: kurtosis about 17, Gaussian 3), and the
    three colours vary together (Ruderman et al. 1998: most variance is achromatic).
    """
    slopes, tails, grey = [], [], []
    for number in range(24):
        frame = (
            SynthSequence(SynthConfig(noise=0.0, blur=0.0), 31, number).frame(3).double().numpy()
        )
        light = np.log(frame.mean(0)[:, 40:280] + 1)
        light = (light - light.mean()) * np.hanning(240)[:, None] * np.hanning(240)
        power = np.abs(np.fft.fft2(light)) ** 2
        across = np.fft.fftfreq(240)
        f = np.hypot(across[:, None], across)
        rings = [(f >= low) & (f < 1.25 * low) for low in 0.02 * 1.25 ** np.arange(12)]
        line = np.log([[f[ring].mean(), power[ring].mean()] for ring in rings])
        slopes.append(np.polyfit(*line.T, 1)[0])
        steps = np.diff(frame.mean(0), axis=1)
        tails.append((steps**4).mean() / (steps**2).mean() ** 2)
        colours = np.linalg.eigvalsh(np.cov(frame.reshape(3, -1)))
        grey.append(colours[-1] / colours.sum())
    assert -3.1 < np.median(slopes) < -1.8, slopes
    assert np.median(tails) > 8
    assert np.median(grey) > 0.75


def test_outside_the_frame_is_the_fill_or_about_the_mean_colour():
    sequence = SynthSequence(SynthConfig.still(**SMALL), 8, 1)
    filled = sequence.crop(0, window(-60, -60, 120, 60), torch.tensor([1.0, 2.0, 3.0]))
    colour = torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None]
    assert (filled[:, :30] == colour).all()
    assert (filled[:, 30:, :30] == colour).all()
    mean = sequence.frame(0).float().mean((1, 2))
    assert (sequence.crop(0, window(-60, -60, 120, 60))[:, 0, 0].float() - mean).abs().max() < 30
    with pytest.raises(ValueError, match="positive side"):
        sequence.scene.render(0, 0, 0, 40)


def test_configs_say_what_is_wrong():
    for changes, word in (
        ({"scale": 1.5}, "scale"),
        ({"noise": -0.1}, "noise"),
        ({"blur": float("nan")}, "blur"),
        ({"width": 8}, "width"),
        ({"frames": 0}, "frames"),
        ({"split": "dev"}, "split"),
    ):
        with pytest.raises(DataError, match=word):
            SynthConfig(**changes)
    with pytest.raises(DataError, match="wobble"):
        SynthConfig.only("wobble")
    with pytest.raises(DataError, match="length"):
        SynthDataset(length=0)
    with pytest.raises(IndexError):
        SynthSequence(SynthConfig.still(**SMALL), 0).frame(16)


def test_write_and_read(tmp_path):
    config = SynthConfig.only("occlusion", "motion", **SMALL)
    dataset = SynthDataset(config, seed=1, length=2)
    for split in ("val", "test"):
        folder = write_dataset(tmp_path, split, (dataset[i] for i in range(2)))
        assert (folder / "list.txt").read_text().split() == [dataset[0].name, dataset[1].name]
    made, read = dataset[1], read_sequence(tmp_path / "val" / dataset[1].name)
    assert len(read) == len(made) == 16 and read.frame_size(0) == (160, 120)
    assert torch.allclose(read.boxes_xywh, made.boxes_xywh, atol=5e-5)
    assert torch.equal(read.cover, made.cover) and torch.equal(read.absent, made.absent)
    assert torch.equal(read.cut, made.cut)
    assert read.attributes == made.attributes == ("motion", "occlusion")
    assert (read.frame(3).float() - made.frame(3).float()).abs().mean() < 6
    assert len(read_sequence(tmp_path / "test" / dataset[1].name).boxes_xywh) == 1
    with pytest.raises(DataError):
        write_dataset(tmp_path, "val", [dataset[0]])
    with pytest.raises(DataError, match="split"):
        write_dataset(tmp_path, "dev", [dataset[0]])


def test_the_embedded_set_is_complete_and_untouched():
    lines = [line.split("  ") for line in (SAMPLES_ROOT / "SHA256SUMS").read_text().splitlines()]
    for digest, name in lines:
        assert hashlib.sha256((SAMPLES_ROOT / name).read_bytes()).hexdigest() == digest, name
    assert sum((SAMPLES_ROOT / name).stat().st_size for _, name in lines) < 8e6
    for split, keys in EMBEDDED.items():
        names = (SAMPLES_ROOT / split / "list.txt").read_text().split()
        assert names == [f"synth_{split}_{key}" for key in keys]
        present = {
            path.relative_to(SAMPLES_ROOT).as_posix()
            for path in (SAMPLES_ROOT / split).rglob("*.*")
        }
        assert present == {name for _, name in lines if name.startswith(split)}


@pytest.mark.parametrize(
    ("split", "key"), [("train", "002"), ("val", "occlusion"), ("test", "turn")]
)
def test_the_embedded_set_can_be_made_again(tmp_path, split, key):
    sequence = sample(split, key)
    write_dataset(tmp_path, split, [sequence], SAMPLE_QUALITY)
    made, kept = tmp_path / split / sequence.name, SAMPLES_ROOT / split / sequence.name
    assert sorted(p.name for p in made.iterdir()) == sorted(p.name for p in kept.iterdir())
    for path in made.iterdir():
        assert path.read_bytes() == (kept / path.name).read_bytes(), path.name


def test_every_sample_starts_in_full_view_and_shows_what_it_says():
    for split, keys in EMBEDDED.items():
        for key, (attributes, _) in keys.items():
            sequence = sample(split, key)
            assert sequence.cover[0] == 8, sequence.name
            if attributes:
                assert set(attributes) <= set(sequence.attributes)
    assert (sample("val", "occlusion").cover < 4).any() and sample(
        "val", "out_of_view"
    ).absent.any()


def test_make_samples_makes_all_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "trackkit.synth.EMBEDDED",
        {split: dict(list(keys.items())[:1]) for split, keys in EMBEDDED.items()},
    )
    monkeypatch.setattr("trackkit.synth.SAMPLE_FRAMES", 2)
    root = make_samples(tmp_path / "data")
    assert {p.name for p in root.iterdir()} == {"train", "val", "test", "SHA256SUMS"}
    assert len((root / "SHA256SUMS").read_text().splitlines()) == 3 + 2 * 7 + 4
