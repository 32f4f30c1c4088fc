"""Keys and values put into plan order by one Triton kernel, and when that pays."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tileplan import TilePlan

# Keys per query from which a copy pays. A block of 128 queries that finds its keys one by one takes an estimated 15 %
# longer than one that reads them side by side with the copy engine: 0.025 ns per key on a chip of 400 TFLOP/s at head
# dim 128. Copying a key and its value takes 0.3 ns at 3.3 TB/s, as much as 12 visits.
COPY_FROM = 12 * 128
BLOCK = 64


def copies(plan: TilePlan, groups: int) -> bool:
    """Whether keys and values are copied into plan order ahead of attention, instead of found while loading.

    Queries never are: each is read once and each output written once, so the permutation is free there. ``groups``:
    query heads per key head; a copy per query head would multiply the keys.
    """
    if plan.kv_order is None or (plan.kv_order.ndim == 2 and groups > 1):
        return False
    return _often_read(plan)


def cleans(plan: TilePlan) -> bool:
    """Whether dead values are set to 0 ahead of attention, in a copy, so that the copy engine can fetch their blocks.

    Dead keys need no such thing: their logits are masked, while a weight of 0 times a value that is not finite is NaN.
    """
    return plan.kv_order is None and plan.tokens_k is None and _often_read(plan)


def _often_read(plan: TilePlan) -> bool:
    # The widths of the lists bound what a row visits; its counts would have to be waited for.
    listed = min(plan.full.width + (0 if plan.partial is None else plan.partial.width), plan.tiles_k)
    return listed * plan.tile_k * plan.n_q >= COPY_FROM * plan.n_k


def cleaned(v: Tensor, kv_valid: Tensor) -> Tensor:
    """v (B, H, N, Dv) with 0 for tokens from ``kv_valid`` (int32 (B,)) on."""
    dead = torch.arange(v.shape[2], device=v.device) >= kv_valid.to(v.device)[:, None]
    return v.masked_fill(dead[:, None, :, None], 0)


def in_order(k: Tensor, v: Tensor, order: Tensor, kv_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """k (B, H, N, D) and v (B, H, N, Dv) with their tokens in plan order: (B, H, n, D) and (B, H, n, Dv), contiguous.

    ``order``: int64 slot -> token, (n,) or (H, n). Holes, and tokens from ``kv_valid`` (int32 (B,)) on, become 0.
    """
    b, heads, tokens, _ = k.shape
    n = order.shape[-1]
    made = tuple(x.new_empty((b, heads, n, x.shape[-1]), dtype=x.dtype) for x in (k, v))
    order = order.contiguous()
    with torch.cuda.device_of(k):
        _gather[(triton.cdiv(n, BLOCK), b * heads)](
            k, v, *made, k.stride()[:3], v.stride()[:3], order, order.stride(0) * (order.ndim == 2), kv_valid,
            heads, tokens, n, k.shape[-1], v.shape[-1],
            triton.next_power_of_2(k.shape[-1]), triton.next_power_of_2(v.shape[-1]), BLOCK,
        )  # fmt: skip
    return made


@triton.jit
def _gather(
    k, v, k_out, v_out, k_strides, v_strides, order, order_stride, kv_valid, heads, tokens, n,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of slots, batch x heads). Strides (batch, head, token); outputs contiguous."""
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < n
    token = tl.load(order + h * order_stride + slot, mask=inside, other=-1)
    if kv_valid is not None:
        tokens = tl.minimum(tokens, tl.load(kv_valid + b).to(tl.int32))
    live = (token >= 0) & (token < tokens)
    row = (b * heads + h) * n + slot
    _copy(k + b * k_strides[0] + h * k_strides[1], k_out, token, k_strides[2], row, live, inside, D, WIDTH)
    _copy(v + b * v_strides[0] + h * v_strides[1], v_out, token, v_strides[2], row, live, inside, DV, WIDTH_V)


@triton.jit
def _copy(base, out, token, stride, row, live, inside, D: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    mask = (column < D)[None, :]
    x = tl.load(base + token[:, None] * stride + column[None, :], mask=live[:, None] & mask, other=0.0)
    tl.store(out + row[:, None] * D + column[None, :], x, mask=inside[:, None] & mask)
