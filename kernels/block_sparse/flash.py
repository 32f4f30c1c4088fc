"""Whole blocks on CPU: torch's own flash kernel on gathered keys.

Gathering costs little beside attending, and the dense kernel then works on nothing but visible pairs: no compiler, an
exact LSE, and for small heads less time per pair than compiled FlexAttention. Lists that all samples and heads share
run once per run of query tiles that visit the same keys, here; all else row by row, in ``flash_rows.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tileplan import TilePlan
from . import flash_rows

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# (first query, query past the last, keys): one call of the dense kernel.
Run = tuple[int, int, Tensor]


def refuses(q: Tensor, plan: TilePlan) -> str | None:
    """Why this tier cannot take the call, or None."""
    if q.device.type != "cpu":
        return f"q is on {q.device}; this tier is torch's CPU kernel"
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}"
    if plan.gate is not None or (plan.partial is not None and not plan.predicate.only_dead):
        return "the plan has partial tiles"
    return None


def heads_at_once(q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, dead: bool) -> int:
    """Query heads to give to :func:`attention` at once. ``dead``: whether some keys are."""
    return q.shape[1] if _as_runs(k, v, plan, dead) else flash_rows.heads_at_once(k, v, plan, q.shape[1])


def _as_runs(k: Tensor, v: Tensor, plan: TilePlan, dead: bool) -> bool:
    """Whether one list of whole tiles serves all samples and heads, and nothing else is to be told."""
    shared = plan.full.count.shape[:2] == (1, 1) and plan.partial is None and plan.plain
    return shared and not dead and k.shape[-1] == v.shape[-1]


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, *, scale: float, alive: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As ``reference.attention``, for plans that :func:`refuses` lets pass."""
    if not _as_runs(k, v, plan, alive is not None):
        return flash_rows.attention(q, k, v, plan, scale=scale, alive=alive)
    if "runs" not in plan._memo:
        plan._memo["runs"] = _runs(plan)
    groups, dim = q.shape[1] // k.shape[1], k.shape[3]
    # One tensor, so that one gather serves keys and values.
    both = torch.cat([k, v], -1)
    both = both.repeat_interleave(groups, 1) if groups > 1 else both
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for start, stop, keys in plan._memo["runs"]:
        if not len(keys):
            out[:, :, start:stop], lse[:, :, start:stop] = 0, -torch.inf
            continue
        seen = both.index_select(2, keys)
        out[:, :, start:stop], lse[:, :, start:stop] = _flash(q[:, :, start:stop], seen, dim, scale)
    return out, lse


def _flash(q: Tensor, seen: Tensor, dim: int, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, seen[..., :dim], seen[..., dim:], scale=scale)


def _runs(plan: TilePlan) -> list[Run]:
    """Consecutive query tiles with equal lists as one run each."""
    count, index = plan.full.count[0, 0].tolist(), plan.full.index[0, 0]
    lists = [sorted(index[tile, :n].tolist()) for tile, n in enumerate(count)]
    inside = torch.arange(plan.tile_k)
    runs: list[Run] = []
    first = 0
    for tile in range(1, plan.tiles_q + 1):
        if tile < plan.tiles_q and lists[tile] == lists[first]:
            continue
        keys = (torch.tensor(lists[first], dtype=torch.int64)[:, None] * plan.tile_k + inside).flatten()
        runs.append((first * plan.tile_q, min(tile * plan.tile_q, plan.n_q), keys[keys < plan.n_k]))
        first = tile
    return runs
