"""Space-filling order of a T x H x W grid: consecutive tokens are neighbours, so a block of slots is a compact region.

The generalised Hilbert curve of J. Cerveny ("Gilbert") serves any size: a box is cut in two to five boxes whose curves
join end to end, until it is a row. Rectified SpaAttn (arXiv 2511.19835) and PSA (arXiv 2512.04025) reorder by it.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from ..layout import Grid, Layout

# Boxes, one per row: the corner where the curve enters, and three signed edges along one grid axis each. The curve
# leaves at the far end of the first edge. int64 (boxes, 3).
Boxes = tuple[Tensor, Tensor, Tensor, Tensor]


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def gilbert(grid: Grid, longest_first: bool = False) -> Tensor:
    """int64 (T H W,): which token of the row-major grid lies in each slot along the curve. Treat it as read-only.

    The curve runs along W, then H, then T, as Rectified SpaAttn has it; with ``longest_first`` along the longest axis
    first, as in the original. Consecutive slots are neighbours on the grid where all sizes are even; an odd size may
    force single diagonal steps. All boxes of one depth are cut at once.
    """
    order = torch.empty(grid[0] * grid[1] * grid[2], dtype=torch.int64)
    strides = torch.tensor([grid[1] * grid[2], grid[2], 1])
    edges = torch.diag(torch.tensor(grid))[_axes(grid, longest_first), None]
    boxes = (torch.zeros((1, 3), dtype=torch.int64), *edges)
    slot = torch.zeros(1, dtype=torch.int64)
    while len(slot):
        row, step = _rows(boxes)
        _fill(order, slot[row], boxes[0][row] @ strides, step[row] @ strides, _volume(boxes)[row])
        boxes, slot = _cut(tuple(x[~row] for x in boxes), slot[~row])
    return order


def curve_order(layout: Layout, curve: str | None, longest_first: bool = False) -> Tensor | None:
    """int64 (N,) slot -> token: the main segment along ``curve``, then every other token; None where nothing moves."""
    token, main = torch.arange(layout.tokens), layout.main
    inside = token[main] if curve is None else main.start + gilbert(layout.grid, longest_first)
    order = torch.cat([inside, token[: main.start], token[main.stop :]])
    return None if torch.equal(order, token) else order


def touching(grid: Grid, owner: Tensor, blocks: int) -> Tensor:
    """bool (blocks, blocks): pairs with a token each in some 3 x 3 x 3 neighbourhood of the grid; the diagonal is set.

    ``owner``: int64 (T H W,), the block of each token in row-major order. Compares the grid with itself shifted.
    """
    owner, touch = owner.view(grid), torch.eye(blocks, dtype=torch.bool)
    # Half of the 26 shifts: the other half gives the same pairs.
    for shift in [s for s in product((-1, 0, 1), repeat=3) if s > (0, 0, 0)]:
        here, there = (_window(owner, shift, sign) for sign in (1, -1))
        touch[here, there] = True
    return touch | touch.T


def _axes(grid: Grid, longest_first: bool) -> list[int]:
    """Axes of the first, second and third edge, as indices into (T, H, W)."""
    t, h, w = grid
    if not longest_first or (w >= h and w >= t):
        return [2, 1, 0]
    return [1, 2, 0] if h >= t else [0, 2, 1]


def _lengths(boxes: Boxes) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(edge.sum(-1).abs() for edge in boxes[1:])


def _volume(boxes: Boxes) -> Tensor:
    w, h, d = _lengths(boxes)
    return w * h * d


def _rows(boxes: Boxes) -> tuple[Tensor, Tensor]:
    """bool (boxes,): boxes that are a row of tokens; and the step along it, int64 (boxes, 3)."""
    _, a, b, c = boxes
    w, h, d = _lengths(boxes)
    along = torch.where((w > 1)[:, None], a, torch.where((h > 1)[:, None], b, c))
    return (w > 1).int() + (h > 1).int() + (d > 1).int() <= 1, along.sign()


def _fill(order: Tensor, slot: Tensor, token: Tensor, stride: Tensor, length: Tensor) -> None:
    """Write rows of ``length`` tokens that begin at ``token`` into the slots from ``slot`` on."""
    row = torch.repeat_interleave(length)
    within = torch.arange(len(row)) - (length.cumsum(0) - length)[row]
    order[slot[row] + within] = token[row] + within * stride[row]


def _cut(boxes: Boxes, slot: Tensor) -> tuple[Boxes, Tensor]:
    """The boxes that each box is made of, and the first slot of each."""
    w, h, d = _lengths(boxes)
    wide = (2 * w > 3 * h) & (2 * w > 3 * d)
    tall, deep = ~wide & (3 * h > 4 * d), ~wide & (3 * d > 4 * h)
    parts, slots = [], []
    for which, rule in ((wide, _wide), (tall, _tall), (deep, _deep), (~(wide | tall | deep), _regular)):
        next_slot = slot[which]
        for part in rule(*(x[which] for x in boxes)):
            parts.append(part)
            slots.append(next_slot)
            next_slot = next_slot + _volume(part)
    return tuple(torch.cat(x) for x in zip(*parts, strict=True)), torch.cat(slots)


def _half(edge: Tensor) -> Tensor:
    """About half of each edge, an even length where it is more than 1."""
    half, length = edge >> 1, edge.sum(-1, keepdim=True).abs()
    odd = half.sum(-1, keepdim=True) % 2 != 0
    return half + edge.sign() * (odd & (length > 2))


def _wide(p: Tensor, a: Tensor, b: Tensor, c: Tensor) -> list[Boxes]:
    a2 = _half(a)
    return [(p, a2, b, c), (p + a2, a - a2, b, c)]


def _tall(p: Tensor, a: Tensor, b: Tensor, c: Tensor) -> list[Boxes]:
    a2, b2, end = _half(a), _half(b), p + a - a.sign()
    return [(p, b2, c, a2), (p + b2, a, b - b2, c), (end + b2 - b.sign(), -b2, c, a2 - a)]


def _deep(p: Tensor, a: Tensor, b: Tensor, c: Tensor) -> list[Boxes]:
    a2, c2, end = _half(a), _half(c), p + a - a.sign()
    return [(p, c2, a2, b), (p + c2, a, b, c - c2), (end + c2 - c.sign(), -c2, a2 - a, b)]


def _regular(p: Tensor, a: Tensor, b: Tensor, c: Tensor) -> list[Boxes]:
    a2, b2, c2 = _half(a), _half(b), _half(c)
    end, back, top = p + a - a.sign(), b2 - b.sign(), c - c.sign()
    return [
        (p, b2, c2, a2),
        (p + b2, c, a2, b - b2),
        (p + back + top, a, -b2, c2 - c),
        (end + b2 + top, -c, a2 - a, b - b2),
        (end + back, -b2, c2, a2 - a),
    ]


def _window(owner: Tensor, shift: tuple[int, ...], sign: int) -> Tensor:
    """The tokens that have a neighbour at ``sign * shift`` inside the grid, flat."""
    for axis, step in enumerate(shift):
        length = owner.shape[axis]
        step *= sign
        owner = owner.narrow(axis, max(-step, 0), length - abs(step)) if abs(step) <= length else owner[:0]
    return owner.flatten()
