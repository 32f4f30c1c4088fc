"""What else is timed on the same tensors: dense kernels by name, and other packages' sparse ones on the same plan."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ...kernels import TilePlan
from ...kernels.dense import DENSE, refusal
from ...kernels.faults import check_device
from ...methods import GNA, Method
from .peers import block_sparse

Call = Callable[[], Tensor]
_TORCH = {"torch-cudnn": SDPBackend.CUDNN_ATTENTION, "torch-flash": SDPBackend.FLASH_ATTENTION}


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, Call], dict[str, str]]:
    """Dense kernels that serve these tensors, by name, and why others do not. Quantised ones end in ``(quantised)``."""
    calls: dict[str, Call] = {}
    why: dict[str, str] = {}
    if q.device.type != "cuda":
        return {"torch": lambda: scaled_dot_product_attention(q, k, v)}, why
    for name, backend in _TORCH.items():
        calls[name] = Forced(backend, q, k, v)
    for name, kernel in DENSE.items():
        if name == "torch":
            continue
        reason = refusal(kernel, q, v)
        if reason is not None:
            why[name] = reason
        else:
            label = name if kernel.exact else f"{name} (quantised)"
            calls[label] = lambda run=kernel.run: run(q, k, v, q.shape[-1] ** -0.5)
    return calls, why


@dataclass(frozen=True)
class Forced:
    """torch's dense attention by one kernel of its own. To choose it costs Python time that no pipeline spends, so a
    clock enters ``context`` once and times ``inside``; a plain call does both."""

    backend: SDPBackend
    q: Tensor
    k: Tensor
    v: Tensor

    def context(self) -> AbstractContextManager:
        return sdpa_kernel(self.backend)

    def inside(self) -> Tensor:
        return scaled_dot_product_attention(self.q, self.k, self.v)

    def __call__(self) -> Tensor:
        with self.context():
            return self.inside()


def sparse(
    method: Method, tiles: TilePlan, grid: tuple[int, int, int], q: Tensor, k: Tensor, v: Tensor, text: int
) -> tuple[dict[str, Call], dict[str, str]]:
    """Other packages' kernels that can run this very plan, by name, and why others do not."""
    calls, why = block_sparse(tiles, q, k, v)
    if importlib.util.find_spec("natten") is None:
        why["natten"] = "not installed"
    elif type(method) is not GNA or text or q.device.type != "cuda":
        why["natten"] = "it serves windows over a grid without text"
    else:
        calls["natten"] = _natten(method, grid, q, k, v)
    return calls, why


def _natten(method: GNA, grid: tuple[int, int, int], q: Tensor, k: Tensor, v: Tensor) -> Call:
    windows = method.windows(grid)
    size, stride = (tuple(getattr(w, name) for w in windows) for name in ("size", "stride"))
    parts = [x.transpose(1, 2).reshape(x.shape[0], *grid, x.shape[1], x.shape[3]).contiguous() for x in (q, k, v)]

    def run() -> Tensor:
        import natten

        out = natten.na3d(*parts, kernel_size=size, stride=stride)
        return out.flatten(1, 3).transpose(1, 2)

    return run


def usable(calls: dict[str, Call], why: dict[str, str]) -> dict[str, Tensor]:
    """What each gives; those that raise leave ``calls`` for ``why``. Raises ``DeviceLost`` for a broken context."""
    outs = {}
    for name, call in list(calls.items()):
        try:
            outs[name] = call()
            if outs[name].is_cuda:
                torch.cuda.synchronize()  # a kernel may fail after its call has returned
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            check_device(error)
            outs.pop(name, None)
            del calls[name]
            why[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return outs
