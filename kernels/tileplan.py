"""TilePlan: what block-sparse kernels take. A Plan cut into tiles of one size (see ``dit_accel.plans.lower``)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from .blocklist import BlockList
from .predicate import Gate, Predicate
from .representatives import Group


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Which key tiles each query tile visits, in plan order.

    ``tile_q``, ``tile_k``: tile sizes; the last tile of either axis may be ragged and needs no test for it.
    ``n_q``, ``n_k``: slots (tokens in plan order). ``full``: tiles visited without a test. ``partial``: tiles
    whose pairs pass ``gate`` and ``predicate``; never a tile that is also full. Without a gate every pair of a
    partial tile is tested by the predicate; with one, 0 hides the pair, 1 tests it, 2 shows it.
    ``order``, ``kv_order``: int64 slot -> token, (n,) or (H, n), or None for the caller's order; -1 is a hole, a slot
    that pads a block to whole tiles, and every key tile that has one is partial. ``tokens_q``, ``tokens_k``: tokens of
    the caller where holes make them fewer than the slots, else None.

    ``reps``: representatives seen beside the exact keys. ``first_order``: float32 (B, Hk or H, D, Dv); adds scale x p x
    (q @ first_order), p the share of a query's mass on representatives; or, for the reference tier alone, (B, Hk or H,
    R, D, Dv), a matrix for the share of each representative. ``row_scale``: float32 (B, H, tiles_q), and ``row_add``:
    float32 (B, H, tiles_q, Dv), applied to the output of each query tile.

    ``kept``: whether the same plan serves further calls, so that tables made for it are made once.

    ``_memo``: what a tier derived from the tables, kept as long as the plan.
    """

    tile_q: int
    tile_k: int
    n_q: int
    n_k: int
    full: BlockList
    partial: BlockList | None = None
    predicate: Predicate | None = None
    gate: Gate | None = None
    order: Tensor | None = None
    kv_order: Tensor | None = None
    tokens_q: int | None = None
    tokens_k: int | None = None
    reps: tuple[Group, ...] = ()
    first_order: Tensor | None = None
    row_scale: Tensor | None = None
    row_add: Tensor | None = None
    kept: bool = False
    _memo: dict = field(default_factory=dict, repr=False)

    @property
    def tiles_q(self) -> int:
        return -(-self.n_q // self.tile_q)

    @property
    def tiles_k(self) -> int:
        return -(-self.n_k // self.tile_k)

    @property
    def queries(self) -> int:
        """Tokens of the caller's q."""
        return self.n_q if self.tokens_q is None else self.tokens_q

    @property
    def keys(self) -> int:
        """Tokens of the caller's k and v."""
        return self.n_k if self.tokens_k is None else self.tokens_k

    @property
    def plain(self) -> bool:
        """Whether the output is a softmax over the caller's keys and nothing else."""
        return not self.reps and self.first_order is None and self.row_scale is None and self.row_add is None

    @property
    def gathers(self) -> bool:
        """Whether the test of a partial tile reads a value per pair, not only per row and column."""
        return self.gate is not None or (self.predicate is not None and self.predicate.band is not None)

    @property
    def first_order_each(self) -> bool:
        """Whether each representative has a first-order matrix of its own."""
        return self.first_order is not None and self.first_order.ndim == 5

    @property
    def device(self) -> torch.device:
        return self.full.count.device

    @property
    def visited(self) -> int:
        """Tiles visited over one (batch, head) table entry set; a host sync on GPU."""
        total = int(self.full.count.sum())
        return total + (int(self.partial.count.sum()) if self.partial is not None else 0)

    def of_heads(self, own: slice, heads: int) -> TilePlan:
        """The plan of some of ``heads`` query heads. ``own``: a slice of them; it holds whole groups of key heads."""

        def cut(table: Tensor | None) -> Tensor | None:
            """(B1, heads or fewer, ..): fewer are key heads, or 1 for all."""
            if table is None or table.shape[1] == 1:
                return table
            size = table.shape[1]
            return table[:, own.start * size // heads : own.stop * size // heads]

        def listed(entry: BlockList | None) -> BlockList | None:
            return None if entry is None else BlockList(cut(entry.count), cut(entry.index))

        def placed(order: Tensor | None) -> Tensor | None:
            return order[own] if order is not None and order.ndim == 2 else order

        return replace(
            self, full=listed(self.full), partial=listed(self.partial),
            gate=None if self.gate is None else replace(self.gate, table=cut(self.gate.table)),
            order=placed(self.order), kv_order=placed(self.kv_order),
            reps=tuple(
                replace(one, key=cut(one.key), value=cut(one.value), count=cut(one.count), seen=listed(one.seen))
                for one in self.reps
            ),
            first_order=cut(self.first_order), row_scale=cut(self.row_scale), row_add=cut(self.row_add), _memo={},
        )  # fmt: skip

    def pair_visible(self, b: int, h: int, q: Tensor, k: Tensor) -> Tensor:
        """bool: whether pairs of a *partial* tile are visible; ``b``, ``h`` address the gate's table."""
        if self.gate is None:
            return self.predicate.visible(q, k)
        table = self.gate.table
        cell = table[min(b, table.shape[0] - 1), min(h, table.shape[1] - 1)]
        cell = cell[self.gate.q_row[q].long(), self.gate.k_col[k].long()]
        return cell == 2 if self.predicate is None else (cell == 2) | ((cell == 1) & self.predicate.visible(q, k))

    def token_mask(self) -> Tensor:
        """bool (B1, H1, n_q, n_k) in plan order. For tests and the reference tier: it is N x N."""
        full = self._expand(self.full.mask(self.tiles_k))
        if self.partial is None:
            return full
        part = self._expand(self.partial.mask(self.tiles_k))
        q = torch.arange(self.n_q, device=self.device)[:, None]
        k = torch.arange(self.n_k, device=self.device)[None, :]
        b1, h1 = torch.broadcast_shapes(part.shape[:2], self.gate.table.shape[:2] if self.gate is not None else (1, 1))
        seen = torch.stack([torch.stack([self.pair_visible(b, h, q, k) for h in range(h1)]) for b in range(b1)])
        return full | (part & seen)

    def _expand(self, mask: Tensor) -> Tensor:
        mask = mask.repeat_interleave(self.tile_q, -2).repeat_interleave(self.tile_k, -1)
        return mask[..., : self.n_q, : self.n_k]

    def to(self, device: torch.device) -> TilePlan:
        def moved(value):
            if isinstance(value, tuple):
                return tuple(one.to(device) for one in value)
            return value.to(device) if hasattr(value, "to") else value

        values = {f.name: moved(getattr(self, f.name)) for f in fields(self) if f.name != "_memo"}
        return replace(self, **values, _memo={})
