"""Means and first-order moments of consecutive blocks of tokens, in plain torch, a few blocks and heads at a time.

On NVIDIA GPUs the kernels of ``pooling.triton`` compute the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..select.api import on_gpu
from .segments import live_segments, segment_spreads, segment_sums, serves

# Elements of the largest temporary, unless a single block of one head is larger.
CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class Statistics:
    """Keys and values of R blocks, in float32 (float64 for float64 inputs).

    ``key`` (B, Hk, R, D) and ``value`` (B, Hk, R, Dv): means over the live tokens of a block, 0 where it has none.
    ``count``: int32 (B or 1, H1, R), how many those are. ``moment`` (B, Hk, D, Dv): sum over all live tokens of
    (k - mean key of its block)^T v. ``norm`` (B, Hk, R): Frobenius norm of each block's share of ``moment``, or None.
    """

    key: Tensor
    value: Tensor
    count: Tensor
    moment: Tensor
    norm: Tensor | None


def block_means(
    x: Tensor, bounds: Tensor, *, live: Tensor | None = None, order: Tensor | None = None, placed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Means of blocks over their live tokens, and how many those are.

    x: (B, H, N, D). ``bounds``: int64 (R + 1,) on the CPU; block r is the slots ``bounds[r] .. bounds[r + 1]``.
    ``live``: bool (B, N), or None for all. ``order``: int64 slot -> token, (n,) or (H, n), or None where slots are
    tokens; x and ``live`` are in token order either way, and no reordered copy of x is made. ``placed``: ``bounds`` on
    x's device, from a caller that keeps them there: kernels on a GPU copy ragged ones otherwise, and a copy waits.

    Returns means (B, H, R, D), float32 or for float64 inputs float64, 0 for a block without a live token, and counts
    int32 (B or 1, H or 1, R): 1 where ``live`` is None, and for heads where the order is shared.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if on_gpu(x.device) and dtype == torch.float32:
        from . import triton

        return triton.block_means(x, bounds, live=live, order=order, placed=placed)[::2]
    count = block_counts(bounds, live=live, order=order, device=x.device)
    if serves(x) and (order is None or order.ndim == 1):
        sums = segment_sums(x, *_segments(bounds, live, order))
        return sums.div_(count[..., None].clamp_min(1)), count
    means = x.new_empty((*x.shape[:2], len(bounds) - 1, x.shape[-1]), dtype=dtype)
    for part in _parts(x.shape, bounds, live, order, x.device):
        means[:, part.heads, part.blocks] = part.mean(part.load(x, dtype), count)
    return means, count


def block_spreads(
    x: Tensor, bounds: Tensor, *, live: Tensor | None = None, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Means, mean absolute deviations and counts of blocks over their live tokens; arguments as in :func:`block_means`.

    Deviations (B, H, R, D) are per channel and from the block's own mean (Rectified SpaAttn, arXiv 2511.19835).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if on_gpu(x.device) and dtype == torch.float32:
        from . import triton

        return triton.block_means(x, bounds, live=live, order=order, spreads=True)
    count = block_counts(bounds, live=live, order=order, device=x.device)
    if serves(x) and live is None and (order is None or order.ndim == 1) and bool((bounds.diff() > 0).all()):
        (tokens,), (starts,) = _segments(bounds, None, order)
        return *segment_spreads(x, tokens, starts), count
    # Two tensors, not two views of one, which no gradient could pass.
    means, spreads = (x.new_empty((*x.shape[:2], len(bounds) - 1, x.shape[-1]), dtype=dtype) for _ in range(2))
    for part in _parts(x.shape, bounds, live, order, x.device):
        tokens, where = part.load(x, dtype), (slice(None), part.heads, part.blocks)
        means[where] = part.mean(tokens, count)
        spreads[where] = part.mean((tokens - means[where][..., None, :]).abs(), count)
    return means, spreads, count


def block_counts(
    bounds: Tensor, *, live: Tensor | None = None, order: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """Live tokens per block, int32 (B or 1, H or 1, R); arguments as in :func:`block_means`."""
    if live is None:
        return bounds.diff().int()[None, None].to(device)
    slots = live[:, None] if order is None else live[:, order] if order.ndim == 2 else live[:, None, order]
    total = torch.nn.functional.pad(slots.cumsum(-1, dtype=torch.int32), (1, 0))
    return total[..., bounds.to(live.device)].diff(dim=-1)


def block_statistics(
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    *,
    live: Tensor | None = None,
    order: Tensor | None = None,
    placed: Tensor | None = None,
    norms: bool = False,
) -> Statistics:
    """Means of keys and values and the first-order moment of PISA (arXiv 2602.01077).

    k (B, Hk, N, D), v (B, Hk, N, Dv), the rest as in :func:`block_means`. The moments of single blocks, which together
    are larger than k and v, exist for a few blocks at a time, and only where their ``norms`` are asked for.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    if on_gpu(k.device) and dtype == torch.float32:
        from . import triton

        if triton.serves_moments(k, v):
            where = {"live": live, "order": order, "placed": placed}
            return Statistics(*triton.block_statistics(k, v, bounds, **where, norms=norms))
    if not norms and (int(bounds[0]), int(bounds[-1])) == (0, k.shape[2]):
        (key, count), (value, _) = (block_means(x, bounds, live=live, order=order, placed=placed) for x in (k, v))
        return Statistics(key, value, count, _total_moment(k, v, key, value, count, live), None)
    b, h, _, d = k.shape
    blocks, dv = len(bounds) - 1, v.shape[-1]
    count = block_counts(bounds, live=live, order=order, device=k.device)
    key, value = (x.new_empty((b, h, blocks, x.shape[-1]), dtype=dtype) for x in (k, v))
    moment = k.new_zeros((b, h, d, dv), dtype=dtype)
    norm = k.new_empty((b, h, blocks), dtype=dtype) if norms else None
    for part in _parts(k.shape, bounds, live, order, k.device, per_block=d * dv if norms else 0):
        keys, values = part.load(k, dtype), part.only_live(part.load(v, dtype))
        where = slice(None), part.heads, part.blocks
        key[where], value[where] = part.mean(keys, count), part.mean(values, count)
        deviation = part.only_live(keys - key[where][..., None, :])
        if norms:
            each = deviation.mT @ values
            norm[where] = torch.linalg.vector_norm(each, dim=(-2, -1))
            moment[:, part.heads] += each.sum(2)
        else:
            moment[:, part.heads] += deviation.flatten(2, 3).mT @ values.flatten(2, 3)
    return Statistics(key, value, count, moment, norm)


def _total_moment(
    k: Tensor, v: Tensor, key: Tensor, value: Tensor, count: Tensor, live: Tensor | None
) -> Tensor:  # fmt: skip
    """Sum over all live tokens of (k - mean key of its block)^T v, without a token knowing its block.

    It is the sum of (k - c)^T v over tokens less that of n (mean key - c)^T (mean value) over blocks, for any c. The
    mean of all keys keeps both small where keys share a large bias.
    """
    weight = count[..., None].to(key.dtype)
    centre = (key * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp_min(1)
    between = ((key - centre) * weight).mT @ value
    total = torch.empty_like(between)
    room = max(CHUNK // max(k[:, 0].numel(), 1), 1)
    for head in range(0, k.shape[1], room):
        some = slice(head, head + room)
        keys, values = k[:, some].to(key.dtype) - centre[:, some], v[:, some].to(key.dtype)
        if live is not None:
            keys, values = (x.masked_fill(~live[:, None, :, None], 0) for x in (keys, values))
        total[:, some] = keys.mT @ values
    return total - between


def _segments(bounds: Tensor, live: Tensor | None, order: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """The blocks as segments of live tokens, per sample or for all."""
    first, stop = int(bounds[0]), int(bounds[-1])
    tokens = torch.arange(first, stop) if order is None else order[first:stop]
    starts = bounds[:-1] - first
    return ([tokens], [starts]) if live is None else live_segments(tokens, starts, live[:, tokens])


@dataclass(frozen=True, eq=False)
class _Part:
    """Some heads and consecutive blocks, the blocks padded to one width.

    ``slots``: their slots without padding, where they have one width; else None. ``tokens``: int64 (padded slots,),
    the token of each, or None where those are the slots themselves. ``live``: bool (B or 1, 1, blocks, width, 1), False
    for padding and dead tokens, or None.
    """

    heads: slice
    blocks: slice
    width: int
    slots: slice | None
    tokens: Tensor | None
    live: Tensor | None

    def load(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (B, H, N, D) of these: (B, heads, blocks, width, D); what is not live holds anything."""
        x = x[:, self.heads]
        x = x[:, :, self.slots] if self.tokens is None else x.index_select(2, self.tokens)
        return x.unflatten(2, (-1, self.width)).to(dtype)

    def only_live(self, x: Tensor) -> Tensor:
        return x if self.live is None else x.masked_fill(~self.live, 0)

    def mean(self, x: Tensor, count: Tensor) -> Tensor:
        """Means over the live ones of x (B, heads, blocks, width, D): (B, heads, blocks, D)."""
        heads = self.heads if count.shape[1] > 1 else slice(None)
        return self.only_live(x).sum(3) / count[:, heads, self.blocks, None].clamp_min(1)


def _parts(
    shape: torch.Size,
    bounds: Tensor,
    live: Tensor | None,
    order: Tensor | None,
    device: torch.device,
    per_block: int = 0,
) -> Iterator[_Part]:
    """Heads and blocks of x (B, H, N, D) in parts of about ``CHUNK`` elements, ``per_block`` more for each block."""
    b, h, n, d = shape
    starts, sizes = bounds[:-1], bounds.diff()
    runs = _runs(sizes.tolist(), b * d, b * per_block)
    # With an order per head each head has its own table.
    room = max(CHUNK // (b * (n * d + per_block * len(sizes))), 1) if order is None or order.ndim == 1 else 1
    for first, stop in runs:
        width = max(int(sizes[first:stop].max()), 1)
        even = bool((sizes[first:stop] == width).all())
        slots = slice(int(bounds[first]), int(bounds[stop]))
        if even:
            place = torch.arange(slots.start, slots.stop)
        else:
            place = (starts[first:stop, None] + torch.arange(width)).flatten().clamp_max(int(bounds[-1]) - 1)
        inside = None if even else (torch.arange(width) < sizes[first:stop, None]).to(device)
        place = None if even and order is None and live is None else place.to(device)
        for head in range(0, h, room):
            heads = slice(head, head + room)
            tokens = place if order is None else order[head, place] if order.ndim == 2 else order[place]
            mask = inside
            if live is not None:
                alive = live[:, tokens].unflatten(1, (-1, width))
                mask = alive if inside is None else alive & inside
            mask = None if mask is None else mask.view(-1, 1, stop - first, width, 1)
            straight = even and order is None
            yield _Part(heads, slice(first, stop), width, slots, None if straight else tokens, mask)


def _runs(sizes: list[int], per_slot: int, per_block: int) -> list[tuple[int, int]]:
    """Consecutive blocks that stay within ``CHUNK`` when padded to one width, and at most double their tokens."""
    runs, first, width, tokens = [], 0, 0, 0
    for i, size in enumerate(sizes):
        count, wide = i - first + 1, max(width, size)
        # A shorter block at the end would take the others from a view to a copy.
        tail = i == len(sizes) - 1 and size < width
        large = count * (wide * per_slot + per_block) > CHUNK or count * wide > 2 * (tokens + size)
        if count > 1 and (tail or large):
            runs.append((first, i))
            first, wide, tokens = i, size, 0
        width, tokens = wide, tokens + size
    runs.append((first, len(sizes)))
    return runs
