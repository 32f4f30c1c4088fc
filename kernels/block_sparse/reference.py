"""Block-sparse attention in plain torch: the meaning of a TilePlan. The only tier that holds an N x N mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tileplan import TilePlan


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, *, scale: float, alive: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax over the visible keys. q (B, H, Nq, D), k and v (B, Hk, Nk, D) in plan order.

    ``alive``: bool (B, 1 or H, Nk) of live keys in plan order, or None. Returns out (B, H, Nq, Dv) in q's
    dtype and the natural-log LSE (B, H, Nq). 16-bit inputs are computed in float32, float64 in float64. A row
    without a visible key gives 0 and an LSE of -inf.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    keys = k.to(dtype).repeat_interleave(groups, 1)
    values = v.to(dtype).repeat_interleave(groups, 1)
    scores = (q.to(dtype) @ keys.mT) * scale
    visible = plan.token_mask()
    if alive is not None:
        visible = visible & alive[:, :, None, :]
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return (weights @ values).to(q.dtype), lse
