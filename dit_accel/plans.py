"""Plan: which keys each query sees, in the method's own blocks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .blocks import Blocks
from .errors import UsageError
from .kernels import BlockList, Group, Predicate
from .layout import Layout
from .pairs import count_pairs

__all__ = ["Blocks", "Plan"]

MASK_LIMIT = 2 * 1024**3  # bytes; token_mask refuses beyond


@dataclass(frozen=True, eq=False)
class Plan:
    """The visible pairs of one attention call.

    ``full``, ``partial``: per query block, the key blocks seen whole, and those whose pairs pass ``predicate``
    (tables in plan order). ``order``, ``kv_order``: int64 slot -> token, (N,) or (H, N), or None.
    ``scale``: the method's own softmax scale, or None for ``scale_factor`` times D**-0.5. Index tables have batch
    and head sizes 1 where the plan is shared.

    ``reps``: groups of representatives, seen per query block. ``first_order``: float32 (B, Hk or H, D, Dv); adds
    scale x p x (q @ first_order) with p the mass on representatives (PISA); (B, Hk or H, R, D, Dv) has a matrix for
    each of them and is for tests, served by the reference tier alone. ``row_scale`` float32 (B, H, nq) and ``row_add``
    float32 (B, H, nq, Dv), together or not at all: applied after the softmax (Rectified SpaAttn).
    ``kept``: whether the method keeps this plan for further calls.
    """

    layout: Layout
    q_blocks: Blocks
    k_blocks: Blocks
    full: BlockList
    partial: BlockList | None = None
    predicate: Predicate | None = None
    order: Tensor | None = None
    kv_order: Tensor | None = None
    kv_layout: Layout | None = None
    scale: float | None = None
    scale_factor: float = 1.0
    reps: tuple[Group, ...] = ()
    first_order: Tensor | None = None
    row_scale: Tensor | None = None
    row_add: Tensor | None = None
    kept: bool = False
    _memo: dict = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        return self.full.count.device

    @property
    def keys(self) -> Layout:
        return self.kv_layout or self.layout

    def softmax_scale(self, dim: int, scale: float | None = None) -> float:
        """What logits of ``dim`` channels are multiplied by: ``scale`` where a caller sets one, else the plan's own."""
        if scale is not None:
            return scale
        return self.scale if self.scale is not None else self.scale_factor * dim**-0.5

    @property
    def block_mask(self) -> Tensor:
        """bool (B1, H1, nq, nk), plan order: key blocks visited whole or in part."""
        mask = self.full.mask(self.k_blocks.count)
        return mask if self.partial is None else mask | self.partial.mask(self.k_blocks.count)

    @property
    def density(self) -> float:
        """Visible share of all Nq x Nk pairs, text included; the mean over batch and heads."""
        return self._densities()[0]

    @property
    def density_video(self) -> float:
        """Visible share of the main x main pairs; the mean over batch and heads."""
        return self._densities()[1]

    @property
    def density_known(self) -> bool:
        """Whether :attr:`density` is at hand; otherwise reading it counts the pairs of every partial block."""
        return self.partial is None or "densities" in self._memo

    def token_mask(self) -> Tensor:
        """bool (B1, H1, Nq, Nk) in the caller's token order: pairs attended exactly.

        Raises ``UsageError`` when the result would exceed 2 GiB.
        """
        mask = self._checked("token_mask", self.full.mask(self.k_blocks.count))
        mask = self._spread(mask, self.k_blocks.owner())
        if self.partial is not None:
            q, k = (torch.arange(blocks.n, device=self.device) for blocks in (self.q_blocks, self.k_blocks))
            seen = self.predicate.visible(q[:, None], k[None, :])
            mask = mask | (self._spread(self.partial.mask(self.k_blocks.count), self.k_blocks.owner()) & seen)
        return self._in_token_order(mask)

    def row(self, token: int, head: int = 0, batch: int = 0) -> Tensor:
        """bool (Nk,), token order: the keys that one query attends exactly, ``token_mask()[batch, head, token]``.

        Costs one row, at any size. Raises ``UsageError`` for a token outside the queries.
        """
        if not 0 <= token < self.q_blocks.n:
            raise UsageError(f"token {token} is not a query of this plan; allowed 0..{self.q_blocks.n - 1}")
        order, kv_order = (o[min(head, len(o) - 1)] if o is not None and o.ndim == 2 else o for o in self._orders())
        slot = torch.tensor(token) if order is None else (order == token).nonzero()[0, 0]
        block = int(torch.searchsorted(self.q_blocks.bounds, slot.cpu(), right=True)) - 1
        owner = self.k_blocks.owner().to(self.device)

        def listed(entry: BlockList) -> Tensor:
            table = min(batch, entry.count.shape[0] - 1), min(head, entry.count.shape[1] - 1), block
            blocks = torch.zeros(self.k_blocks.count, dtype=torch.bool, device=self.device)
            return blocks.index_fill_(0, entry.index[table][: entry.count[table]].long(), True)[owner]

        seen = listed(self.full)
        if self.partial is not None:
            keys = listed(self.partial).nonzero().flatten()
            seen[keys] |= self.predicate.visible(slot.to(self.device), keys)
        return seen if kv_order is None else torch.zeros_like(seen).index_put_((kv_order,), seen)

    def rep_mask(self) -> Tensor:
        """bool (B1, H1, Nq, Nk) in the caller's token order: pairs seen through a representative.

        A dead key counts as seen where its representative stands for live ones too. Raises ``UsageError`` when the
        result would exceed 2 GiB.
        """
        seen = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=self.device)
        for group in self.reps:
            mask = self._checked("rep_mask", group.mask())
            # One column more stands for the slots that no representative stands for.
            owner = torch.full((self.k_blocks.n,), group.size)
            start, stop = int(group.bounds[0]), int(group.bounds[-1])
            owner[start:stop] = torch.repeat_interleave(torch.arange(group.size), group.bounds.diff())
            seen = seen | self._spread(torch.nn.functional.pad(mask, (0, 1)), owner)
        if not self.reps:
            return self._checked("rep_mask", seen).expand(1, 1, self.q_blocks.n, self.k_blocks.n)
        return self._in_token_order(seen)

    def bytes(self) -> int:
        """Bytes of the index lists, of the representatives and of the row factors."""
        rest = [x.nbytes for x in (self.first_order, self.row_scale, self.row_add) if x is not None]
        lists = self.full.bytes() + (self.partial.bytes() if self.partial is not None else 0)
        return lists + sum(group.bytes() for group in self.reps) + sum(rest)

    def to(self, device: torch.device) -> Plan:
        """The plan with its tables on ``device``."""
        if device == self.device:
            return self

        def moved(name: str):
            value = getattr(self, name)
            return value.to(device) if hasattr(value, "to") else value

        tables = ("full", "partial", "predicate", "order", "kv_order", "first_order", "row_scale", "row_add")
        return replace(
            self, **{name: moved(name) for name in tables}, reps=tuple(group.to(device) for group in self.reps),
            _memo={key: value for key, value in self._memo.items() if key == "densities"},
        )  # fmt: skip

    def _orders(self) -> tuple[Tensor | None, Tensor | None]:
        return self.order, self.kv_order if self.kv_order is not None else self.order

    def _checked(self, what: str, mask: Tensor) -> Tensor:
        """``mask`` (B1, H1, ..), unless spreading it over all tokens would take more than the limit."""
        heads = max(mask.shape[1], *(o.shape[0] if o is not None and o.ndim == 2 else 1 for o in self._orders()))
        size = mask.shape[0] * heads * self.q_blocks.n * self.k_blocks.n
        if size > MASK_LIMIT:
            raise UsageError(
                f"{what}() would take {size / 2**30:.1f} GiB for {self.q_blocks.n} x {self.k_blocks.n} tokens and "
                f"{heads} head tables; the limit is 2 GiB. Use block_mask, density or a smaller layout."
            )
        return mask

    def _spread(self, mask: Tensor, columns: Tensor) -> Tensor:
        """mask (B1, H1, nq, cols) over slots: rows by query block, slot j takes column ``columns[j]``."""
        rows = self.q_blocks.owner().to(self.device)
        return mask[:, :, rows][..., columns.to(self.device)]

    def _in_token_order(self, mask: Tensor) -> Tensor:
        for axis, order in zip((-2, -1), self._orders(), strict=True):
            if order is not None:
                mask = _unorder(mask, order, axis)
        return mask

    def _densities(self) -> tuple[float, float]:
        if "densities" not in self._memo:
            self._memo["densities"] = count_pairs(self)
        return self._memo["densities"]


def _unorder(mask: Tensor, order: Tensor, axis: int) -> Tensor:
    """mask with ``axis`` moved from plan order to token order."""
    inverse = torch.argsort(order, dim=-1)
    if inverse.ndim == 1:
        return mask.index_select(axis, inverse)
    heads = inverse.shape[0]
    mask = mask.expand(mask.shape[0], heads, *mask.shape[2:])
    index = inverse[None, :, :, None] if axis == -2 else inverse[None, :, None, :]
    return mask.gather(axis, index.expand(mask.shape))
