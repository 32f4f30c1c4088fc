"""What query tiles see, laid out for torch's CPU flash kernel: strips of keys and values, and a bias per key.

Exact keys and representatives alike; logits take 0, ``+log n`` or -inf from the bias. What lists name in runs is copied
in runs: several times as fast as token by token.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocklist import BlockList
from ..tileplan import TilePlan

# Elements of one call's strips: a few MiB, which stay in the caches of two cores and more.
STRIPS = 1 << 22


def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out and LSE of q (B, H, Nq, D) over all of k and v (B, H, Nk, D). ``bias``: (B, 1, 1, Nk), added to logits."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)


def sources(k: Tensor, v: Tensor, plan: TilePlan, width: int) -> tuple[Tensor, Tensor]:
    """(B, Hs, S, width), keys and values: exact ones up to whole tiles, then every group's representatives.

    Zero where there is none. With a first-order term, column Dv of the values is 1 for representatives.
    """
    rooms = [plan.tiles_k * plan.tile_k, *(group.size for group in plan.reps)]
    keys = _one_after_another([k, *(group.key for group in plan.reps)], rooms, width)
    values = _one_after_another([v, *(group.value for group in plan.reps)], rooms, width)
    if plan.first_order is not None:
        values[:, :, rooms[0] :, v.shape[-1]] = 1
    return keys, values


def _one_after_another(parts: list[Tensor], rooms: list[int], width: int) -> Tensor:
    """(B, Hs, S, width): each part (B, Hi, Ni, Di) at the start of its room; a single one that fills it as it is."""
    if len(parts) == 1 and parts[0].shape[2:] == (rooms[0], width):
        return parts[0].contiguous()
    heads = max(x.shape[1] for x in parts)
    whole = all(x.shape[2:] == (room, width) for x, room in zip(parts, rooms, strict=True))
    shape = parts[0].shape[0], heads, sum(rooms), width
    out = parts[0].new_empty(shape) if whole else parts[0].new_zeros(shape)
    at = 0
    for x, room in zip(parts, rooms, strict=True):
        out[:, :, at : at + x.shape[2], : x.shape[3]].unflatten(1, (x.shape[1], -1))[:] = x[:, :, None]
        at += room
    return out


class _Kept(threading.local):
    """Memory of strips, kept from call to call: fresh memory costs about as much as the copy into it."""

    def __init__(self) -> None:
        self.memory: dict[tuple[int, torch.dtype], Tensor] = {}

    def strip(self, which: int, size: int, like: Tensor) -> Tensor:
        if 2 * size > STRIPS:
            return like.new_empty(size)
        key = which, like.dtype
        if key not in self.memory or self.memory[key].numel() < size:
            # What is made in inference mode cannot be written to outside of it.
            with torch.inference_mode(False):
                self.memory[key] = torch.empty(STRIPS // 2, dtype=like.dtype)
        return self.memory[key][:size]


_kept = _Kept()


def gathered(keys: Tensor, values: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``runs`` (int64, (n,)) of both sources, (S, R), one after the other; valid until the next call."""
    found = []
    for which, x in enumerate((keys, values)):
        strip = _kept.strip(which, len(runs) * x.shape[1], x).view(-1, x.shape[1])
        found.append(torch.index_select(x, 0, runs, out=strip))
    return found[0], found[1]


def _merged(plan: TilePlan) -> BlockList:
    """Full and partial tiles as one list: holes are told by slot, and two lists would be padded one by one."""
    if plan.partial is None:
        return plan.full
    if "merged" not in plan._memo:
        tiles = plan.tiles_k
        plan._memo["merged"] = BlockList.from_mask(plan.full.mask(tiles) | plan.partial.mask(tiles))
    return plan._memo["merged"]


@dataclass(frozen=True, eq=False)
class Tiles:
    """Query tiles by sample, head and number, int64 (R,) each. ``heads``: how many heads a sample has."""

    sample: Tensor
    head: Tensor
    number: Tensor
    heads: int

    def __getitem__(self, rows: Tensor) -> Tiles:
        return Tiles(self.sample[rows], self.head[rows], self.number[rows], self.heads)

    def of_heads(self, table: Tensor) -> Tensor:
        """(R, ..): what a table (1 or B, heads or fewer, ..) holds for each; fewer are key heads, or 1 for all."""
        return table[self.sample if len(table) > 1 else 0, self.head * table.shape[1] // self.heads]

    def of(self, table: Tensor) -> Tensor:
        """(R, ..): what a table (1 or B, heads or 1, query tiles, ..) holds for each."""
        sample = self.sample if len(table) > 1 else 0
        return table[sample, self.head * table.shape[1] // self.heads, self.number]


class Strips:
    """What every row sees, as runs of positions in the source and a bias. ``run``: how many positions a run has."""

    def __init__(self, plan: TilePlan, b: int, h: int, source_heads: int, alive: Tensor | None) -> None:
        self.plan = plan
        shape = (b, h, plan.tiles_q)
        lists = [(_merged(plan), plan.tile_k, 0, None)]
        at = plan.tiles_k * plan.tile_k
        for group in plan.reps:
            lists.append((group.seen, group.width, at, group.bias().expand(b, h, -1).flatten(0, 1)))
            at += group.size
        self.lists = [_Listed.of(entry, shape, *rest) for entry, *rest in lists]
        self.run = math.gcd(*(one.width for one in self.lists), *(one.offset for one in self.lists), at)
        self.dead = None if plan.partial is None else plan.predicate.dead
        self.alive = None if alive is None else alive.expand(b, h, -1).flatten(0, 1)
        self.same = not plan.reps and self.dead is None and self.alive is None
        rows = torch.arange(b * h * plan.tiles_q)
        self.tiles = Tiles(rows // (h * plan.tiles_q), rows // plan.tiles_q % h, rows % plan.tiles_q, h)
        self.table = rows // plan.tiles_q
        self.base = (self.tiles.sample * source_heads + self.tiles.head * source_heads // h) * (at // self.run)

    def chunks(self, width: int) -> Iterator[Tensor]:
        """Rows to run in one call: similar lengths together, as many as the budget holds; where keys are all the same
        to a row, equal lengths, which need no bias."""
        lengths = sum(one.count * one.width for one in self.lists)
        order = torch.argsort(lengths, descending=True, stable=True)
        lengths = lengths[order].tolist()
        start = 0
        while start < len(lengths):
            stop = min(start + max(1, STRIPS // max(1, lengths[start] * width)), len(lengths))
            if self.same:
                stop = next((i for i in range(start, stop) if lengths[i] != lengths[start]), stop)
            yield order[start:stop]
            start = stop

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
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

    def _bias(self, rows: Tensor, one: _Listed, index: Tensor, listed: Tensor) -> Tensor:
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


class _Listed:
    """One block list, row by row. ``bias``: float32 (B x H, R) of representatives, or None for exact keys."""

    def __init__(self, count: Tensor, index: Tensor, width: int, offset: int, bias: Tensor | None) -> None:
        self.count, self.index, self.width, self.offset, self.bias = count, index, width, offset, bias

    @classmethod
    def of(cls, entry: BlockList, shape: tuple[int, int, int], width: int, offset: int, bias: Tensor | None) -> _Listed:
        count = entry.count.expand(shape).flatten().long()
        return cls(count, entry.index.expand(*shape, -1).flatten(0, 2), width, offset, bias)

    def entries(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Block indices int64 (rows, W) and which of them count, W the largest count of these rows."""
        count = self.count[rows]
        width = int(count.max())
        return self.index[rows, :width].long(), torch.arange(width) < count[:, None]
