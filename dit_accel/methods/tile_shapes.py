"""Which boxes of tokens make good blocks for a window, and the order of tokens that lays them out."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .windows import Axis

Shape = tuple[int, int, int]
# Tile size -> pairs along an axis in tiles of that size that are seen at all, and that are seen whole.
Counter = Callable[[int], tuple[int, int]]

# Time per visited pair of the CPU tier relative to dense SDPA, by block size, and of a partial block relative to a
# full one (measured for 4,096 tokens of head size 64 at density 0.25).
BLOCK_COST = {128: 1.10, 64: 1.25}
PARTIAL_COST = 1.3


@dataclass(frozen=True, eq=False)
class Shapes:
    """Boxes of ``block`` tokens that fit into the grid, and the time expected with each, in pairs of dense attention.

    Empty where the grid is smaller than any.
    """

    block: int
    time: dict[Shape, float]

    def best(self, extent: Sequence[int]) -> tuple[float, Shape] | None:
        """The time and shape for tiling ``extent``, which may be a part of the grid; None where none fits.

        What whole boxes leave over is tiled worse: it counts one and a half times.
        """
        fitting = [shape for shape in self.time if all(a <= n for a, n in zip(shape, extent, strict=True))]
        found = ((self.time[shape] * (1 + ragged(extent, shape) / 2), sum(shape), shape) for shape in fitting)
        time, _, shape = min(found, default=(0, 0, None))
        return None if shape is None else (time, shape)


def choose(
    counters: Sequence[Counter], extent: Shape, blocks: Sequence[int] = tuple(BLOCK_COST)
) -> tuple[float, Shapes]:  # fmt: skip
    """The block size that is expected to take least time over windows counted by ``counters``, and that time."""

    def time(shape: Shape, block: int) -> float:
        counts = [count(size) for count, size in zip(counters, shape, strict=True)]
        seen, whole = (math.prod(count[i] for count in counts) for i in (0, 1))
        return BLOCK_COST.get(block, 1.0) * (PARTIAL_COST * seen - (PARTIAL_COST - 1) * whole)

    found = []
    for block in blocks:
        shapes = Shapes(block, {shape: time(shape, block) for shape in boxes(extent, block)})
        best = shapes.best(extent)
        if best is not None:
            found.append((best[0], shapes))
    smallest = min(blocks)
    return min(found, key=lambda x: x[0], default=(time(extent, smallest), Shapes(smallest, {})))


def counter(axis: Axis) -> Counter:
    """Counts each tile size once."""
    return functools.cache(functools.partial(_tiled_pairs, axis))


@functools.lru_cache(maxsize=64)
def boxes(extent: Shape, block: int) -> tuple[Shape, ...]:
    """Boxes of ``block`` cells, a power of two on each axis, that fit into ``extent``."""
    powers = [[1 << i for i in range(n.bit_length())] for n in extent]
    return tuple(shape for shape in itertools.product(*powers) if math.prod(shape) == block)


def ragged(extent: Sequence[int], shape: Shape) -> float:
    """Share of the cells of ``extent`` that whole boxes of ``shape`` leave over."""
    return 1 - math.prod((n - n % size) / n for n, size in zip(extent, shape, strict=True))


def arrange(cells: Tensor, shapes: Shapes) -> Tensor:
    """``cells`` (T, H, W) flattened box by box; row-major inside, and over, the boxes.

    What boxes of the best shape leave over at the far ends of the axes is tiled by the best shape that fits there,
    and so on; what fits none comes last, row-major.
    """
    whole, rest = _arrange(cells, shapes)
    return torch.cat(whole + rest)


def _arrange(cells: Tensor, shapes: Shapes) -> tuple[list[Tensor], list[Tensor]]:
    best = shapes.best(cells.shape)
    if best is None:
        return [], [cells.flatten()]
    a, b, c = best[1]
    t, h, w = (n - n % size for n, size in zip(cells.shape, best[1], strict=True))
    body = cells[:t, :h, :w].reshape(t // a, a, h // b, b, w // c, c).permute(0, 2, 4, 1, 3, 5)
    whole, rest = [body.flatten()], []
    for edge in (cells[t:], cells[:t, h:], cells[:t, :h, w:]):
        if edge.numel():
            more = _arrange(edge, shapes)
            whole += more[0]
            rest += more[1]
    return whole, rest


def _tiled_pairs(axis: Axis, size: int) -> tuple[int, int]:
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
