"""Selection: one kernel launch on NVIDIA GPUs, plain torch elsewhere."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from . import reference

# Longer rows do not fit into the registers of one program.
LONGEST = 16384


def largest(values: Tensor, count: int | Tensor) -> Tensor:
    """bool like ``values`` (.., n): along the last axis the ``count`` largest, -inf last.

    ``count``: one for all rows, or int (..). Among equals the first ones are taken, on CPU with one count any.
    """
    if on_gpu(values.device) and values.dtype == torch.float32 and 0 < values.shape[-1] <= LONGEST:
        from . import triton

        return triton.largest(values, count)
    if isinstance(count, int):
        found = values.topk(min(max(count, 0), values.shape[-1]), -1, sorted=False).indices
        return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, found, True)
    return reference.largest(values, count)


def compact(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Counts int32 (..) of the set entries of a bool mask (.., n), and int32 (.., width) where they are, ascending."""
    if on_gpu(mask.device) and mask.numel():
        from . import triton

        return triton.compact(mask, width)
    return reference.compact(mask, width)


def on_gpu(device: torch.device) -> bool:
    """Whether our kernels serve tensors on ``device``."""
    return device.type == "cuda" and _usable(device)


@functools.cache
def _usable(device: torch.device) -> bool:
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
