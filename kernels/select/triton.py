"""Selection as Triton kernels: no sort, no transfer, one launch, so that CUDA graphs capture it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Entries that one program holds.
TILE = 4096
CHUNK = 1024


def largest(values: Tensor, count: int | Tensor) -> Tensor:
    """As ``reference.largest``; values float32 (.., n)."""
    n = values.shape[-1]
    rows = values.reshape(-1, n).contiguous()
    taken = torch.empty(rows.shape, dtype=torch.bool, device=values.device)
    width = triton.next_power_of_2(max(n, 16))
    some = max(1, TILE // width)
    each = None
    if isinstance(count, Tensor):
        each, count = count.expand(values.shape[:-1]).reshape(-1).to(torch.int32).contiguous(), 0
    with torch.cuda.device_of(values):
        _largest[(triton.cdiv(len(rows), some),)](
            rows, taken.view(torch.uint8), each, count, len(rows), n, some, width,
            num_warps=4 if width <= TILE else 8 if width <= 2 * TILE else 16,
        )  # fmt: skip
    return taken.view(values.shape)


def compact(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """As ``reference.compact``; past a row's count the index holds 0."""
    n = mask.shape[-1]
    rows = mask.reshape(-1, n).contiguous().view(torch.uint8)
    count = torch.empty(mask.shape[:-1], dtype=torch.int32, device=mask.device)
    index = torch.empty((*mask.shape[:-1], width), dtype=torch.int32, device=mask.device)
    with torch.cuda.device_of(mask):
        _compact[(len(rows),)](rows, count, index, n, width, min(CHUNK, triton.next_power_of_2(n)), num_warps=4)
    return count, index


@triton.jit
def _largest(values, taken, each, count, rows, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Grid: (groups of ROWS rows,). Bisects the bits of the smallest value taken, then counts through its equals."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    at = row[:, None] * n + column[None, :]
    inside = (row < rows)[:, None] & (column < n)[None, :]
    # Read as integers with the negative half mirrored, floats keep their order; -0 becomes 0.
    bits = (tl.load(values + at, mask=inside, other=0.0) + 0.0).to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if each is not None:
        wanted = tl.load(each + row, mask=row < rows, other=0)
    else:
        wanted = tl.zeros((ROWS,), tl.int32) + count
    wanted = tl.minimum(wanted, n)
    low = tl.full((ROWS,), -2147483648, tl.int64)
    high = tl.full((ROWS,), 2147483647, tl.int64)
    for _ in range(32):
        middle = (low + high + 1) >> 1
        reached = tl.sum(((keys >= middle.to(tl.int32)[:, None]) & inside).to(tl.int32), 1)
        low = tl.where(reached >= wanted, middle, low)
        high = tl.where(reached >= wanted, high, middle - 1)
    cut = low.to(tl.int32)[:, None]
    above = (keys > cut) & inside
    equal = ((keys == cut) & inside).to(tl.int32)
    missing = wanted - tl.sum(above.to(tl.int32), 1)
    tied = (equal > 0) & (tl.cumsum(equal, 1) <= missing[:, None])
    tl.store(taken + at, (above | tied).to(tl.uint8), mask=inside)


@triton.jit
def _compact(mask, count, index, n, width, BLOCK: tl.constexpr):
    """Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    found = 0
    for first in range(0, n, BLOCK):
        column = first + lane
        on = (tl.load(mask + row * n + column, mask=column < n, other=0) != 0).to(tl.int32)
        place = found + tl.cumsum(on, 0) - 1
        tl.store(index + row * width + place, column, mask=(on > 0) & (place < width))
        found += tl.sum(on, 0)
    tl.store(count + row, found)
    for first in range(0, width, BLOCK):
        place = first + lane
        tl.store(index + row * width + place, tl.zeros((BLOCK,), tl.int32), mask=(place >= found) & (place < width))
