"""Token predicates of partial blocks: a closed set, evaluated from small per-slot tables.

Indices address slots: positions in plan order. All tables are one-dimensional per axis, which every tier can
index alike (FlexAttention's dynamic compilation refuses anything that carries a symbolic shape).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Box:
    """Visible iff ``lo[a][q] <= coord[a][k] < hi[a][q]`` on every axis ``a``.

    int32; ``lo`` and ``hi`` hold (nq,) per axis, ``coord`` (nk,) per axis.
    """

    lo: tuple[Tensor, ...]
    hi: tuple[Tensor, ...]
    coord: tuple[Tensor, ...]

    def visible(self, q: Tensor, k: Tensor) -> Tensor:
        seen = (self.lo[0][q] <= self.coord[0][k]) & (self.coord[0][k] < self.hi[0][q])
        for lo, hi, coord in zip(self.lo[1:], self.hi[1:], self.coord[1:], strict=True):
            seen = seen & (lo[q] <= coord[k]) & (coord[k] < hi[q])
        return seen


@dataclass(frozen=True, eq=False)
class Disc:
    """Visible iff ``sum_a (centre[a][q] - coord[a][k])**2 < r2[q]``. int32, strict (CLEAR's disc)."""

    centre: tuple[Tensor, ...]
    coord: tuple[Tensor, ...]
    r2: Tensor

    def visible(self, q: Tensor, k: Tensor) -> Tensor:
        distance = (self.centre[0][q] - self.coord[0][k]) ** 2
        for centre, coord in zip(self.centre[1:], self.coord[1:], strict=True):
            distance = distance + (centre[q] - coord[k]) ** 2
        return distance < self.r2[q]


@dataclass(frozen=True, eq=False)
class Band:
    """Visible iff ``|q_pos[q] - k_pos[k]| <= reach[q_row[q], k_col[k]]``; a reach of -1 hides the whole group.

    int32; ``reach`` is (rows, cols): a band whose half-width depends on a pair of groups (frames in Radial).
    """

    q_pos: Tensor
    k_pos: Tensor
    q_row: Tensor
    k_col: Tensor
    reach: Tensor

    def visible(self, q: Tensor, k: Tensor) -> Tensor:
        return (self.q_pos[q] - self.k_pos[k]).abs() <= self.reach[self.q_row[q], self.k_col[k]]


@dataclass(frozen=True, eq=False)
class Predicate:
    """``((box and disc and band) or always) and not dead``, over the tests that are present.

    ``always``: bool (nk,) keys that every query of a partial block sees (text), or None. ``dead``: bool (nk,) slots
    that hold no key, or None.
    """

    box: Box | None = None
    disc: Disc | None = None
    band: Band | None = None
    always: Tensor | None = None
    dead: Tensor | None = None

    @property
    def only_dead(self) -> bool:
        """Whether nothing but holes is tested, which is the same for every query."""
        return self.box is None and self.disc is None and self.band is None and self.always is None

    def visible(self, q: Tensor, k: Tensor) -> Tensor:
        """bool, broadcast over the slot indices ``q`` and ``k``."""
        seen = None
        for test in (self.box, self.disc, self.band):
            if test is not None:
                one = test.visible(q, k)
                seen = one if seen is None else seen & one
        if seen is None:
            seen = (q == q) & (k == k)
        seen = seen if self.always is None else seen | self.always[k]
        return seen if self.dead is None else seen & ~self.dead[k]

    def of_queries(self, slot: Tensor) -> Predicate:
        """The same for other queries: query i is the one that was ``slot[i]``."""
        box, disc, band = self.box, self.disc, self.band
        if box is not None:
            box = replace(box, lo=tuple(x[slot] for x in box.lo), hi=tuple(x[slot] for x in box.hi))
        if disc is not None:
            disc = replace(disc, centre=tuple(x[slot] for x in disc.centre), r2=disc.r2[slot])
        if band is not None:
            band = replace(band, q_pos=band.q_pos[slot], q_row=band.q_row[slot])
        return replace(self, box=box, disc=disc, band=band)

    def to(self, device: torch.device) -> Predicate:
        return move(self, device)


@dataclass(frozen=True, eq=False)
class Gate:
    """Visibility of one logical block for another, at any granularity.

    ``table``: uint8 (B1, H1, rows, cols) with 0 hidden, 1 tested by the predicate, 2 visible.
    ``q_row``: int32 (nq,), ``k_col``: int32 (nk,), the logical block of each slot.
    """

    table: Tensor
    q_row: Tensor
    k_col: Tensor

    def to(self, device: torch.device) -> Gate:
        return move(self, device)


def move(tables, device: torch.device):
    """``tables`` on ``device``."""
    return each(tables, lambda table: table.to(device))


def each(tables, change: Callable[[Tensor], Tensor]):
    """``tables`` (a dataclass of tensors, tuples of tensors and such dataclasses) with every tensor changed."""

    def one(value):
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, tuple):
            return tuple(one(v) for v in value)
        return value if value is None else each(value, change)

    return replace(tables, **{f.name: one(getattr(tables, f.name)) for f in fields(tables)})
