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
from torch.nn.functional import pad

from ..blocklist import BlockList
from ..representatives import Group
from ..tileplan import TilePlan

# Elements of one call's strips: a few MiB, which stay in the caches of two cores and more.
STRIPS = 1 << 22


def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out and LSE of q (B, H, Nq, D) over all of k and v (B, H, Nk, D). ``bias``: (B, 1, 1, Nk), added to logits."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)


def sources(k: Tensor, v: Tensor, plan: TilePlan, width: int, rooms: list[int]) -> tuple[Tensor, Tensor]:
    """(B, Hs, S, width), keys and values: exact ones, then every group's representatives, each in its room.

    Zero where there is none. With a first-order term, column Dv of the values is 1 for representatives.
    """
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
    out = parts[0].new_empty((parts[0].shape[0], heads, sum(rooms), width))
    for x, place in zip(parts, out.split(rooms, 2), strict=True):
        n, dim = x.shape[2:]
        place[:, :, :n, :dim].unflatten(1, (x.shape[1], -1))[:] = x[:, :, None]
        place[:, :, :n, dim:] = 0
        place[:, :, n:] = 0
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
        return table[self._owner(table)]

    def of(self, table: Tensor) -> Tensor:
        """(R, ..): what a table (1 or B, heads or 1, query tiles, ..) holds for each."""
        return table[(*self._owner(table), self.number)]

    def _owner(self, table: Tensor) -> tuple[Tensor | int, Tensor]:
        return self.sample if len(table) > 1 else 0, self.head * table.shape[1] // self.heads


class Strips:
    """What every row sees, as runs of positions in the sources and a bias.

    ``rooms``: positions for the exact keys and for each group. ``run``: how many positions a run has.
    """

    def __init__(self, plan: TilePlan, b: int, h: int, source_heads: int, alive: Tensor | None) -> None:
        self.plan, self.shape = plan, (b, h, source_heads)
        rows = torch.arange(b * h * plan.tiles_q)
        self.tiles = Tiles(rows // (h * plan.tiles_q), rows // plan.tiles_q % h, rows % plan.tiles_q, h)
        self.table = rows // plan.tiles_q
        self.rooms = [plan.tiles_k * plan.tile_k]
        self.lists = [_Listed.of(_merged(plan), (b, h, plan.tiles_q), plan.tile_k, 0)]
        for group in plan.reps:
            made = _representatives(group, (b, h, plan.tiles_q), plan.tile_k, sum(self.rooms))
            self.lists.append(made)
            self.rooms.append(group.size if made.seen is None else made.width)
        self.run = math.gcd(*(one.width for one in self.lists), *(one.offset for one in self.lists), sum(self.rooms))
        self.base = (self.tiles.sample * source_heads + self.tiles.head * source_heads // h) * (
            sum(self.rooms) // self.run
        )
        self.dead = None if plan.partial is None else plan.predicate.dead
        self.alive = None if alive is None else alive.expand(b, h, -1).flatten(0, 1)
        # Whether exact keys are all the same to a row: lists of one length then need no bias.
        self.same = self.dead is None and self.alive is None

    @property
    def visited(self) -> int:
        """Keys and representatives over all rows."""
        return int(sum((one.count * one.width).sum() for one in self.lists))

    def chunks(self, width: int) -> Iterator[Tensor]:
        """Rows to run in one call: similar lengths together, as many as the budget holds; where keys are all the same
        to a row, equal lengths, which need no bias."""
        lengths = sum(one.count * one.width for one in self.lists)
        order = torch.argsort(lengths, descending=True, stable=True)
        lengths = lengths[order].tolist()
        start = 0
        while start < len(lengths):
            stop = min(start + max(1, STRIPS // max(1, lengths[start] * width)), len(lengths))
            if self.same and not self.plan.reps:
                stop = next((i for i in range(start, stop) if lengths[i] != lengths[start]), stop)
            yield order[start:stop]
            start = stop

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Runs int64 (rows, L / run), and the bias float32 (rows, 1, 1, L), or None where all of it would be 0."""
        runs, biases = [], []
        for one in self.lists:
            index, listed = one.entries(rows)
            span = one.width // self.run
            inside = torch.arange(span) + one.offset // self.run
            runs.append((index[..., None] * span + inside).flatten(1) + self.base[rows, None])
            biases.append(self._bias(rows, one, index, listed))
        if len(runs) == 1:
            return runs[0], None if biases[0] is None else biases[0][:, None, None]
        # Only the exact keys' bias may be None.
        exact = torch.zeros((1, 1)).expand(len(rows), runs[0].shape[1] * self.run) if biases[0] is None else biases[0]
        return torch.cat(runs, 1), torch.cat([exact, *biases[1:]], 1)[:, None, None]

    def _bias(self, rows: Tensor, one: _Listed, index: Tensor, listed: Tensor) -> Tensor | None:
        """float32 (rows, L): what the keys of one list add to their logits; None where that is 0."""
        if one.seen is not None:
            return one.bias[self.table[rows]].masked_fill(~one.seen[rows], -torch.inf)
        if one.bias is None and self.same and bool(listed.all()) and not self._ragged(index):
            return None
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

    def _ragged(self, index: Tensor) -> bool:
        """Whether a row lists a tile that is not full of slots."""
        plan = self.plan
        return plan.n_k % plan.tile_k != 0 and bool((index == plan.tiles_k - 1).any())


@dataclass(frozen=True, eq=False)
class _Listed:
    """One block list, row by row: ``count`` int64 (rows,) blocks of ``width`` positions from ``offset`` on, which ones
    int (rows, W) in ``index``.

    ``bias``: float32 (B x H, positions) of representatives, or None for exact keys. ``seen``: bool (rows, positions)
    where every row lists all of them, seen or not.
    """

    count: Tensor
    index: Tensor
    width: int
    offset: int
    bias: Tensor | None = None
    seen: Tensor | None = None

    @classmethod
    def of(
        cls, entry: BlockList, shape: tuple[int, int, int], width: int, offset: int, bias: Tensor | None = None
    ) -> _Listed:
        count = entry.count.expand(shape).flatten().long()
        return cls(count, entry.index.expand(*shape, -1).flatten(0, 2), width, offset, bias)

    def entries(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Block indices int64 (rows, W) and which of them count, W the largest count of these rows."""
        count = self.count[rows]
        width = int(count.max())
        return self.index[rows, :width].long(), torch.arange(width) < count[:, None]


def _representatives(group: Group, shape: tuple[int, int, int], tile: int, offset: int) -> _Listed:
    """The representatives of ``group`` from position ``offset`` on, for rows ``shape``, (B, H, query tiles).

    Where rows see most of them all are listed as one block, whole tiles long: copied in one piece, what is not seen
    costs less than picking what is.
    """
    bias = group.bias().expand(*shape[:2], -1).flatten(0, 1)
    if int(group.seen.count.sum()) * 2 < group.seen.count.numel() * group.blocks:
        return _Listed.of(group.seen, shape, group.width, offset, bias)
    more = 0, -group.size % tile
    seen = pad(group.mask(), more).expand(*shape, -1).flatten(0, 2)
    once = torch.ones(len(seen), dtype=torch.int64)
    return _Listed(once, torch.zeros((len(seen), 1), dtype=torch.int64), seen.shape[1], offset, pad(bias, more), seen)
