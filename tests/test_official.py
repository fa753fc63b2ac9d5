"""The authors' checkpoints: what is read, what is refused without running it, and what an error
says.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden import golden
from safetensors.torch import save_file
from torch import Tensor

from trackkit import checkpoints, official
from trackkit.errors import CheckpointError, TrackkitError
from trackkit.weights import TRACKERS, create

ZIP = {"_use_new_zipfile_serialization": True}  # as torch saves since 1.6
OLD = {"_use_new_zipfile_serialization": False}


def refused(says: str):
    return pytest.raises(CheckpointError, match=says)


def entries(name: str = "siamfc-tiny", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights by our names, which every tracker takes too."""
    values = create(name).state_dict()
    return OrderedDict(
        (key, value.to(dtype) if value.is_floating_point() else value)
        for key, value in values.items()
    )


def shapes(name: str, **changes) -> dict[str, Tensor]:
    """The entries of an authors' checkpoint without values: they are refused before any is looked
    at.
    """
    keys = {**golden(name)["keys"], **changes}
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


def renamed_in_file(path: Path, old: bytes, new: bytes) -> Path:
    """The same file with other names in its pickle."""
    changed = path.with_suffix(".changed")
    if not zipfile.is_zipfile(path):
        changed.write_bytes(path.read_bytes().replace(old, new))
        return changed
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as target,
    ):
        for item in source.namelist():
            data = source.read(item)
            target.writestr(item, data.replace(old, new) if item.endswith("data.pkl") else data)
    return changed


class Settings:
    """What training loops like to keep in their checkpoints."""

    def __init__(self):
        self.rate = 0.1


# ---- what is read ----


@pytest.mark.parametrize("layout", [ZIP, OLD], ids=["zip", "old"])
@pytest.mark.parametrize("within", ["net", "model", "state_dict", "model_state_dict", None])
def test_weights_are_found_where_training_loops_put_them(tmp_path, within, layout):
    weights = {"a.weight": torch.rand(2, 3), "a.bias": torch.rand(3).half()}
    notes = {
        "epoch": 7,
        "net_type": "STARK",
        "stats": OrderedDict(loss=[0.5, None]),
        "optimizer": {"state": {0: torch.ones(2)}},
    }
    torch.save({**notes, within: weights} if within else weights, tmp_path / "a.pth.tar", **layout)
    found = official.read(tmp_path / "a.pth.tar")
    assert found.keys() == weights.keys() and all(
        torch.equal(found[key], weights[key]) for key in weights
    )
    assert found["a.bias"].dtype == torch.float16


@pytest.mark.parametrize("layout", [ZIP, OLD], ids=["zip", "old"])
@pytest.mark.parametrize(
    "core", [b"numpy._core.multiarray", b"numpy.core.multiarray"], ids=["numpy2", "numpy1"]
)
def test_numpy_scalars(tmp_path, core, layout):
    """Best scores beside the weights, which torch alone refuses, and entries that are numbers."""
    numbers = {
        "half": np.float16(0.5), "single": np.float32(0.25), "double": np.float64(0.1),
        "big": np.dtype(">f8").type(2.5), "yes": np.bool_(True), "int": np.int64(-3),
        "byte": np.uint8(200), "plain": 4, "float": 0.5,
    }  # fmt: skip
    weights = {
        "head.weight": torch.rand(3),
        **{f"head.{key}": value for key, value in numbers.items()},
    }
    torch.save({"net": weights, "best": np.float64(0.7), **numbers}, tmp_path / "a.pth", **layout)
    with pytest.raises(Exception, match="numpy"):
        torch.load(tmp_path / "a.pth", weights_only=True)
    found = official.read(renamed_in_file(tmp_path / "a.pth", b"numpy._core.multiarray", core))
    assert found.keys() == weights.keys()
    for key, value in numbers.items():
        assert found[f"head.{key}"].shape == () and found[f"head.{key}"].item() == value
    assert found["head.double"].dtype == torch.float64 and found["head.byte"].dtype == torch.uint8


def test_numbers_that_are_no_weights_are_left_out(tmp_path):
    torch.save(
        {"a.weight": torch.rand(1), "a.count": np.int64(3), "epoch": 3, "best_ao": np.float64(0.7)},
        tmp_path / "a.pth",
    )
    assert official.read(tmp_path / "a.pth").keys() == {"a.weight", "a.count"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_and_scalars_in_weights(tmp_path, dtype):
    weights = entries(dtype=dtype)
    counts = {key: np.int64(9) for key in weights if key.endswith("num_batches_tracked")}
    assert counts
    torch.save(
        {"model": {f"module.{key}": value for key, value in (weights | counts).items()}},
        tmp_path / "a.pth",
    )
    tracker = official.load("siamfc-tiny", official.read(tmp_path / "a.pth"))
    assert not tracker.training
    for key, value in tracker.state_dict().items():
        assert value.dtype == (torch.int64 if key in counts else torch.float32)
        assert torch.equal(value, torch.tensor(9) if key in counts else weights[key].float())


def test_entries_may_be_arrays_and_wrapped():
    weights = {f"module.{key}": value.numpy() for key, value in entries().items()}
    tracker = official.load("siamfc-tiny", {"epoch": 3, "net": weights})
    assert torch.equal(
        tracker.backbone.conv1[0].weight,
        torch.from_numpy(weights["module.backbone.conv1.0.weight"]),
    )


@pytest.mark.parametrize("name", TRACKERS)
def test_our_names_stay(name):
    assert all(official.rename(name, key) == key for key in official._shapes(name))


# ---- what is refused, and never executed ----


class Trap:
    def __init__(self, function, *args):
        self.what = function, args

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize("layout", [ZIP, OLD], ids=["zip", "old"])
@pytest.mark.parametrize("within", ["net", "model", "state_dict"])
def test_a_file_that_runs_code_when_unpickled(tmp_path, within, layout):
    proof, file = tmp_path / "executed", tmp_path / "a.pth"
    torch.save(
        {within: {"a.weight": torch.ones(1), "b": Trap(os.system, f"touch {proof}")}},
        file,
        **layout,
    )
    with refused(
        r"a.pth: holds objects other than tensors \((posix|nt).system\)\. .*nothing was "
        rf"loaded.*\['{within}'\]"
    ):
        official.read(file)
    assert not proof.exists()


@pytest.mark.parametrize("function", [eval, exec, getattr, np.load, torch.load, np.zeros])
def test_no_other_function_is_called(tmp_path, function):
    torch.save({"net": {"a.weight": torch.ones(1)}, "x": Trap(function, "1")}, tmp_path / "a.pth")
    with refused(f"other than tensors .*{function.__name__}"):
        official.read(tmp_path / "a.pth")


def test_what_a_program_allowed_elsewhere_is_not_allowed_here(tmp_path):
    torch.save(
        {"net": {"a.weight": torch.ones(1)}, "settings": Settings(), "best": np.float64(0.5)},
        tmp_path / "a.pth",
    )
    outside = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([Settings, np.dtype]):
        before = set(torch.serialization.get_safe_globals())
        with refused(r"\(test_official.Settings\)"):
            official.read(tmp_path / "a.pth")
        assert set(torch.serialization.get_safe_globals()) == before
    assert set(torch.serialization.get_safe_globals()) == outside


def test_arrays_of_objects_are_no_numbers(tmp_path):
    """NumPy's dtype and scalar by name, but for something that holds more than a number."""
    for value in (np.str_("a"), np.void(b"abcd"), np.datetime64(3, "s"), np.complex64(1)):
        torch.save({"net": {"a.weight": torch.ones(1), "a.x": value}}, tmp_path / "a.pth")
        with refused("damaged or not a torch checkpoint .*no number"):
            official.read(tmp_path / "a.pth")


@pytest.mark.parametrize("layout", [ZIP, OLD], ids=["zip", "old"])
@pytest.mark.parametrize("within", ["net", "model", "state_dict", None])
def test_the_way_out_that_the_error_shows_works(tmp_path, monkeypatch, within, layout):
    """The command in the message, run where the authors' classes are, gives a file that can be
    read.
    """
    monkeypatch.chdir(tmp_path)
    weights = {"a.weight": torch.rand(2, 3)}
    content = {
        "epoch": 3,
        "actor_type": "STARKActor",
        within: weights,
        "stats": {"x": Settings()},
        "more": SimpleNamespace(a=1),
    }
    torch.save(content if within else [weights, Settings()], "a.pth.tar", **layout)
    with refused("test_official.Settings") as error:
        official.read("a.pth.tar")
    text = str(error.value)
    if layout is ZIP and within:
        assert "(test_official.Settings, types.SimpleNamespace)" in text
    assert "separate environment that has the authors' code" in text and "\x1b" not in text
    command = re.search(r"torch\.save\(torch\.load\(.*?'weights\.pth'\)", text)[0]
    if within is None:
        assert "weights_only=False), 'weights.pth'" in command
        return
    exec(command, {"torch": torch})
    assert torch.equal(official.read("weights.pth")["a.weight"], weights["a.weight"])


def test_a_whole_network(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    with refused(
        r"torch.nn.modules.linear.Linear.*If what you save is a whole network, save its "
        r"state_dict\(\)"
    ):
        official.read(tmp_path / "a.pth")


@pytest.mark.parametrize("protocol", [3, 4])
def test_other_pickle_protocols(tmp_path, protocol):
    """torch cannot read them without running them, and its advice to do so is not passed on."""
    torch.save(
        {"net": {"a": torch.ones(1)}, "best": np.float64(0.5)},
        tmp_path / "a.pth",
        pickle_protocol=protocol,
    )
    with refused(r"as torch.save writes it by default \(Unsupported operand \d+\)$"):
        official.read(tmp_path / "a.pth")


def test_many_objects_are_counted(tmp_path):
    class_names = [str, dict, list, tuple, int, float, bytes, complex]
    torch.save(
        {"net": {"a": torch.ones(1)}, "x": [Trap(f) for f in class_names]}, tmp_path / "a.pth"
    )
    with refused(r"and \d more\)"):
        official.read(tmp_path / "a.pth")


# ---- files that are broken, or something else ----


def test_files_that_are_no_checkpoint(tmp_path):
    for name, data in (
        ("empty", b""),
        ("text", b"<html>404</html>"),
        ("noise", bytes(range(256)) * 8),
    ):
        (tmp_path / name).write_bytes(data)
        with refused(f"{name}: damaged or not a torch checkpoint"):
            official.read(tmp_path / name)
    save_file({"a": torch.ones(2)}, tmp_path / "b.safetensors")
    with refused("damaged or not a torch checkpoint"):
        official.read(tmp_path / "b.safetensors")
    for content in ({}, {"net": {}}, [torch.ones(1)], torch.ones(2), {"epoch": 3, "best": 0.5}):
        torch.save(content, tmp_path / "c.pth")
        with refused("c.pth: no tensors in it"):
            official.read(tmp_path / "c.pth")
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with refused("no such file"):
            official.read(path)


@pytest.mark.parametrize("layout", [ZIP, OLD], ids=["zip", "old"])
def test_damaged_files(tmp_path, layout, recwarn):
    """Cut short, or with a wrong byte anywhere in the part that is pickled: an error of ours, or
    the right keys' tensors.
    """
    file = tmp_path / "a.pth"
    torch.save({"net": {"a.weight": torch.ones(2, 2)}, "best": np.float64(0.5)}, file, **layout)
    whole = file.read_bytes()
    for share in (0.1, 0.5, 0.9):
        file.write_bytes(whole[: int(share * len(whole))])
        with refused("a.pth: damaged or not a torch checkpoint"):
            official.read(file)
    random, errors = np.random.default_rng(0), 0
    for _ in range(150):
        data = bytearray(whole)
        data[random.integers(min(len(whole), 700))] = random.integers(256)
        file.write_bytes(data)
        try:
            official.read(file)
        except CheckpointError:
            errors += 1
    assert errors > 20 and not recwarn


# ---- what does not fit ----


def test_another_size_names_both_and_both_shapes():
    with refused(
        r"stark-st50 does not fit it; of another size: query\.weight is \(10, 256\), needs \(1, "
        r"256\) \(the authors' query_embed\.weight\)$"
    ):
        official.load("stark-st50", shapes("stark_st50", **{"query_embed.weight": [10, 256]}))


def test_missing_and_extra_entries_are_named_by_both_names():
    theirs = shapes("stark_st50")
    for key in (
        "box_head.conv2_tl.0.bias",
        "transformer.encoder.layers.3.linear1.weight",
        "bottleneck.bias",
    ):
        del theirs[key]
    with refused(
        r"missing: bottleneck\.bias, .*encoder\.layers\.3\.linear1\.weight \(the authors' "
        r"transformer\.encoder\.layers\.3\.linear1\.weight\)"
    ) as error:
        official.load("stark-st50", theirs)
    assert "box_head.top_left.1.0.bias (the authors' box_head.conv2_tl.0.bias)" in str(error.value)
    with refused(
        r"not expected: encoder\.extra \(the authors' module\.transformer\.encoder\.extra\)$"
    ):
        extra = {**shapes("stark_st50"), "transformer.encoder.extra": torch.ones(1)}
        official.load("stark-st50", {f"module.{key}": value for key, value in extra.items()})


def test_two_entries_for_one_of_ours():
    weights = entries()
    with refused(
        r"given twice: backbone\.conv1\.0\.bias \(by backbone\.conv1\.0\.bias and by "
        r"module\.backbone\.conv1\.0\.bias\)"
    ):
        official.load(
            "siamfc-tiny",
            {**weights, "module.backbone.conv1.0.bias": weights["backbone.conv1.0.bias"]},
        )
    with refused(r"given twice: query\.weight \(by query_embed\.weight and by query\.weight\)$"):
        official.load("stark-st50", shapes("stark_st50", **{"query.weight": [1, 256]}))


@pytest.mark.parametrize(
    ("file", "name", "says"),
    [
        ("stark_s50", "stark-st101", "stark-s50"), ("stark_s50", "mixvit-b288", "stark-s50"),
        ("stark_st50", "siamfc", "stark-st50"), ("stark_st101", "stay", "stark-st101"),
        ("siamfc", "stark-tiny", "siamfc"), ("siamfc", "siamfc-tiny", "siamfc"),
        ("sbt_base", "sbt-small", "sbt-base"), ("sbt_light", "ustam-tiny", "sbt-light"),
        ("stmtrack", "dastm", "stmtrack"),
        ("ostrack_256_ce", "ostrack-384", "ostrack-256 and procontext-256"),
        ("ostrack_256_ce", "mixvit-b288", "ostrack-256 and procontext-256"),
        ("mixvit_b_288", "ustam-b288", "mixvit-b288"),
        ("mixvit_b_288", "procontext-256", "mixvit-b288"),
    ],
    ids=str,
)  # fmt: skip
def test_another_variant_or_family_says_which_fits(file, name, says):
    gold = golden(file)
    theirs = {key: torch.empty(shape, device="meta") for key, shape in gold["keys"].items()}
    with refused(f"; it fits {says}$"):
        official.load(name, theirs)


def test_nothing_fits_but_one_nearly():
    with refused("; it fits no tracker, but stark-s50 best, all but 1 of the entries$"):
        official.load("siamfc", shapes("stark_s50", **{"neck.weight": [3]}))
    with refused("not expected: a, b$"):
        official.load("siamfc-tiny", {**entries(), "a": torch.ones(1), "b": torch.ones(1)})
    with refused(r"does not fit it; missing: .*; not expected: odd$"):
        official.load("siamfc", {"odd": torch.ones(1)})


def test_no_network_is_made_for_a_checkpoint_that_does_not_fit(monkeypatch):
    """The largest would need gigabytes before it is refused."""
    cls, made = TRACKERS["ustam-l384"][0], []
    plain = cls.__init__

    def watched(self, config):
        plain(self, config)
        made.append({p.device.type for p in self.parameters()})

    monkeypatch.setattr(cls, "__init__", watched)
    with refused("ustam-l384 does not fit"):
        official.load("ustam-l384", {"odd": torch.ones(1)})
    assert all(devices == {"meta"} for devices in made)


def test_what_is_no_checkpoint_at_all(tmp_path):
    with refused(r"got PosixPath; official\.read\(path\) gives them|got WindowsPath"):
        official.load("siamfc", tmp_path)
    for value, says in (
        ("text", "entry a is a str"),
        (None, "entry a is a NoneType"),
        (np.array(["x"]), "entry a is an array"),
    ):
        with refused(says):
            official.load("siamfc", {"a": value})
    with pytest.raises(TrackkitError, match="there are stay, ncc, siamfc"):
        official.load("siamese", {})


# ---- our own files ----


def test_a_description_that_is_damaged(tmp_path):
    for number, text in enumerate(("{", "[]", "3", "{}", '{"format": 99}')):
        path = tmp_path / f"{number}.safetensors"
        save_file({"a": torch.ones(1)}, path, {"trackkit": text})
        with refused(
            f"{number}.safetensors: (damaged, its description|format 99, this trackkit reads 1)"
        ):
            checkpoints.read(path)
