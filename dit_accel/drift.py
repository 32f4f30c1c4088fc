"""Drift monitor: how much of the exact attention a plan still catches, on sampled rows.

A static plan is made once and used on other prompts and steps; recall says whether it still fits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import UsageError
from .plans import Plan


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
    order, kv_order = plan._orders()
    tokens = slots if order is None else order[..., slots]
    queries = q.gather(2, tokens.expand(heads, -1)[None, :, :, None].expand(q.shape[0], -1, -1, q.shape[-1]))
    keys = k.repeat_interleave(heads // k.shape[1], 1)
    scores = (queries.float() * scale) @ keys.float().mT
    if kv_valid is not None:
        dead = torch.arange(n, device=q.device) >= kv_valid.to(q.device)[:, None, None, None]
        scores = scores.masked_fill(dead, -torch.inf)
    weights = scores.softmax(-1)
    if kv_order is not None:
        weights = weights.gather(-1, kv_order.expand(heads, n)[None, :, None].expand_as(weights))
    return (weights * _visible(plan, slots)).sum(-1)


def _visible(plan: Plan, slots: Tensor) -> Tensor:
    """bool (B1, H1, rows, Nk): pairs of some query slots that the plan keeps, keys in plan order."""
    block = torch.searchsorted(plan.q_blocks.bounds.to(slots.device), slots, right=True) - 1
    owner = plan.k_blocks.owner().to(slots.device)

    def listed(entry) -> Tensor:
        return entry.mask(plan.k_blocks.count)[:, :, block][..., owner]

    seen = listed(plan.full)
    if plan.partial is None:
        return seen
    keys = torch.arange(plan.k_blocks.n, device=slots.device)
    return seen | (listed(plan.partial) & plan.predicate.visible(slots[:, None], keys[None]))
