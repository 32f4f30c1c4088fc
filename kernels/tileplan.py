"""TilePlan: what block-sparse kernels take. A Plan cut into tiles of one size (see ``dit_accel.plans.lower``)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .blocklist import BlockList
from .predicate import Gate, Predicate


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Which key tiles each query tile visits, in plan order.

    ``tile_q``, ``tile_k``: tile sizes; the last tile of either axis may be ragged and needs no test for it.
    ``n_q``, ``n_k``: slots (tokens in plan order). ``full``: tiles visited without a test. ``partial``: tiles
    whose pairs pass ``gate`` and ``predicate``; never a tile that is also full. Without a gate every pair of a
    partial tile is tested by the predicate; with one, 0 hides the pair, 1 tests it, 2 shows it.
    ``order``, ``kv_order``: int64 slot -> token, (n,) or (H, n), or None for the caller's order. ``_memo``: what a tier
    derived from the tables, kept as long as the plan.
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
    _memo: dict = field(default_factory=dict, repr=False)

    @property
    def tiles_q(self) -> int:
        return -(-self.n_q // self.tile_q)

    @property
    def tiles_k(self) -> int:
        return -(-self.n_k // self.tile_k)

    @property
    def device(self) -> torch.device:
        return self.full.count.device

    @property
    def visited(self) -> int:
        """Tiles visited over one (batch, head) table entry set; a host sync on GPU."""
        total = int(self.full.count.sum())
        return total + (int(self.partial.count.sum()) if self.partial is not None else 0)

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
            return value if value is None else value.to(device)

        return TilePlan(
            self.tile_q, self.tile_k, self.n_q, self.n_k, moved(self.full), moved(self.partial),
            moved(self.predicate), moved(self.gate), moved(self.order), moved(self.kv_order),
        )  # fmt: skip
