"""A CUDA device that a CPU plays: tensors that say they are on it, and a log of what a real one would have waited for.

Data lies on the CPU and Triton kernels run in Triton's interpreter, so a process that uses this has
``TRITON_INTERPRET=1`` set. What is logged: ``sync`` (the host needs a value from the device), ``copy`` (to the device,
from memory that is not pinned: it waits, and a CUDA graph cannot hold it), ``mixed`` (an operation on tensors of both
devices, which a real one refuses).
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda:0")
# The sizes of their results, or the results themselves, depend on values.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "allclose",
}  # fmt: skip
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Methods that C++ serves by asking for the device's own guard before anything can take over: name -> what is logged.
BY_HAND = {
    "item": "sync", "tolist": "sync", "numpy": "sync", "nonzero": "sync", "__bool__": "sync", "__int__": "sync",
    "__float__": "sync", "__index__": "sync", "__array__": "sync", "__invert__": None, "__getitem__": None,
    "__setitem__": None, "data_ptr": None, "contiguous": None, "copy_": None, "__repr__": None,
}  # fmt: skip


class Simulated(torch.Tensor):
    """A tensor that says it is on ``DEVICE``. ``held``: the one on the CPU that has its data."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Simulated:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _operation(func, args, kwargs or {})


class Log(TorchFunctionMode):
    """While entered, factories and copies know ``DEVICE``; while :meth:`recording`, ``events`` counts what waits.

    ``events``: (kind, operation, where in our code) -> times. ``launches``: Triton kernels run since it was entered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: Counter[tuple[str, str, str]] = Counter()
        self.launches = 0
        self._on = False

    def recording(self) -> contextlib.AbstractContextManager:
        return mock.patch.object(self, "_on", True)

    def note(self, kind: str | None, name: str) -> None:
        if self._on and kind:
            self.events[kind, name, _where()] += 1

    def indexed(self, index: Any, name: str, value: Any) -> None:
        """An index by ``index``. ``value``: what is assigned; a single one needs no list of the places."""
        if isinstance(index, list) or _on_host(index):
            self.note("copy", name)
        elif isinstance(index, Tensor) and (index.dtype in (torch.bool, torch.uint8) or not index.ndim):
            single = value is not None and not (isinstance(value, Tensor) and value.numel() > 1)
            self.note(None if single else "sync", name)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs, first = func.__name__, kwargs or {}, args[0] if args else None
        if name in ("to", "cpu", "cuda") and isinstance(first, Tensor):
            return self._moved(func, *args, **kwargs)
        if name in BY_HAND and isinstance(first, Simulated):
            return self._by_hand(func, *args, **kwargs)
        if name in ("tensor", "as_tensor", "asarray") and _names(kwargs):
            self.note(None if isinstance(first, Simulated) else "copy", name)
            return _wrapped(func(*_held(args), **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)

    def _by_hand(self, func: Callable, x: Simulated, *args: Any, **kwargs: Any) -> Any:
        name, given = func.__name__, args[-1] if args else None
        self.note(BY_HAND[name], name)
        if name in ("__getitem__", "__setitem__"):
            for index in args[0] if isinstance(args[0], tuple) else args[:1]:
                self.indexed(index, name, given if name == "__setitem__" else None)
        if name in ("__setitem__", "copy_") and _on_host(given) and given.ndim:
            self.note("copy", name)
        if name == "contiguous" and x.is_contiguous():
            return x
        out = _wrapped(func(x.held, *_held(args), **_held(kwargs)))
        return x if name == "copy_" else out

    def _moved(self, func: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``to`` and its kin. A copy to the host waits, and so does one from memory that is not pinned."""
        device, dtype = x.device if func.__name__ == "to" else torch.device(func.__name__), x.dtype
        for given in (*args, *kwargs.values()):
            if isinstance(given, (str, torch.device, Tensor)):
                device = given.device if isinstance(given, Tensor) else torch.device(given)
            if isinstance(given, (torch.dtype, Tensor)):
                dtype = given.dtype if isinstance(given, Tensor) else given
        if device.type == x.device.type:
            return x if dtype == x.dtype else torch.ops.aten._to_copy.default(x, dtype=dtype)
        self.note("copy" if device.type == "cuda" else "sync", func.__name__)
        held = _held(x).detach().to(dtype).clone()
        return Simulated(held) if device.type == "cuda" else held


class _Operations(TorchDispatchMode):
    """What names the device without a tensor on it: factories, also those inside other operations."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = _names(kwargs or {}) or any(isinstance(x, Simulated) for x in tree_leaves((args, kwargs)))
        return _operation(func, args, kwargs or {}) if known else func(*args, **kwargs or {})


LOG = Log()


@contextlib.contextmanager
def simulated() -> Iterator[Log]:
    """The device, as new as an H100, with Triton's kernels in its interpreter."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launched(self, *args, **kwargs):
        LOG.launches += 1
        with torch._C.DisableTorchFunction():
            return launch(self, *_held(args), **_held(kwargs))

    chip = SimpleNamespace(multi_processor_count=132, total_memory=80 * 2**30, name="NVIDIA H100")
    played = mock.patch.multiple(
        torch.cuda, _lazy_init=lambda: None, device=contextlib.nullcontext, device_of=contextlib.nullcontext,
        get_device_capability=lambda device=None: (9, 0), get_device_name=lambda device=None: chip.name,
        get_device_properties=lambda device=None: chip,
    )  # fmt: skip
    LOG.__init__()
    with played, mock.patch.object(GridExecutor, "__call__", launched), LOG, _Operations():
        yield LOG


def _operation(func: Any, args: tuple, kwargs: dict) -> Any:
    """One operation of torch, below its Python methods: on the CPU, its results on ``DEVICE``."""
    name = func.__name__.split(".")[0]
    host = [x for x in tree_leaves((args, kwargs)) if _on_host(x)]
    if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        LOG.note("sync", name)
    if name in INDEXED:
        for index in args[1]:
            LOG.indexed(index, name, None if name == "index" else args[2])
    elif name == "copy_" and host:
        LOG.note("copy" if isinstance(args[0], Simulated) else "sync", name)
    elif any(x.ndim for x in host):
        LOG.note("mixed", name)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": "cpu"}
    out = func(*_held(args), **_held(kwargs))
    if func._schema.is_mutable:
        # The same tensor comes back, not another that says it holds the same.
        return args[0] if "out" not in kwargs else kwargs["out"]
    return _wrapped(out)


def _held(x: Any) -> Any:
    if type(x).__name__ == "TensorDescriptor":
        return type(x)(_held(x.base), x.shape, x.strides, x.block_shape)
    return tree_map(_held, x) if type(x) in (tuple, list, dict) else x.held if isinstance(x, Simulated) else x


def _wrapped(x: Any) -> Any:
    return tree_map(lambda one: Simulated(one) if type(one) is Tensor else one, x)


def _names(kwargs: dict) -> bool:
    return torch.device(kwargs.get("device") or "cpu").type == "cuda"


def _on_host(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, Simulated)


def _where() -> str:
    frames = [f for f in traceback.extract_stack() if "dit_accel" in f.filename or "/kernels/" in f.filename]
    return " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(frames[-3:]))
