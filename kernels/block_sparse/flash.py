"""Whole blocks on CPU: torch's own flash kernel on gathered keys.

Gathering costs a fifth of what attending does, and the dense kernel then works on nothing but visible pairs: no
compiler, an exact LSE, and for small heads less time per pair than compiled FlexAttention. Lists that all samples and
heads share run once per run of query tiles that visit the same keys, here; all else row by row, in ``flash_rows.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tileplan import TilePlan
from . import flash_rows

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
    # The kernel takes a head dim without gaps for granted and reads other memory where there are some.
    q = q if q.stride(-1) == 1 else q.contiguous()
    if not _as_runs(k, v, plan, alive is not None):
        return flash_rows.attention(q, k, v, plan, scale=scale, alive=alive)
    if "runs" not in plan._memo:
        plan._memo["runs"] = _runs(plan)
    (batch, heads), dim, width = q.shape[:2], k.shape[3], 2 * k.shape[3]
    source = flash_rows.beside(k, v, plan, dim).view(-1, plan.tile_k * width)
    owner = torch.arange(batch * k.shape[1]).view(batch, -1, 1).repeat_interleave(heads // k.shape[1], 1) * plan.tiles_k
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    buffer = source.new_empty(0)
    for start, stop, tiles, keys in plan._memo["runs"]:
        if not keys:
            out[:, :, start:stop], lse[:, :, start:stop] = 0, -torch.inf
            continue
        some = max(1, flash_rows.STRIPS // (batch * keys * width))
        for first in range(0, heads, some):
            part = slice(None), slice(first, first + some), slice(start, stop)
            strip, buffer = flash_rows.gathered(source, owner[:, part[1]] + tiles, buffer)
            seen = strip.view(batch, -1, len(tiles) * plan.tile_k, width)[:, :, :keys]
            out[part], lse[part] = _flash(q[part], seen, dim, scale)
    return out, lse


def _flash(q: Tensor, seen: Tensor, dim: int, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, seen[..., :dim], seen[..., dim:], scale=scale)


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
