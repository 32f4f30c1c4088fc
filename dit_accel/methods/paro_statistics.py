"""What PARO's calibration keeps of a dense run: per block and axis order the attention mass, maximum and small entries.

Scores exist for a few query rows at a time, never N x N. The rows come in the caller's order and serve every axis
order at once: a weight belongs to one block per order, whatever the order in which it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, one_hot

from ..errors import UnsupportedError, UsageError
from ..layout import Layout
from ..plans import Blocks
from ..step import Step
from .base import Call
from .orders import candidates, token_order
from .testing import outside_main

# Weights held at once, in elements: what the cache of a core holds on CPU, little memory on a GPU.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}


def bin_of(step: Step, bins: int, total: int | None = None) -> int:
    """The timestep bin of a step: uniform over the run. ``total`` stands in where the run's length is not known."""
    total = step.total or total
    if not total:
        raise UnsupportedError(
            "PARO needs the number of steps of the run to find its timestep bin; set the processor on the pipeline "
            "instead of on its transformer, or pass step=Step(index, total)"
        )
    return min(step.index * bins // total, bins - 1)


@dataclass(frozen=True)
class OrderedBlocks:
    """The candidate orders of a layout, cut into blocks. ``ids``: axis orders; O = len(ids), nb = blocks."""

    layout: Layout
    block_size: int
    ids: tuple[int, ...]

    @classmethod
    def of(cls, layout: Layout, block_size: int) -> OrderedBlocks:
        return cls(layout, block_size, candidates(layout.grid))

    @cached_property
    def blocks(self) -> Blocks:
        return Blocks.uniform(self.layout.tokens, self.block_size)

    @cached_property
    def orders(self) -> Tensor:
        """int64 (O, N): slot -> token."""
        return torch.stack([token_order(self.layout, i) for i in self.ids])

    @cached_property
    def owner(self) -> Tensor:
        """int64 (O, N): the block that holds each token."""
        return torch.empty_like(self.orders).scatter_(1, self.orders, self.blocks.owner().expand_as(self.orders))

    @cached_property
    def free(self) -> Tensor:
        """bool (nb, nb): blocks of video tokens alone. The others are always kept and take no part in a choice."""
        inside = ~outside_main(self.blocks, self.layout)
        return inside[:, None] & inside


class BlockSums:
    """Block statistics of one attention call, for G heads: ``mass``, and with ``detail`` ``peak`` and ``small``.

    float32 (G, O, nb, nb): the sum of the weights of a block, their maximum, and how many lie below ``epsilon``. With
    ``chosen``, a position in ``shape.ids`` per head, (G, 1, nb, nb) under that order alone.
    """

    def __init__(
        self,
        shape: OrderedBlocks,
        heads: int,
        device: torch.device,
        *,
        detail: bool = False,
        epsilon: float = 1e-3,
        chosen: list[int] | None = None,
    ):
        self.shape, self.epsilon, self._chosen = shape, epsilon, chosen
        size = (heads, len(shape.ids) if chosen is None else 1, shape.blocks.count, shape.blocks.count)
        self.mass = torch.zeros(size, device=device)
        self.peak = torch.zeros(size, device=device) if detail else None
        self.small = torch.zeros(size, device=device) if detail else None
        self._orders, self._owner = shape.orders.to(device), shape.owner.to(device)
        self._starts = shape.blocks.bounds[:-1].to(device)

    def add(self, weights: Tensor, rows: Tensor, heads: slice = slice(None)) -> None:
        """Count ``heads`` at ``rows`` int64 (R,). weights: float32 (G, N, R), the softmax over N keys, keys first."""
        if self._chosen is None:
            for o in range(len(self.shape.ids)):
                self._add(weights, rows, heads, o, o)
            return
        for i, head in enumerate(range(self.mass.shape[0])[heads]):
            self._add(weights[i : i + 1], rows, slice(head, head + 1), self._chosen[head], 0)

    def _add(self, weights: Tensor, rows: Tensor, heads: slice, o: int, column: int) -> None:
        owner, order = self._owner[o, rows], self._orders[o]
        self.mass[heads, column].index_add_(1, owner, self._sums(weights, order))
        if self.peak is not None:
            self.small[heads, column].index_add_(1, owner, self._sums((weights < self.epsilon).float(), order))
            maxima = self._maxima(weights, order)
            self.peak[heads, column].scatter_reduce_(1, owner[:, None].expand_as(maxima), maxima, "amax")

    def _sums(self, x: Tensor, order: Tensor) -> Tensor:
        """(G, R, nb): x (G, N, R) summed over the keys of every block under ``order``, in one pass without a copy."""
        heads, n, r = x.shape
        index = order + torch.arange(heads, device=order.device)[:, None] * n
        starts = self._starts + torch.arange(heads, device=order.device)[:, None] * n
        bags = embedding_bag(index.flatten(), x.reshape(heads * n, r), starts.flatten(), mode="sum")
        return bags.reshape(heads, -1, r).mT

    def _maxima(self, x: Tensor, order: Tensor) -> Tensor:
        """(G, R, nb): as :meth:`_sums`, the maximum."""
        b, n = self.shape.block_size, x.shape[1]
        ordered, whole = x.index_select(1, order), n // b * b
        parts = [ordered[:, :whole].unflatten(1, (-1, b)).amax(2)] if whole else []
        if whole < n:
            parts.append(ordered[:, whole:].amax(1, keepdim=True))
        return torch.cat(parts, 1).mT


@dataclass
class LayerTally:
    """Sums over the calls of one layer, float32 (bins, H, O, nb, nb); ``calls``: int64 (bins,), one per sample."""

    mass: Tensor
    peak: Tensor | None
    small: Tensor | None
    calls: Tensor


class Statistics:
    """Block statistics of a dense run; :meth:`observe` is a listener for :class:`~.observe.Observe`.

    ``bins``: timestep bins. ``detail``: also keep what the quantisation cost and the printed metric need, at about
    three times the work. ``epsilon``: below it a weight counts as small (the paper's example, 1e-3). ``rows``:
    fraction of query rows looked at, drawn once. ``orders``: int8 (H,) per layer where the axis orders are chosen
    already (:class:`~.paro_calibration.OrderVotes`); then only these are kept, a sixth of the memory. Guidance
    branches and samples of a batch count alike.
    """

    def __init__(
        self,
        *,
        bins: int = 4,
        block_size: int = 64,
        detail: bool = False,
        epsilon: float = 1e-3,
        rows: float = 1.0,
        orders: dict[int, Tensor] | None = None,
    ):
        if bins < 1 or block_size < 1:
            raise UsageError(f"calibration needs bins >= 1 and block_size >= 1; got bins={bins}, {block_size=}")
        if not 0 < rows <= 1:
            raise UsageError(f"rows is the fraction of query rows looked at and lies in (0, 1]; got {rows}")
        self.bins, self.block_size, self.detail, self.epsilon, self.rows = bins, block_size, detail, epsilon, rows
        self.orders = orders
        self.shape: OrderedBlocks | None = None
        self.layers: dict[int, LayerTally] = {}

    def bytes(self, layout: Layout, heads: int, layers: int) -> int:
        """What a calibration on ``layout`` holds in memory."""
        shape = OrderedBlocks.of(layout, self.block_size)
        tables = 3 if self.detail else 1
        orders = len(shape.ids) if self.orders is None else 1
        return 4 * tables * layers * self.bins * heads * orders * shape.blocks.count**2

    @torch.no_grad()
    def observe(self, q: Tensor, k: Tensor, v: Tensor | None, call: Call) -> None:
        """Count one call. q (B, H, N, D), k (B, Hk, N, D). Raises where the layout or the head count changed."""
        shape = self._shape(call)
        scale = call.scale if call.scale is not None else q.shape[-1] ** -0.5
        where = bin_of(call.step, self.bins)
        for sample in range(q.shape[0]):
            valid = None if call.kv_valid is None else int(call.kv_valid[sample])
            sums = self._sums(shape, q[sample], k[sample], scale, valid, self._chosen(call.layer))
            self.count(call.layer, q.shape[1], where, sums)

    def count(self, layer: int, heads: int, where: int, sums: BlockSums) -> None:
        """Add what one sample of a call gave."""
        tally = self._tally(layer, heads)
        tally.mass[where] += sums.mass.cpu()
        if self.detail:
            tally.peak[where] += sums.peak.cpu()
            tally.small[where] += sums.small.cpu()
        tally.calls[where] += 1

    @cached_property
    def _rows(self) -> Tensor:
        """int64 (R,): the query rows looked at, ``rows`` of all, more where a block of some order would have none.

        At random: evenly spaced rows would miss whole columns of a grid whose width shares a factor with the spacing.
        """
        n, owner = self.shape.layout.tokens, self.shape.owner
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        turn = torch.empty(n, dtype=torch.int64).scatter_(0, drawn, torch.arange(n))
        first = torch.full((len(owner), self.shape.blocks.count), n)
        first.scatter_reduce_(1, owner, turn.expand_as(owner), "amin")
        return drawn[: max(round(self.rows * n), int(first.max()) + 1)].sort().values

    @cached_property
    def sampled(self) -> Tensor:
        """float32 (O, nb): how many of the rows looked at lie in each block."""
        return one_hot(self.shape.owner[:, self._rows], self.shape.blocks.count).sum(1).float()

    @cached_property
    def entries(self) -> Tensor:
        """float32 (O, nb, nb): weights of one call that were looked at in each block."""
        return self.sampled[:, :, None] * self.shape.blocks.sizes

    def _chosen(self, layer: int) -> list[int] | None:
        return None if self.orders is None else [self.shape.ids.index(i) for i in self.orders[layer].tolist()]

    def _sums(
        self, shape: OrderedBlocks, q: Tensor, k: Tensor, scale: float, valid: int | None, chosen: list[int] | None
    ) -> BlockSums:
        heads, n, _ = q.shape
        limit = CHUNK.get(q.device.type, CHUNK["cuda"])
        count = max(min(limit // n, 512), 16)
        group = max(limit // (n * count), 1)
        rows = self._rows.to(q.device)
        total = BlockSums(shape, heads, q.device, detail=self.detail, epsilon=self.epsilon, chosen=chosen)
        for head in range(0, heads, group):
            some = slice(head, min(head + group, heads))
            keys = k.repeat_interleave(heads // k.shape[0], 0)[some].float()
            for index in rows.split(count):
                scores = keys @ (q[some, index].float() * scale).mT
                if valid is not None:
                    scores[:, valid:] = -torch.inf
                total.add(scores.softmax(1), index, some)
        # As if every row had been looked at: blocks that happen to hold fewer of them would weigh too little.
        whole = (self.shape.blocks.sizes / self.sampled)[:, :, None].to(total.mass.device)
        total.mass *= whole if chosen is None else whole[chosen][:, None]
        return total

    def _shape(self, call: Call) -> OrderedBlocks:
        if call.kv_layout is not None and call.kv_layout != call.layout:
            raise UnsupportedError(f"PARO needs keys in the queries' layout; got {call.layout} and {call.kv_layout}")
        if self.shape is None:
            self.shape = OrderedBlocks.of(call.layout, self.block_size)
        if call.layout != self.shape.layout:
            raise UsageError(
                f"a calibration serves one layout; it began with {self.shape.layout} and now saw {call.layout}. "
                "Use one size and frame count for all prompts"
            )
        return self.shape

    def _tally(self, layer: int, heads: int) -> LayerTally:
        nb, orders = self.shape.blocks.count, len(self.shape.ids) if self.orders is None else 1
        if layer not in self.layers:

            def zeros() -> Tensor:
                return torch.zeros((self.bins, heads, orders, nb, nb))

            detail = (zeros(), zeros()) if self.detail else (None, None)
            self.layers[layer] = LayerTally(zeros(), *detail, torch.zeros(self.bins, dtype=torch.int64))
        known = self.layers[layer].mass.shape[1]
        if known != heads:
            raise UsageError(f"layer {layer} had {known} heads and now has {heads}; calibrate one model at a time")
        return self.layers[layer]
