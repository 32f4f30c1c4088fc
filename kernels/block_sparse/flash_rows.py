"""Block lists that differ by sample and head, and representatives, on torch's CPU flash kernel.

A row is one query tile of one sample and head. What it sees is gathered into one strip of keys and values, exact ones
and representatives alike, whose logits take 0, ``+log n`` or -inf from a bias per key. Rows of similar length share a
call, so that little is padded and a strip is still in the cache when it is read. What lists name in runs is copied in
runs: several times as fast as token by token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocklist import BlockList
from ..tileplan import TilePlan

# Elements of one call's strips: a few MiB, which stay in the caches of two cores and more.
STRIPS = 1 << 22
# Bytes of the keys and values beside each other that are kept at once; more heads than that take turns.
SOURCE = 64 << 20


def heads_at_once(k: Tensor, v: Tensor, plan: TilePlan, heads: int) -> int:
    """How many of ``heads`` query heads to give to :func:`attention` at once; whole groups that share a key head."""
    one = (k[:, :1].nbytes + v[:, :1].nbytes) * (1 + sum(group.size for group in plan.reps) / plan.n_k)
    return min(max(1, int(SOURCE // max(one, 1))) * (heads // k.shape[1]), heads)


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, *, scale: float, alive: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As ``reference.attention``, for plans without a gate whose partial tiles test nothing but holes."""
    (b, h, n, _), dim = q.shape, v.shape[-1]
    tiles, tile = plan.tiles_q, plan.tile_q
    wide = torch.promote_types(q.dtype, torch.float32)
    # The kernel wants one head dim for all. With a first-order term a further column of the values holds a 1 for every
    # representative, so that the same column of the output holds their share of the mass.
    width = max(q.shape[-1], dim + (plan.first_order is not None))
    source = beside(k, v, plan, width)
    strips = _Strips(plan, b, h, source.shape[1], alive)
    source = source.view(-1, strips.run * source.shape[-1])
    rows = pad(q, (0, width - q.shape[-1], 0, tiles * tile - n)).reshape(b * h * tiles, 1, tile, width)
    out = torch.empty_like(rows)
    lse = rows.new_empty(rows.shape[:3], dtype=wide)
    buffer = source.new_empty(0)
    for picked in strips.chunks(2 * width):
        runs, bias = strips.of(picked)
        if not runs.shape[1]:
            out[picked], lse[picked] = 0, -torch.inf
            continue
        strip, buffer = gathered(source, runs, buffer)
        strip = strip.view(len(runs), 1, -1, 2 * width)
        found, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows[picked], strip[..., :width], strip[..., width:], scale=scale,
            attn_mask=None if bias is None else bias.to(wide),
        )  # fmt: skip
        if bias is not None:
            empty = (bias == -torch.inf).all(-1, keepdim=True)
            found, log = found.masked_fill(empty, 0), log.masked_fill(empty[..., 0], -torch.inf)
        out[picked], lse[picked] = found, log
    out, lse = out.view(b, h, -1, width)[:, :, :n], lse.view(b, h, -1)[:, :, :n]
    out, mass = out[..., :dim], out[..., dim : dim + 1]
    if plan.first_order is not None:
        first = plan.first_order.to(wide).repeat_interleave(h // plan.first_order.shape[1], 1)
        out = (out + scale * mass * (q.to(wide) @ first)).to(q.dtype)
    if plan.row_scale is not None:
        factor, shift = (x.repeat_interleave(tile, 2)[:, :, :n] for x in (plan.row_scale[..., None], plan.row_add))
        out = torch.addcmul(shift.to(wide), out.to(wide), factor.to(wide)).to(q.dtype)
    return out, lse


def beside(k: Tensor, v: Tensor, plan: TilePlan, width: int) -> Tensor:
    """(B, Hs, S, 2 width): keys beside values, exact ones up to whole tiles, then every group's representatives.

    Zero where there is none. With a first-order term, column ``width + Dv`` is 1 for representatives.
    """
    parts = [(k, v, plan.tiles_k * plan.tile_k), *((group.key, group.value, group.size) for group in plan.reps)]
    heads, dims = max(key.shape[1] for key, _, _ in parts), (k.shape[-1], v.shape[-1])
    whole = dims == (width, width) and plan.n_k % plan.tile_k == 0
    shape = k.shape[0], heads, sum(room for _, _, room in parts), 2 * width
    source = k.new_empty(shape) if whole else k.new_zeros(shape)
    at = 0
    for number, (key, value, room) in enumerate(parts):
        rows = source[:, :, at : at + key.shape[2]].unflatten(1, (key.shape[1], -1))
        rows[..., : dims[0]] = key[:, :, None]
        rows[..., width : width + dims[1]] = value[:, :, None]
        if plan.first_order is not None:
            rows[..., width + dims[1]] = float(number > 0)
        at += room
    return source


def gathered(source: Tensor, runs: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``runs`` of ``source``, one after the other, in ``buffer`` where that is large enough, and the buffer.

    Fresh memory of that size costs about as much as the copy.
    """
    needed = runs.numel() * source.shape[-1]
    if buffer.numel() < needed:
        buffer = source.new_empty(needed)
    strip = buffer[:needed].view(runs.numel(), source.shape[-1])
    return torch.index_select(source, 0, runs.flatten(), out=strip), buffer


def _merged(plan: TilePlan) -> BlockList:
    """Full and partial tiles as one list: holes are told by slot, and two lists would be padded one by one."""
    if plan.partial is None:
        return plan.full
    if "merged" not in plan._memo:
        tiles = plan.tiles_k
        plan._memo["merged"] = BlockList.from_mask(plan.full.mask(tiles) | plan.partial.mask(tiles))
    return plan._memo["merged"]


class _Strips:
    """What every row sees, as runs of positions in the source and a bias. ``run``: how many positions a run has."""

    def __init__(self, plan: TilePlan, b: int, h: int, source_heads: int, alive: Tensor | None) -> None:
        self.plan = plan
        shape = (b, h, plan.tiles_q)
        lists = [(_merged(plan), plan.tile_k, 0, None)]
        at = plan.tiles_k * plan.tile_k
        for group in plan.reps:
            lists.append((group.seen, group.width, at, group.bias().expand(b, h, -1).flatten(0, 1)))
            at += group.size
        self.lists = [_Rows.of(entry, shape, *rest) for entry, *rest in lists]
        self.run = math.gcd(*(one.width for one in self.lists), *(one.offset for one in self.lists), at)
        self.dead = None if plan.partial is None else plan.predicate.dead
        self.alive = None if alive is None else alive.expand(b, h, -1).flatten(0, 1)
        self.same = not plan.reps and self.dead is None and self.alive is None
        table = torch.arange(b * h * plan.tiles_q) // plan.tiles_q
        self.table = table
        self.base = (table // h * source_heads + table % h * source_heads // h) * (at // self.run)

    def chunks(self, width: int) -> Iterator[Tensor | slice]:
        """Rows to run in one call: similar lengths together, as many as the budget holds; where keys are all the same
        to a row, equal lengths, which need no bias."""
        lengths = sum(one.count * one.width for one in self.lists)
        order = torch.argsort(lengths, descending=True, stable=True)
        consecutive = (torch.diff(order) == 1).tolist()
        lengths = lengths[order].tolist()
        start = 0
        while start < len(lengths):
            stop = min(start + max(1, STRIPS // max(1, lengths[start] * width)), len(lengths))
            if self.same:
                stop = next((i for i in range(start, stop) if lengths[i] != lengths[start]), stop)
            first = int(order[start])
            # A slice saves a copy.
            yield slice(first, first + stop - start) if all(consecutive[start : stop - 1]) else order[start:stop]
            start = stop

    def of(self, rows: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        """Runs int64 (rows, L / run), and the bias float32 (rows, 1, 1, L), or None where all of it would be 0."""
        found = [one.entries(rows) for one in self.lists]
        runs = []
        for one, (index, _) in zip(self.lists, found, strict=True):
            span = one.width // self.run
            inside = torch.arange(span) + one.offset // self.run
            runs.append((index[..., None] * span + inside).flatten(1) + self.base[rows, None])
        runs = runs[0] if len(runs) == 1 else torch.cat(runs, 1)
        if self.same and bool(found[0][1].all()) and not self._ragged(found[0][0]):
            return runs, None
        biases = [self._bias(rows, one, *entries) for one, entries in zip(self.lists, found, strict=True)]
        return runs, torch.cat(biases, 1)[:, None, None]

    def _ragged(self, index: Tensor) -> bool:
        """Whether a row lists a tile that is not full of slots."""
        plan = self.plan
        return plan.n_k % plan.tile_k != 0 and bool((index == plan.tiles_k - 1).any())

    def _bias(self, rows: Tensor | slice, one: _Rows, index: Tensor, listed: Tensor) -> Tensor:
        """float32 (rows, L): what the keys of one list add to their logits."""
        slot = (index[..., None] * one.width + torch.arange(one.width)).flatten(1)
        listed = listed.repeat_interleave(one.width, 1)
        if one.bias is not None:
            return one.bias[self.table[rows][:, None], slot].masked_fill(~listed, -torch.inf)
        listed = listed & (slot < self.plan.n_k)
        slot = slot.clamp_max(self.plan.n_k - 1)
        if self.dead is not None:
            listed = listed & ~self.dead[slot]
        if self.alive is not None:
            listed = listed & self.alive[self.table[rows][:, None], slot]
        return torch.zeros(listed.shape).masked_fill(~listed, -torch.inf)


class _Rows:
    """One block list, row by row. ``bias``: float32 (B x H, R) of representatives, or None for exact keys."""

    def __init__(self, count: Tensor, index: Tensor, width: int, offset: int, bias: Tensor | None) -> None:
        self.count, self.index, self.width, self.offset, self.bias = count, index, width, offset, bias

    @classmethod
    def of(cls, entry: BlockList, shape: tuple[int, int, int], width: int, offset: int, bias: Tensor | None) -> _Rows:
        count = entry.count.expand(shape).flatten().long()
        return cls(count, entry.index.expand(*shape, -1).flatten(0, 2), width, offset, bias)

    def entries(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Block indices int64 (rows, W) and which of them count, W the largest count of these rows."""
        count = self.count[rows]
        width = int(count.max())
        return self.index[rows, :width].long(), torch.arange(width) < count[:, None]
