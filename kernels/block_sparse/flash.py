"""Whole blocks on CPU: torch's own flash kernel on gathered keys.

Gathering costs a fifth of what attending does, and the dense kernel then works on nothing but visible pairs: no
compiler, an exact LSE, and for small heads less time per pair than compiled FlexAttention. Lists that all samples and
heads share run once per run of query tiles that visit the same keys, here; all else row by row, in ``flash_rows.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tileplan import TilePlan
from . import flash_rows, flash_strips
from .order import in_plan_order, in_token_order

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# (first query, query past the last, key tiles ascending, how many keys they hold): one call of the dense kernel.
Run = tuple[int, int, Tensor, int]


def refuses(q: Tensor, plan: TilePlan) -> str | None:
    """Why this tier cannot take the call, or None."""
    if q.device.type != "cpu":
        return f"q is on {q.device}; this tier is torch's CPU kernel"
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}"
    if plan.gate is not None or (plan.partial is not None and not plan.predicate.only_dead):
        return "the plan has partial tiles"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, *, scale: float, kv_valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out (B, H, Nq, Dv) and natural-log LSE (B, H, Nq) for plans that :func:`refuses` lets pass.

    q (B, H, Nq, D), k (B, Hk, Nk, D) and v (B, Hk, Nk, Dv) in the caller's token order. ``kv_valid``: int32 (B,), keys
    from that token on are dead, or None.
    """
    # One list of whole tiles for all samples and heads, and nothing else to be told.
    shared = plan.full.count.shape[:2] == (1, 1) and plan.partial is None and plan.plain and kv_valid is None
    if not shared or k.shape[-1] != v.shape[-1]:
        return flash_rows.attention(q, k, v, plan, scale=scale, kv_valid=kv_valid)
    # The kernel takes a head dim without gaps for granted and reads other memory where there are some.
    q = q if q.stride(-1) == 1 else q.contiguous()
    q, k, v, _ = in_plan_order(q, k, v, plan, None)
    return in_token_order(*_by_runs(q, k, v, plan, scale), plan)


def _by_runs(q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, scale: float) -> tuple[Tensor, Tensor]:
    """As :func:`attention` for one list of whole tiles, all in plan order."""
    if "runs" not in plan._memo:
        plan._memo["runs"] = _runs(plan)
    (batch, heads), dim = q.shape[:2], k.shape[3]
    rooms = [plan.tiles_k * plan.tile_k]
    keys, values = (x.view(-1, plan.tile_k * dim) for x in flash_strips.sources(k, v, plan, dim, rooms))
    owner = torch.arange(batch * k.shape[1]).view(batch, -1, 1).repeat_interleave(heads // k.shape[1], 1) * plan.tiles_k
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for start, stop, tiles, visible in plan._memo["runs"]:
        if not visible:
            out[:, :, start:stop], lse[:, :, start:stop] = 0, -torch.inf
            continue
        some = max(1, flash_strips.STRIPS // (2 * batch * visible * dim))
        for first in range(0, heads, some):
            part = slice(None), slice(first, first + some), slice(start, stop)
            strips = flash_strips.gathered(keys, values, (owner[:, part[1]] + tiles).flatten())
            seen = (x.view(batch, -1, len(tiles) * plan.tile_k, dim)[:, :, :visible] for x in strips)
            out[part], lse[part] = flash_strips.kernel(q[part], *seen, scale)
    return out, lse


def _runs(plan: TilePlan) -> list[Run]:
    """Consecutive query tiles with equal lists as one run each."""
    count, index = plan.full.count[0, 0].tolist(), plan.full.index[0, 0]
    lists = [sorted(index[tile, :n].tolist()) for tile, n in enumerate(count)]
    runs: list[Run] = []
    first = 0
    for tile in range(1, plan.tiles_q + 1):
        if tile < plan.tiles_q and lists[tile] == lists[first]:
            continue
        # Only the last tile may hold fewer than the others, and lists are ascending.
        keys = sum(min(plan.tile_k, plan.n_k - key * plan.tile_k) for key in lists[first])
        tiles = torch.tensor(lists[first], dtype=torch.int64)
        runs.append((first * plan.tile_q, min(tile * plan.tile_q, plan.n_q), tiles, keys))
        first = tile
    return runs
