"""Lowering: a Plan cut into the tiles of one size that kernels take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .blocks import Blocks
from .kernels import BlockList, Gate, TilePlan

if TYPE_CHECKING:
    from .plans import Plan


def lower(plan: Plan, tile: tuple[int, int] | None = None) -> TilePlan:
    """Cut a plan into kernel tiles of ``(tile_q, tile_k)`` slots; None keeps the plan's own block size.

    Blocks that are whole multiples of a tile are split and keep their class. Any other combination lists the
    union of what a tile overlaps and settles visibility with a gate: exact, but a tile is then partial unless
    all it overlaps is full. Cached per plan and tile.
    """
    tile = tile or (plan.q_blocks.size or 64, plan.k_blocks.size or 64)
    if tile not in plan._memo:
        plan._memo[tile] = _lower(plan, *tile)
    return plan._memo[tile]


def _lower(plan: Plan, tile_q: int, tile_k: int) -> TilePlan:
    bq, bk = plan.q_blocks.size, plan.k_blocks.size
    order, kv_order = plan._orders()
    common = {"n_q": plan.q_blocks.n, "n_k": plan.k_blocks.n, "order": order, "kv_order": kv_order}
    if (bq, bk) == (tile_q, tile_k):
        return TilePlan(tile_q, tile_k, full=plan.full, partial=plan.partial, predicate=plan.predicate, **common)
    nk = plan.k_blocks.count
    full = plan.full.mask(nk)
    part = plan.partial.mask(nk) if plan.partial is not None else torch.zeros_like(full)
    if bq is not None and bk is not None and bq % tile_q == 0 and bk % tile_k == 0:
        full, part = (_split(m, bq // tile_q, bk // tile_k, common, tile_q, tile_k) for m in (full, part))
        lists = BlockList.from_mask(full), BlockList.from_mask(part) if plan.partial is not None else None
        return TilePlan(tile_q, tile_k, full=lists[0], partial=lists[1], predicate=plan.predicate, **common)
    full, part = torch.broadcast_tensors(full, part)
    q_row, k_col = (blocks.owner().int().to(plan.device) for blocks in (plan.q_blocks, plan.k_blocks))
    gate = Gate((full * 2 + part).to(torch.uint8), q_row, k_col)
    rows, cols = (_overlap(b, t).to(plan.device) for b, t in ((plan.q_blocks, tile_q), (plan.k_blocks, tile_k)))
    seen = rows @ (full | part).float() @ cols.T
    whole = (rows @ full.float() @ cols.T) == rows.sum(-1)[:, None] * cols.sum(-1)
    return TilePlan(
        tile_q, tile_k, full=BlockList.from_mask(whole), partial=BlockList.from_mask((seen > 0) & ~whole),
        predicate=plan.predicate, gate=gate, **common,
    )  # fmt: skip


def _split(mask: Tensor, by_q: int, by_k: int, common: dict, tile_q: int, tile_k: int) -> Tensor:
    mask = mask.repeat_interleave(by_q, -2).repeat_interleave(by_k, -1)
    return mask[..., : -(-common["n_q"] // tile_q), : -(-common["n_k"] // tile_k)]


def _overlap(blocks: Blocks, tile: int) -> Tensor:
    """float32 (tiles, blocks): 1 where a tile and a block share a slot."""
    start = torch.arange(0, blocks.n, tile)[:, None]
    return ((start < blocks.bounds[1:]) & (start + tile > blocks.bounds[:-1])).float()
