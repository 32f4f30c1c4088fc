"""Blocks of PISA: tiles of the grid, and runs of the tokens beside it, in the order in which they come."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import Grid, Layout
from ..plans import Blocks
from .tile_shapes import Shape, boxes


@dataclass(frozen=True, eq=False)
class Regions:
    """The blocks of one layout. ``main``: which of them hold the main segment, and nothing else.

    ``order``: int64 (N,) slot -> token on the CPU, or None where nothing moves. Segments keep their places; inside
    the main one tiles follow each other row-major, and so do the tokens of a tile.
    """

    blocks: Blocks
    main: range
    order: Tensor | None

    @property
    def beside(self) -> tuple[int, int]:
        """Blocks before and after the main ones."""
        return self.main.start, self.blocks.count - self.main.stop

    @property
    def bounds(self) -> Tensor:
        """int64 (main blocks + 1,): the slots of the main blocks."""
        return self.blocks.bounds[self.main.start : self.main.stop + 1]

    def on(self, device: torch.device) -> Tensor:
        """:attr:`bounds` on ``device``."""
        return self.blocks.on(device)[0][self.main.start : self.main.stop + 1]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def regions(layout: Layout, size: int, tile: Shape | None) -> Regions:
    """Blocks of ``tile`` in the main segment, of ``size`` tokens without a tile and beside it; ragged at the ends."""
    start, stop = layout.main.start, layout.main.stop
    before, after = (Blocks.uniform(n, size).sizes for n in (start, layout.tokens - stop))
    token = torch.arange(layout.tokens)
    if tile is None:
        sizes = Blocks.uniform(stop - start, size).sizes
    else:
        order, sizes = tile_order(layout.grid, tile)
        token[start:stop] = start + order
    moved = None if torch.equal(token, torch.arange(layout.tokens)) else token
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat([before, sizes, after]).cumsum(0)])
    return Regions(Blocks(bounds), range(len(before), len(before) + len(sizes)), moved)


def tile_order(grid: Grid, tile: Shape) -> tuple[Tensor, Tensor]:
    """int64 (T H W,), which row-major token lies in each slot tile by tile, and the tokens of each tile.

    Tiles at the far ends of the axes hold what is left there.
    """
    owner = torch.zeros(grid, dtype=torch.int64)
    for axis, (length, side) in enumerate(zip(grid, tile, strict=True)):
        along = torch.arange(length) // side
        owner = owner * -(-length // side) + along.view([-1 if i == axis else 1 for i in range(3)])
    owner = owner.flatten()
    return owner.argsort(stable=True), owner.bincount()


@functools.lru_cache(maxsize=64)
def compact_tile(grid: Grid, size: int) -> Shape | None:
    """The box of ``size`` tokens to tile ``grid`` by: compact, and leaving few ragged tiles. None where none fits.

    Sides are powers of two. Of all boxes the one with the least product of tiles and summed sides: 8 x 8 on square
    images as published, 4 x 4 x 4 on the grids of Wan. The sum stands for the surface, over which related tokens are
    cut apart; every tile more is one more representative, and one more block for the same tokens.
    """

    def cost(tile: Shape) -> int:
        return sum(tile) * math.prod(-(-n // side) for n, side in zip(grid, tile, strict=True))

    return min(boxes(grid, size), key=lambda tile: (cost(tile), tile), default=None)
