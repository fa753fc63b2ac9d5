"""A GPU that is not there: tensors that say they lie on `cuda:0` and keep their numbers on the CPU.

    with PretendGPU() as gpu:
        tracker = gpu.moved(tracker)
        ...
        gpu.waits, gpu.uploads  # Counters of the functions of trackkit in which they happened

A tensor of the CPU that meets one of the GPU raises `Crossed`, as on a real one. Every copy to the
host, every operation whose result the host must know (a number, the size of what a mask leaves) and
every copy from the host is counted. With `numbers=False` there are shapes only, so that the largest
networks run in a second; the host then reads numbers that are made up.

What it cannot prove: that CUDA has the kernels, forward and backward, and what they give (autograd
is off here); that copies and kernels overlap on real streams; any timing.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import trackkit
from trackkit import crops
from trackkit.devices import constant

aten = torch.ops.aten
CUDA, ROOT = torch.device("cuda", 0), str(Path(trackkit.__file__).parent)
# the host must know what comes out
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.repeat_interleave,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class Crossed(RuntimeError):
    """Tensors of the CPU and of the GPU in one operation."""


class OnGPU(Tensor):
    """`held`, on the CPU or on the meta device, as a tensor of the GPU."""

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        like = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        self = Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, device=CUDA, requires_grad=False, **like
        )
        self.held = held
        return self

    def __repr__(self) -> str:
        return f"OnGPU({self.held.dtype}, {tuple(self.held.shape)})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, given=(), named=None):
        raise Crossed(f"{operation} outside of PretendGPU")


def each(change, given):
    """`given` with `change` applied to what its lists and tuples hold; torch's pytree is slower."""
    if isinstance(given, (list, tuple)):
        return type(given)([each(change, x) for x in given])
    return change(given)


def site() -> str:
    """The function of trackkit that is at work, as "file.py:function"; "" for a test's own."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(ROOT) and not code.co_name.startswith("<"):
            return f"{Path(code.co_filename).name}:{code.co_name}"
        frame = frame.f_back
    return ""


class PretendGPU(TorchDispatchMode):
    def __init__(self, numbers: bool = True):
        super().__init__()
        self.place = torch.device("cpu" if numbers else "meta")
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    def __enter__(self) -> PretendGPU:
        self.undo = ExitStack()
        torch._C._ensureCUDADeviceGuardSet()
        self.undo.enter_context(mock.patch("torch.cuda._lazy_init", lambda: None))
        self.undo.enter_context(torch.backends.cudnn.flags(enabled=False))
        self.undo.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        self.undo.callback(forget)
        forget()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.undo.close()

    def autocast(self) -> ExitStack:
        """`torch.autocast("cuda", torch.bfloat16)`, which does nothing where there is no GPU."""
        undo = ExitStack()
        undo.callback(torch.clear_autocast_cache)
        undo.callback(torch.set_autocast_dtype, "cuda", torch.get_autocast_dtype("cuda"))
        undo.callback(torch.set_autocast_enabled, "cuda", False)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        return undo

    def forget(self) -> None:
        self.waits.clear()
        self.uploads.clear()

    def hold(self, tensor: Tensor) -> OnGPU:
        """A copy on the GPU, not counted."""
        return OnGPU(tensor.detach().to(self.place, copy=True))

    def moved(self, module: nn.Module) -> nn.Module:
        """Its parameters and buffers on the GPU, as by `module.to("cuda")`."""
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    part._parameters[name] = nn.Parameter(self.hold(value), requires_grad=False)
            for name, value in part._buffers.items():
                if value is not None:
                    part._buffers[name] = self.hold(value)
        return module

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        named, kind = dict(named or {}), operation.overloadpacket
        tensors = []
        each(
            lambda x: tensors.append(x) if isinstance(x, Tensor) else None,
            [*given, *named.values()],
        )
        ours = [x for x in tensors if isinstance(x, OnGPU)]
        if kind is aten._to_copy:
            return self._copied(operation, given[0], named)
        if kind is aten.copy_ and len({isinstance(x, OnGPU) for x in given[:2]}) == 2:
            (self.uploads if isinstance(given[0], OnGPU) else self.waits)[site()] += 1
            to, source = (x.held if isinstance(x, OnGPU) else x for x in given[:2])
            meets = source.device == to.device or to.device.type == "meta"
            to.copy_(source if meets else made_up(source))
            return given[0]
        device = named.get("device")
        here = bool(ours) or (device is not None and torch.device(device).type == "cuda")
        if not here:
            return operation(*given, **named)
        if kind is aten._fused_sdp_choice:
            return int(torch.nn.attention.SDPBackend.MATH.value)  # the one made of others
        self._checked(operation, kind, given, tensors)
        if kind in WAITING:
            self.waits[site()] += 1
            if kind is aten._local_scalar_dense and self.place.type == "meta":
                return made_up(given[0].held).item()
        if device is not None:
            named["device"] = self.place
        named = {key: each(self._held, value) for key, value in named.items()}
        result = operation(*each(self._held, given), **named)
        known = {id(x.held): x for x in ours}  # what an operation in place gives back

        def wrapped(x):
            if not isinstance(x, Tensor):
                return x
            return known[id(x)] if id(x) in known else OnGPU(x)

        return each(wrapped, result)

    def _held(self, x):
        if isinstance(x, OnGPU):
            return x.held
        if isinstance(x, Tensor) and self.place.type == "meta":
            return x.to(self.place)
        return self.place if isinstance(x, torch.device) and x.type == "cuda" else x

    def _checked(self, operation, kind, given, tensors: list[Tensor]) -> None:
        """Crossed, or an index that has to be copied or waited for is counted."""
        index = [x for x in given[1] if isinstance(x, Tensor)] if kind in INDEXING else []
        if any(x.dtype in (torch.bool, torch.uint8) for x in index):
            self.waits[site()] += 1
        for tensor in tensors:
            if isinstance(tensor, OnGPU) or not tensor.ndim:  # one number travels with the call
                continue
            if isinstance(given[0], OnGPU) and any(tensor is x for x in index):
                self.uploads[site()] += 1
            else:
                raise Crossed(f"{operation}: one of {tuple(tensor.shape)} is on the CPU, {site()}")

    def _copied(self, operation, source: Tensor, named: dict) -> Tensor:
        """`source` in another type or place."""
        ours, device = isinstance(source, OnGPU), named.get("device")
        goes = ours if device is None else torch.device(device).type == "cuda"
        if not ours and not goes:
            return operation(source, **named)
        held = source.held if ours else source
        if not goes:
            self.waits[site()] += 1
            return operation(made_up(held) if self.place.type == "meta" else held, **named)
        if not ours:
            self.uploads[site()] += 1
        return OnGPU(operation(held, **{**named, "device": self.place}))


def made_up(like: Tensor) -> Tensor:
    """Numbers (B, ...) for the host: rows rise from .3 to .7, so that corners are in order."""
    row = torch.linspace(0.3, 0.7, like.shape[-1] if like.ndim else 1)
    return (row if like.ndim else row[0]).expand(like.shape).to(like.dtype)


def forget() -> None:
    """What trackkit keeps of a device is not for the next one."""
    for kept in (constant, crops._plan):
        kept.cache_clear()
