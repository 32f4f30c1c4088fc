"""Axis orders: the six ways to walk a (T, H, W) grid (PAROAttention, arXiv 2506.16054, section 3.2).

An order is named by its axes from slowest to fastest, with F for the frame axis: id 0, ``FHW``, is the row-major
order that video tokens come in. The ids are those of the released integration (jamescsq47/PAROAtten).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError
from ..layout import Grid, Layout

ORDERS: tuple[tuple[int, int, int], ...] = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1))
NAMES = tuple("".join("FHW"[axis] for axis in axes) for axes in ORDERS)


def inverse(order: int) -> int:
    """The id that undoes ``order``: applied to the reordered grid it gives id 0's sequence."""
    axes = ORDERS[check_order(order)]
    return ORDERS.index(tuple(axes.index(axis) for axis in range(3)))


def grid_order(grid: Grid, order: int) -> Tensor:
    """int64 (T H W,): which token of the row-major grid lies in each slot under ``order``."""
    tokens = torch.arange(grid[0] * grid[1] * grid[2]).reshape(grid)
    return tokens.permute(ORDERS[check_order(order)]).flatten()


def token_order(layout: Layout, order: int) -> Tensor:
    """int64 (N,): slot -> token over the whole sequence. Only the main segment moves; text stays in its place."""
    tokens = torch.arange(layout.tokens)
    tokens[layout.main] = layout.main.start + grid_order(layout.grid, order)
    return tokens


def candidates(grid: Grid) -> tuple[int, ...]:
    """The ids that differ on ``grid``, smallest of each kind: two for images, one for a plain sequence."""
    found: dict[tuple[int, ...], int] = {}
    for order, axes in enumerate(ORDERS):
        found.setdefault(tuple(axis for axis in axes if grid[axis] > 1), order)
    return tuple(found.values())


def check_order(order: int) -> int:
    """``order`` as an id in 0..5; raises ``UsageError`` otherwise."""
    if int(order) != order or not 0 <= order < len(ORDERS):
        known = ", ".join(f"{i} {name}" for i, name in enumerate(NAMES))
        raise UsageError(f"axis order {order} is unknown; the orders are {known}")
    return int(order)
