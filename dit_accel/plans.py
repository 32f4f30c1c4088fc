"""Plan: which keys each query sees, in the method's own blocks. Lowers to the TilePlan that kernels take."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import UsageError
from .kernels import BlockList, Gate, Predicate, TilePlan
from .layout import Layout

MASK_LIMIT = 2 * 1024**3  # bytes; token_mask refuses beyond


@dataclass(frozen=True, eq=False)
class Blocks:
    """A partition of n slots into consecutive blocks. ``bounds``: int64 (blocks + 1,) on the CPU."""

    bounds: Tensor

    @classmethod
    def uniform(cls, n: int, size: int) -> Blocks:
        """Blocks of ``size``; the last one may be shorter."""
        return cls(torch.cat([torch.arange(0, n, size), torch.tensor([n])]))

    @property
    def n(self) -> int:
        return int(self.bounds[-1])

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    @property
    def sizes(self) -> Tensor:
        return self.bounds.diff()

    @property
    def size(self) -> int | None:
        """The common size of all blocks but a shorter last one, or None."""
        sizes = self.sizes
        first = int(sizes[0])
        return first if bool((sizes[:-1] == first).all()) and int(sizes[-1]) <= first else None

    def owner(self) -> Tensor:
        """int64 (n,): the block of each slot."""
        return torch.repeat_interleave(torch.arange(self.count), self.sizes)


@dataclass(frozen=True, eq=False)
class Plan:
    """The visible pairs of one attention call.

    ``full``, ``partial``: per query block, the key blocks seen whole, and those whose pairs pass ``predicate``
    (tables in plan order). ``order``, ``kv_order``: int64 slot -> token, (N,) or (H, N), or None.
    ``scale``: the method's own softmax scale, or None for ``scale_factor`` times D**-0.5. Index tables have batch
    and head sizes 1 where the plan is shared.
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
    _memo: dict = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        return self.full.count.device

    @property
    def keys(self) -> Layout:
        return self.kv_layout or self.layout

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
        batch, heads = self.block_mask.shape[:2]
        heads = max(heads, *(o.shape[0] if o is not None and o.ndim == 2 else 1 for o in self._orders()))
        size = batch * heads * self.q_blocks.n * self.k_blocks.n
        if size > MASK_LIMIT:
            raise UsageError(
                f"token_mask() would take {size / 2**30:.1f} GiB for {self.q_blocks.n} x {self.k_blocks.n} tokens and "
                f"{heads} head tables; the limit is 2 GiB. Use block_mask, density or a smaller layout."
            )
        mask = lower(self).token_mask()
        for axis, order in zip((-2, -1), self._orders(), strict=True):
            if order is not None:
                mask = _unorder(mask, order, axis)
        return mask

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
        """bool (1, 1, Nq, Nk): pairs seen through a representative. No method of this version has any."""
        return torch.zeros((1, 1, self.q_blocks.n, self.k_blocks.n), dtype=torch.bool, device=self.device)

    def bytes(self) -> int:
        """Bytes of the index lists."""
        return self.full.bytes() + (self.partial.bytes() if self.partial is not None else 0)

    def to(self, device: torch.device) -> Plan:
        """The plan with its tables on ``device``."""
        if device == self.device:
            return self

        def moved(value):
            return value if value is None else value.to(device)

        return Plan(
            self.layout, self.q_blocks, self.k_blocks, moved(self.full), moved(self.partial), moved(self.predicate),
            moved(self.order), moved(self.kv_order), self.kv_layout, self.scale, self.scale_factor,
            {key: value for key, value in self._memo.items() if key == "densities"},
        )  # fmt: skip

    def _orders(self) -> tuple[Tensor | None, Tensor | None]:
        return self.order, self.kv_order if self.kv_order is not None else self.order

    def _densities(self) -> tuple[float, float]:
        if "densities" not in self._memo:
            self._memo["densities"] = _count_pairs(self)
        return self._memo["densities"]


def lower(plan: Plan, tile: tuple[int, int] | None = None) -> TilePlan:
    """Cut a plan into kernel tiles of ``(tile_q, tile_k)`` slots; None keeps the plan's own block size.

    Blocks that are whole multiples of a tile are split and keep their class. Any other combination lists the
    union of what a tile overlaps and settles visibility with a gate: exact, but a tile is then partial unless
    all it overlaps is full. Cached per plan and tile.
    """
    tile = tile or (plan.q_blocks.size or 64, plan.k_blocks.size or 64)
    if tile not in plan._memo:
        plan._memo[tile] = _lower(plan, *tile)
    return plan._memo[tile]


def _lower(plan: Plan, tile_q: int, tile_k: int) -> TilePlan:
    bq, bk = plan.q_blocks.size, plan.k_blocks.size
    order, kv_order = plan._orders()
    common = {"n_q": plan.q_blocks.n, "n_k": plan.k_blocks.n, "order": order, "kv_order": kv_order}
    if (bq, bk) == (tile_q, tile_k):
        return TilePlan(tile_q, tile_k, full=plan.full, partial=plan.partial, predicate=plan.predicate, **common)
    nk = plan.k_blocks.count
    full = plan.full.mask(nk)
    part = plan.partial.mask(nk) if plan.partial is not None else torch.zeros_like(full)
    if bq is not None and bk is not None and bq % tile_q == 0 and bk % tile_k == 0:
        full, part = (_split(m, bq // tile_q, bk // tile_k, common, tile_q, tile_k) for m in (full, part))
        lists = BlockList.from_mask(full), BlockList.from_mask(part) if plan.partial is not None else None
        return TilePlan(tile_q, tile_k, full=lists[0], partial=lists[1], predicate=plan.predicate, **common)
    full, part = torch.broadcast_tensors(full, part)
    q_row, k_col = (blocks.owner().int().to(plan.device) for blocks in (plan.q_blocks, plan.k_blocks))
    gate = Gate((full * 2 + part).to(torch.uint8), q_row, k_col)
    rows, cols = (_overlap(b, t).to(plan.device) for b, t in ((plan.q_blocks, tile_q), (plan.k_blocks, tile_k)))
    seen = rows @ (full | part).float() @ cols.T
    whole = (rows @ full.float() @ cols.T) == rows.sum(-1)[:, None] * cols.sum(-1)
    return TilePlan(
        tile_q, tile_k, full=BlockList.from_mask(whole), partial=BlockList.from_mask((seen > 0) & ~whole),
        predicate=plan.predicate, gate=gate, **common,
    )  # fmt: skip


def _split(mask: Tensor, by_q: int, by_k: int, common: dict, tile_q: int, tile_k: int) -> Tensor:
    mask = mask.repeat_interleave(by_q, -2).repeat_interleave(by_k, -1)
    return mask[..., : -(-common["n_q"] // tile_q), : -(-common["n_k"] // tile_k)]


def _overlap(blocks: Blocks, tile: int) -> Tensor:
    """float32 (tiles, blocks): 1 where a tile and a block share a slot."""
    start = torch.arange(0, blocks.n, tile)[:, None]
    return ((start < blocks.bounds[1:]) & (start + tile > blocks.bounds[:-1])).float()


def _unorder(mask: Tensor, order: Tensor, axis: int) -> Tensor:
    """mask with ``axis`` moved from plan order to token order."""
    inverse = torch.argsort(order, dim=-1)
    if inverse.ndim == 1:
        return mask.index_select(axis, inverse)
    heads = inverse.shape[0]
    mask = mask.expand(mask.shape[0], heads, *mask.shape[2:])
    index = inverse[None, :, :, None] if axis == -2 else inverse[None, :, None, :]
    return mask.gather(axis, index.expand(mask.shape))


def _count_pairs(plan: Plan) -> tuple[float, float]:
    """Visible pairs over all pairs, and over main x main pairs."""
    total = plan.q_blocks.n * plan.k_blocks.n
    q_main, k_main = (_main_weight(plan, layout) for layout in (plan.layout, plan.keys))
    entries = [entry for entry in (plan.full, plan.partial) if entry is not None]
    tables = max(entry.count.shape[0] * entry.count.shape[1] for entry in entries)
    seen = video = 0.0
    for entry in entries:
        repeat = tables // (entry.count.shape[0] * entry.count.shape[1])
        pairs = _partial_pairs(plan) if entry is plan.partial else _full_pairs(plan, entry, q_main, k_main)
        seen, video = seen + repeat * pairs[0], video + repeat * pairs[1]
    mains = float(plan.layout.main.stop - plan.layout.main.start) * (plan.keys.main.stop - plan.keys.main.start)
    return seen / (tables * total), video / (tables * mains)


def _main_weight(plan: Plan, layout: Layout) -> Tensor:
    return torch.zeros(layout.tokens).index_fill_(0, torch.arange(layout.main.start, layout.main.stop), 1)


def _full_pairs(plan: Plan, entry: BlockList, q_main: Tensor, k_main: Tensor) -> tuple[float, float]:
    order, kv_order = plan._orders()
    mask = entry.mask(plan.k_blocks.count).cpu().double()
    seen = (plan.q_blocks.sizes.double() @ mask @ plan.k_blocks.sizes.double()).sum()
    q_video, k_video = (
        _per_block(weight if o is None else weight[o.cpu()], blocks)
        for weight, o, blocks in ((q_main, order, plan.q_blocks), (k_main, kv_order, plan.k_blocks))
    )
    video = (q_video[..., None] * mask * k_video[..., None, :]).sum((-2, -1))
    return float(seen), float(video.sum())


def _per_block(weight: Tensor, blocks: Blocks) -> Tensor:
    """Sums of ``weight`` (n,) or (H, n) over blocks: (blocks,) or (H, blocks)."""
    total = torch.nn.functional.pad(weight.double().cumsum(-1), (1, 0))
    return total[..., blocks.bounds].diff(dim=-1)


def _partial_pairs(plan: Plan) -> tuple[float, float]:
    """Pairs of the partial blocks that pass the predicate, counted one query block at a time."""
    tiles = plan.to(torch.device("cpu"))
    order, kv_order = tiles._orders()
    q_token = torch.arange(plan.q_blocks.n) if order is None else order
    k_token = torch.arange(plan.k_blocks.n) if kv_order is None else kv_order
    mask = tiles.partial.mask(plan.k_blocks.count)
    seen = video = 0.0
    bounds, kb = plan.q_blocks.bounds.tolist(), plan.k_blocks.owner()
    for block in range(plan.q_blocks.count):
        q = torch.arange(bounds[block], bounds[block + 1])
        columns = mask[:, :, block].any(0).any(0)
        k = torch.nonzero(columns[kb]).flatten()
        visible = tiles.predicate.visible(q[:, None], k[None, :])
        listed = mask[:, :, block][:, :, kb[k]]
        seen += float((listed.sum((0, 1)) * visible.sum(0)).sum())
        rows, columns = _in_main(q_token[..., q], plan.layout), _in_main(k_token[..., k], plan.keys)
        inside = rows[..., :, None] & columns[..., None, :]
        video += float((visible & inside & listed[..., None, :]).sum())
    return seen, video


def _in_main(tokens: Tensor, layout: Layout) -> Tensor:
    return (tokens >= layout.main.start) & (tokens < layout.main.stop)
