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
    """Visible pairs over all pairs, and over main x main pairs, means over batch and heads.

    A representative counts as one key of each query that sees it, and as a main one where its first token is.
    """
    order, kv_order = plan._orders()
    q_main, k_main = (_main_weight(plan, layout) for layout in (plan.layout, plan.keys))
    q_main, k_main = (w if o is None else w[o.cpu()] for w, o in ((q_main, order), (k_main, kv_order)))
    rows = torch.ones(plan.q_blocks.n), q_main
    keys = torch.ones(plan.k_blocks.n), k_main
    terms = [_listed_pairs(plan, plan.full, [_per_block(w, plan.k_blocks) for w in keys], rows)]
    for group in plan.reps:
        live = (group.count > 0).double()
        # One that stands for nothing may begin where the tokens end.
        main = live * k_main[..., group.bounds[:-1].clamp_max(plan.k_blocks.n - 1)]
        weights = [w.unflatten(-1, (-1, group.width)).sum(-1) for w in (live, main)]
        terms.append(_listed_pairs(plan, group.seen, weights, rows))
    if plan.partial is not None:
        terms.append(_partial_pairs(plan))
    total = plan.q_blocks.n * plan.k_blocks.n
    mains = float(plan.layout.main.stop - plan.layout.main.start) * (plan.keys.main.stop - plan.keys.main.start)
    return sum(term[0] for term in terms) / total, sum(term[1] for term in terms) / mains


def _main_weight(plan: Plan, layout: Layout) -> Tensor:
    return torch.zeros(layout.tokens).index_fill_(0, torch.arange(layout.main.start, layout.main.stop), 1)


def _listed_pairs(
    plan: Plan, entry: BlockList, weights: list[Tensor], rows: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Pairs of listed blocks, all and main. ``weights``: keys per block (.., blocks); ``rows``: queries per slot."""
    valid, index = entry.valid().cpu(), entry.index.cpu().long()
    found = []
    for weight, row in zip(weights, rows, strict=True):
        weight = weight.cpu().double()[(None,) * (3 - weight.ndim)]
        b1, h1 = (max(weight.shape[i], index.shape[i]) for i in (0, 1))
        flat = index.expand(b1, h1, -1, -1).flatten(2)
        kept = weight.expand(b1, h1, -1).gather(-1, flat).view(b1, h1, *index.shape[2:])
        kept = (kept * valid).sum(-1)
        found.append(float((kept * _per_block(row, plan.q_blocks)).sum(-1).mean()))
    return found[0], found[1]


def _per_block(weight: Tensor, blocks: Blocks) -> Tensor:
    """Sums of ``weight`` (n,) or (H, n) over blocks: (blocks,) or (H, blocks)."""
    total = torch.nn.functional.pad(weight.double().cumsum(-1), (1, 0))
    return total[..., blocks.bounds].diff(dim=-1)


def _partial_pairs(plan: Plan) -> tuple[float, float]:
    """Pairs of the partial blocks that pass the predicate, one query block at a time; means over batch and heads."""
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
        seen += float((listed.double().mean((0, 1)) * visible.sum(0)).sum())
        rows, columns = _in_main(q_token[..., q], plan.layout), _in_main(k_token[..., k], plan.keys)
        inside = rows[..., :, None] & columns[..., None, :]
        video += float((visible & inside & listed[..., None, :]).double().mean((0, 1)).sum())
    return seen, video


def _in_main(tokens: Tensor, layout: Layout) -> Tensor:
    return (tokens >= layout.main.start) & (tokens < layout.main.stop)
