"""The authors' checkpoints: what is read, what is refused without running it, and what an error
says.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import golden
from safetensors.torch import save_file
from torch import Tensor

from trackkit import checkpoints, cli, official, pickles
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
        "half": np.float16(0.5), "single": np.float32(0.25), "double": np.float64(0.1), "big": np.dtype(">f8").type(2.5), "yes": np.bool_(True),
        "int": np.int64(-3), "byte": np.uint8(200), "plain": 4, "float": 0.5,
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


# ---- what is never executed ----


class Trap:
    def __init__(self, function, *args):
        self.what = function, args

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize("layout", [ZIP, OLD], ids=["zip", "old"])
@pytest.mark.parametrize("within", ["net", "model", "state_dict"])
def test_a_file_that_would_run_code_is_read_and_runs_none(tmp_path, within, layout):
    proof, file = tmp_path / "executed", tmp_path / "a.pth"
    weight = torch.rand(3)
    trap = Trap(os.system, f"touch {proof}")
    torch.save({within: {"a.weight": weight, "b": trap}, "settings": trap}, file, **layout)
    found = official.read(file)
    assert not proof.exists()
    assert found.keys() == {"a.weight"} and torch.equal(found["a.weight"], weight)
    assert repr(pickles.read(file)["settings"]) == f"<{os.system.__module__}.system, not loaded>"


@pytest.mark.parametrize("function", [eval, exec, getattr, np.load, torch.load, np.zeros, Path])
def test_no_function_is_called(tmp_path, function, monkeypatch):
    torch.save({"net": {"a.weight": torch.ones(1)}, "x": Trap(function, "1")}, tmp_path / "a.pth")
    assert official.read(tmp_path / "a.pth").keys() == {"a.weight"}
    assert isinstance(pickles.read(tmp_path / "a.pth")["x"], pickles.StandIn)


def test_nothing_is_imported(tmp_path, monkeypatch):
    """A module that would say so when it is imported; Python's own unpickler does import it."""
    (tmp_path / "tell_tale.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    archive_of(tmp_path / "a.pth", b"ctell_tale\nThing\n)R.")
    with pytest.raises(SystemExit, match="imported"):
        pickle.loads(b"ctell_tale\nThing\n)R.")
    assert pickles.read(tmp_path / "a.pth").name == "tell_tale.Thing"


def archive_of(path: Path, content: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """A file in the layout of torch.save, with a pickle of our own in it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/data.pkl", content)
        for key, data in (storages or {}).items():
            archive.writestr(f"a/data/{key}", data)
    return path


def tensor_pickle(count: int, shape: tuple, stride: tuple, offset: int = 0) -> bytes:
    """The pickle of {"a.weight": a tensor in storage 0}, as torch.save writes it."""
    kind = b"ctorch\nFloatStorage\n"
    storage = b"(" + pickle_of("storage") + kind + b"".join(map(pickle_of, ("0", "cpu", count)))
    numbers = b"".join(map(pickle_of, (offset, shape, stride, False, None)))
    return (
        b"\x80\x02}" + pickle_of("a.weight") + b"ctorch._utils\n_rebuild_tensor_v2\n"
        b"(" + storage + b"tQ" + numbers + b"tRs."
    )


def pickle_of(value) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def test_claims_that_the_file_does_not_bear_out_are_damage(tmp_path):
    four = {"0": np.arange(4, dtype="<f4").tobytes()}
    fine = archive_of(tmp_path / "a.pth", tensor_pickle(4, (2, 2), (2, 1)), four)
    assert official.read(fine)["a.weight"].tolist() == [[0, 1], [2, 3]]
    for claim, storages in (
        (tensor_pickle(2**40, (2, 2), (2, 1)), four),  # of the storage's size
        (tensor_pickle(4, (2**20, 2**20), (0, 0)), four),  # terabytes, if somebody copies it
        (tensor_pickle(4, (2, 3), (3, 1)), four),  # beyond the storage
        (tensor_pickle(4, (2, 2), (2, 1), offset=1), four),
        (tensor_pickle(4, (2, 2), (-2, 1)), four),
        (tensor_pickle(4, (2, 2), (1,)), four),
        (tensor_pickle(4, (2, 2), (2, 1)), {}),  # no storage at all
    ):
        with refused("damaged or not a torch checkpoint"):
            official.read(archive_of(tmp_path / "b.pth", claim, storages))


def test_entries_that_share_bytes_or_are_compressed_are_damage(tmp_path):
    """A few kilobytes that unpack to gigabytes."""
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", tensor_pickle(2**20, (2**20,), (1,)))
        archive.writestr("a/data/0", bytes(2**22))
    with refused("compressed or overlapping"):
        official.read(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "content",
    [
        b"]q\x00h\x00a.",  # a list that holds itself
        b"}q\x00U\x01ah\x00s.",  # a dictionary that does
        b"(((((" * 50_000 + b"t" * 250_000 + b".",  # a quarter of a million tuples in each other
        b"]q\x00" + b"(h\x00h\x00h\x00h\x00tq\x00" * 64 + b".",  # 4 ** 64 leaves
        b"cos\nsystem\n" + b")R" * 20_000 + b".",  # what a call would give, called, and so on
        b"\x80\x02\x82\x01.",  # a class by its number in the program's registry
        b"\x80\x05\x97.",  # a buffer from outside the file
        b"(ios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93)\x81}\x92.",
        b"cbuiltins\nset\n(]]ltR.",
        b"ccollections\nOrderedDict\n(]](I1\nI2\nI3\nlatR.",
        b"r\xff\xff\xff\x7f.",  # the memo's two thousand millionth place
        b"\x8b\xff\xff\xff\x7f.",  # a number of two thousand million bytes
        b"0.",
        b"t.",
        b"",
    ],
)
def test_hostile_programs_end_in_an_error(tmp_path, content):
    with refused("damaged or not a torch checkpoint|no tensors in it|a whole object"):
        official.read(archive_of(tmp_path / "a.pth", content))


def test_arrays_of_objects_are_no_numbers(tmp_path):
    """NumPy's dtype and scalar by name, but for something that holds more than a number."""
    for value in (np.str_("a"), np.void(b"abcd"), np.datetime64(3, "s"), np.complex64(1)):
        torch.save({"net": {"a.weight": torch.ones(1), "a.x": value}}, tmp_path / "a.pth")
        assert official.read(tmp_path / "a.pth").keys() == {"a.weight"}


# ---- what the authors' training loops write ----


def layout_of_stark(weights: dict[str, Tensor]) -> dict:
    """`lib/train/trainers/base_trainer.py` of STARK, which OSTrack, SBT, ProContEXT and MixFormer
    have taken over.
    """
    return {
        "epoch": 50,
        "actor_type": "STARKSTActor",
        "net_type": "STARKST",
        "net": weights,
        "net_info": Settings(),
        "constructor": Settings(),
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.rand(4)}}, "param_groups": []},
        "stats": OrderedDict(train=OrderedDict({"Loss/total": Settings()}), val=None),
        "settings": Settings(),
    }


@pytest.mark.parametrize("layout", [ZIP, OLD], ids=["zip", "old"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_beside_the_weights_are_left_alone(tmp_path, layout, protocol):
    weights = entries()
    torch.save(layout_of_stark(weights), tmp_path / "a.pth.tar", pickle_protocol=protocol, **layout)
    found = official.read(tmp_path / "a.pth.tar")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_optimizer_and_module_wrappers_of_stmtrack(tmp_path):
    weights = {f"module.{key}": value for key, value in entries().items()}
    content = {"epoch": 19, "model_state_dict": weights, "optimizer_state_dict": {"x": Settings()}}
    torch.save(content, tmp_path / "epoch-19.pkl")
    assert official.load("siamfc-tiny", official.read(tmp_path / "epoch-19.pkl"))


def test_parameters_views_and_shared_storages(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    content = {
        "a.parameter": torch.nn.Parameter(whole),
        "a.transposed": whole.t(),
        "a.part": whole[1:3, 2:4],
        "a.empty": torch.empty(0, 3),
        "a.scalar": torch.tensor(3),
        "a.half": torch.rand(3).half(),
        "a.yes": torch.tensor([True, False]),
    }
    torch.save(content, tmp_path / "a.pth")
    found = official.read(tmp_path / "a.pth")
    for key, value in content.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value.detach()), key


def test_a_whole_network(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    with refused(r"a whole object, torch.nn.modules.linear.Linear.*save its state_dict\(\)"):
        official.read(tmp_path / "a.pth")


def test_frozen_norms_without_a_count_and_what_is_left_out(tmp_path, capsys):
    """As MixViT's published checkpoints are: their norms are frozen and count no batches."""
    weights = entries("siamfc-tiny")
    counts = [key for key in weights if key.endswith("num_batches_tracked")]
    tracker = official.load("siamfc-tiny", {k: v for k, v in weights.items() if k not in counts})
    assert counts and all(tracker.state_dict()[key] == 0 for key in counts)
    with refused("missing: backbone.conv1.1.running_mean"):
        official.load("siamfc-tiny", {k: v for k, v in weights.items() if "conv1.1.run" not in k})
    mixvit = entries("mixvit-tiny") if "mixvit-tiny" in TRACKERS else entries("ustam-tiny")
    extra = {"score_branch.proj.weight": torch.rand(2, 2), "score_branch.proj.bias": torch.rand(2)}
    name = "mixvit-tiny" if "mixvit-tiny" in TRACKERS else "ustam-tiny"
    assert official.left_out(name, {**mixvit, **extra}) == ["score_branch.*: 2"]
    torch.save({"net": {**mixvit, **extra}}, tmp_path / "a.pth.tar")
    given = ["import", str(tmp_path / "a.pth.tar"), "--tracker", name, "--out"]
    assert cli.main([*given, str(tmp_path / "out.safetensors")]) == 0
    assert "left out, as the tracker does not use it: score_branch.*: 2" in capsys.readouterr().out


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
        ("stark_s50", "stark-st101", "stark-s50"), ("stark_s50", "mixvit-b288", "stark-s50"), ("stark_st50", "siamfc", "stark-st50"),
        ("siamfc", "stark-tiny", "siamfc"), ("siamfc", "siamfc-tiny", "siamfc"), ("sbt_base", "sbt-small", "sbt-base"), ("sbt_light", "ustam-tiny", "sbt-light"),
        ("stmtrack", "dastm", "stmtrack"), ("ostrack_256_ce", "ostrack-384", "ostrack-256 and "
        "procontext-256"),
        ("ostrack_256_ce", "mixvit-b288", "ostrack-256 and "
        "procontext-256"), ("mixvit_b_288", "ustam-b288", "mixvit-b288"),
        ("mixvit_b_288", "procontext-256", "mixvit-b288"), ("stark_st101", "stay", "stark-st101"),
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
    official._shapes("ustam-l384")
    monkeypatch.setattr(official, "create", None)
    with refused("ustam-l384 does not fit"):
        official.load("ustam-l384", {"odd": torch.ones(1)})


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
            f"{number}.safetensors: (damaged, its description|format 99, this trackkit reads 2)"
        ):
            checkpoints.read(path)
