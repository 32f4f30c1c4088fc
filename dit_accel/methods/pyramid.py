"""PSA (Pyramid Sparse Attention, arXiv 2512.04025): the less a block matters, the coarser its keys.

Keys and values of a block are averaged in pairs, and again, up to means of eight. Each query block ranks the key blocks
by sampled attention; the best it sees exactly, the next by means of two, of four, of eight, the rest not at all, all in
one softmax. A mean that stands for n keys carries ``+log n``, so that levels weigh what their keys would.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import choice, number, several, whole
from ..errors import UsageError
from ..kernels import BlockList, Group
from ..kernels.pooling import Runs, pyramid_means, pyramid_similarity
from ..layout import Layout
from ..plans import Blocks, Plan
from ..schedule import Schedule
from .base import Call, Method, check_density
from .curves import curve_order
from .pyramid_levels import (
    generator,
    importance,
    quota_ends,
    ranked_levels,
    sample_places,
    sample_tokens,
    threshold_ends,
)
from .pyramid_presets import PRESETS, Preset

MODES = ("threshold", "topk")
LEVELS = (1, 2, 4, 8)
CURVES = (None, "gilbert")
# Steps whose places are drawn at once.
STEPS = 64


@dataclass(frozen=True)
class Pyramid(Method):
    """Pyramid Sparse Attention with the published parameters.

    ``levels``: how many keys each mean stands for, from fine to coarse; 1 is exact. ``bounds``: where each level ends,
    with ``mode="topk"`` as a share of the key blocks, with ``"threshold"`` of a row's importance. ``block_q``,
    ``block_k``: tokens per block. ``tile``: keys that a kernel takes at once; a level takes blocks by so many that
    their means fill a tile, which for short sequences keeps more than the bounds say. ``similarity``: the mean cosine
    of keys that a block must exceed to be seen at each level but the first, else it is seen at a finer one.
    ``min_level1``: share of the blocks that a threshold leaves exact at least. ``curve``: ``"gilbert"`` cuts blocks
    along a generalised Hilbert curve, None along the caller's order. ``seed``: of the places where blocks are sampled,
    together with layer and step; torch's own generators are not touched.

    Text and other tokens beside the main segment see all and are seen exactly by all. Means and their ``log n`` are
    those of live tokens, so short blocks and padding count as what they hold. Every query block sees its best block. A
    first bound of 1 on level 1 is dense.

    Defaults: the release's attention for any model, except that it does not reorder. Raises ``UsageError`` for values
    that cannot be.
    """

    name: ClassVar[str] = "pyramid"
    static: ClassVar[bool] = False
    reads_values: ClassVar[bool] = True

    levels: tuple[int, ...] = LEVELS
    bounds: tuple[float, ...] = (0.1, 0.15, 0.15, 0.35)
    mode: str = "topk"
    block_q: int = 128
    block_k: int = 64
    tile: int = 32
    similarity: tuple[float, ...] | None = None
    min_level1: float = 0.06
    curve: str | None = "gilbert"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in _plain(self).items():
            object.__setattr__(self, name, value)
        _check(self)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Pyramid:
        """A published configuration by name, with single parameters replaced by ``changes``.

        Sources in ``pyramid_presets``; :meth:`preset_schedule` has the dense steps that go with it.
        """
        return cls(**{**_preset(name)[0], **changes})

    @classmethod
    def preset_schedule(cls, name: str) -> Schedule:
        """The dense steps that a configuration was published with."""
        return _preset(name)[1]

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """The plan of one call. q (B, H, Nq, D), k (B, Hk, Nk, D), v (B, Hk, Nk, Dv)."""
        queries = self._tokens(call.layout, self.block_q, call)
        keys = self._tokens(call.kv_layout or call.layout, self.block_k, call)
        lists = {"layout": call.layout, "q_blocks": queries.blocks, "k_blocks": keys.blocks, "order": queries.order}
        if call.kv_layout is not None and call.kv_layout != call.layout:
            kv_order = keys.order
            if kv_order is None and queries.order is not None:
                kv_order = torch.arange(keys.blocks.n, device=call.device)
            lists |= {"kv_layout": call.kv_layout, "kv_order": kv_order}
        if self._is_dense(self.bounds):
            everything = torch.ones((1, 1, queries.blocks.count, keys.blocks.count), dtype=torch.bool, device=q.device)
            return Plan(full=BlockList.from_mask(everything, keys.blocks.count), **lists)

        live = keys.live(call.kv_valid)
        pooled = [level for level in self._reachable if level > 1]
        which, table = self._assign(q, k, queries, keys, live, call)
        beside = queries.blocks.count - queries.count, keys.blocks.count - keys.count
        full, *seen = self._lists(which, table, pooled, beside)
        runs = self._runs(keys, live, pooled, call)
        means = (pyramid_means(x, keys.tokens, live, pooled, runs) for x in (k, v))
        reps = []
        for level, key, value, count, rows in zip(pooled, *means, runs.counts, seen, strict=True):
            bounds = (torch.arange(key.shape[2] + 1) * level).clamp_max(keys.main)
            reps.append(Group(key.to(q.dtype), value.to(q.dtype), count, rows, bounds, self.block_k // level))
        return Plan(full=full, reps=tuple(reps), **lists)

    def with_density(self, density: float, layout: Layout) -> tuple[Pyramid, float]:
        """Scale ``bounds`` so that the whole plan has the density asked for, text and means included.

        What a threshold keeps is not known ahead, so the answer has quotas (``mode="topk"``). The figure returned is
        that of blocks of average size; ``similarity`` can only raise it.
        """
        wanted, n = check_density(density), layout.tokens
        main = layout.main.stop - layout.main.start
        blocks = -(-main // self.block_k)

        def reached(bounds: tuple[float, ...]) -> float:
            share = 1.0 if self._is_dense(bounds) else self._kept(quota_ends(blocks, bounds, self._steps), blocks)
            return (n * n - main * main + main * main * share) / n**2

        # Quotas change where a scaled bound reaches a whole number of blocks.
        scales = {i / (blocks * bound) for bound in self.bounds if bound for i in range(1, blocks + 1)}
        found = {
            tuple(min(math.nextafter(bound * scale, 2), 1.0) if bound else 0.0 for bound in self.bounds)
            for scale in scales
        }
        best = min(sorted(found), key=lambda bounds: abs(reached(bounds) - wanted))
        return replace(self, mode="topk", bounds=best), reached(best)

    def _is_dense(self, bounds: tuple[float, ...]) -> bool:
        return self.levels[0] == 1 and bounds[0] >= 1

    @property
    def _steps(self) -> list[int]:
        """By how many blocks each level grows: their means fill a tile."""
        return [max(math.ceil(level * self.tile / self.block_k), 1) for level in self.levels]

    @property
    def _reachable(self) -> list[int]:
        """Levels that some block may get. One that ends where the level before it does is empty."""
        if self.similarity is not None:
            return list(self.levels)
        before = (-1.0, *self.bounds)
        return [level for level, a, b in zip(self.levels, before, self.bounds, strict=False) if b > a]

    def _kept(self, ends: list[int], blocks: int) -> float:
        """Share of the pairs of a row, each mean counted as one, the sum of 1 / level over ``blocks``."""
        counts = [end - start for start, end in zip((0, *ends), ends, strict=False)]
        counts[0] += ends[-1] == 0
        return sum(count / level for count, level in zip(counts, self.levels, strict=True)) / blocks

    def _assign(
        self, q: Tensor, k: Tensor, queries: _Tokens, keys: _Tokens, live: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        """Main key blocks by falling importance, int64 (B, H, query blocks, key blocks), and the level at which each is
        seen, uint8 alike, 0 for not at all; None where its rank alone decides that (:meth:`_ranks`).
        """
        places = self._places(call)
        dead = None if call.kv_valid is None else ~live.any(-1)
        rows = sample_tokens(queries.tokens, places[0], None)
        columns = sample_tokens(keys.tokens, places[1], None if dead is None else live)
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        score = importance(q, k, rows, columns, scale, dead)
        if dead is not None:
            # Behind live blocks whose importance underflows.
            score = score.masked_fill(dead[:, None, None], -1)
        ranked, which = score.sort(dim=-1, descending=True, stable=True)
        if self.mode == "topk":
            if self.similarity is None and dead is None:
                return which, None
            key = "pyramid quotas", keys.count, self.levels, self.bounds, tuple(self._steps), q.device
            ends = quota_ends(keys.count, self.bounds, self._steps)
            by_rank = call.state.plan(key, lambda: ranked_levels(keys.count, self.levels, ends, q.device))
        else:
            first = self.levels[0] == 1 and self._steps[0] == 1
            least = int(self.min_level1 * keys.count) + 1 if first else 0
            ends = threshold_ends(ranked.clamp_min(0), self.bounds, self._steps, least)
            by_rank = ranked_levels(keys.count, self.levels, ends, q.device)
        by_rank = by_rank.expand(score.shape)
        table = torch.empty_like(by_rank, memory_format=torch.contiguous_format).scatter_(-1, which, by_rank)
        if self.similarity is not None:
            table = torch.minimum(table, self._caps(k, keys, live, q.shape[1]))
        return which, table if dead is None else table.masked_fill(dead[:, None, None], 0)

    def _places(self, call: Call) -> tuple[Tensor, Tensor]:
        """Where query and key blocks are sampled at this site and step, on the call's device.

        Sent there for many steps at once: a copy to a GPU waits for it, and a CUDA graph refuses it.
        """
        first, row = call.step.index // STEPS * STEPS, call.step.index % STEPS
        sizes = self.block_q, self.block_k

        def drawn() -> list[Tensor]:
            sources = [generator(self.seed, call.layer, step) for step in range(first, first + STEPS)]
            return [torch.stack([sample_places(size, one) for one in sources]).to(call.device) for size in sizes]

        queries, keys = call.state.plan(("pyramid places", self.seed, call.layer, first, sizes, call.device), drawn)
        return queries[row], keys[row]

    def _lists(
        self, which: Tensor, table: Tensor | None, pooled: list[int], beside: tuple[int, int]
    ) -> list[BlockList]:
        """The blocks seen exactly and those seen at each level of ``pooled``, from what :meth:`_assign` returns.

        ``beside``: how many blocks of other tokens there are behind the main ones, of queries and of keys.
        """
        blocks, on_cpu = which.shape[-1], which.device.type == "cpu"
        if table is None:
            exact = torch.zeros_like(which, dtype=torch.bool).scatter_(-1, which[..., self._ranks(blocks, 1)], True)
        else:
            exact = table == 1
        exact = pad(exact, (0, beside[1], 0, beside[0]), value=True)
        # On a GPU the largest count is not worth waiting for.
        lists = [BlockList.from_mask(exact, None if on_cpu else exact.shape[-1])]
        for level in pooled:
            if table is not None:
                mask = pad(table == level, (0, 0, 0, beside[0]))
                lists.append(BlockList.from_mask(mask, None if on_cpu else blocks))
                continue
            index = pad(which[..., self._ranks(blocks, level)].sort(-1).values.int(), (0, 0, 0, beside[0]))
            count = torch.full(which.shape[:-1], index.shape[-1], dtype=torch.int32, device=which.device)
            lists.append(BlockList(pad(count, (0, beside[0])), index))
        return lists

    def _caps(self, k: Tensor, keys: _Tokens, live: Tensor, heads: int) -> Tensor:
        """uint8 (B, H, 1, key blocks): the coarsest level at which each block may be seen."""
        alike = pyramid_similarity(k, keys.tokens, live, self.levels[1:])
        cap = torch.ones_like(alike[..., 0], dtype=torch.uint8)
        for coarser, (level, least) in enumerate(zip(self.levels[1:], self.similarity, strict=True)):
            cap = torch.where(alike[..., coarser] > least, level, cap)
        return cap.repeat_interleave(heads // k.shape[1], 1)[:, :, None]

    def _ranks(self, blocks: int, level: int) -> slice:
        """The ranks that get ``level`` where quotas decide, as in ``ranked_levels``."""
        ends = dict(
            zip(self.levels, itertools.pairwise((0, *quota_ends(blocks, self.bounds, self._steps))), strict=True)
        )
        first, stop = ends.get(level, (0, 0))
        nothing = ends[self.levels[-1]][1] == 0
        return slice(first, 1 if nothing and level == self.levels[0] else stop)

    def _runs(self, keys: _Tokens, live: Tensor, levels: list[int], call: Call) -> Runs:
        """The runs that ``levels`` average; without padding they follow from the layout."""
        if call.kv_valid is not None:
            return Runs.of(keys.tokens, live, levels)
        key = "pyramid runs", self.block_k, self.curve, tuple(levels), call.kv_layout or call.layout, call.device
        return call.state.plan(key, lambda: Runs.of(keys.tokens, live, levels))

    def _tokens(self, layout: Layout, size: int, call: Call) -> _Tokens:
        key = "pyramid", size, self.curve, layout, call.device
        return call.state.plan(key, lambda: _Tokens.of(layout, size, self.curve, call.device))


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The blocks of one layout: ``count`` of the ``main`` tokens along the curve, then those of all other tokens.

    ``order``: int64 (N,) slot -> token, or None. ``tokens``: int64 (count, size), those of the main blocks; a short
    last one is padded with its last token, and ``real``, bool (count, size), says where it is not.
    """

    blocks: Blocks
    count: int
    main: int
    order: Tensor | None
    tokens: Tensor
    real: Tensor

    @classmethod
    def of(cls, layout: Layout, size: int, curve: str | None, device: torch.device) -> _Tokens:
        main = layout.main.stop - layout.main.start
        starts = torch.cat([torch.arange(0, main, size), torch.arange(main, layout.tokens, size)])
        blocks = Blocks(torch.cat([starts, torch.tensor([layout.tokens])]))
        count = -(-main // size)
        slot = torch.arange(count * size).view(count, size)
        order = curve_order(layout, curve, longest_first=True)
        tokens = slot.clamp_max(main - 1) if order is None else order[slot.clamp_max(main - 1)]
        order = None if order is None else order.to(device)
        return cls(blocks, count, main, order, tokens.to(device), (slot < main).to(device))

    def live(self, kv_valid: Tensor | None) -> Tensor:
        """bool (B or 1, count, size): which places hold a live token."""
        if kv_valid is None:
            return self.real[None]
        return self.real & (self.tokens < kv_valid.to(self.tokens.device)[:, None, None])


def _plain(method: Pyramid) -> dict[str, Any]:
    """The parameters as plain values of their kinds."""
    found: dict[str, Any] = {}
    for name, what, kind in (
        ("levels", "how many keys each mean stands for, like (1, 2, 4, 8)", whole),
        ("bounds", "one share per level, like (0.1, 0.15, 0.15, 0.35)", number),
        ("similarity", "one cosine per level but the first, like (0.7, 0.65, 0.6), or is None", number),
    ):
        value = getattr(method, name)
        if value is not None or name != "similarity":
            values = several(f"Pyramid.{name}", value, what)
            found[name] = tuple(kind(f"Pyramid.{name}", one, f"a tuple of {what}, each a number") for one in values)
    for name in ("block_q", "block_k", "tile"):
        found[name] = whole(f"Pyramid.{name}", getattr(method, name), "a number of tokens")
    share = number("Pyramid.min_level1", method.min_level1, "a share of the key blocks, 0 to 1", 0, 1)
    return found | {"min_level1": share, "seed": whole("Pyramid.seed", method.seed, "a whole number", None)}


def _check(method: Pyramid) -> None:
    levels, bounds, similarity = method.levels, method.bounds, method.similarity
    if not levels or list(levels) != sorted(set(levels)) or not set(levels) <= set(LEVELS):
        raise UsageError(f"Pyramid.levels are some of {LEVELS}, ascending; got {levels!r}")
    if len(bounds) != len(levels) or list(bounds) != sorted(bounds) or bounds[0] < 0 or not 0 < bounds[-1] <= 1:
        raise UsageError(
            f"Pyramid.bounds are one share per level {levels}, 0 to 1, none falling, the last above 0; got {bounds!r}"
        )
    choice("Pyramid.mode", method.mode, MODES)
    if method.block_k % levels[-1]:
        raise UsageError(f"Pyramid.block_k is a multiple of the coarsest level, {levels[-1]}; got {method.block_k}")
    if similarity is not None and (levels[0] != 1 or len(similarity) != len(levels) - 1):
        raise UsageError(
            f"Pyramid.similarity has one threshold per level behind level 1, which it falls back to; got "
            f"{similarity!r} for levels {levels}. Example: levels=(1, 2, 4, 8), similarity=(0.7, 0.65, 0.6)"
        )
    if method.curve not in CURVES:
        raise UsageError(f"Pyramid.curve {method.curve!r} is unknown; choose 'gilbert', or None for no reordering")


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UsageError(f"unknown Pyramid preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
