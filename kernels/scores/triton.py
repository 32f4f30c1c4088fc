"""Attention mass per block, and the largest sampled weight per block, as Triton kernels: scores stay in registers.

Launched by the searches of AdaSpa and Pyramid for tensors on an NVIDIA GPU. In plain torch every score is written and
read several times, and in float32, which costs many times what dense attention does. Import it only where Triton is.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse.triton import interpreted, widths
from ..block_sparse.triton_kernel import load_rows

# Queries of one program, and keys per step.
ROWS, STEP = 128, 64
# Of the kernel that samples: its rows keep what they saw between two passes, so fewer of them stay in the cache.
SAMPLED_ROWS = 64
# Maxima that are turned into weights at once.
COLUMNS = 64
# Programs per multiprocessor of the kernel that samples; each has a scratch of its own.
PROGRAMS = 2
LARGEST_DIM = 256


def serves(x: Tensor, *sizes: int) -> bool:
    """Whether tensors like x (.., D) in blocks of so many tokens, or samples, fit into these kernels."""
    small = 1 <= x.shape[-1] <= LARGEST_DIM
    return x.dtype in (torch.float32, torch.float16, torch.bfloat16) and small and max(sizes) <= ROWS


def block_mass(
    q: Tensor, k: Tensor, size: int, *, scale: float, lse: Tensor | None, kv_valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As ``methods.adaspa_search.block_mass``: mass (B, H, ceil(R / size), ceil(N / size)) and LSE, float32."""
    (batch, heads, rows, dim), keys = q.shape, k.shape[2]
    q, k = _rows(q), _rows(k)
    blocks = -(-rows // size), -(-keys // size)
    mass = torch.empty((batch, heads, *blocks), dtype=torch.float32, device=q.device)
    known = lse is not None
    used = lse.contiguous() if known else torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    padded = triton.next_power_of_2(size)
    parts = -(-blocks[0] // max(ROWS // padded, 1))
    if mass.numel():
        with torch.cuda.device_of(q):
            _mass[(parts * batch * heads,)](
                q, k, q.stride()[:3], k.stride()[:3], used, mass,
                None if kv_valid is None else kv_valid.to(q.device).contiguous(),
                rows, keys, parts, heads, heads // k.shape[1], scale * math.log2(math.e),
                size, padded, ROWS, max(STEP, padded), dim, widths(dim), known, interpreted(),
                num_warps=8, num_stages=3 if dim <= 128 else 2,
            )  # fmt: skip
    return mass, used


def peaks(q: Tensor, k: Tensor, per_row: int, per_column: int, *, scale: float, dead: Tensor | None) -> Tensor:
    """Of ``per_row`` queries in a row and ``per_column`` keys in a row, the largest exp(logit - largest of the query).

    q (H, m x per_row, D), k (Hk, n x per_column, D), any strides. ``dead``: bool (n,), runs of keys that weigh nothing.
    Returns (H, m, n), float32.
    """
    (heads, rows, dim), keys = q.shape, k.shape[1]
    q, k = _rows(q), _rows(k)
    m, n = rows // per_row, keys // per_column
    out = torch.empty((heads, m, n), dtype=torch.float32, device=q.device)
    wide, padded = triton.next_power_of_2(per_row), triton.next_power_of_2(per_column)
    tile = max(SAMPLED_ROWS, wide)
    parts = -(-m // (tile // wide))
    items = parts * heads
    if out.numel():
        programs = min(items, _programs(q.device))
        scratch = torch.empty((programs, tile, n), dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            _peaks[(programs,)](
                q, k, q.stride()[:2], k.stride()[:2], None if dead is None else dead.contiguous().view(torch.uint8),
                scratch, out, m, n, parts, items, heads // k.shape[0], scale * math.log2(math.e),
                per_row, wide, per_column, padded, tile, max(STEP, padded), COLUMNS, dim, widths(dim), interpreted(),
                num_warps=4 if dim <= 64 else 8, num_stages=3,
            )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _programs(device: torch.device) -> int:
    # In the interpreter two, so that programs take several items there too.
    return 2 if interpreted() else PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _mass(
    q, k, q_strides, k_strides, lse, mass, kv_valid, rows, keys, parts, heads, groups, scale,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr,
    WIDTHS: tl.constexpr, KNOWN: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Grid: (parts x batch x heads,). Strides (batch, head, token); lse (batch, head, rows) and mass contiguous.

    A block of SIZE tokens takes PADDED lanes. scale contains log2(e). KNOWN: lse is read, else it is found and written.
    """
    part = tl.program_id(0) % parts
    site = tl.program_id(0) // parts
    b = (site // heads).to(tl.int64)
    h = (site % heads).to(tl.int64)
    lane = tl.arange(0, ROWS)
    blocks: tl.constexpr = ROWS // PADDED
    token = (part * blocks + lane // PADDED) * SIZE + lane % PADDED
    live = (lane % PADDED < SIZE) & (token < rows)
    query, query_tail = _both(q + b * q_strides[0] + h * q_strides[1], token, q_strides[2], live, D, WIDTHS, EMULATED)
    keys_at = k + b * k_strides[0] + (h // groups) * k_strides[1]
    valid = keys
    if kv_valid is not None:
        valid = tl.minimum(tl.load(kv_valid + b).to(tl.int32), keys)
    lse += site.to(tl.int64) * rows + token
    slot = tl.arange(0, STEP)
    if KNOWN:
        offset = tl.load(lse, mask=live, other=0.0) * 1.4426950408889634
    else:
        top = tl.full((ROWS,), -1e30, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, valid, STEP):
            alive = start + slot < valid
            score = _scores(query, query_tail, keys_at, start + slot, k_strides[2], alive, scale, D, WIDTHS, EMULATED)
            score = tl.where(alive[None, :], score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(score - higher[:, None]), 1)
            top = higher
        empty = total == 0
        offset = top + tl.log2(tl.where(empty, 1.0, total))
        # A row without a key: float32's least number, as torch's maximum of nothing is held to.
        found = tl.where(empty, -3.4028234663852886e38, offset * 0.6931471805599453)
        tl.store(lse, found, mask=live)
    column = tl.arange(0, STEP // PADDED)
    row = part * blocks + tl.arange(0, blocks)
    n_rows = tl.cdiv(rows, SIZE)
    n_columns = tl.cdiv(keys, SIZE)
    mass += (site.to(tl.int64) * n_rows + row)[:, None] * n_columns
    for first in range(0, n_columns, STEP // PADDED):
        key = (first + slot // PADDED) * SIZE + slot % PADDED
        alive = (slot % PADDED < SIZE) & (key < valid)
        score = _scores(query, query_tail, keys_at, key, k_strides[2], alive, scale, D, WIDTHS, EMULATED)
        # An LSE of another step may be far off; of weights up to 1e30 sums stay finite.
        weight = tl.where(live[:, None] & alive[None, :], tl.exp2(tl.minimum(score - offset[:, None], 99.66)), 0.0)
        sums = tl.sum(tl.reshape(weight, (ROWS, STEP // PADDED, PADDED)), 2)
        sums = tl.sum(tl.reshape(sums, (blocks, PADDED, STEP // PADDED)), 1)
        inside = (row < n_rows)[:, None] & (first + column < n_columns)[None, :]
        tl.store(mass + first + column[None, :], tl.minimum(sums, 1e30), mask=inside)


@triton.jit
def _peaks(
    q, k, q_strides, k_strides, dead, scratch, out, m, n, parts, items, groups, scale,
    PER_ROW: tl.constexpr, WIDE: tl.constexpr, PER_COLUMN: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs up to ``items`` (parts x heads), each with ROWS x n of scratch.

    Strides (head, token); out contiguous. A row block of PER_ROW queries takes WIDE lanes, a column of
    PER_COLUMN keys PADDED. scale contains log2(e).
    """
    lane = tl.arange(0, ROWS)
    slot = tl.arange(0, STEP)
    blocks: tl.constexpr = ROWS // WIDE
    columns: tl.constexpr = STEP // PADDED
    scratch += (tl.program_id(0).to(tl.int64) * ROWS + lane)[:, None] * n
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        part = item % parts
        h = (item // parts).to(tl.int64)
        block = part * blocks + lane // WIDE
        live = (lane % WIDE < PER_ROW) & (block < m)
        token = block * PER_ROW + lane % WIDE
        query, query_tail = _both(q + h * q_strides[0], token, q_strides[1], live, D, WIDTHS, EMULATED)
        keys_at = k + (h // groups) * k_strides[0]
        top = tl.full((ROWS,), -3.4028234663852886e38, tl.float32)
        for first in range(0, n, columns):
            column = first + slot // PADDED
            alive = (slot % PADDED < PER_COLUMN) & (column < n)
            if dead is not None:
                alive = alive & (tl.load(dead + column, mask=column < n, other=1) == 0)
            key = column * PER_COLUMN + slot % PADDED
            score = _scores(query, query_tail, keys_at, key, k_strides[1], alive, scale, D, WIDTHS, EMULATED)
            score = tl.where(alive[None, :], score, float("-inf"))
            best = tl.max(tl.reshape(score, (ROWS, columns, PADDED)), 2)
            place = first + tl.arange(0, columns)
            tl.store(scratch + place[None, :], best, mask=(place < n)[None, :])
            top = tl.maximum(top, tl.max(best, 1))
        # Other threads of this program read what these wrote.
        tl.debug_barrier()
        row = part * blocks + tl.arange(0, blocks)
        out_at = out + (h * m + row)[:, None] * n
        for first in range(0, n, COLUMNS):
            place = first + tl.arange(0, COLUMNS)
            best = tl.load(scratch + place[None, :], mask=(place < n)[None, :], other=float("-inf"))
            weight = tl.where(live[:, None], tl.exp2(best - top[:, None]), 0.0)
            weight = tl.max(tl.reshape(weight, (blocks, WIDE, COLUMNS)), 1)
            tl.store(out_at + place[None, :], weight, mask=(row < m)[:, None] & (place < n)[None, :])
        tl.debug_barrier()


@triton.jit
def _both(base, token, stride, live, D: tl.constexpr, WIDTHS: tl.constexpr, EMULATED: tl.constexpr):
    """Rows of tokens as a power of two of columns and a tail, the same again where there is none."""
    token = token.to(tl.int64)
    x = load_rows(base, token, stride, live, WIDTHS[0], 0, D, True, EMULATED)
    tail = x
    if WIDTHS[1]:
        tail = load_rows(base, token, stride, live, WIDTHS[1], WIDTHS[0], D, True, EMULATED)
    return x, tail


@triton.jit
def _scores(
    query, query_tail, keys_at, key, stride, alive, scale, D: tl.constexpr, WIDTHS: tl.constexpr, EMULATED: tl.constexpr
):  # fmt: skip
    """Logits times log2(e); 0 for keys that are not ``alive``."""
    keys, keys_tail = _both(keys_at, key, stride, alive, D, WIDTHS, EMULATED)
    score = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if WIDTHS[1]:
        score = tl.dot(query_tail, tl.trans(keys_tail), score, input_precision="ieee")
    return score * scale
