"""Rectified SpaAttn (arXiv 2511.19835): block-sparse attention corrected by pooled attention.

A softmax over few blocks gives them the weight of all. Attention between block means, the implicit full attention A,
tells how much they should have (R) and what the blocks left out would have added (C): O' = R O_sparse + C. Tokens
beside the main segment are never pooled: as keys each counts for itself in A, as queries they are dense.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import flag, number, whole
from ..errors import UnsupportedError, UsageError
from ..kernels import BlockList
from ..kernels.pooling import block_means, block_spreads
from ..layout import Layout
from ..plans import Blocks, Plan
from ..schedule import Schedule
from .base import Call, Method, check_density
from .curves import curve_order, touching
from .rectified_presets import PRESETS, Preset

CURVES = (None, "gilbert")

# The smallest block that a density is solved with.
SMALLEST = 32

# Logits of tokens beside the main segment that are held at once, in elements.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Rectified(Method):
    """Rectified SpaAttn with the published parameters; the defaults are those released for HunyuanVideo.

    ``density``: kept fraction of the key blocks per query block, at least; ``top_p``: more are kept where they hold
    less than this share of the pooled attention. ``block_size``: tokens per block. ``curve``: ``"gilbert"`` cuts blocks
    along a generalised Hilbert curve, None along the caller's order. ``neighbors``: blocks that touch on the grid are
    kept. ``compensate``: pooled values stand in for blocks left out, where that gains more than it errs; without, the
    blocks kept take all the weight. ``first_frame_blocks``: blocks with tokens of the first frame keep each other;
    moot on single images.

    Text and other tokens beside the main segment see all and are seen by all. Means, weights and counts are those of
    live tokens, so a short last block counts as what it holds. A ``density`` that reaches every block is dense.

    Raises ``UsageError`` for values that cannot be, ``UnsupportedError`` for keys of another layout than the queries'.
    """

    name: ClassVar[str] = "rectified"
    static: ClassVar[bool] = False
    reads_values: ClassVar[bool] = True

    density: float = 0.2
    top_p: float = 0.3
    block_size: int = 128
    curve: str | None = "gilbert"
    neighbors: bool = True
    compensate: bool = True
    first_frame_blocks: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", check_density(self.density))
        top_p = number("Rectified.top_p", self.top_p, "a share of the pooled attention, 0 to 1", 0, 1)
        object.__setattr__(self, "top_p", top_p)
        size = whole("Rectified.block_size", self.block_size, "a number of tokens", 2)
        object.__setattr__(self, "block_size", size)
        for name in ("neighbors", "compensate", "first_frame_blocks"):
            object.__setattr__(self, name, flag(f"Rectified.{name}", getattr(self, name)))
        if self.curve not in CURVES:
            raise UsageError(f"Rectified.curve {self.curve!r} is unknown; choose 'gilbert', or None for no reordering")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Rectified:
        """A published configuration by name, with single parameters replaced by ``changes``.

        Sources in ``rectified_presets``; :meth:`preset_schedule` has the dense steps and layers that go with it.
        """
        return cls(**{**_preset(name).parameters, **changes})

    @classmethod
    def preset_schedule(cls, name: str) -> Schedule:
        """The dense steps and layers that a configuration was published with."""
        return _preset(name).schedule

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """The plan of one call. q (B, H, N, D), k (B, Hk, N, D), v (B, Hk, N, Dv)."""
        if call.kv_layout is not None and call.kv_layout != call.layout:
            raise UnsupportedError(f"Rectified needs keys in the queries' layout; got {call.layout}, {call.kv_layout}")
        what = "rectified", self.block_size, self.curve, self.neighbors, self.first_frame_blocks
        regions = call.state.plan((what, call.layout, call.device), lambda: _Regions.of(self, call.layout, call.device))
        if regions.whole or self._least(regions.count) == regions.count:
            everything = torch.ones((1, 1, *(regions.blocks.count,) * 2), dtype=torch.bool, device=call.device)
            return regions.plan(call.layout, everything)
        pooled = _Pooled.of(q, k, regions, call)
        kept = self._select(pooled.weights, regions) & (pooled.count > 0)[:, :, None]
        seen = pad(kept, (0, regions.beside, 0, regions.beside), value=True)
        if not self.compensate:
            return regions.plan(call.layout, seen)
        left_out = pooled.weights[..., : regions.count].masked_fill(kept | ~pooled.gains, 0)
        values, _ = block_means(v, regions.main, live=pooled.live, order=regions.order)
        # What is neither kept nor compensated is folded into the blocks kept: the weights of a row sum to 1.
        factor, addend = 1 - left_out.sum(-1), left_out @ _heads(values, q.shape[1])
        factor, addend = pad(factor, (0, regions.beside), value=1), pad(addend, (0, 0, 0, regions.beside))
        return replace(regions.plan(call.layout, seen), row_scale=factor, row_add=addend)

    def with_density(self, density: float, layout: Layout) -> tuple[Rectified, float]:
        """Solve ``density`` for the whole plan with its text, then ``block_size`` where that misses by over 20 %.

        Of few large blocks too many touch. ``top_p`` is lowered to the share of blocks that ``density`` keeps, so that
        flat rows keep no more. Which blocks are the most important ones, tensors decide: those that are always kept may
        be among them, as on smooth content, or be no likelier than others, as on noise. The figure returned is the
        middle of the two, where the bundled model's tensors lie; noise and smooth content have up to a quarter more
        and less.
        """
        wanted, best, size = check_density(density), None, self.block_size
        while best is None or (size >= SMALLEST and abs(best[1] - wanted) > 0.2 * wanted):
            found = replace(self, block_size=size)._solve_density(wanted, layout)
            if best is None or abs(found[1] - wanted) < abs(best[1] - wanted):
                best = found
            size //= 2
        return best

    def _solve_density(self, wanted: float, layout: Layout) -> tuple[Rectified, float]:
        regions = _Regions.of(self, layout, torch.device("cpu"))
        n, blocks, main = layout.tokens, regions.count, int(regions.main[-1])
        forced = torch.zeros(blocks) if regions.always is None else regions.always.sum(-1)

        def reached(count: int) -> float:
            apart = forced + count * (1 - forced / blocks)
            kept = (forced.clamp_min(count) + apart) / 2
            listed = float((regions.main.diff() * kept).sum()) * main / blocks
            return (listed + n * n - main * main) / n**2

        best = min(range(1, blocks + 1), key=lambda count: abs(reached(count) - wanted))
        share = best / blocks
        if int(share * blocks) < best:
            share = math.nextafter(share, 2)
        return replace(self, density=share, top_p=min(self.top_p, best / blocks)), reached(best)

    def _least(self, blocks: int) -> int:
        """Key blocks of ``blocks`` that a query block keeps at least."""
        return int(self.density * blocks)

    def _select(self, weights: Tensor, regions: _Regions) -> Tensor:
        """bool (B, H, blocks, blocks): key blocks kept. What is beside the main segment takes a place when it ranks."""
        ranked, which = weights.sort(dim=-1, descending=True, stable=True)
        count = (ranked.cumsum(-1) <= self.top_p).sum(-1, keepdim=True) + 1
        first = torch.arange(weights.shape[-1], device=weights.device) < count.clamp_min(self._least(regions.count))
        kept = torch.zeros_like(first).scatter_(-1, which, first)[..., : regions.count]
        return kept if regions.always is None else kept | regions.always


@dataclass(frozen=True, eq=False)
class _Regions:
    """The blocks of one layout: those of the main segment along the curve, then those of all other tokens.

    ``main``: int64 on the CPU, bounds of the main blocks. ``order``: int64 (N,) slot -> token, or None. ``always``:
    bool (main blocks, main blocks), pairs that are always kept, or None. ``whole``: no pair can be left out.
    """

    blocks: Blocks
    main: Tensor
    order: Tensor | None
    always: Tensor | None
    whole: bool

    @classmethod
    def of(cls, method: Rectified, layout: Layout, device: torch.device) -> _Regions:
        size, tokens = method.block_size, layout.main.stop - layout.main.start
        bounds = torch.cat([torch.arange(0, tokens, size), torch.arange(tokens, layout.tokens, size)])
        blocks = Blocks(torch.cat([bounds, torch.tensor([layout.tokens])]))
        main = torch.cat([torch.arange(0, tokens, size), torch.tensor([tokens])])
        order = curve_order(layout, method.curve)
        always = _always(method, layout, order, len(main) - 1)
        # The most important block is always kept, so that one block alone is.
        whole = blocks.count == 1 or (always is not None and bool(always.all()))
        order, always = (None if x is None else x.to(device) for x in (order, always))
        return cls(blocks, main, order, always, whole)

    @property
    def count(self) -> int:
        """Blocks of the main segment."""
        return len(self.main) - 1

    @property
    def beside(self) -> int:
        """Blocks of other tokens."""
        return self.blocks.count - self.count

    def plan(self, layout: Layout, seen: Tensor) -> Plan:
        # On a GPU the largest count is not worth waiting for.
        width = None if seen.device.type == "cpu" else self.blocks.count
        return Plan(layout, self.blocks, self.blocks, BlockList.from_mask(seen, width), order=self.order)


def _always(method: Rectified, layout: Layout, order: Tensor | None, blocks: int) -> Tensor | None:
    """bool (blocks, blocks): pairs of main blocks that touch, and pairs that both hold tokens of the first frame."""
    frames, height, width = layout.grid
    slot = torch.arange(frames * height * width)
    token = slot if order is None else order[: len(slot)] - layout.main.start
    owner = torch.empty_like(slot)
    owner[token] = slot // method.block_size
    always = torch.zeros((blocks, blocks), dtype=torch.bool)
    if method.neighbors:
        always |= touching(layout.grid, owner, blocks)
    if method.first_frame_blocks and frames > 1:
        first = torch.zeros(blocks, dtype=torch.bool).index_fill_(0, owner[: height * width], True)
        always |= first[:, None] & first
    return always if bool(always.any()) else None


@dataclass(frozen=True, eq=False)
class _Pooled:
    """Attention between block means: n main query blocks to n main key blocks and to what is beside them.

    ``weights``: (B, H, n, n + 1), the implicit full attention A, the last column all other keys together; rows sum to
    1. ``gains``: bool (B, H, n, n), whether pooled values may stand in for a block (GAPR). ``count``: int32 (B or 1, 1,
    n), live keys. ``live``: bool (B, N) of the keys in token order, or None.
    """

    weights: Tensor
    gains: Tensor
    count: Tensor
    live: Tensor | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, regions: _Regions, call: Call) -> _Pooled:
        scale = call.scale if call.scale is not None else q.shape[-1] ** -0.5
        live = None
        if call.kv_valid is not None:
            live = torch.arange(k.shape[2], device=k.device) < call.kv_valid.to(k.device)[:, None]
        query, query_spread, _ = block_spreads(q, regions.main, order=regions.order)
        key, key_spread, count = block_spreads(k, regions.main, live=live, order=regions.order)
        key, key_spread = (_heads(x, q.shape[1]) for x in (key, key_spread))
        scores = query @ key.mT
        # A mean that stands for n keys weighs n times as much: the paper's reallocation (IPAR), for blocks of any size.
        logits = scale * scores + count.to(scores).log()[:, :, None]
        logits = torch.cat([logits, _beside(query, k, call.layout, live, scale)], -1)
        error = (query_spread @ key.mT).abs() + (query @ key_spread.mT).abs()
        return cls(logits.softmax(-1), scores.abs() > error, count, live)


def _beside(query: Tensor, k: Tensor, layout: Layout, live: Tensor | None, scale: float) -> Tensor:
    """(B, H, n, 1): log-sum-exp of the logits of all live keys beside the main segment, token by token."""
    parts = [query.new_full((*query.shape[:3], 1), -torch.inf)]
    for tokens in _slices(layout, max(CHUNK // query[..., 0].numel(), 1)):
        logits = scale * (query @ _heads(k[:, :, tokens], query.shape[1]).to(query).mT)
        if live is not None:
            logits = logits.masked_fill(~live[:, None, None, tokens], -torch.inf)
        parts.append(logits.logsumexp(-1, keepdim=True))
    return torch.cat(parts, -1).logsumexp(-1, keepdim=True)


def _slices(layout: Layout, size: int) -> Iterator[slice]:
    """The tokens beside the main segment, ``size`` at a time."""
    for start, stop in ((0, layout.main.start), (layout.main.stop, layout.tokens)):
        for first in range(start, stop, size):
            yield slice(first, min(first + size, stop))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UsageError(f"unknown Rectified preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
