"""PISA (Piecewise Sparse Attention, arXiv 2602.01077): important blocks exactly, all others by their means.

Each query block takes the key blocks whose mean key is most like its mean query. A block left out is not dropped: in
the softmax its mean key stands for its n keys, exp(s q.kbar + log n), and its mean value for their values (zeroth
order). What that neglects is, to first order, s (q H_j) with H_j = sum over the block of (k - kbar)^T v. In the
denominator it cancels; in the numerator PISA takes the mean of all H_j for each (hybrid), one matrix per head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import choice, flag, plain, whole
from ..errors import UsageError
from ..kernels import BlockList, Group
from ..kernels.pooling import block_means, block_statistics
from ..kernels.select import largest
from ..layout import Grid, Layout
from ..plans import Plan
from ..schedule import Schedule
from .base import Call, Method, check_density
from .pisa_blocks import Regions, compact_tile, regions
from .tile_shapes import Shape

ORDERS = ("zeroth", "hybrid", "first")

# Parameters, and what stays dense. FLUX.1-dev: the released processor and its README, whose first four layers are dense
# on every step. Wan 2.1 14B and HunyuanVideo: the density of the paper's comparison, 87.5 % sparse, "with warm-up" of
# unpublished length, so the usual schedule. "wan-sol-engine": Wan 2.1 14B in NVIDIA's Sol-Engine, by its page on PISA
# (nvlabs.github.io/Sana/Sol-Engine/docs/techniques/sparse/pisa), which gives the density alone: bias and block are the
# released kernel's defaults, and which layers it keeps dense is not published. The 3-D tile of video is not published:
# ours.
PRESETS: dict[str, tuple[dict[str, Any], Schedule]] = {
    "flux": ({"density": 0.15, "norm_bias": True, "tile": (8, 8)}, Schedule(first=0, layers=4)),
    "wan": ({"density": 0.125, "norm_bias": True}, Schedule()),
    "wan-sol-engine": ({"density": 0.1}, Schedule()),
    "hunyuan-video": ({"density": 0.125, "norm_bias": True}, Schedule()),
}


@dataclass(frozen=True)
class Pisa(Method):
    """PISA with the published parameters.

    ``density``: of N key blocks of the main segment each query block takes max(1, int(density N)) exactly.
    ``block_size``: tokens per block. ``order``: what stands for the others, ``"zeroth"``, ``"hybrid"``, or for tests
    ``"first"``, the exact first-order term, which the reference tier alone serves. ``norm_bias``: blocks whose means
    tell least, those of large ||H_j||, are taken rather than others. ``tile``: (h, w) or (t, h, w), boxes of
    ``block_size`` tokens that become the blocks; None keeps the caller's order, ``"auto"`` picks a compact box that
    suits the grid.

    Text and other segments lie in blocks of their own, seen exactly by every query, and their queries are dense. Keys
    beyond ``kv_valid`` are in no statistic. Blocks at the ends may be shorter: a mean stands for as many keys as it was
    made of.

    Defaults: block 64 and no bias, as in the released kernel; density 0.15, as in its README. Raises ``UsageError`` for
    values that cannot be.
    """

    name: ClassVar[str] = "pisa"
    static: ClassVar[bool] = False
    reads_values: ClassVar[bool] = True

    density: float = 0.15
    block_size: int = 64
    order: str = "hybrid"
    norm_bias: bool = False
    tile: tuple[int, ...] | str | None = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", check_density(self.density))
        object.__setattr__(self, "block_size", whole("Pisa.block_size", self.block_size, "a number of tokens"))
        choice("Pisa.order", self.order, ORDERS)
        object.__setattr__(self, "norm_bias", flag("Pisa.norm_bias", self.norm_bias))
        object.__setattr__(self, "tile", _checked(self.tile, self.block_size))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Pisa:
        """A published configuration by name (``PRESETS``), with single parameters replaced by ``changes``.

        :meth:`preset_schedule` has the dense steps and layers that go with it.
        """
        return cls(**{**_preset(name)[0], **changes})

    @classmethod
    def preset_schedule(cls, name: str) -> Schedule:
        """The dense steps and layers that a configuration was published with."""
        return _preset(name)[1]

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """The plan of one call. q (B, H, Nq, D), k (B, Hk, Nk, D), v (B, Hk, Nk, Dv)."""
        queries, keys = self.regions(call.layout), self.regions(call.kv_layout or call.layout)
        count = self._count(len(keys.main))
        order, kv_order = (self._order(layout, call) for layout in (call.layout, call.kv_layout or call.layout))
        same = call.kv_layout is None or call.kv_layout == call.layout
        lists = {"layout": call.layout, "q_blocks": queries.blocks, "k_blocks": keys.blocks, "order": order}
        if not same:
            unmoved = torch.arange(keys.blocks.n, device=q.device) if order is not None else None
            lists |= {"kv_layout": call.kv_layout, "kv_order": unmoved if kv_order is None else kv_order}
        if count == len(keys.main):
            everything = torch.ones((1, 1, queries.blocks.count, keys.blocks.count), dtype=torch.bool, device=q.device)
            return Plan(full=BlockList.from_mask(everything, keys.blocks.count), **lists)

        live = None if call.kv_valid is None else _live(k.shape[2], call.kv_valid.to(k.device))
        where = {"live": live, "order": kv_order}
        pooled = _pool(k, v, keys, where, moments=self.order == "hybrid", norms=self.norm_bias)
        query, _ = block_means(q, queries.bounds, order=order, placed=queries.on(q.device))
        exact = self._select(query, pooled, count, call.scale)
        beside_q, beside_k = queries.beside, keys.beside
        width = count + sum(beside_k) if not any(beside_q) else keys.blocks.count
        full = BlockList.from_mask(pad(exact, (*beside_k, *beside_q), value=True), width)
        seen = BlockList.from_mask(pad(~exact, (0, 0, *beside_q)), len(keys.main) - count)
        group = Group(pooled.key.to(q.dtype), pooled.value.to(q.dtype), pooled.count, seen, keys.bounds)
        first_order = pooled.moment
        if self.order == "first":
            first_order = _moments(k, v, keys.bounds, where) / pooled.count.clamp_min(1)[..., None, None]
        return Plan(full=full, reps=(group,), first_order=first_order, **lists)

    def with_density(self, density: float, layout: Layout) -> tuple[Pisa, float]:
        """Solve ``density`` so that the whole plan has the one asked for, text and representatives included.

        The figure returned is that of blocks of average size; which blocks are taken, the tensors decide. Where
        tiles leave short blocks at the ends, noise has up to a third less: their means vary most, so they rank first.
        """
        wanted, n, blocks = check_density(density), layout.tokens, len(self.regions(layout).main)
        main = layout.main.stop - layout.main.start

        def reached(count: int) -> float:
            return (n * n - main * main + main * (count * main / blocks + blocks - count)) / n**2

        best = min(range(1, blocks + 1), key=lambda count: abs(reached(count) - wanted))
        share = best / blocks
        if int(share * blocks) < best:
            share = math.nextafter(share, 2)
        return replace(self, density=share), reached(best)

    def regions(self, layout: Layout) -> Regions:
        """The blocks of ``layout`` and the order of tokens that lays them out."""
        return regions(layout, self.block_size, self.tile_on(layout.grid))

    def tile_on(self, grid: Grid) -> Shape | None:
        """The tile (t, h, w) on ``grid``, or None for blocks of consecutive tokens."""
        if self.tile == "auto":
            return compact_tile(grid, self.block_size)
        return self.tile if self.tile is None else (1,) * (3 - len(self.tile)) + self.tile

    def _order(self, layout: Layout, call: Call) -> Tensor | None:
        """The order of tokens on the call's device, sent there once."""
        key = "pisa order", self.block_size, self.tile, layout, call.device
        order = self.regions(layout).order
        return None if order is None else call.state.plan(key, lambda: order.to(call.device))

    def _count(self, blocks: int) -> int:
        """Key blocks of ``blocks`` that each query block takes exactly."""
        return max(1, int(self.density * blocks))

    def _select(self, query: Tensor, pooled: _Pooled, count: int, scale: float | None) -> Tensor:
        """bool (B, H, n, R): the ``count`` key blocks that each of n query blocks takes, by mean query and mean key."""
        heads, scale = query.shape[1], query.shape[-1] ** -0.5 if scale is None else scale
        score = scale * (query @ _heads(pooled.key, heads).mT)
        if self.norm_bias:
            score = score + (_heads(pooled.norm, heads) + 1e-5).log()[:, :, None]
        score = score.masked_fill((pooled.count == 0)[:, :, None], -torch.inf)
        return largest(score, count)


@dataclass(frozen=True, eq=False)
class _Pooled:
    """Of the R main key blocks: mean ``key`` (B, Hk, R, D) and ``value``, ``count`` of live keys, ``norm`` (B, Hk, R).

    ``moment``: (B, Hk, D, Dv), sum of H_j over all blocks, those beside the main segment included, divided by the
    number of all live keys; None where it is not asked for, and so ``norm``.
    """

    key: Tensor
    value: Tensor
    count: Tensor
    norm: Tensor | None
    moment: Tensor | None


def _pool(k: Tensor, v: Tensor, keys: Regions, where: dict[str, Any], *, moments: bool, norms: bool) -> _Pooled:
    if not moments and not norms:
        placed = keys.on(k.device)
        (key, count), (value, _) = (block_means(x, keys.bounds, placed=placed, **where) for x in (k, v))
        return _Pooled(key, value, count, None, None)
    found = block_statistics(k, v, keys.blocks.bounds, placed=keys.blocks.on(k.device)[0], norms=norms, **where)
    main = slice(keys.main.start, keys.main.stop)
    norm = None if found.norm is None else found.norm[:, :, main]
    tokens = found.count.sum(-1).clamp_min(1)[..., None, None]
    moment = found.moment / tokens if moments else None
    return _Pooled(found.key[:, :, main], found.value[:, :, main], found.count[..., main], norm, moment)


def _moments(k: Tensor, v: Tensor, bounds: Tensor, where: dict[str, Any]) -> Tensor:
    """(B, Hk, R, D, Dv): H_j of every block."""
    pairs = (bounds[j : j + 2] for j in range(len(bounds) - 1))
    return torch.stack([block_statistics(k, v, pair, **where).moment for pair in pairs], 2)


def _live(tokens: int, kv_valid: Tensor) -> Tensor:
    return torch.arange(tokens, device=kv_valid.device) < kv_valid[:, None]


def _heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _checked(tile: Any, size: int) -> tuple[int, ...] | str | None:
    if tile is None or tile == "auto":
        return tile
    sides = tuple(map(plain, tile)) if isinstance(tile, Iterable) and not isinstance(tile, str) else ()
    if len(sides) not in (2, 3) or not all(isinstance(n, int) and n > 0 for n in sides) or math.prod(sides) != size:
        raise UsageError(
            f"Pisa.tile is (h, w) or (t, h, w) of block_size tokens together, None or 'auto'; got {tile!r} with "
            f"block_size {size}. For an 8 x 8 tile: tile=(8, 8), block_size=64"
        )
    return sides


def _preset(name: str) -> tuple[dict[str, Any], Schedule]:
    if name not in PRESETS:
        raise UsageError(f"unknown Pisa preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
