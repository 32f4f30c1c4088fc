"""Drift monitor: how much of the exact attention a plan still catches, on sampled rows.

A static plan is made once and used on other prompts and steps; recall says whether it still fits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import UsageError
from .plans import Plan
from .rows import take, tokens_of, visible


@torch.no_grad()
def recall(
    q: Tensor,
    k: Tensor,
    plan: Plan,
    rows: int = 64,
    generator: torch.Generator | None = None,
    *,
    scale: float | None = None,
    kv_valid: Tensor | None = None,
) -> float:
    """Share of the dense softmax mass on the pairs that ``plan`` keeps, the mean over batch, heads and sampled rows.

    Arguments as for :func:`row_recall`. 1 for a plan that keeps everything; a host sync on a GPU.
    """
    return float(row_recall(q, k, plan, rows, generator, scale=scale, kv_valid=kv_valid).mean())


@torch.no_grad()
def row_recall(
    q: Tensor,
    k: Tensor,
    plan: Plan,
    rows: int = 64,
    generator: torch.Generator | None = None,
    *,
    scale: float | None = None,
    kv_valid: Tensor | None = None,
) -> Tensor:
    """float32 (B, H, rows): the share row by row.

    q (B, H, Nq, D), k (B, Hk, Nk, D) in the caller's order; memory is rows x Nk. ``rows`` are drawn from the plan's
    slots by ``generator`` (on the CPU; None takes torch's own), all of them once ``rows`` reaches their number.
    ``kv_valid``: int32 (B,), keys from that index on are dead. Dead keys hold no mass.
    """
    if rows < 1:
        raise UsageError(f"recall needs at least one row; got rows={rows}")
    heads, n = q.shape[1], plan.k_blocks.n
    scale = scale if scale is not None else plan.scale if plan.scale is not None else q.shape[-1] ** -0.5
    slots = torch.randperm(plan.q_blocks.n, generator=generator)[:rows].sort().values.to(q.device)
    queries, keys = take(q, tokens_of(plan, slots)), k.repeat_interleave(heads // k.shape[1], 1)
    scores = (queries.float() * scale) @ keys.float().mT
    if kv_valid is not None:
        dead = torch.arange(n, device=q.device) >= kv_valid.to(q.device)[:, None, None, None]
        scores = scores.masked_fill(dead, -torch.inf)
    return (scores.softmax(-1) * visible(plan, slots)).sum(-1)
