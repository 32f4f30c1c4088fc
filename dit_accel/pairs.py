"""Visible pairs of a plan, counted without a token mask, on the plan's device and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .blocks import Blocks
from .kernels import BlockList
from .layout import Layout

if TYPE_CHECKING:
    from .plans import Plan

# Elements of the largest temporary, unless one block or one row of blocks has more.
MOST = 1 << 22


def count_pairs(plan: Plan) -> tuple[float, float]:
    """Visible pairs over all pairs, and over main x main pairs, means over batch and heads.

    A representative counts as one key of each query that sees it, and as a main one where its first token is.
    """
    order, kv_order = plan._orders()
    q_main, k_main = _main(plan.layout, order, plan.device), _main(plan.keys, kv_order, plan.device)
    rows = [_per_block(x, plan.q_blocks) for x in (torch.ones_like(q_main), q_main)]
    keys = [_per_block(x, plan.k_blocks) for x in (torch.ones_like(k_main), k_main)]
    terms = [_listed_pairs(plan.full, keys, rows)]
    for group in plan.reps:
        live = group.count > 0
        # One that stands for nothing may begin where the tokens end.
        first = group.bounds[:-1].clamp_max(plan.k_blocks.n - 1).to(plan.device)
        weights = [w.unflatten(-1, (-1, group.width)).sum(-1) for w in (live, live & k_main[..., first])]
        terms.append(_listed_pairs(group.seen, weights, rows))
    if plan.partial is not None:
        terms.append(_partial_pairs(plan, q_main, k_main))
    total = plan.q_blocks.n * plan.k_blocks.n
    mains = float(plan.layout.main.stop - plan.layout.main.start) * (plan.keys.main.stop - plan.keys.main.start)
    return sum(term[0] for term in terms) / total, sum(term[1] for term in terms) / mains


def _main(layout: Layout, order: Tensor | None, device: torch.device) -> Tensor:
    """bool (n,) or (H, n): which slots hold a token of the main segment."""
    tokens = torch.arange(layout.tokens, device=device) if order is None else order
    return (tokens >= layout.main.start) & (tokens < layout.main.stop)


def _per_block(kind: Tensor, blocks: Blocks) -> Tensor:
    """Slots of a ``kind``, bool (n,) or (H, n), per block: int64 (blocks,) or (H, blocks)."""
    total = torch.nn.functional.pad(kind.cumsum(-1), (1, 0))
    return total[..., blocks.on(kind.device)[0]].diff(dim=-1)


def _listed_pairs(entry: BlockList, weights: list[Tensor], rows: list[Tensor]) -> tuple[float, float]:
    """Pairs of listed blocks, all and main; means over batch and heads.

    ``weights``: keys per block, int64 (.., blocks); ``rows``: queries per row of blocks, int64 (nq,) or (H, nq).
    """
    found = []
    for weight, row in zip(weights, rows, strict=True):
        weight, row = (x[(None,) * (3 - x.ndim)] for x in (weight, row))
        b, h = (max(x.shape[i] for x in (weight, row, entry.index)) for i in (0, 1))
        total = torch.zeros((), dtype=torch.int64, device=weight.device)
        for which, some in _rows(entry, b * h * entry.width):
            index = some.index.long().expand(b, h, -1, -1)
            kept = weight.expand(b, h, -1).gather(-1, index.flatten(2)).view(index.shape)
            total += ((kept * some.valid()).sum(-1) * row[..., which]).sum()
        found.append(total.item() / (b * h))
    return found[0], found[1]


def _rows(entry: BlockList, cost: int) -> Iterator[tuple[slice, BlockList]]:
    """All rows of a list, as many at once as fit: which, and their list. ``cost``: elements of a row's temporary."""
    step = max(1, MOST // max(cost, 1))
    for start in range(0, entry.count.shape[2], step):
        rows = slice(start, start + step)
        yield rows, BlockList(entry.count[:, :, rows], entry.index[:, :, rows])


def _partial_pairs(plan: Plan, q_main: Tensor, k_main: Tensor) -> tuple[float, float]:
    """Pairs of the partial blocks that pass the predicate, all and main; means over batch and heads.

    A block that several tables list is tested once. ``q_main``, ``k_main``: bool (n,) or (H, n).
    """
    entry = plan.partial
    b, h = entry.count.shape[:2]
    heads = max(x.shape[0] if x.ndim == 2 else 1 for x in (q_main, k_main))
    totals = torch.zeros(2, dtype=torch.int64, device=plan.device)
    for which, some in _rows(entry, b * h * max(entry.width, plan.k_blocks.count)):
        mask = some.mask(plan.k_blocks.count).sum(0)  # (h, rows, blocks): tables of the batch that list it
        row, column = mask.any(0).nonzero().unbind(-1)
        listed = mask[:, row, column]
        for batch, q, k in _batches(plan, row + which.start, column):
            seen = plan.predicate.visible(q.slots[..., None], k.slots[:, None])
            seen &= q.real[..., None] & k.real[:, None]
            count = listed[:, batch]
            totals[0] += (seen.sum((1, 2)) * count).sum()
            for head in range(heads):
                own = (x if x.ndim == 1 else x[head] for x in (q_main, k_main))
                rows, keys = (main[side.slots] for main, side in zip(own, (q, k), strict=True))
                inside = (seen & rows[..., None] & keys[:, None]).sum((1, 2))
                totals[1] += (inside * (count.sum(0) if heads == 1 else count[min(head, h - 1)])).sum()
    seen, main = totals.tolist()
    return seen / (b * h), main / (b * max(h, heads))


class _Side:
    """``slots``: int64 (blocks, size) of some blocks, padded with slots that are not theirs; ``real``: which are."""

    def __init__(self, bounds: Tensor, block: Tensor, size: int) -> None:
        slots = bounds[block][:, None] + torch.arange(size, device=block.device)
        self.real = slots < bounds[block + 1][:, None]
        self.slots = slots.minimum(bounds[-1] - 1)


def _batches(plan: Plan, row: Tensor, column: Tensor) -> Iterator[tuple[Tensor, _Side, _Side]]:
    """Pairs of blocks (``row[i]``, ``column[i]``), as many at once as fit: which ones, their queries and their keys.

    Blocks of about one size go together, so that little is padding.
    """
    sides = [(blocks.on(plan.device)[0], index) for blocks, index in ((plan.q_blocks, row), (plan.k_blocks, column))]
    classes = [_classes(bounds)[index] for bounds, index in sides]
    for q_class, k_class in torch.stack(classes, -1).unique(dim=0).tolist():
        members = ((classes[0] == q_class) & (classes[1] == k_class)).nonzero().flatten()
        sizes = 1 << q_class, 1 << k_class
        for batch in members.split(max(1, MOST // (sizes[0] * sizes[1]))):
            q, k = (_Side(bounds, index[batch], size) for (bounds, index), size in zip(sides, sizes, strict=True))
            yield batch, q, k


def _classes(bounds: Tensor) -> Tensor:
    """int64 (blocks,): the least c for which a block has no more than 2^c slots."""
    return bounds.diff().clamp_min(1).double().log2().ceil().long()
