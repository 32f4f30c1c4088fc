"""Lowering: a Plan cut into the tiles of one size that kernels take."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from .blocks import Blocks
from .errors import UnsupportedError
from .kernels import BlockList, Gate, Predicate, TilePlan

if TYPE_CHECKING:
    from .plans import Plan

# The largest ragged block that is one tile, and the tile of larger ones and of single tokens.
LARGEST, USUAL = 128, 64


def lower(plan: Plan, tile: tuple[int, int] | None = None) -> TilePlan:
    """Cut a plan into kernel tiles of ``(tile_q, tile_k)`` slots; None takes :func:`tile_of` the plan's own blocks.

    Blocks of whole tiles are split and keep their class. Ragged blocks are padded with holes to whole tiles where that
    is cheap. Any other combination lists the union of what a tile overlaps and settles visibility with a gate: exact,
    but a tile is then partial unless all it overlaps is full. Cached per plan and tile. Raises ``UnsupportedError``
    where representatives or row factors differ within a query tile.
    """
    tile = tile or (tile_of(plan.q_blocks), tile_of(plan.k_blocks))
    if tile not in plan._memo:
        plan._memo[tile] = _lower(plan, *tile)
    return plan._memo[tile]


def tile_of(blocks: Blocks) -> int:
    """The tile size that suits a partition: its own block size, unless that is one token or large and uneven."""
    size = blocks.size
    if size is None:
        return blocks.largest if blocks.largest <= LARGEST else USUAL
    return size if size > 1 else USUAL


def _lower(plan: Plan, tile_q: int, tile_k: int) -> TilePlan:
    # A predicate's tables are indexed by slots. Representatives leave query tiles no choice but holes, which its tables
    # of queries follow.
    most = 2 if plan.predicate is None else 0
    most_q = most if _plain(plan) else math.inf
    q_axis = _Axis.of(plan.q_blocks, tile_q, most_q, plan.device)
    k_axis = _Axis.of(plan.k_blocks, tile_k, most, plan.device)
    order, kv_order = plan._orders()
    common = {
        "tile_q": tile_q, "tile_k": tile_k, "n_q": q_axis.slots, "n_k": k_axis.slots,
        "order": q_axis.place(order), "kv_order": k_axis.place(kv_order),
        "tokens_q": None if q_axis.slot is None else plan.q_blocks.n,
        "tokens_k": None if k_axis.slot is None else plan.k_blocks.n,
        "kept": plan.kept, **_beside(plan, q_axis),
    }  # fmt: skip
    if q_axis.trivial and k_axis.trivial:
        return TilePlan(full=plan.full, partial=plan.partial, predicate=plan.predicate, **common)
    nk = plan.k_blocks.count
    full = plan.full.mask(nk)
    part = plan.partial.mask(nk) if plan.partial is not None else None
    if q_axis.aligned and k_axis.aligned:
        full, part = (None if m is None else m[:, :, q_axis.first][..., k_axis.first] for m in (full, part))
        gate = None
    else:
        full, part = torch.broadcast_tensors(full, torch.zeros_like(full) if part is None else part)
        # Holes have no block of their own: the predicate must get to test what a gate would show whole.
        shown = 2 if k_axis.dead is None else 1
        gate = Gate(full.to(torch.uint8) * shown + part, q_axis.block, k_axis.block)
        seen = k_axis.count(q_axis.count(full | part, -2) > 0, -1) > 0
        full = k_axis.whole(q_axis.whole(full, -2), -1)
        part = seen & ~full
    dead, predicate = k_axis.dead, plan.predicate
    if predicate is not None and q_axis.slot is not None:
        predicate = predicate.of_queries(q_axis.slot.clamp_min(0))
    if dead is not None:
        part = full & k_axis.holed if part is None else part | (full & k_axis.holed)
        full = full & ~k_axis.holed
        predicate = Predicate(dead=dead)
    partial = None if part is None else BlockList.from_mask(part)
    return TilePlan(full=BlockList.from_mask(full), partial=partial, predicate=predicate, gate=gate, **common)


def _beside(plan: Plan, axis: _Axis) -> dict:
    """What a plan holds per query block besides its lists, per query tile."""
    plain = _plain(plan)
    if not plain and not axis.aligned:
        raise UnsupportedError(
            f"a query tile would straddle blocks that see different representatives; choose a tile that divides the "
            f"plan's query blocks ({plan.q_blocks.size or 'ragged'})"
        )
    if plain or axis.trivial:
        picked = {"reps": plan.reps, "row_scale": plan.row_scale, "row_add": plan.row_add}
    else:
        rows = [None if x is None else x.index_select(2, axis.first) for x in (plan.row_scale, plan.row_add)]
        reps = tuple(group.of_tiles(axis.first) for group in plan.reps)
        picked = {"reps": reps, "row_scale": rows[0], "row_add": rows[1]}
    return {**picked, "first_order": plan.first_order}


def _plain(plan: Plan) -> bool:
    """Whether a plan holds nothing per query block besides its lists."""
    return not plan.reps and plan.first_order is None and plan.row_scale is None


@dataclass(frozen=True, eq=False)
class _Axis:
    """One axis of a plan in tiles: tile i overlaps blocks ``first[i] .. last[i]``; ``block`` is that of each slot.

    ``aligned``: no tile overlaps two blocks. ``slot``: the plan's slot of each padded slot, -1 for holes, or None where
    nothing is padded. ``run``: how many blocks a tile holds where every block is one slot, else 0.
    """

    slots: int
    first: Tensor
    last: Tensor
    block: Tensor
    slot: Tensor | None
    trivial: bool
    run: int = 0
    _memo: dict = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, blocks: Blocks, tile: int, most: float, device: torch.device) -> _Axis:
        """The axis on ``device``, kept with the partition. ``most``: ragged blocks are padded where that gives at most
        this many slots per token."""
        key = tile, most, device
        if key not in blocks._memo:
            with torch.inference_mode(False):
                blocks._memo[key] = cls._make(blocks, tile, most).to(device)
        return blocks._memo[key]

    @classmethod
    def _make(cls, blocks: Blocks, tile: int, most: float) -> _Axis:
        sizes, size = blocks.sizes, blocks.size
        if size is None and int((-(-sizes // tile) * tile).sum()) <= most * blocks.n:
            tiles = -(-sizes // tile)
            owner = torch.repeat_interleave(torch.arange(blocks.count), tiles)
            place = torch.arange(len(owner) * tile)
            start = pad((tiles * tile).cumsum(0), (1, 0))[:-1]
            block = owner.repeat_interleave(tile)
            within = place - start[block]
            slot = torch.where(within < sizes[block], blocks.bounds[block] + within, -1)
            return cls(len(place), owner, owner, block.int(), slot, False)
        owner = blocks.owner()
        starts = torch.arange(0, blocks.n, tile)
        first, last = owner[starts], owner[(starts + tile - 1).clamp_max(blocks.n - 1)]
        return cls(blocks.n, first, last, owner.int(), None, size == tile, tile if size == 1 else 0)

    @functools.cached_property
    def aligned(self) -> bool:
        return torch.equal(self.first, self.last)

    @functools.cached_property
    def dead(self) -> Tensor | None:
        """bool (slots,): the holes, or None without any."""
        return None if self.slot is None or not bool((self.slot < 0).any()) else self.slot < 0

    @functools.cached_property
    def holed(self) -> Tensor | None:
        """bool (tiles,): which hold a hole, or None without any."""
        return None if self.dead is None else self.dead.view(len(self.first), -1).any(-1)

    def place(self, order: Tensor | None) -> Tensor | None:
        """``order`` with holes. The last one is kept: all plans of a layout share theirs."""
        if self.slot is None:
            return order
        if order is None:
            return self.slot
        given, placed = self._memo.get("order", (None, None))
        if given is not order:
            with torch.inference_mode(False):
                placed = order[..., self.slot.clamp_min(0)].masked_fill(self.slot < 0, -1)
            self._memo["order"] = order, placed
        return placed

    def count(self, mask: Tensor, dim: int) -> Tensor:
        """int32: over the blocks that each tile overlaps, how many are set along ``dim``."""
        if self.run:
            return _count_runs(mask, dim, self.run)
        total = mask.cumsum(dim, dtype=torch.int32).movedim(dim, 0)
        before = torch.cat([torch.zeros_like(total[:1]), total])
        return (before[self.last + 1] - before[self.first]).movedim(0, dim)

    def whole(self, mask: Tensor, dim: int) -> Tensor:
        """bool: whether all blocks that a tile overlaps are set along ``dim``."""
        overlapped = (self.last - self.first + 1).view(-1, *(1,) * (-dim - 1))
        return self.count(mask, dim) == overlapped

    def to(self, device: torch.device) -> _Axis:
        slot = None if self.slot is None else self.slot.to(device)
        first, last, block = (x.to(device) for x in (self.first, self.last, self.block))
        return _Axis(self.slots, first, last, block, slot, self.trivial, self.run)


def _count_runs(mask: Tensor, dim: int, run: int) -> Tensor:
    """int32: how many are set in each ``run`` along ``dim`` (negative), the last of which may be shorter.

    A running count over single tokens would take eight bytes for each of the mask's.
    """
    size = mask.shape[dim]
    whole = size - size % run
    counts = mask.narrow(dim, 0, whole).unflatten(dim, (-1, run)).sum(dim, dtype=torch.int32)
    if whole == size:
        return counts
    rest = mask.narrow(dim, whole, size - whole).sum(dim, keepdim=True, dtype=torch.int32)
    return torch.cat([counts, rest], dim)
