"""Block lists that differ by sample and head, and representatives, on torch's CPU flash kernel.

A row is one query tile of one sample and head. What it sees is gathered into one strip of keys and values, exact ones
and representatives alike, whose logits take 0, ``+log n`` or -inf from a bias per key. Rows of similar length share a
call, so that little is padded and a strip is still in the cache when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocklist import BlockList
from ..tileplan import TilePlan

# Elements of one call's strips: a few MiB, which stay in the second level cache of two cores and more.
STRIPS = 1 << 20
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
    source = _source(k, v, plan, width)
    strips = _Strips(plan, b, h, source.shape[1], alive)
    source = source.flatten(0, 2)
    rows = pad(q, (0, width - q.shape[-1], 0, tiles * tile - n)).reshape(b * h * tiles, 1, tile, width)
    out = torch.empty_like(rows)
    lse = rows.new_empty(rows.shape[:3], dtype=wide)
    buffer = source.new_empty(0)
    for picked in strips.chunks(source.shape[-1]):
        index, bias = strips.of(picked)
        if not index.shape[1]:
            out[picked], lse[picked] = 0, -torch.inf
            continue
        needed = index.numel() * source.shape[-1]
        if buffer.numel() < needed:
            buffer = source.new_empty(needed)
        strip = buffer[:needed].view(index.numel(), source.shape[-1])
        torch.index_select(source, 0, index.flatten(), out=strip)
        strip = strip.view(len(picked), 1, index.shape[1], -1)
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


def _source(k: Tensor, v: Tensor, plan: TilePlan, width: int) -> Tensor:
    """(B, Hs, n_k + R, 2 width): keys beside values, exact ones first, then every group's representatives."""
    parts = [(k, v), *((group.key, group.value) for group in plan.reps)]
    most = max(key.shape[1] for key, _ in parts)
    strips = []
    for number, (key, value) in enumerate(parts):
        if plan.first_order is not None:
            value = pad(value, (0, 1), value=float(number > 0))
        strip = torch.cat([pad(x, (0, width - x.shape[-1])) for x in (key, value)], -1)
        strips.append(strip if strip.shape[1] == most else strip.repeat_interleave(most // strip.shape[1], 1))
    return strips[0] if len(strips) == 1 else torch.cat(strips, 2)


def _merged(plan: TilePlan) -> BlockList:
    """Full and partial tiles as one list: holes are told by slot, and two lists would be padded one by one."""
    if plan.partial is None:
        return plan.full
    if "merged" not in plan._memo:
        tiles = plan.tiles_k
        plan._memo["merged"] = BlockList.from_mask(plan.full.mask(tiles) | plan.partial.mask(tiles))
    return plan._memo["merged"]


class _Strips:
    """What every row sees, as positions in the source and a bias."""

    def __init__(self, plan: TilePlan, b: int, h: int, source_heads: int, alive: Tensor | None) -> None:
        self.plan = plan
        shape = (b, h, plan.tiles_q)
        lists = [(_merged(plan), plan.tile_k, 0, None)]
        at = plan.n_k
        for group in plan.reps:
            lists.append((group.seen, group.width, at, group.bias().expand(b, h, -1).flatten(0, 1)))
            at += group.size
        self.lists = [_Rows.of(entry, shape, *rest) for entry, *rest in lists]
        self.per_head = at
        self.dead = None if plan.partial is None else plan.predicate.dead
        self.alive = None if alive is None else alive.expand(b, h, -1).flatten(0, 1)
        table = torch.arange(b * h * plan.tiles_q) // plan.tiles_q
        self.table = table
        self.base = (table // h * source_heads + table % h * source_heads // h) * self.per_head

    def chunks(self, width: int) -> Iterator[Tensor]:
        """Rows to run in one call: similar lengths together, as many as the budget holds."""
        lengths = sum(one.count * one.width for one in self.lists)
        order = torch.argsort(lengths, descending=True)
        lengths = lengths[order].tolist()
        start = 0
        while start < len(lengths):
            stop = start + max(1, STRIPS // max(1, lengths[start] * width))
            yield order[start:stop]
            start = stop

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Positions int64 (rows, L), and the bias float32 (rows, 1, 1, L), or None where all of it would be 0."""
        positions, biases = [], []
        for one in self.lists:
            index, listed = one.entries(rows)
            slot = (index[..., None] * one.width + torch.arange(one.width)).flatten(1)
            listed = listed.repeat_interleave(one.width, 1)
            if one.bias is not None:
                bias = one.bias[self.table[rows][:, None], slot]
            else:
                listed = listed & (slot < self.plan.n_k)
                slot = slot.clamp_max(self.plan.n_k - 1)
                if self.dead is not None:
                    listed = listed & ~self.dead[slot]
                if self.alive is not None:
                    listed = listed & self.alive[self.table[rows][:, None], slot]
                bias = None
            positions.append(slot + one.offset + self.base[rows, None])
            biases.append((bias, listed))
        if all(bias is None and bool(listed.all()) for bias, listed in biases):
            return torch.cat(positions, 1), None
        filled = [
            (torch.zeros(listed.shape) if bias is None else bias).masked_fill(~listed, -torch.inf)
            for bias, listed in biases
        ]
        return torch.cat(positions, 1), torch.cat(filled, 1)[:, None, None]


class _Rows:
    """One block list, row by row. ``bias``: float32 (B x H, R) of representatives, or None for exact keys."""

    def __init__(self, count: Tensor, index: Tensor, width: int, offset: int, bias: Tensor | None) -> None:
        self.count, self.index, self.width, self.offset, self.bias = count, index, width, offset, bias

    @classmethod
    def of(cls, entry: BlockList, shape: tuple[int, int, int], width: int, offset: int, bias: Tensor | None) -> _Rows:
        count = entry.count.expand(shape).flatten().long()
        return cls(count, entry.index.expand(*shape, -1).flatten(0, 2), width, offset, bias)

    def entries(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Block indices int64 (rows, W) and which of them count, W the largest count of these rows."""
        count = self.count[rows]
        width = int(count.max())
        return self.index[rows, :width].long(), torch.arange(width) < count[:, None]
