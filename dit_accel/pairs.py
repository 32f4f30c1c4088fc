"""Visible pairs of a plan, counted without a token mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .blocks import Blocks
from .kernels import BlockList
from .layout import Layout

if TYPE_CHECKING:
    from .plans import Plan


def count_pairs(plan: Plan) -> tuple[float, float]:
    """Visible pairs over all pairs, and over main x main pairs."""
    total = plan.q_blocks.n * plan.k_blocks.n
    q_main, k_main = (_main_weight(plan, layout) for layout in (plan.layout, plan.keys))
    entries = [entry for entry in (plan.full, plan.partial) if entry is not None]
    tables = max(entry.count.shape[0] * entry.count.shape[1] for entry in entries)
    seen = video = 0.0
    for entry in entries:
        repeat = tables // (entry.count.shape[0] * entry.count.shape[1])
        pairs = _partial_pairs(plan) if entry is plan.partial else _full_pairs(plan, entry, q_main, k_main)
        seen, video = seen + repeat * pairs[0], video + repeat * pairs[1]
    mains = float(plan.layout.main.stop - plan.layout.main.start) * (plan.keys.main.stop - plan.keys.main.start)
    return seen / (tables * total), video / (tables * mains)


def _main_weight(plan: Plan, layout: Layout) -> Tensor:
    return torch.zeros(layout.tokens).index_fill_(0, torch.arange(layout.main.start, layout.main.stop), 1)


def _full_pairs(plan: Plan, entry: BlockList, q_main: Tensor, k_main: Tensor) -> tuple[float, float]:
    order, kv_order = plan._orders()
    mask = entry.mask(plan.k_blocks.count).cpu().double()
    seen = (plan.q_blocks.sizes.double() @ mask @ plan.k_blocks.sizes.double()).sum()
    q_video, k_video = (
        _per_block(weight if o is None else weight[o.cpu()], blocks)
        for weight, o, blocks in ((q_main, order, plan.q_blocks), (k_main, kv_order, plan.k_blocks))
    )
    video = (q_video[..., None] * mask * k_video[..., None, :]).sum((-2, -1))
    return float(seen), float(video.sum())


def _per_block(weight: Tensor, blocks: Blocks) -> Tensor:
    """Sums of ``weight`` (n,) or (H, n) over blocks: (blocks,) or (H, blocks)."""
    total = torch.nn.functional.pad(weight.double().cumsum(-1), (1, 0))
    return total[..., blocks.bounds].diff(dim=-1)


def _partial_pairs(plan: Plan) -> tuple[float, float]:
    """Pairs of the partial blocks that pass the predicate, counted one query block at a time."""
    tiles = plan.to(torch.device("cpu"))
    order, kv_order = tiles._orders()
    q_token = torch.arange(plan.q_blocks.n) if order is None else order
    k_token = torch.arange(plan.k_blocks.n) if kv_order is None else kv_order
    mask = tiles.partial.mask(plan.k_blocks.count)
    seen = video = 0.0
    bounds, kb = plan.q_blocks.bounds.tolist(), plan.k_blocks.owner()
    for block in range(plan.q_blocks.count):
        q = torch.arange(bounds[block], bounds[block + 1])
        columns = mask[:, :, block].any(0).any(0)
        k = torch.nonzero(columns[kb]).flatten()
        visible = tiles.predicate.visible(q[:, None], k[None, :])
        listed = mask[:, :, block][:, :, kb[k]]
        seen += float((listed.sum((0, 1)) * visible.sum(0)).sum())
        rows, columns = _in_main(q_token[..., q], plan.layout), _in_main(k_token[..., k], plan.keys)
        inside = rows[..., :, None] & columns[..., None, :]
        video += float((visible & inside & listed[..., None, :]).sum())
    return seen, video


def _in_main(tokens: Tensor, layout: Layout) -> Tensor:
    return (tokens >= layout.main.start) & (tokens < layout.main.stop)
