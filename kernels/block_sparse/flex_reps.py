"""Representatives as key tiles in front of the exact ones, for a kernel that knows nothing but key tiles.

In front, because behind the keys the ragged tail would need padding and a test of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocklist import BlockList
from ..predicate import Gate, Predicate
from ..tileplan import TilePlan
from .order import repeat_heads


def refuses(plan: TilePlan) -> str | None:
    """Why the representatives of ``plan`` cannot be joined to its keys, or None."""
    tested = plan.predicate is not None and not plan.predicate.only_dead
    if plan.reps and (plan.gate is not None or tested):
        return "the plan has representatives beside tiles with a test of their own"
    return None


def front(plan: TilePlan) -> int:
    """Slots in front of the keys: the representatives, padded to whole key tiles."""
    return -(-sum(group.size for group in plan.reps) // plan.tile_k) * plan.tile_k


def joined(plan: TilePlan) -> TilePlan:
    """The plan over [representatives | keys]: their tiles are partial, and a gate says who sees whom."""
    lead, width = front(plan), plan.tile_k
    masks = [group.mask() for group in plan.reps]
    b1, h1 = (max(m.shape[i] for m in (*masks, plan.full.count)) for i in (0, 1))
    seen = torch.cat([m.expand(b1, h1, -1, -1) for m in masks], -1)
    reps = seen.shape[-1]
    listed = pad(seen, (0, lead - reps)).unflatten(-1, (-1, width)).any(-1)
    full = plan.full.mask(plan.tiles_k).expand(b1, h1, -1, -1)
    part = torch.zeros_like(full) if plan.partial is None else plan.partial.mask(plan.tiles_k).expand_as(full)
    # Two columns more: keys, which only the predicate can hide, and the padding between, which no one sees.
    keys = seen.new_full((*seen.shape[:3], 1), True, dtype=torch.uint8) * (2 if plan.predicate is None else 1)
    table = torch.cat([seen.to(torch.uint8) * 2, keys, torch.zeros_like(keys)], -1)
    column = torch.full((lead + plan.n_k,), reps, dtype=torch.int32, device=plan.device)
    column[:reps] = torch.arange(reps, dtype=torch.int32, device=plan.device)
    column[reps:lead] = reps + 1
    row = torch.arange(plan.n_q, dtype=torch.int32, device=plan.device) // plan.tile_q
    predicate = None if plan.predicate is None else Predicate(dead=pad(plan.predicate.dead, (lead, 0)))
    return TilePlan(
        plan.tile_q, width, plan.n_q, lead + plan.n_k,
        BlockList.from_mask(torch.cat([torch.zeros_like(listed), full], -1)),
        BlockList.from_mask(torch.cat([listed, part], -1)),
        predicate, Gate(table, row, column),
    )  # fmt: skip


def strips(k: Tensor, v: Tensor, plan: TilePlan) -> tuple[Tensor, Tensor]:
    """[representatives | k] and [representatives | v]. With a first-order term the values carry one column more, 1 for
    every representative, whose output is their share of the mass."""
    heads = max(k.shape[1], *(group.key.shape[1] for group in plan.reps))
    gap = front(plan) - sum(group.size for group in plan.reps)

    def join(parts: list[Tensor]) -> Tensor:
        parts = [repeat_heads(x, heads) for x in parts]
        empty = parts[0].new_zeros((*parts[0].shape[:2], gap, parts[0].shape[3]))
        return torch.cat([*parts[1:], empty, parts[0]], 2)

    values = [v, *(group.value for group in plan.reps)]
    if plan.first_order is not None:
        values = [pad(x, (0, 1), value=float(number > 0)) for number, x in enumerate(values)]
    return join([k, *(group.key for group in plan.reps)]), join(values)


def bias(plan: TilePlan, alive: Tensor | None) -> Tensor:
    """float32 (B1, H1, lead + Nk): ``log n`` of the representatives, 0 for live keys, -inf for dead ones."""
    parts = [group.bias() for group in plan.reps]
    keys = torch.zeros((1, 1, plan.n_k), device=plan.device)
    if alive is not None:
        keys = keys.expand(*alive.shape).masked_fill(~alive, -torch.inf)
    b1, h1 = (max(x.shape[i] for x in (*parts, keys)) for i in (0, 1))
    gap = keys.new_zeros((1, 1, front(plan) - sum(x.shape[-1] for x in parts)))
    return torch.cat([x.expand(b1, h1, -1) for x in (*parts, gap, keys)], -1)


def finish(out: Tensor, q: Tensor, plan: TilePlan, scale: float) -> Tensor:
    """The first-order term and the row factors on the kernel's output (B, H, Nq, Dv or Dv + 1)."""
    dtype, n = torch.promote_types(q.dtype, torch.float32), q.shape[2]
    if plan.first_order is not None:
        first = repeat_heads(plan.first_order.to(dtype), q.shape[1])
        out = out[..., :-1] + scale * out[..., -1:] * (q.to(dtype) @ first)
    if plan.row_scale is not None:
        factors = (plan.row_scale[..., None], plan.row_add)
        factor, shift = (x.to(dtype).repeat_interleave(plan.tile_q, 2)[:, :, :n] for x in factors)
        out = torch.addcmul(shift, out.to(dtype), factor)
    return out.to(q.dtype)
