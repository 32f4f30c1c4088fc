"""Block-sparse attention in plain torch: the meaning of a TilePlan. The only tier that holds an N x N mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tileplan import TilePlan
from .order import repeat_heads


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, *, scale: float, alive: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax over the visible keys and representatives. q (B, H, Nq, D), k and v (B, Hk, Nk, D) in plan order.

    ``alive``: bool (B, 1 or H, Nk) of live keys in plan order, or None. Returns out (B, H, Nq, Dv) in q's
    dtype and the natural-log LSE (B, H, Nq). 16-bit inputs are computed in float32, float64 in float64. A row
    without a visible key gives 0 and an LSE of -inf. The LSE is that of the softmax, before ``row_scale``.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads = q.shape[1]
    query, keys, values = q.to(dtype), *(repeat_heads(x, heads).to(dtype) for x in (k, v))
    visible = plan.token_mask()
    if alive is not None:
        visible = visible & alive[:, :, None, :]
    scores = [((query @ keys.mT) * scale).masked_fill(~visible, -torch.inf)]
    for group in plan.reps:
        logits = (query @ repeat_heads(group.key, heads).to(dtype).mT) * scale + group.bias().to(dtype)[:, :, None]
        scores.append(logits.masked_fill(~_by_row(group.mask(), plan), -torch.inf))
        values = torch.cat([values, repeat_heads(group.value, heads).to(dtype)], 2)
    scores = torch.cat(scores, -1)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    out = weights @ values
    if plan.first_order is not None:
        first_order, mass = repeat_heads(plan.first_order, heads).to(dtype), weights[..., plan.n_k :]
        if plan.first_order_each:
            for r in range(mass.shape[-1]):
                out = out + scale * mass[..., r, None] * (query @ first_order[:, :, r])
        else:
            out = out + scale * mass.sum(-1, keepdim=True) * (query @ first_order)
    if plan.row_scale is not None:
        factor, shift = (_by_row(x.to(dtype), plan) for x in (plan.row_scale[..., None], plan.row_add))
        out = out * factor + shift
    return out.to(q.dtype), lse


def _by_row(x: Tensor, plan: TilePlan) -> Tensor:
    """x (B1, H1, tiles_q, ..) for every query: (B1, H1, Nq, ..)."""
    return x.repeat_interleave(plan.tile_q, 2)[:, :, : plan.n_q]
