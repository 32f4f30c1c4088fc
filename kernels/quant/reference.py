"""Quantised block-sparse attention in plain torch: what the quantised kernels compute, one query tile at a time.

Integer products are exact in float32 (127 x 127 x D stays below 2**24 for D up to 1040), so the emulation differs from
the hardware in the order of float32 sums alone, and in FP16 sums, which it rounds once per 64 products.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..block_sparse import gather
from ..block_sparse.order import repeat_heads
from ..tileplan import TilePlan
from .operands import Operands, smoothed
from .recipe import Recipe
from .values import FP16_CHAIN, LIMIT, ROUND

LOG2E = math.log2(math.e)
LOWEST = torch.finfo(torch.float32).min


def attention(
    q: Tensor, x: Operands, plan: TilePlan, recipe: Recipe, *, scale: float, alive: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out (B, H, Nq, Dv) in q's dtype and the natural-log LSE (B, H, Nq) float32, tokens in plan order.

    ``q``: the queries as given, for what stays in 16 bits; ``x``: the quantised operands, ``alive`` as in the
    block-sparse tiers. Reads only the listed tiles; memory is O(tile_q x visited keys).
    """
    x = replace(x, k=x.k.float(), v=x.v.float())
    plan = smoothed(plan, x, q)
    out = q.new_empty((*q.shape[:3], x.v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    for tile in range(plan.tiles_q):
        inside = slice(tile * plan.tile_q, min((tile + 1) * plan.tile_q, plan.n_q))
        out[:, :, inside], lse[:, :, inside] = rows(q, x, plan, recipe, tile, inside, scale=scale, alive=alive)
    return out, lse


def rows(
    q: Tensor, x: Operands, plan: TilePlan, recipe: Recipe, tile: int, inside: slice, *, scale: float,
    alive: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, R, Dv) and LSE (B, H, R) of one query tile, whose queries are ``inside``. float32."""
    heads = q.shape[1]
    slots, live = gather.visible(plan, tile, inside)
    if alive is not None:
        live = live & gather.pick(alive[..., None], slots)[..., 0][:, :, None, :]

    def seen(table: Tensor) -> Tensor:
        return gather.pick_slots(table, slots, heads)

    query = q[:, :, inside].float()
    # In place from here on: a new table of logits costs more than the arithmetic on it.
    score = x.q[:, :, inside].float() @ seen(x.k).mT
    score *= x.q_scale[:, :, inside, None]
    score *= seen(x.k_scale[..., None]).mT
    if x.q_mean is not None:
        block = torch.arange(inside.start, inside.stop, device=q.device) // recipe.block_q
        means = x.q_mean[:, :, inside.start // recipe.block_q : (inside.stop - 1) // recipe.block_q + 1]
        extra = means @ seen(x.k_smooth).mT * (scale * LOG2E)
        score += extra if extra.shape[2] == 1 else extra[:, :, block - inside.start // recipe.block_q]
    if not live.all():
        score.masked_fill_(~live, -torch.inf)
    score = score.unflatten(-1, (-1, plan.tile_k))
    pooled = [gather.represented(query, group, tile, scale) for group in plan.reps]
    logits = torch.cat([score.new_empty((*score.shape[:3], 0)), *(part * LOG2E for part, _ in pooled)], -1)

    # The maximum as each tile finds it, since weights are rounded in units of it; faded to the last one afterwards.
    peaks = score.amax(-1)
    last = gather.largest(torch.cat([peaks, logits], -1)).clamp_min(LOWEST)
    top = peaks.cummax(-1).values.clamp_min(LOWEST) if peaks.shape[-1] else peaks
    weight, fade = score.sub_(top[..., None]).exp2_(), torch.exp2(top - last)
    total = (weight.sum(-1) * fade).sum(-1, keepdim=True)
    out = _product(weight, fade, seen(x.v), recipe)
    if x.v_scale is not None:
        out = out * repeat_heads(x.v_scale, heads)
    mass = torch.exp2(logits - last)
    start = 0
    for part, values in pooled:
        out = out + mass[..., start : start + part.shape[-1]] @ values
        start += part.shape[-1]
    mass = mass.sum(-1, keepdim=True)
    total = total + mass
    empty = total == 0
    divisor = total.masked_fill(empty, 1)
    out = out / divisor
    if x.v_mean is not None:
        out = out + repeat_heads(x.v_mean, heads).masked_fill(empty, 0)
    if plan.first_order is not None:
        first_order = repeat_heads(plan.first_order, heads)
        out = out + scale * (mass / divisor) * (query @ first_order.float())
    if plan.row_scale is not None:
        out = out * plan.row_scale[:, :, tile, None, None] + plan.row_add[:, :, tile, None]
    lse = (last + total.log2()) / LOG2E
    if x.k_mean is not None:
        lse = lse + scale * (query @ repeat_heads(x.k_mean, heads).mT)
    return out, lse[..., 0]


def _product(weight: Tensor, fade: Tensor, values: Tensor, recipe: Recipe) -> Tensor:
    """P @ V as the recipe rounds it, summed tile by tile (B, H, R, Dv); it overwrites ``weight`` (B, H, R, T, K) of T
    tiles. ``fade``: (B, H, R, T), ``values``: (B, H, T K, Dv)."""
    if recipe.pv in LIMIT:
        unit = {
            "static": lambda: torch.ones_like(fade),
            "row": lambda: weight.amax(-1),
            "tile": lambda: weight.amax((2, 4))[:, :, None].expand_as(fade),
        }[recipe.p_scale]()
        unit = unit.masked_fill(unit == 0, 1) / LIMIT[recipe.pv]
        weight, fade = ROUND[recipe.pv](weight.div_(unit[..., None])), fade * unit
    elif recipe.pv == "fp16":
        weight = weight.half().float()
    size = weight.shape[-1]
    chain = min(size, FP16_CHAIN) if recipe.narrow else size
    out = weight.new_zeros((*weight.shape[:3], values.shape[-1]))
    for tile in range(weight.shape[3]):
        for start in range(0, size, chain):
            inside = slice(start, min(start + chain, size))
            part = weight[:, :, :, tile, inside] @ values[:, :, tile * size + inside.start : tile * size + inside.stop]
            if recipe.narrow:
                part = part.half().float()
            out.addcmul_(part, fade[..., tile, None])
    return out
