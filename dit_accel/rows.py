"""A few rows of attention in plain torch: what a plan means for some queries, and what exact attention gives them.

The reference tier's arithmetic on the rows alone, read off the method's own plan, so that lowering, tables and kernel
are all checked against it. Memory is rows x Nk, and float32 copies of a few heads at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Blocks
from .kernels import BlockList
from .plans import Plan

GOLDEN = 0.6180339887498949  # of a turn between neighbours: no period of a grid is met twice
CHUNK = 64 * 2**20  # bytes of float32 keys at a time


@dataclass(frozen=True)
class Rows:
    """Sampled rows in the accumulation dtype.

    ``tokens``: int64 (1 or H, R), which queries. ``planned``, ``exact`` (B, H, R, Dv): the plan's reference, and all
    keys under the dense scale. ``size`` (B, H, R): what a row of ``planned`` is held against, its own norm and that
    which as many unrelated values would have left, so that a row whose values cancel is not held against nothing.
    ``kept`` (B, H, R): share of the exact softmax mass on pairs that the plan attends exactly.
    """

    tokens: Tensor
    planned: Tensor
    exact: Tensor
    size: Tensor
    kept: Tensor


def spread_slots(n: int, rows: int, shift: float, device: torch.device) -> Tensor:
    """int64 (min(rows, n),): the last slot, the first, and others evenly over ``n``. Made on the device, no host sync.

    ``shift`` in [0, 1) turns the pattern; equal arguments give equal slots. The ends are where tails are dropped.
    """
    rows = min(rows, n)
    turns = (torch.arange(rows, device=device, dtype=torch.float32) * GOLDEN + shift) % 1
    slots = (turns * n).long().clamp_(max=n - 1)
    slots[0] = n - 1
    slots[1:2] = 0
    return slots


def tokens_of(plan: Plan, slots: Tensor) -> Tensor:
    """int64 (1 or H, R): the queries at ``slots`` of the plan's order."""
    order = plan.order
    return (slots if order is None else order[..., slots]).reshape(-1, len(slots))


def take(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows of x (B, H, N, D) by token (1 or H, R): (B, H, R, D)."""
    return x.gather(2, tokens.expand(x.shape[1], -1)[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[-1]))


def visible(plan: Plan, slots: Tensor) -> Tensor:
    """bool (B1, H1, R, Nk), keys in the caller's token order: the pairs of some query slots attended exactly."""
    block, owner = _block_of(plan.q_blocks, slots), plan.k_blocks.on(slots.device)[1]
    seen = _listed(plan.full, block, plan.k_blocks.count)[..., owner]
    if plan.partial is not None:
        keys = torch.arange(plan.k_blocks.n, device=slots.device)
        passes = plan.predicate.visible(slots[:, None], keys[None])
        seen = seen | (_listed(plan.partial, block, plan.k_blocks.count)[..., owner] & passes)
    order = plan.kv_order if plan.kv_order is not None else plan.order
    if order is None:
        return seen
    order = order.reshape(1, -1, 1, order.shape[-1])
    seen = seen.expand(-1, max(seen.shape[1], order.shape[1]), -1, -1)
    return torch.zeros_like(seen).scatter_(-1, order.expand_as(seen), seen)


@torch.no_grad()
def sample(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, slots: Tensor, *, scale: float | None = None,
    kv_valid: Tensor | None = None,
) -> Rows:  # fmt: skip
    """The rows at ``slots``, int64 (R,), of q (B, H, Nq, D), k (B, Hk, Nk, D), v (B, Hk, Nk, Dv).

    ``scale``: of the call; None takes the plan's own for ``planned`` and D**-0.5 for ``exact``. ``kv_valid`` int32
    (B,): keys from that index on are dead. float64 stays, everything else is computed in float32. No host sync.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    n, dim = k.shape[2:]
    tokens = tokens_of(plan, slots)
    queries, seen = take(q, tokens).to(dtype), visible(plan, slots)
    dead = None if kv_valid is None else torch.arange(n, device=q.device) >= kv_valid.to(q.device)[:, None, None, None]
    dense, own = dim**-0.5 if scale is None else scale, plan.softmax_scale(dim, scale)
    block = _block_of(plan.q_blocks, slots)
    each = max(1, CHUNK // (q.shape[0] * n * dim * dtype.itemsize))
    parts = []
    for start in range(0, k.shape[1], each):
        heads = _Heads(q.shape[1], k.shape[1], start, min(start + each, k.shape[1]))
        query, keys, values = heads.of(queries), k[:, heads.keys].to(dtype), v[:, heads.keys].to(dtype)
        scores = heads.product(query, keys.mT)
        if dead is not None:
            scores, values = scores.masked_fill(dead, -torch.inf), values.masked_fill(dead.mT, 0)
        weights, mine = (scores * dense).softmax(-1), heads.of(seen)
        planned = _planned(query, (scores * own).masked_fill(~mine, -torch.inf), values, plan, block, heads, own)
        parts.append((*planned, heads.product(weights, values), (weights * mine).sum(-1)))
    planned, size, exact, kept = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return Rows(tokens, planned, exact, size, kept)


def _planned(
    query: Tensor, logits: Tensor, values: Tensor, plan: Plan, block: Tensor, heads: _Heads, scale: float
) -> tuple[Tensor, Tensor]:
    """``planned`` and ``size`` of some heads. ``logits`` (B, H, R, Nk): of the exact pairs, -inf elsewhere."""
    dtype, n = query.dtype, values.shape[2]
    joint, pooled = [logits], []
    for group in plan.reps:
        score = (query @ heads.of(group.key).to(dtype).mT) * scale + heads.of(group.bias()).to(dtype)[:, :, None]
        listed = _listed(group.seen, block, group.blocks).repeat_interleave(group.width, -1)
        joint.append(score.masked_fill(~heads.of(listed & (group.count > 0)[:, :, None]), -torch.inf))
        pooled.append(heads.of(group.value).to(dtype).expand(*score.shape[:2], -1, -1))
    joint = torch.cat(joint, -1)
    # A row without a key is 0, as in every tier.
    weights = joint.softmax(-1).masked_fill((joint == -torch.inf).all(-1, keepdim=True), 0)
    out, mass = heads.product(weights[..., :n], values), weights[..., n:]
    if pooled:
        out = out + mass @ torch.cat(pooled, 2)
    size = weights.square().sum(-1) * heads.repeat(values.square().sum(-1).mean(-1))[..., None]
    if plan.first_order is not None:
        out = out + scale * _first_order(query, mass, heads.of(plan.first_order).to(dtype))
    if plan.row_scale is not None:
        factor, shift = (heads.of(x)[:, :, block].to(dtype) for x in (plan.row_scale, plan.row_add))
        out = out * factor[..., None] + shift
        size = size * factor.square() + shift.square().sum(-1)
    return out, (out.square().sum(-1) + size).sqrt()


def _first_order(query: Tensor, mass: Tensor, matrix: Tensor) -> Tensor:
    """p x (q @ matrix), p the mass on representatives: one matrix for all of them, or one for each."""
    if matrix.ndim == 4:
        return mass.sum(-1, keepdim=True) * (query @ matrix)
    return (mass[..., None] * torch.einsum("bhqd,bhrde->bhqre", query, matrix)).sum(-2)


@dataclass(frozen=True)
class _Heads:
    """The key heads ``start`` to ``stop`` and the query heads that they serve."""

    count: int
    key_count: int
    start: int
    stop: int

    @property
    def keys(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def share(self) -> int:
        """Query heads per key head."""
        return self.count // self.key_count

    def of(self, table: Tensor) -> Tensor:
        """A table over one, all key or all query heads for these query heads; one head stays one."""
        if table.shape[1] == self.count != 1:
            return table[:, self.start * self.share : self.stop * self.share]
        return table if table.shape[1] == 1 else self.repeat(table[:, self.keys])

    def repeat(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.share, 1)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a (B, H, R, X) @ b (B, Hk, X, Y) without repeating b over the query heads."""
        grouped = a.reshape(a.shape[0], b.shape[1], -1, a.shape[-1])
        return (grouped @ b).reshape(*a.shape[:3], b.shape[-1])


def _listed(entry: BlockList, block: Tensor, blocks: int) -> Tensor:
    """bool (B1, H1, R, blocks): what the query blocks ``block`` list."""
    return BlockList(entry.count[:, :, block], entry.index[:, :, block]).mask(blocks)


def _block_of(blocks: Blocks, slots: Tensor) -> Tensor:
    return torch.searchsorted(blocks.on(slots.device)[0], slots.contiguous(), right=True) - 1
