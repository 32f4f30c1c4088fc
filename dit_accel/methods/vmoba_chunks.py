"""VMoBA's three partitions of a video (arXiv 2506.23858, equation 1), for any grid.

A chunk of the temporal partition is a run of frames, of the spatial one a rectangle through all frames, of the
spatio-temporal one a box. Chunks at the far ends of an axis may be smaller: sizes need not divide the grid.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks import Blocks
from ..layout import Grid, Layout

PARTITIONS = ("temporal", "spatial", "spatio-temporal")
Chunk = float | tuple[int, ...]
Chunks = tuple[float, tuple[int, int], tuple[int, int, int]]

# Table 4 of the paper: latent grid (T, H, W) after patching -> chunk sizes in tokens.
PUBLISHED: dict[Grid, Chunks] = {
    (21, 30, 52): (3, (5, 13), (7, 5, 13)),
    (21, 45, 80): (3, (9, 10), (7, 15, 20)),
    (24, 36, 64): (3, (6, 8), (8, 12, 8)),
    (36, 30, 52): (3, (5, 13), (12, 10, 13)),
}
# Fewest and most chunks over all published settings.
TEMPORAL_LEAST, SPATIAL, SPATIO_TEMPORAL = 7, (24, 48), (36, 72)


@functools.lru_cache(maxsize=64)
def rule(grid: Grid) -> Chunks:
    """Chunk sizes for ``grid``: the published ones, elsewhere as many chunks per partition as those have.

    Three frames make a temporal chunk, fewer where that would leave less than 7 chunks. Tiles divide the grid and
    have even sides where they can; a grid too small for the least number is cut as finely as it goes.
    """
    if grid in PUBLISHED:
        return PUBLISHED[grid]
    frames, least = grid[0], TEMPORAL_LEAST
    run = 3 if frames > 3 * (least - 1) else frames // least
    if not run:
        # Half a token more, since sizes are rounded down to whole tokens.
        run = (-(-math.prod(grid) // least) + 0.5) / math.prod(grid[1:])
    return run, _tile(grid[1:], *SPATIAL), _tile(grid, *SPATIO_TEMPORAL)


def _tile(extent: Sequence[int], least: int, most: int) -> tuple[int, ...]:
    """The tile that cuts ``extent`` into ``least`` to ``most`` pieces with the least ragged and most even sides."""

    def pieces(tile: tuple[int, ...]) -> int:
        return math.prod(-(-n // size) for n, size in zip(extent, tile, strict=True))

    def cost(tile: tuple[int, ...]) -> float:
        covered = pieces(tile) * math.prod(tile)
        sides = [size for n, size in zip(extent, tile, strict=True) if n > 1] or [1]
        return covered / math.prod(extent) - 1 + math.log2(max(sides) / min(sides)) / 10

    sides = [sorted({-(-n // parts) for parts in range(1, min(n, most) + 1)}) for n in extent]
    fitting = [tile for tile in itertools.product(*sides) if pieces(tile) <= most]
    least = min(least, max(map(pieces, fitting)))
    return min((tile for tile in fitting if pieces(tile) >= least), key=lambda tile: (cost(tile), tile))


@dataclass(frozen=True, eq=False)
class Chunking:
    """A layout in the order of one partition: the main segment chunk by chunk, then every token outside of it.

    ``order``: int64 (N,) slot -> token, or None where nothing moves. ``chunks``: the C chunks, over the main slots.
    ``main``: int64 (main tokens,), the token of each main slot.
    """

    layout: Layout
    order: Tensor | None
    chunks: Blocks
    main: Tensor

    @classmethod
    def make(cls, layout: Layout, chunk: Chunk, device: torch.device) -> Chunking:
        """``chunk``: frames (may be a fraction), (height, width) or (frames, height, width), in tokens."""
        start, stop, grid = layout.main.start, layout.main.stop, layout.grid
        inside = torch.arange(stop - start)
        if isinstance(chunk, tuple):
            owner = _owner(grid, chunk if len(chunk) == 3 else (grid[0], *chunk))
            inside = torch.argsort(owner, dim=0, stable=True)
            chunks = Blocks(pad(torch.bincount(owner).cumsum(0), (1, 0)))
        else:
            chunks = Blocks.uniform(len(inside), max(int(chunk * grid[1] * grid[2]), 1))
        token = torch.arange(layout.tokens)
        order = torch.cat([start + inside, token[:start], token[stop:]])
        moved = None if torch.equal(order, token) else order.to(device)
        return cls(layout, moved, chunks, (start + inside).to(device))

    @property
    def outside(self) -> int:
        """Tokens outside the main segment."""
        return self.layout.tokens - self.chunks.n

    def with_outside(self, blocks: Blocks, size: int) -> Blocks:
        """``blocks`` of the main slots, and the slots behind them in blocks of ``size``."""
        if not self.outside:
            return blocks
        return Blocks(torch.cat([blocks.bounds[:-1], Blocks.uniform(self.outside, size).bounds + blocks.n]))

    def pieces(self, size: int) -> Blocks:
        """The main slots in runs of at most ``size`` that no chunk border cuts, as even as they can be."""
        ends = [
            start + torch.arange(1, parts + 1) * length // parts
            for start, length in zip(self.chunks.bounds.tolist(), self.chunks.sizes.tolist(), strict=False)
            for parts in [-(-length // size)]
        ]
        return Blocks(pad(torch.cat(ends), (1, 0)))

    def owner(self, blocks: Blocks | None = None) -> Tensor:
        """int64: the chunk of each of ``blocks``, none of which a chunk border cuts; of each main slot for None."""
        starts = torch.arange(self.chunks.n) if blocks is None else blocks.bounds[:-1]
        return torch.searchsorted(self.chunks.bounds, starts, right=True) - 1

    def tokens(self, blocks: Blocks) -> Tensor:
        """int64 (blocks, longest): the tokens of each of ``blocks`` of the main slots, padded with -1."""
        sizes = blocks.sizes[:, None]
        within = torch.arange(int(sizes.max()))
        slots = (blocks.bounds[:-1, None] + within).clamp_max(blocks.n - 1).to(self.main.device)
        return self.main[slots].masked_fill((within >= sizes).to(self.main.device), -1)


def _owner(grid: Grid, tile: tuple[int, ...]) -> Tensor:
    """int64 (T H W,): the box of each token, boxes numbered row-major."""
    owner = torch.zeros((1,) * 3, dtype=torch.long)
    for axis, (n, size) in enumerate(zip(grid, tile, strict=True)):
        shape = [1, 1, 1]
        shape[axis] = n
        owner = owner * -(-n // size) + (torch.arange(n) // size).view(shape)
    return owner.flatten()
