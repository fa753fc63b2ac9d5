"""Files of torch.save from elsewhere, which are pickles: their tensors, numbers and plain
containers are read, and nothing in them is executed.

A pickle is a program for a small stack machine, two of whose instructions import and call whatever
the file names. Here `pickletools`, which executes nothing, walks through the program, and this
module's own machine knows what a few names mean: tensors, NumPy's numbers, dictionaries. Every
other name, such as a training loop's settings, becomes a `StandIn`, which can do nothing.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from trackkit.errors import CheckpointError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save before 1.6
NUMBERS = frozenset({"b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"})
DTYPES = {
    **{f"torch.{name}Storage": dtype for name, dtype in {
        "Float": torch.float32, "Double": torch.float64, "Half": torch.float16,
        "BFloat16": torch.bfloat16, "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16,
        "Int": torch.int32, "Long": torch.int64, "Bool": torch.bool,
    }.items()},
    **{str(dtype): dtype for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8,
        torch.int16, torch.int32, torch.int64, torch.bool,
    )},
}  # fmt: skip


class StandIn:
    """What a file calls by a name that means nothing here; the object behind it was not made."""

    def __init__(self, name: str):
        self.name = re.sub(
            r"[^\w.]", "?", name[:200]
        )  # it may hold anything, and end on a terminal

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"


@dataclass(frozen=True)
class _Global:
    """A class or function that a file names. It is never looked up."""

    name: str


@dataclass
class _NumberType:
    """A numpy.dtype that a file describes, of numbers only."""

    code: str
    order: str = "="


@dataclass(frozen=True)
class _Storage:
    """The numbers that tensors lie in, and what they are ("" if the tensors say it)."""

    data: bytearray
    dtype: str


class _Damaged(Exception):
    """The file is not what torch.save writes."""


def read(path: str | Path) -> Any:
    """What a file of torch.save holds: tensors on the CPU, numbers (NumPy's too), strings, and
    plain containers of these; a `StandIn` for everything else.

    Raises CheckpointError if the file is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                return _read_archive(file, path.stat().st_size)
            file.seek(0)
            return _read_legacy(file, path.stat().st_size)
    except Exception as error:  # what damaged bytes lead to cannot be foreseen
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: damaged or not a torch checkpoint as torch.save writes it by default "
            f"({reason}); copy it anew"
        ) from error


def _read_archive(file: BinaryIO, size: int) -> Any:
    """A zip file of a pickle and one entry for each storage, uncompressed."""
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Damaged(f"{len(pickles)} entries data.pkl in the archive")
        folder = pickles[0].removesuffix("data.pkl")
        left = size  # the storages together cannot be larger than the file that holds them

        def entry(name: str) -> bytes:
            nonlocal left
            info = archive.getinfo(folder + name)
            left -= info.file_size
            if info.compress_type != zipfile.ZIP_STORED or left < 0:
                raise _Damaged("compressed or overlapping entries, which torch.save does not write")
            return archive.read(info)

        if folder + "byteorder" in archive.namelist() and entry("byteorder") != b"little":
            raise _Damaged("saved on a big-endian machine")
        return _Machine(lambda key: entry(f"data/{key}")).run(io.BytesIO(entry("data.pkl")))


def _read_legacy(file: BinaryIO, size: int) -> Any:
    """Before torch 1.6: pickles one after the other, a magic number, a version, facts about the
    machine, the content and the storages' keys; then the storages.
    """
    magic = _Machine().run(file)
    if magic != LEGACY_MAGIC:
        raise _Damaged("it begins like no checkpoint")
    _Machine().run(file)
    about = _Machine().run(file)
    if not about.get("little_endian", True):
        raise _Damaged("saved on a big-endian machine")
    start = file.tell()
    kinds: dict[str, int] = {}  # bytes of an element of each storage, known from the content alone
    _Machine(lambda key: b"", kinds).run(file)
    places = {}
    for key in _Machine().run(file):
        count = int.from_bytes(file.read(8), "little", signed=True)
        length = count * kinds.get(str(key), 0)
        places[str(key)] = (file.tell(), length)
        if count < 0 or file.tell() + length > size:
            raise _Damaged("cut short")
        file.seek(length, 1)

    def storage(key: str) -> bytes:
        offset, length = places[key]
        here = file.tell()
        file.seek(offset)
        data = file.read(length)
        file.seek(here)
        return data

    file.seek(start)
    return _Machine(storage).run(file)


class _Machine:
    """Pickle's stack machine, which imports nothing and calls nothing.

    `storage` gives the bytes of a storage by its key. With `sizes`, a first look that makes no
    tensors notes there how many bytes an element of each storage has.
    """

    def __init__(
        self,
        storage: Callable[[str], bytes] | None = None,
        sizes: dict[str, int] | None = None,
    ):
        self.storage, self.sizes = storage, sizes
        self.storages: dict[str, _Storage] = {}
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: BinaryIO) -> Any:
        """The object of the pickle that begins here."""
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            step = getattr(self, f"_{name.lower()}", None)
            if step is not None:
                step(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif argument is not None and opcode.stack_after and not opcode.stack_before:
                self.stack.append(argument)  # a number or a string
            elif name not in ("PROTO", "FRAME"):
                raise _Damaged(f"pickle instruction {name}, which torch.save does not write")
        raise _Damaged("cut short")

    # ---- the stack ----

    def _mark(self, _) -> None:
        self.marks.append(len(self.stack))

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _pop(self, _) -> None:
        self.stack.pop()

    def _pop_mark(self, _) -> None:
        self._since_mark()

    def _dup(self, _) -> None:
        self.stack.append(self.stack[-1])

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _memoize(self, _) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _binput = _long_binput = _put
    _binget = _long_binget = _get

    # ---- containers ----

    def _tuple(self, _) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _tuple1(self, _) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _tuple2(self, _) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def _tuple3(self, _) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def _list(self, _) -> None:
        self.stack.append(self._since_mark())

    def _dict(self, _) -> None:
        items = self._since_mark()
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def _frozenset(self, _) -> None:
        self.stack.append(frozenset(self._since_mark()))

    def _appends(self, _) -> None:
        items = self._since_mark()
        self._extend(items)

    def _append(self, _) -> None:
        self._extend([self.stack.pop()])

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _additems(self, _) -> None:
        items = self._since_mark()
        if isinstance(self.stack[-1], set):
            self.stack[-1].update(items)

    def _setitem(self, _) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _setitems(self, _) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    # ---- what would be imported and called ----

    def _global(self, name: str) -> None:
        self.stack.append(_Global(name.replace(" ", ".")))

    def _stack_global(self, _) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_Global(f"{module}.{name}"))

    def _reduce(self, _) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self._made(function, arguments))

    def _newobj(self, _) -> None:
        self._reduce(None)

    def _newobj_ex(self, _) -> None:
        self.stack.pop()  # arguments by name
        self._reduce(None)

    def _inst(self, name: str) -> None:
        self._since_mark()
        self.stack.append(StandIn(name.replace(" ", ".")))

    def _obj(self, _) -> None:
        function, *arguments = self._since_mark()
        self.stack.append(self._made(function, tuple(arguments)))

    def _ext1(self, code: int) -> None:
        self.stack.append(StandIn(f"extension {code}"))

    _ext2 = _ext4 = _ext1

    def _build(self, _) -> None:
        """State for the object below it: that of a number type says in which order bytes are; no
        other object here has one.
        """
        state = self.stack.pop()
        if isinstance(self.stack[-1], _NumberType):
            self.stack[-1].order = {"<": "<", ">": ">"}.get(state[1], "=")

    def _persid(self, text: str) -> None:
        raise _Damaged(f"a reference {text!r}, which torch.save does not write")

    def _binpersid(self, _) -> None:
        what, kind, key, _, count, *view = self.stack.pop()
        if what != "storage" or any(view) or self.storage is None:
            raise _Damaged("a reference that is no storage, or a view of one")
        dtype = DTYPES.get(kind.name)
        if dtype is None and kind.name != "torch.storage.UntypedStorage":
            raise _Damaged(f"a storage of {kind.name}")
        size = dtype.itemsize if dtype else 1
        if self.sizes is not None:
            self.sizes[str(key)] = size
        elif key not in self.storages:
            data = self.storage(str(key))
            if len(data) != count * size:
                raise _Damaged(f"storage {key} has {len(data)} bytes instead of {count * size}")
            self.storages[key] = _Storage(bytearray(data), kind.name if dtype else "")
        self.stack.append(self.storages.get(key))

    def _made(self, function: Any, arguments: Any) -> Any:
        """What a call would give, if it is one of those that are known."""
        known = isinstance(function, (_Global, StandIn))
        name = function.name if known else type(function).__name__
        name = name.replace("numpy._core.", "numpy.core.")
        if name in ("collections.OrderedDict", "collections.defaultdict", "builtins.dict"):
            pairs = arguments[0] if arguments and isinstance(arguments[0], (list, dict)) else ()
            return dict(pairs)
        if name in ("builtins.set", "__builtin__.set"):
            return set(*arguments)
        if name == "torch.Size":
            return tuple(*arguments)
        if name == "_codecs.encode" and arguments[1:] == ("latin1",):
            return arguments[0].encode("latin1")  # how older pickles write bytes
        if name == "numpy.dtype" and arguments[0] in NUMBERS:
            return _NumberType(arguments[0])
        if name == "numpy.core.multiarray.scalar" and isinstance(arguments[0], _NumberType):
            kind, data = arguments
            return np.frombuffer(data, kind.order + kind.code).reshape(())[()]
        if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return self._tensor(*arguments[:4])
        if name == "torch._utils._rebuild_tensor_v3":
            return self._tensor(*arguments[:4], dtype=arguments[6].name)
        if name.startswith("torch._utils._rebuild_parameter"):
            return arguments[0]
        if name == "torch._tensor._rebuild_from_type_v2":  # of a subclass, or with attributes
            return self._made(arguments[0], arguments[2])
        return StandIn(name)

    def _tensor(
        self, storage: _Storage, offset: int, shape: tuple, stride: tuple, dtype: str = ""
    ) -> Tensor | None:
        if self.sizes is not None:
            return None
        kind = DTYPES[dtype or storage.dtype]
        held, numbers = len(storage.data) // kind.itemsize, (offset, *shape, *stride)
        if not all(type(n) is int and 0 <= n < 2**48 for n in numbers) or len(shape) != len(stride):
            raise _Damaged("a tensor without a proper shape")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        count = math.prod(shape)
        if count and (last >= held or count > held):
            raise _Damaged(f"a tensor of {count} numbers in a storage of {held}")
        flat = torch.frombuffer(storage.data, dtype=kind) if held else torch.empty(0, dtype=kind)
        return flat.as_strided(shape, stride, offset) if count else flat.new_empty(shape)


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
