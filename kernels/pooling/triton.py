"""Statistics of blocks as Triton kernels: each token is read once, and a block's sums stay in registers.

Launched by ``kernels.pooling`` for tensors on an NVIDIA GPU. Import it only where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens per step; fewer where both factors of a product, in float32, have to lie in shared memory.
STEP = 64
STEP_MOMENT = 32
# A moment of more channels does not fit into the registers of one program.
LARGEST_DIM = 128
# Programs per head that share the blocks of a moment, which needs one matrix per program.
SHARES = 8


def block_means(
    x: Tensor, bounds: Tensor, *, live: Tensor | None = None, order: Tensor | None = None, spreads: bool = False,
    placed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """As ``blocks.block_spreads``: means, mean absolute deviations (or None) and counts."""
    b, h, n, d = x.shape
    blocks = len(bounds) - 1
    means = torch.empty((b, h, blocks, d), dtype=torch.float32, device=x.device)
    spread = torch.empty_like(means) if spreads else None
    count, table = _count(x, blocks, live, order), _table(bounds, x.device, placed)
    order, live, x = _contiguous(order), _bytes(live), _rows(x)
    with torch.cuda.device_of(x):
        _means[(blocks, b * h)](
            x, x.stride()[:3], means, spread, count, _spread(count), *table, order,
            _head_stride(order), live, h, n, d, triton.next_power_of_2(max(d, 16)), STEP,
        )  # fmt: skip
    return means, spread, count


def block_statistics(
    k: Tensor, v: Tensor, bounds: Tensor, *, live: Tensor | None = None, order: Tensor | None = None,
    norms: bool = False, placed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """As ``blocks.block_statistics``: key, value, count, moment and norm."""
    b, h, n, d = k.shape
    dv, blocks = v.shape[-1], len(bounds) - 1
    shares = min(SHARES, blocks)

    def made(*shape: int) -> Tensor:
        return torch.empty((b, h, *shape), dtype=torch.float32, device=k.device)

    key, value, parts = made(blocks, d), made(blocks, dv), made(shares, d, dv)
    norm = made(blocks) if norms else None
    count, table = _count(k, blocks, live, order), _table(bounds, k.device, placed)
    order, live, k, v = _contiguous(order), _bytes(live), _rows(k), _rows(v)
    with torch.cuda.device_of(k):
        _moments[(shares, b * h)](
            k, v, k.stride()[:3], v.stride()[:3], key, value, parts, norm, count,
            _spread(count), *table, order, _head_stride(order), live, h, n, blocks, d, dv,
            triton.next_power_of_2(max(d, 16)), triton.next_power_of_2(max(dv, 16)), STEP_MOMENT, num_warps=8,
            num_stages=1,
        )  # fmt: skip
    return key, value, count, parts.sum(2), norm


def serves_moments(k: Tensor, v: Tensor) -> bool:
    """Whether a moment fits into one program."""
    return max(k.shape[-1], v.shape[-1]) <= LARGEST_DIM


def _count(x: Tensor, blocks: int, live: Tensor | None, order: Tensor | None) -> Tensor:
    """Where counts go: one entry per sample where tokens may be dead, per head where also orders differ."""
    per_head = live is not None and order is not None and order.ndim == 2
    shape = (1 if live is None else x.shape[0], x.shape[1] if per_head else 1, blocks)
    return torch.empty(shape, dtype=torch.int32, device=x.device)


def _table(
    bounds: Tensor, device: torch.device, placed: Tensor | None
) -> tuple[Tensor | None, int, int, int]:  # fmt: skip
    """Bounds as a table, or None where one size says it all; then the first slot, that size, and the end.

    Equal blocks need no copy to the device, which a CUDA graph could not hold; neither do bounds ``placed`` there.
    """
    if placed is not None:
        return placed, 0, 0, 0
    sizes = bounds.diff()
    size = int(sizes[0])
    if bool((sizes[:-1] == size).all()) and int(sizes[-1]) <= size:
        return None, int(bounds[0]), size, int(bounds[-1])
    return bounds.to(device), 0, 0, 0


def _spread(count: Tensor) -> tuple[int, int]:
    """Strides (batch, head) of a count table, 0 where one entry serves all."""
    return tuple(count.stride(i) * (count.shape[i] > 1) for i in range(2))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(order: Tensor | None) -> Tensor | None:
    return None if order is None else order.contiguous()


def _bytes(live: Tensor | None) -> Tensor | None:
    return None if live is None else live.contiguous().view(torch.uint8)


def _head_stride(order: Tensor | None) -> int:
    return order.shape[1] if order is not None and order.ndim == 2 else 0


@triton.jit
def _means(
    x, strides, means, spreads, count, count_strides, bounds, origin, size, end, order, order_stride, live,
    heads, n, D: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks, batch x heads). Strides (batch, head, token); means and spreads contiguous float32."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    first, stop = _bounds(bounds, block, origin, size, end)
    base = x + b * strides[0] + h * strides[1]
    column = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    some = tl.zeros((), tl.int32)
    for start in range(first, stop, STEP):
        token, alive = _tokens(start, stop, order, h * order_stride, live, b * n, STEP)
        total += tl.sum(_floats(base, token, strides[2], alive, D, WIDTH), 0)
        some += tl.sum(alive.to(tl.int32), 0)
    mean = total / tl.maximum(some, 1).to(tl.float32)
    at = ((b * heads + h) * blocks + block) * D + column
    tl.store(means + at, mean, mask=column < D)
    if spreads is not None:
        away = tl.zeros((WIDTH,), tl.float32)
        for start in range(first, stop, STEP):
            token, alive = _tokens(start, stop, order, h * order_stride, live, b * n, STEP)
            far = tl.abs(_floats(base, token, strides[2], alive, D, WIDTH) - mean[None, :])
            away += tl.sum(tl.where(alive[:, None], far, 0.0), 0)
        tl.store(spreads + at, away / tl.maximum(some, 1).to(tl.float32), mask=column < D)
    _store_count(count, count_strides, b, h, block, some)


@triton.jit
def _moments(
    k, v, k_strides, v_strides, key, value, parts, norm, count, count_strides, bounds, origin, size, end,
    order, order_stride, live, heads, n, blocks, D: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid: (shares, batch x heads); a program takes every shares-th block and leaves their summed moment in parts."""
    share = tl.program_id(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    keys_at = k + b * k_strides[0] + h * k_strides[1]
    values_at = v + b * v_strides[0] + h * v_strides[1]
    column = tl.arange(0, WIDTH)
    column_v = tl.arange(0, WIDTH_V)
    acc = tl.zeros((WIDTH, WIDTH_V), tl.float32)
    for block in range(share, blocks, tl.num_programs(0)):
        first, stop = _bounds(bounds, block, origin, size, end)
        total = tl.zeros((WIDTH,), tl.float32)
        total_v = tl.zeros((WIDTH_V,), tl.float32)
        some = tl.zeros((), tl.int32)
        for start in range(first, stop, STEP):
            token, alive = _tokens(start, stop, order, h * order_stride, live, b * n, STEP)
            total += tl.sum(_floats(keys_at, token, k_strides[2], alive, D, WIDTH), 0)
            total_v += tl.sum(_floats(values_at, token, v_strides[2], alive, DV, WIDTH_V), 0)
            some += tl.sum(alive.to(tl.int32), 0)
        each = 1.0 / tl.maximum(some, 1).to(tl.float32)
        mean = total * each
        row = (b * heads + h) * blocks + block
        tl.store(key + row * D + column, mean, mask=column < D)
        tl.store(value + row * DV + column_v, total_v * each, mask=column_v < DV)
        own = acc
        if norm is not None:
            own = tl.zeros((WIDTH, WIDTH_V), tl.float32)
        for start in range(first, stop, STEP):
            token, alive = _tokens(start, stop, order, h * order_stride, live, b * n, STEP)
            away = _floats(keys_at, token, k_strides[2], alive, D, WIDTH) - mean[None, :]
            away = tl.where(alive[:, None], away, 0.0)
            values = _floats(values_at, token, v_strides[2], alive, DV, WIDTH_V)
            own = tl.dot(tl.trans(away), values, own, input_precision="tf32x3")
        if norm is not None:
            tl.store(norm + row, tl.sqrt(tl.sum(tl.sum(own * own, 1), 0)))
            acc += own
        else:
            acc = own
        _store_count(count, count_strides, b, h, block, some)
    at = parts + ((b * heads + h) * tl.num_programs(0) + share) * (D * DV)
    mask = (column < D)[:, None] & (column_v < DV)[None, :]
    tl.store(at + column[:, None] * DV + column_v[None, :], acc, mask=mask)


@triton.jit
def _bounds(bounds, block, origin, size, end):
    """The slots first .. stop of a block."""
    if bounds is not None:
        first = tl.load(bounds + block).to(tl.int32)
        stop = tl.load(bounds + block + 1).to(tl.int32)
    else:
        first = origin + block * size
        stop = tl.minimum(first + size, end)
    return first, stop


@triton.jit
def _tokens(start, stop, order, order_at, live, live_at, STEP: tl.constexpr):
    """The tokens in slots start .. start + STEP, and which of them count."""
    slot = start + tl.arange(0, STEP)
    alive = slot < stop
    token = slot.to(tl.int64)
    if order is not None:
        token = tl.load(order + order_at + slot, mask=alive, other=0)
    if live is not None:
        alive = alive & (tl.load(live + live_at + token, mask=alive, other=0) != 0)
    return token, alive


@triton.jit
def _floats(base, token, stride, alive, D: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    mask = alive[:, None] & (column < D)[None, :]
    return tl.load(base + token[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_count(count, strides, b, h, block, some):
    """Of programs that would write the same count, the first one does."""
    mine = ((b == 0) | (strides[0] > 0)) & ((h == 0) | (strides[1] > 0))
    tl.store(count + b * strides[0] + h * strides[1] + block, some, mask=mine)
