"""Buffers that tell when a kernel writes beside them, or reads what nobody wrote."""

import contextlib
import math

import torch

BAND = 4096


@contextlib.contextmanager
def banded(device):
    """Every ``empty`` on ``device`` lies between bands of ones and starts as ones, which are NaN in every float type.

    Gives the list of buffers; on leaving, a band that changed raises.
    """
    made = []
    stock = torch.empty, torch.empty_like, torch.Tensor.new_empty
    on = torch.device(device).type

    def buffer(shape, strides, dtype):
        room = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if math.prod(shape) else 0
        flat = stock[0](room * dtype.itemsize + 2 * BAND, dtype=torch.uint8, device=device).fill_(255)
        made.append(flat)
        return flat[BAND:-BAND].view(dtype).as_strided(shape, strides)

    def like(x, *, dtype=None, device=None, **more):
        if x.device.type != on or device is not None:
            return stock[1](x, dtype=dtype, device=device, **more)
        bare = stock[1](x, dtype=dtype, device="meta", **more)
        return buffer(bare.shape, bare.stride(), bare.dtype)

    def new_empty(x, *shape, dtype=None, device=None, **more):
        if x.device.type != on or device is not None or more:
            return stock[2](x, *shape, dtype=dtype, device=device, **more)
        bare = stock[2](x, *shape, dtype=dtype, device="meta")
        return buffer(bare.shape, bare.stride(), bare.dtype)

    def empty(*shape, dtype=None, device=None, **more):
        if device is None or torch.device(device).type != on or more:
            return stock[0](*shape, dtype=dtype, device=device, **more)
        bare = stock[0](*shape, dtype=dtype, device="meta")
        return buffer(bare.shape, bare.stride(), bare.dtype)

    torch.empty, torch.empty_like, torch.Tensor.new_empty = empty, like, new_empty
    try:
        yield made
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = stock
    for flat in made:
        for band in (flat[:BAND], flat[-BAND:]):
            if not bool((band == 255).all()):
                raise AssertionError(f"something wrote beside a buffer of {flat.numel() - 2 * BAND} bytes")
