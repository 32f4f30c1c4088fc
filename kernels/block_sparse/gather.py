"""Blocked gather: plain torch, one query tile at a time, reading only the listed key tiles.

The tier for machines without a C++ compiler, for float64, and for an exact LSE on CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..representatives import Group
from ..tileplan import TilePlan
from .order import repeat_heads


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, *, scale: float, alive: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As ``reference.attention``, in O(visited tiles) time and O(tile_q x visited) memory."""
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for tile in range(plan.tiles_q):
        inside = slice(tile * plan.tile_q, (tile + 1) * plan.tile_q)
        out[:, :, inside], lse[:, :, inside] = rows(q, k, v, plan, tile, scale=scale, alive=alive)
    return out, lse


def rows(
    q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, tile: int, *, scale: float, alive: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out (B, H, R, Dv) and LSE (B, H, R) of the R queries of one query tile."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads = q.shape[1]
    inside = slice(tile * plan.tile_q, min((tile + 1) * plan.tile_q, plan.n_q))
    slots, live = visible(plan, tile, inside)
    q = q[:, :, inside].to(dtype)
    if alive is not None:
        live = live & pick(alive[..., None], slots)[..., 0][:, :, None, :]
    keys, values = (pick_slots(x, slots, heads).to(dtype) for x in (k, v))
    scores = ((q @ keys.mT) * scale).masked_fill(~live, -torch.inf)
    exact = scores.shape[-1]
    for group in plan.reps:
        logits, pooled = represented(q, group, tile, scale)
        scores, values = torch.cat([scores, logits], -1), torch.cat([values, pooled], 2)
    top = largest(scores).clamp_min(torch.finfo(dtype).min)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    out = (weights @ values) / total.masked_fill(total == 0, 1)
    if plan.first_order is not None:
        mass = weights[..., exact:].sum(-1, keepdim=True) / total.masked_fill(total == 0, 1)
        out = out + scale * mass * (q @ repeat_heads(plan.first_order, heads).to(dtype))
    if plan.row_scale is not None:
        out = out * plan.row_scale[:, :, tile, None, None].to(dtype) + plan.row_add[:, :, tile, None].to(dtype)
    return out, (top + total.log())[..., 0]


def largest(scores: Tensor) -> Tensor:
    """(B, H, R, 1): the largest of scores (B, H, R, C), -inf of none at all."""
    return scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:3], 1), -torch.inf)


def represented(q: Tensor, group: Group, tile: int, scale: float) -> tuple[Tensor, Tensor]:
    """Logits (B, H, R, C) of the representatives that a query tile sees, and their values (B, H, C, Dv)."""
    count = group.seen.count[:, :, tile]
    width = int(count.max())
    index = group.seen.index[:, :, tile, :width].long()
    slots = (index[..., None] * group.width + torch.arange(group.width, device=index.device)).flatten(-2)
    listed = (torch.arange(width, device=index.device) < count[..., None]).repeat_interleave(group.width, -1)
    keys, values = (pick_slots(x, slots, q.shape[1]).to(q) for x in (group.key, group.value))
    bias = pick(group.bias()[..., None].to(q), slots)[..., 0].masked_fill(~listed, -torch.inf)
    return (q @ keys.mT) * scale + bias[:, :, None], values


def visible(plan: TilePlan, tile: int, rows: slice) -> tuple[Tensor, Tensor]:
    """Slots of the listed key tiles (B1, H1, C) and which pairs are visible, bool (B1, H1, R or 1, C)."""
    lists = [plan.full] if plan.partial is None else [plan.full, plan.partial]
    slots, masks = [], []
    for entry in lists:
        count = entry.count[:, :, tile]
        width = int(count.max())
        index = entry.index[:, :, tile, :width].long()
        slot = (index[..., None] * plan.tile_k + torch.arange(plan.tile_k, device=index.device)).flatten(-2)
        listed = (torch.arange(width, device=index.device) < count[..., None]).repeat_interleave(plan.tile_k, -1)
        live = (listed & (slot < plan.n_k))[:, :, None, :]
        slot = slot.clamp_max(plan.n_k - 1)
        if entry is plan.partial and width:
            live = live & _tested(plan, torch.arange(rows.start, rows.stop, device=index.device), slot)
        slots.append(slot)
        masks.append(live)
    if len(lists) == 1:
        return slots[0], masks[0]
    b1, h1, r, _ = torch.broadcast_shapes(*(m[..., :1].shape for m in masks))
    slots = [s.expand(b1, h1, -1) for s in slots]
    return torch.cat(slots, -1), torch.cat([m.expand(b1, h1, r, -1) for m in masks], -1)


def _tested(plan: TilePlan, q: Tensor, slots: Tensor) -> Tensor:
    """Pair visibility of the partial tiles' slots (B1, H1, C): bool (B1 or B, H1 or H, R, C)."""
    k = slots[:, :, None, :]
    seen = None if plan.predicate is None else plan.predicate.visible(q[:, None], k)
    if plan.gate is None:
        return seen
    table = plan.gate.table
    b, h = max(table.shape[0], slots.shape[0]), max(table.shape[1], slots.shape[1])
    batch = torch.arange(table.shape[0], device=q.device)[:, None, None, None]
    head = torch.arange(table.shape[1], device=q.device)[None, :, None, None]
    row = plan.gate.q_row[q].long()[:, None]
    col = plan.gate.k_col[k.expand(b, h, 1, -1)].long()
    cell = table[batch, head, row, col]
    return cell == 2 if seen is None else (cell == 2) | ((cell == 1) & seen)


def pick_slots(x: Tensor, slots: Tensor, heads: int) -> Tensor:
    """x (B, Hk, N, D) at slots (B1, H1, C) for every query head: (B, heads, C, D)."""
    if slots.shape[1] > 1:
        return pick(repeat_heads(x, heads), slots)
    return repeat_heads(x.index_select(2, slots[0, 0]) if len(slots) == 1 else pick(x, slots), heads)


def pick(x: Tensor, slots: Tensor) -> Tensor:
    """x (B, H, N, D) at slots (B1, H1, C), broadcast over batch and heads: (B, H, C, D)."""
    b, h = (max(x.shape[i], slots.shape[i]) for i in (0, 1))
    x = x.expand(b, h, *x.shape[2:])
    return x.gather(2, slots.expand(b, h, -1)[..., None].expand(-1, -1, -1, x.shape[-1]))
