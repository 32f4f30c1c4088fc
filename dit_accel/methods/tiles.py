"""Tile order: tokens of a small T x H x W box made consecutive, so that few blocks are seen in part.

Over row-major tokens a window is a set of slivers. Reordered so that a block of slots is a box of the grid, each
block is skipped, seen whole or tested by comparing intervals per axis; no token mask is ever made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kernels import BlockList, Box, Predicate
from ..layout import Layout
from ..plans import Blocks, Plan
from .windows import Axis

Shape = tuple[int, int, int]

# Time per visited pair of the CPU tier relative to dense SDPA, by block size, and of a partial block relative to a
# full one (measured for 4,096 tokens of head size 64 at density 0.25).
BLOCK_COST = {128: 1.10, 64: 1.25}
PARTIAL_COST = 1.3
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
    def make(cls, layout: Layout, axes: Sequence[Axis], shape: Shape, block: int) -> Tiling:
        grid, n = layout.grid, layout.tokens
        start, stop = layout.main.start, layout.main.stop
        ranks = torch.unravel_index(arrange(torch.arange(stop - start).view(grid), shape, block), grid)
        t, h, w = (axis.coordinate[rank] for axis, rank in zip(axes, ranks, strict=True))
        token = torch.arange(n)
        order = torch.cat([start + (t * grid[1] + h) * grid[2] + w, token[:start], token[stop:]])
        ranks = tuple(pad(rank.int(), (0, n - len(rank))) for rank in ranks)
        moved = None if torch.equal(order, token) else order
        return cls(layout, Blocks.uniform(n, block), moved, ranks, token >= stop - start)

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

    def plan(self, seen: Tensor, whole: Tensor, predicate: Predicate, pairs: int, scale: float | None = None) -> Plan:
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
            order=self.order, scale=scale, _memo={"densities": densities(self.layout, pairs)},
        )  # fmt: skip


def box_plan(
    layout: Layout, axes: Sequence[Axis], shape: Shape, block: int, scale: float | None = None
) -> Plan:  # fmt: skip
    """The plan of windows that are a product of intervals per axis, in tiles of ``shape`` (``block`` tokens).

    A key block is skipped when it misses the union of its query block's intervals on some axis, and seen whole when
    it lies in their intersection on every axis.
    """
    restricted = [i for i, axis in enumerate(axes) if not axis.whole]
    if not restricted:
        return _dense(layout, block, scale)
    tiling = Tiling.make(layout, axes, shape, block)
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
    return tiling.plan(seen, whole, predicate, math.prod(axis.pairs for axis in axes), scale)


def _dense(layout: Layout, block: int, scale: float | None) -> Plan:
    blocks = Blocks.uniform(layout.tokens, block)
    mask = torch.ones((1, 1, blocks.count, blocks.count), dtype=torch.bool)
    return Plan(layout, blocks, blocks, BlockList.from_mask(mask), scale=scale)


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


def arrange(cells: Tensor, shape: Shape, block: int) -> Tensor:
    """``cells`` (T, H, W) flattened box by box of ``shape`` (``block`` cells); row-major inside, and over, the boxes.

    What is left at the far ends of the axes is cut into boxes of other shapes of ``block`` cells; only what fits
    none comes last, row-major.
    """
    whole, rest = _boxes(cells, shape if math.prod(shape) == block else None, block)
    return torch.cat(whole + rest)


def _boxes(cells: Tensor, shape: Shape | None, block: int) -> tuple[list[Tensor], list[Tensor]]:
    if shape is None:
        return [], [cells.flatten()]
    t, h, w = (n - n % size for n, size in zip(cells.shape, shape, strict=True))
    a, b, c = shape
    body = cells[:t, :h, :w].reshape(t // a, a, h // b, b, w // c, c).permute(0, 2, 4, 1, 3, 5)
    whole, rest = [body.flatten()], []
    for edge in (cells[t:], cells[:t, h:], cells[:t, :h, w:]):
        if edge.numel():
            more = _boxes(edge, _compact(edge.shape, block), block)
            whole += more[0]
            rest += more[1]
    return whole, rest


def _compact(extent: Sequence[int], block: int) -> Shape | None:
    """The box of ``block`` cells that covers most of ``extent``, among equals the most compact; None if none fits."""

    def merit(shape: Shape) -> tuple[int, int]:
        return math.prod(n - n % size for n, size in zip(extent, shape, strict=True)), -sum(shape)

    return max(shapes(extent, block), key=merit, default=None)


def shapes(extent: Sequence[int], block: int) -> list[Shape]:
    """Boxes of ``block`` cells, a power of two on each axis, that fit into ``extent``."""
    powers = [[1 << i for i in range(n.bit_length())] for n in extent]
    return [shape for shape in itertools.product(*powers) if math.prod(shape) == block]


def choose(axes: Sequence[Axis], blocks: Sequence[int] = tuple(BLOCK_COST)) -> tuple[Shape, int]:
    """The tile shape, and its number of tokens, that is expected to take least time over these windows.

    A grid that no tile fits into is small; its shape is the grid itself, in blocks of the smallest size.
    """
    extent = [axis.length for axis in axes]
    pairs: dict[tuple[int, int], tuple[int, int]] = {}

    def cost(shape: Shape, block: int) -> float:
        """In visible pairs: those of visited tiles, partial ones weighted; ragged ends count as smaller tiles."""
        for axis, size in enumerate(shape):
            if (axis, size) not in pairs:
                pairs[axis, size] = _tiled_pairs(axes[axis], size)
        seen, whole = (math.prod(pairs[key][i] for key in enumerate(shape)) for i in (0, 1))
        return BLOCK_COST.get(block, 1.0) * (PARTIAL_COST * seen - (PARTIAL_COST - 1) * whole)

    best = min(
        ((cost(shape, block), sum(shape), -block, shape) for block in blocks for shape in shapes(extent, block)),
        default=(0.0, 0, -min(blocks), tuple(extent)),
    )
    return best[3], -best[2]


def _tiled_pairs(axis: Axis, size: int) -> tuple[int, int]:
    """Pairs along one axis, in tiles of ``size``, whose tiles are seen at all, and seen whole."""
    n = axis.length
    start, tile = torch.arange(0, n, size), torch.arange(n) // size

    def extreme(values: Tensor, how: str) -> Tensor:
        return torch.empty_like(start).scatter_reduce(0, tile, values, how, include_self=False)

    lo_min, lo_max = extreme(axis.lo, "amin"), extreme(axis.lo, "amax")
    hi_min, hi_max = extreme(axis.hi, "amin"), extreme(axis.hi, "amax")
    seen = (-(-hi_max // size) * size).clamp_max(n) - lo_min // size * size
    end = torch.where(hi_min == n, n, hi_min // size * size)
    whole = (end - -(-lo_max // size) * size).clamp_min(0)
    queries = (n - start).clamp_max(size)
    return int((queries * seen).sum()), int((queries * whole).sum())
