"""What the compiled FlexAttention takes: a plan's index lists and the flat tables of its tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._dynamo.decorators import maybe_mark_dynamic

from ..blocklist import BlockList
from ..predicate import Band, Predicate, each
from ..tileplan import TilePlan


@dataclass(frozen=True)
class MaskKind:
    """What the mask of partial tiles evaluates: axes of box and disc, and the padded lengths of all tables."""

    predicate: bool
    gate: bool
    box: int
    disc: int
    band: bool
    always: bool
    dead: bool
    lengths: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class FlatBand:
    """``Band`` with its table flattened: reach[q_base[q] + k_col[k]]."""

    q_pos: Tensor
    k_pos: Tensor
    q_base: Tensor
    k_col: Tensor
    reach: Tensor

    def visible(self, q: Tensor, k: Tensor) -> Tensor:
        return (self.q_pos[q] - self.k_pos[k]).abs() <= self.reach[self.q_base[q] + self.k_col[k]]


@dataclass(frozen=True, eq=False)
class Cells:
    """A table per batch and head, flattened: cells[batch[b] + head[h] + q_base[q] + k_col[k]]."""

    cells: Tensor
    batch: Tensor
    head: Tensor
    q_base: Tensor | None = None
    k_col: Tensor | None = None

    @classmethod
    def of(cls, table: Tensor, b: int, h: int, **index: Tensor) -> Cells:
        """``table`` (B1, H1, ...) for ``b`` samples and ``h`` heads."""
        table = table.contiguous()
        offsets = torch.int32 if table.numel() < 2**31 else torch.int64
        batch, head = (
            torch.arange(n, device=table.device, dtype=offsets) * (table.stride(axis) if table.shape[axis] > 1 else 0)
            for axis, n in enumerate((b, h))
        )
        return cls(_pad(table), batch, head, **{name: _pad(value) for name, value in index.items()})


@dataclass(frozen=True, eq=False)
class Tables:
    """A plan as the compiled function takes it.

    Index lists: full and partial of equal (B1, H1), contiguous and not the same object, which the template takes
    for granted. Tables of the tests: one-dimensional and of fixed lengths, since the template renames symbols by
    plain text replacement and breaks the code of masks that mention a symbolic size.
    """

    lists: tuple[Tensor, Tensor, Tensor, Tensor]
    predicate: Predicate | None
    gate: Cells | None

    @property
    def tests(self) -> MaskKind | None:
        """Which tests partial tiles run; None where there are no partial tiles."""
        if self.predicate is None and self.gate is None:
            return None
        p = self.predicate or Predicate()
        lengths: list[int] = []
        for tables in (self.predicate, self.gate):
            if tables is not None:
                each(tables, lambda table: lengths.append(len(table)) or table)
        return MaskKind(
            predicate=self.predicate is not None,
            gate=self.gate is not None,
            box=len(p.box.coord) if p.box else 0,
            disc=len(p.disc.coord) if p.disc else 0,
            band=p.band is not None,
            always=p.always is not None,
            dead=p.dead is not None,
            lengths=tuple(lengths),
        )

    @classmethod
    def of(cls, plan: TilePlan, b: int, h: int) -> Tables:
        full, part = plan.full, plan.partial
        b1, h1 = (max(1 if part is None else part.count.shape[i], full.count.shape[i]) for i in (0, 1))
        shape = (b1, h1, plan.tiles_q)
        # Two columns at least: a size of 1 would compile a function of its own.
        width = max(plan.tiles_k, 2)
        if part is None:
            # Only the partial table's width is checked, so a stride-0 view of one column serves when it is empty.
            count = torch.zeros(shape, dtype=torch.int32, device=plan.device)
            index = torch.zeros((*shape, 1), dtype=torch.int32, device=plan.device).expand(*shape, width)
        else:
            count, index = part.count.expand(shape).contiguous(), _wide(part, shape, width)
        lists = (count, index, full.count.expand(shape).contiguous(), _wide(full, shape, max(full.width, 2)))
        for table in lists:
            maybe_mark_dynamic(table, list(range(2, table.ndim)))
        if part is None:
            return cls(lists, None, None)
        predicate, gate = plan.predicate, plan.gate
        if predicate is not None:
            if predicate.band is not None:
                predicate = replace(predicate, band=_flat(predicate.band))
            predicate = each(predicate, _pad)
        if gate is not None:
            gate = Cells.of(gate.table, b, h, q_base=gate.q_row * gate.table.shape[3], k_col=gate.k_col)
        return cls(lists, predicate, gate)


def _flat(band: Band) -> FlatBand:
    return FlatBand(band.q_pos, band.k_pos, band.q_row * band.reach.shape[1], band.k_col, band.reach)


def _wide(entry: BlockList, shape: tuple[int, int, int], width: int) -> Tensor:
    index = torch.nn.functional.pad(entry.index, (0, max(width - entry.width, 0)))
    return index.expand(*shape, -1).contiguous()


def _pad(table: Tensor) -> Tensor:
    """``table`` flattened to a length that few token counts differ in: a power of two, 1024 or more."""
    length = 1 << max(10, (table.numel() - 1).bit_length())
    return torch.nn.functional.pad(table.flatten(), (0, length - table.numel()))
