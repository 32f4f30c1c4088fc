"""Tile order: tokens of a small T x H x W box made consecutive, so that few blocks are seen in part.

Over row-major tokens a window is a set of slivers. Reordered so that a block of slots is a box of the grid, each
block is skipped, seen whole or tested by comparing intervals per axis; no token mask is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kernels import BlockList, Box, Predicate
from ..layout import Layout
from ..plans import Blocks, Plan
from .tile_shapes import Shapes, arrange
from .windows import Axis

# Beyond any coordinate; the squares of two differences still fit an int64.
FAR = 1 << 28
# A bound that no coordinate reaches, in int32.
ALWAYS = 1 << 30


@dataclass(frozen=True, eq=False)
class Tiling:
    """One layout in tile order: the main segment tile by tile, then every token outside of it.

    ``order``: int64 (N,) slot -> token, or None where nothing moves. ``ranks``: per axis int32 (N,), the rank of
    each slot's token, 0 outside the main segment. ``outside``: bool (N,).
    """

    layout: Layout
    blocks: Blocks
    order: Tensor | None
    ranks: tuple[Tensor, ...]
    outside: Tensor

    @classmethod
    def make(cls, layout: Layout, axes: Sequence[Axis], shapes: Shapes) -> Tiling:
        grid, n = layout.grid, layout.tokens
        start, stop = layout.main.start, layout.main.stop
        cell = arrange(torch.arange(stop - start).view(grid), shapes)
        # By hand: torch.unravel_index imports a symbolic algebra package on first use, which takes seconds.
        ranks = cell // (grid[1] * grid[2]), cell // grid[2] % grid[1], cell % grid[2]
        t, h, w = (axis.coordinate[rank] for axis, rank in zip(axes, ranks, strict=True))
        token = torch.arange(n)
        order = torch.cat([start + (t * grid[1] + h) * grid[2] + w, token[:start], token[stop:]])
        ranks = tuple(pad(rank.int(), (0, n - len(rank))) for rank in ranks)
        moved = None if torch.equal(order, token) else order
        return cls(layout, Blocks.uniform(n, shapes.block), moved, ranks, token >= stop - start)

    @property
    def mixed(self) -> Tensor:
        """bool (blocks,): blocks that hold a token outside the main segment."""
        return self.blocks.bounds[1:] > self.layout.main.stop - self.layout.main.start

    def lowest(self, values: Tensor) -> Tensor:
        """int64 (blocks,): the least of ``values`` (N,) over each block's main tokens, FAR without any."""
        size = int(self.blocks.bounds[1])
        values = values.long().masked_fill(self.outside, FAR)
        return pad(values, (0, self.blocks.count * size - self.blocks.n), value=FAR).view(-1, size).amin(1)

    def highest(self, values: Tensor) -> Tensor:
        """int64 (blocks,): the greatest of ``values`` (N,) over each block's main tokens, -FAR without any."""
        return -self.lowest(-values.long())

    def plan(self, seen: Tensor, whole: Tensor, predicate: Predicate, pairs: int) -> Plan:
        """The plan of block classes over the main tokens, bool (blocks, blocks).

        ``seen``: some pair is visible; ``whole``: every pair is. Tokens outside the main segment see and are seen
        by all. ``pairs``: visible main pairs, so that no one has to count them.
        """
        seen = seen | self.mixed[:, None] | self.mixed[None, :]
        partial = seen & ~whole
        some = bool(partial.any())
        return Plan(
            self.layout, self.blocks, self.blocks, listed(whole), listed(partial) if some else None,
            predicate if some else None,
            order=self.order, _memo={"densities": densities(self.layout, pairs)},
        )  # fmt: skip


def box_plan(layout: Layout, axes: Sequence[Axis], shapes: Shapes) -> Plan:
    """The plan of windows that are a product of intervals per axis.

    A key block is skipped when it misses the union of its query block's intervals on some axis, and seen whole when
    it lies in their intersection on every axis.
    """
    restricted = [i for i, axis in enumerate(axes) if not axis.whole]
    if not restricted:
        return _dense(layout, shapes.block)
    tiling = Tiling.make(layout, axes, shapes)
    seen = torch.ones((tiling.blocks.count,) * 2, dtype=torch.bool)
    whole, tables = seen.clone(), []
    for i in restricted:
        rank = tiling.ranks[i]
        lo = axes[i].lo.int()[rank].masked_fill(tiling.outside, -ALWAYS)
        hi = axes[i].hi.int()[rank].masked_fill(tiling.outside, ALWAYS)
        first, last = tiling.lowest(rank)[None, :], tiling.highest(rank)[None, :]
        seen &= (last >= tiling.lowest(lo)[:, None]) & (first < tiling.highest(hi)[:, None])
        whole &= (first >= tiling.highest(lo)[:, None]) & (last < tiling.lowest(hi)[:, None])
        tables.append((lo, hi, rank))
    always = tiling.outside if layout.tokens > math.prod(layout.grid) else None
    predicate = Predicate(box=Box(*(tuple(x) for x in zip(*tables, strict=True))), always=always)
    return tiling.plan(seen, whole, predicate, math.prod(axis.pairs for axis in axes))


def _dense(layout: Layout, block: int) -> Plan:
    blocks = Blocks.uniform(layout.tokens, block)
    mask = torch.ones((1, 1, blocks.count, blocks.count), dtype=torch.bool)
    return Plan(layout, blocks, blocks, BlockList.from_mask(mask))


def listed(mask: Tensor) -> BlockList:
    """The BlockList of a shared mask, bool (nq, nk) on the CPU. In time of what is listed, where a sort costs all."""
    row, column = mask.nonzero(as_tuple=True)
    count = mask.sum(-1)
    index = torch.zeros((len(mask), max(int(count.max()), 1)), dtype=torch.int32)
    index[row, torch.arange(len(row)) - (count.cumsum(0) - count)[row]] = column.int()
    return BlockList(count.int()[None, None], index[None, None])


def densities(layout: Layout, pairs: int) -> tuple[float, float]:
    """Density and video density of ``pairs`` visible main pairs with everything else dense."""
    n, main = layout.tokens, math.prod(layout.grid)
    return (pairs + n * n - main * main) / (n * n), pairs / (main * main)
