"""Tensors in plan order and back: what lies side by side in a plan's tiles need not lie so among the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tileplan import TilePlan


def in_plan_order(
    q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, kv_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k and v in plan order, and which slots hold a live key, bool (B, 1 or H, n_k), or None where all do.

    Holes hold any token and count as live: the plan hides them itself. Key heads are repeated up to the query heads
    where each query head has its own order.
    """
    if plan.order is not None:
        q = take(q, plan.order)
    return q, *keys_in_plan_order(k, v, plan, q.shape[1]), live_slots(plan, kv_valid)


def keys_in_plan_order(k: Tensor, v: Tensor, plan: TilePlan, heads: int) -> tuple[Tensor, Tensor]:
    """k and v of a call with ``heads`` query heads in plan order, as :func:`in_plan_order` gives them."""
    if plan.kv_order is None:
        return k, v
    if plan.kv_order.ndim == 2:
        k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    return take(k, plan.kv_order), take(v, plan.kv_order)


def in_token_order(out: Tensor, lse: Tensor | None, plan: TilePlan) -> tuple[Tensor, Tensor | None]:
    """out (B, H, n_q, Dv) and lse (B, H, n_q) in the caller's token order, without holes."""
    if plan.order is None:
        return out, lse
    lse = None if lse is None else put(lse[..., None], plan.order, plan.queries)[..., 0]
    return put(out, plan.order, plan.queries), lse


def take(x: Tensor, order: Tensor) -> Tensor:
    """x (B, H, N, D) with its tokens in plan order; holes hold any token. ``order``: int64 (n,) or (H, n).

    One flat index_select.
    """
    order = order.clamp_min(0)
    if order.ndim == 1:
        return x.index_select(2, order)
    b, h, n, d = x.shape
    flat = (order + torch.arange(h, device=order.device)[:, None] * n).flatten()
    return x.reshape(b, h * n, d).index_select(1, flat).reshape(b, h, -1, d)


def put(x: Tensor, order: Tensor, tokens: int | None = None) -> Tensor:
    """The inverse of :func:`take`: (B, H, tokens, D). None where the order has no holes."""
    b, h, n, d = x.shape
    tokens = n if tokens is None else tokens
    # Holes go to a row of their own behind the last token: to find them a GPU would have to be waited for.
    rows = tokens + (tokens < n)
    order = order if rows == tokens else order.masked_fill(order < 0, tokens)
    if order.ndim == 1:
        return x.new_empty((b, h, rows, d)).index_copy_(2, order, x)[:, :, :tokens]
    flat = (order + torch.arange(h, device=order.device)[:, None] * rows).flatten()
    placed = x.new_empty((b, h * rows, d)).index_copy_(1, flat, x.reshape(b, h * n, d))
    return placed.view(b, h, rows, d)[:, :, :tokens]


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """x (B, Hk, ..) with each key head repeated for the query heads that share it: (B, heads, ..)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def live_slots(plan: TilePlan, kv_valid: Tensor | None) -> Tensor | None:
    """bool (B, 1 or H, n_k): which slots hold a live key; None where all do."""
    if kv_valid is None:
        return None
    tokens = torch.arange(plan.n_k, device=plan.device) if plan.kv_order is None else plan.kv_order
    tokens = tokens if tokens.ndim == 2 else tokens[None]
    return tokens[None] < kv_valid.to(plan.device)[:, None, None]
