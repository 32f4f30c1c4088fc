"""Block lists that differ by sample and head, and representatives, on torch's CPU flash kernel.

A row is one query tile of one sample and head. Rows of similar length share a call, so that little is padded and a
strip of keys is still in the cache when it is read. Queries are read from the caller's token order and outputs written
to it, row by row: a copy in plan order would cost as much as a tenth of attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..tileplan import TilePlan
from . import flash_strips
from .flash_strips import Strips, Tiles
from .order import keys_in_plan_order, live_slots

# Runs, bias, query tiles and places of one call of the kernel.
Chunk = tuple[Tensor, Tensor | None, Tiles, Tensor]

# Pairs of a query tile and a key up to which a plan's tables are kept with it: 16 MiB at most. A larger one takes so
# long that making them again does not count.
KEPT = 1 << 22
# Bytes of keys and values that are laid out at once; more heads than that take turns.
SOURCE = 64 << 20


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, *, scale: float, kv_valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As ``flash.attention``, for plans without a gate whose partial tiles test nothing but holes."""
    heads, kv_heads = q.shape[1], k.shape[1]
    queries = _Queries(q, plan, v.shape[-1])
    turn = heads_at_once(k, v, plan, heads)
    for first in range(0, heads, turn):
        own = slice(first, min(first + turn, heads))
        groups = slice(first * kv_heads // heads, own.stop * kv_heads // heads)
        part = plan if turn >= heads else plan.of_heads(own, heads)
        keys, values = keys_in_plan_order(k[:, groups], v[:, groups], part, own.stop - first)
        _attend(queries, own, keys, values, part, scale, live_slots(part, kv_valid))
    return queries.results()


def heads_at_once(k: Tensor, v: Tensor, plan: TilePlan, heads: int) -> int:
    """How many of ``heads`` query heads take part at once; whole groups that share a key head."""
    one = (k[:, :1].nbytes + v[:, :1].nbytes) * (1 + sum(group.size for group in plan.reps) / plan.n_k)
    return min(max(1, int(SOURCE // max(one, 1))) * (heads // k.shape[1]), heads)


def _attend(
    queries: _Queries, own: slice, k: Tensor, v: Tensor, plan: TilePlan, scale: float, alive: Tensor | None
) -> None:
    """The query heads ``own``, whose keys, values and plan are given, all of them in plan order."""
    b, h, dim = k.shape[0], own.stop - own.start, v.shape[-1]
    # The kernel wants one head dim for all. With a first-order term a further column of the values holds a 1 for every
    # representative, so that the same column of the output holds their share of the mass.
    width = max(k.shape[-1], dim + (plan.first_order is not None))
    source_heads = max(x.shape[1] for x in (k, *(group.key for group in plan.reps)))
    strips = Strips(plan, b, h, source_heads, alive)
    sources = flash_strips.sources(k, v, plan, width, strips.rooms)
    keys, values = (x.view(-1, strips.run * width) for x in sources)
    for runs, bias, tiles, places in _chunks(strips, queries, own, plan, width):
        query = queries.read(places)
        if runs.shape[1]:
            seen = (x.view(len(runs), 1, -1, width) for x in flash_strips.gathered(keys, values, runs.flatten()))
            wide = pad(query, (0, width - query.shape[-1])) if query.shape[-1] < width else query
            found, log = flash_strips.kernel(wide, *seen, scale, None if bias is None else bias.to(queries.lse.dtype))
            if bias is not None:
                empty = bias.amax(-1, keepdim=True) == -torch.inf
                found, log = found.masked_fill(empty, 0), log.masked_fill(empty[..., 0], -torch.inf)
        else:
            found, log = query.new_zeros((*query.shape[:3], width)), queries.lse.new_full(query.shape[:3], -torch.inf)
        if not plan.plain:
            found = _corrected(found, query, plan, dim, scale, tiles)
        queries.write(places, found[..., :dim], log)


def _chunks(strips: Strips, queries: _Queries, own: slice, plan: TilePlan, width: int) -> Iterable[Chunk]:
    """What each call of the kernel is for, made once where a small plan serves many calls."""

    def made() -> Iterator[Chunk]:
        for picked in strips.chunks(2 * width):
            tiles = strips.tiles[picked]
            places = queries.places(tiles.sample, tiles.head + own.start, tiles.number)
            yield *strips.of(picked), tiles, places

    key = "chunks", strips.shape, own.start, queries.strides, width
    if not plan.kept or strips.alive is not None or (key not in plan._memo and strips.visited > KEPT):
        return made()
    if key not in plan._memo:
        with torch.inference_mode(False):
            plan._memo[key] = list(made())
    return plan._memo[key]


def _corrected(found: Tensor, query: Tensor, plan: TilePlan, dim: int, scale: float, tiles: Tiles) -> Tensor:
    """The output (R, 1, tile, dim) of query tiles with the plan's first-order term and row factors. ``query``: (R, 1,
    tile, D); ``found``: (R, 1, tile, width), as the kernel leaves it."""
    wide = torch.promote_types(found.dtype, torch.float32)
    out = found[..., :dim].to(wide)
    if plan.first_order is not None:
        # A query's share weighs the query instead of its row of the product.
        weighted = query.to(wide) * (scale * found[..., dim : dim + 1].to(wide))
        out = torch.baddbmm(out[:, 0], weighted[:, 0], tiles.of_heads(plan.first_order).to(wide))[:, None]
    if plan.row_scale is not None:
        factor, shift = (tiles.of(x).to(wide)[:, None, None] for x in (plan.row_scale[..., None], plan.row_add))
        out = out.mul_(factor).add_(shift)
    return out.to(found.dtype)


class _Queries:
    """Queries read from, and outputs written to, memory in the caller's token order.

    A place is a token of one sample and head, or -1 for what only fills a tile.
    """

    def __init__(self, q: Tensor, plan: TilePlan, dim: int) -> None:
        b, h, n, d = q.shape
        # Outputs lie as queries do: diffusers has tokens before heads, and wants them so.
        self.tokens_first = q.stride(2) > q.stride(1)
        shape = (b, n, h) if self.tokens_first else (b, h, n)
        self.memory = (q.transpose(1, 2) if self.tokens_first else q).reshape(-1, d)
        self.strides = (n * h, 1, h) if self.tokens_first else (h * n, n, 1)
        slots = torch.arange(n) if plan.order is None else plan.order
        slots = pad(slots, (0, plan.tiles_q * plan.tile_q - slots.shape[-1]), value=-1)
        # (1 or H, query tiles, tile)
        self.slots = slots.view(-1, plan.tiles_q, plan.tile_q)
        self.filled = not bool((slots < 0).any())
        # What only fills a tile is written to a place behind the last token.
        rows = b * h * n + (not self.filled)
        self.out = q.new_empty((rows, dim))
        self.lse = q.new_empty(rows, dtype=torch.promote_types(q.dtype, torch.float32))
        self.shape = shape

    def places(self, sample: Tensor, head: Tensor, tile: Tensor) -> Tensor:
        """int64 (R, tile): the places of R query tiles, whose sample, head and number are int64 (R,)."""
        slots = self.slots[head if len(self.slots) > 1 else 0, tile]
        by_sample, by_head, by_token = self.strides
        places = slots * by_token + (sample * by_sample + head * by_head)[:, None]
        return places if self.filled else places.masked_fill_(slots < 0, -1)

    def read(self, places: Tensor) -> Tensor:
        """(R, 1, tile, D); any token where there is none."""
        found = self.memory.index_select(0, places.flatten() if self.filled else places.flatten().clamp_min(0))
        return found.view(len(places), 1, places.shape[1], -1)

    def write(self, places: Tensor, out: Tensor, lse: Tensor) -> None:
        """out (R, 1, tile, Dv) and lse (R, 1, tile) to their places."""
        places = places.flatten()
        places = places if self.filled else places.masked_fill(places < 0, len(self.out) - 1)
        self.out.index_copy_(0, places, out.flatten(0, 2))
        self.lse.index_copy_(0, places, lse.flatten())

    def results(self) -> tuple[Tensor, Tensor]:
        """out (B, H, N, Dv) and LSE (B, H, N)."""
        out, lse = (x[: math.prod(self.shape)].unflatten(0, self.shape) for x in (self.out, self.lse))
        return (out.transpose(1, 2), lse.transpose(1, 2)) if self.tokens_first else (out, lse)
