"""The order in which a GPU works on the rows of a plan: long ones first, so that none is left over at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tileplan import TilePlan

# A plan that serves one call is sorted where its rows per head are so many that attention takes far longer than the
# few launches of a sort.
FROM_TILES = 128
# Rows that differ by less than this share of the longest keep their order, in which neighbours read the same keys.
STEPS = 16


def row_order(plan: TilePlan, batch: int, heads: int, groups: int) -> Tensor | None:
    """int32 (batch x heads x tiles_q,): which row comes when, or None for their own order. Kept with the plan.

    A row is (sample x heads + head) x tiles_q + query tile. The ``groups`` query heads of one key head stay together,
    whose keys and values the second-level cache then holds; key heads with most work come first, and within one the
    longest rows. Computed on the plan's device, without a transfer.
    """
    if not plan.kept and plan.tiles_q < FROM_TILES:
        return None
    key = "rows", batch, heads, groups
    if key not in plan._memo:
        plan._memo[key] = _sorted(row_work(plan), batch, heads, groups)
    return plan._memo[key]


def row_work(plan: TilePlan) -> Tensor:
    """float32 (B1, H1, tiles_q): keys and representatives that each query tile visits; a tested key counts twice."""
    work = plan.full.count.float() * plan.tile_k
    if plan.partial is not None:
        work = work + plan.partial.count * (2.0 * plan.tile_k)
    for group in plan.reps:
        work = work + group.seen.count * float(group.width)
    return work


def _sorted(work: Tensor, batch: int, heads: int, groups: int) -> Tensor:
    tiles = work.shape[-1]
    longest = work.amax().clamp_min(1)
    rows = work.expand(batch, heads, tiles).reshape(batch * heads // groups, groups * tiles)
    by_head = rows.sum(-1).argsort(descending=True, stable=True)
    steps = (rows * (STEPS / longest)).ceil()
    within = steps.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(len(rows), device=work.device)[:, None] * (groups * tiles)
    return (first + within).index_select(0, by_head).flatten().int()
