"""AdaSpa's search (arXiv 2502.21079, 3.2 and 3.3): attention mass per block, and the blocks that each head keeps.

The mass of block (p, q) is the sum of its softmax weights exp(q.k scale - LSE). With a row's LSE at hand one pass over
its scores gives them; without, the LSE is taken from the same scores first. Scores exist for a few rows and heads at a
time, never N x N.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import Layout

RECALL = 0.8  # of the mass; heads above it can do with fewer blocks (3.3)

# Scores held at once, in elements.
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}

# An LSE of another step may be off without bound; sums over all blocks stay finite in float32.
_LARGEST = 1e30


def main_blocks(layout: Layout, size: int) -> range:
    """Blocks of ``size`` consecutive tokens that hold nothing but tokens of the main segment."""
    main, tokens = layout.main, layout.tokens
    first = -(-main.start // size)
    stop = -(-tokens // size) if main.stop == tokens else main.stop // size
    return range(first, max(first, stop))


def tokens_of(blocks: range, size: int, layout: Layout) -> slice:
    """The tokens of ``blocks``; the last block of a sequence may be short."""
    return slice(min(blocks.start * size, layout.tokens), min(blocks.stop * size, layout.tokens))


@torch.no_grad()
def block_mass(
    q: Tensor, k: Tensor, size: int, *, scale: float, lse: Tensor | None = None, kv_valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention mass per block of ``size`` queries and ``size`` keys; the last ones may be short.

    q (B, H, R, D), k (B, Hk, N, D), H a multiple of Hk. ``lse``: (B, H, R), natural log, of this or of an earlier
    step, or None to compute it. ``kv_valid``: int32 (B,), keys from that index on hold no mass.

    Returns the mass (B, H, ceil(R / size), ceil(N / size)) and the LSE that was used, both float32, or float64 for
    float64 tensors. Under the rows' own LSE a whole block of queries holds ``size`` in all.
    """
    batch, heads, rows, _ = q.shape
    keys, groups = k.shape[2], heads // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    mass = torch.empty((batch, heads, -(-rows // size), -(-keys // size)), dtype=dtype, device=q.device)
    fresh, lowest = lse is None, torch.finfo(dtype).min
    if fresh:
        lse = torch.empty((batch, heads, rows), dtype=dtype, device=q.device)
    some_heads, some_blocks, strip = _chunk(q.device, heads, size, keys)
    for b in range(batch):
        dead = None if kv_valid is None else torch.arange(keys, device=q.device) >= kv_valid[b].to(q.device)
        for h in range(0, heads, some_heads):
            own = slice(h, min(h + some_heads, heads))
            columns = k[b].index_select(0, torch.arange(own.start, own.stop, device=k.device) // groups).to(dtype)
            queries = q[b, own].to(dtype) * scale
            if not fresh:
                # The product subtracts the LSE as one channel more.
                queries = torch.cat([queries, -lse[b, own, :, None]], -1)
                columns = pad(columns, (0, 1), value=1)
            for first in range(0, rows, strip * size):
                part = queries[:, first : first + strip * size]
                sums = part.new_empty((*part.shape[:2], mass.shape[-1]))
                offset = part.new_empty((*part.shape[:2], 1)) if fresh else None
                for row in range(0, part.shape[1], some_blocks * size):
                    at = (slice(None), slice(row, row + some_blocks * size))
                    scores = part[at] @ columns.mT
                    if dead is not None:
                        scores.masked_fill_(dead, -torch.inf)
                    if fresh:
                        offset[at] = top = scores.amax(-1, keepdim=True).clamp_min_(lowest)
                        scores.sub_(top)
                    sums[at] = _sums(scores.exp_(), size)
                if fresh:
                    total = sums.sum(-1, keepdim=True)
                    lse[b, own, first : first + strip * size] = (offset + total.log()).clamp_min_(lowest)[..., 0]
                    sums /= total.masked_fill(total == 0, 1)
                mass[b, own, first // size : first // size + strip] = _sums(sums.mT, size).mT
    return mass.clamp_max_(_LARGEST), lse


def select(mass: Tensor, keys: range, counts: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The key blocks that each row of query blocks keeps of ``keys``; blocks beside them are kept anyway.

    ``mass`` (B, H, nq, nk). ``counts``: how many blocks per row a head keeps at most recall, at usual and at least
    recall (:func:`budgets`); every row of a head keeps the same number (3.3).
    Returns int64 (B, H, nq, max(counts)), the blocks by falling mass, and int32 (B, H), how many of them count.
    """
    inner = mass[..., keys.start : keys.stop]
    top = inner.topk(max(counts), dim=-1)
    total = mass.sum((-1, -2))
    dropped = inner.sum((-1, -2)) - top.values[..., : counts[1]].sum((-1, -2))
    return top.indices + keys.start, budgets(1 - dropped / total, counts)


def budgets(recall: Tensor, counts: tuple[int, int, int]) -> Tensor:
    """int32 (B, H): the count of each head by its recall (B, H) at the usual count.

    As many heads as have a recall above 0.8, but no more than half, get the first count, those of highest recall; as
    many of lowest recall get the last one (3.3; the paper leaves open what happens above half).
    """
    few, usual, many = counts
    heads = recall.shape[-1]
    n = (recall > RECALL).sum(-1, keepdim=True).clamp_max(heads // 2)
    rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    count = torch.full_like(rank, usual).masked_fill_(rank < n, few).masked_fill_(rank >= heads - n, many)
    return count.to(torch.int32)


def levels(density: float) -> tuple[float, float, float]:
    """Densities of heads with high, usual and low recall: d/2, d and 3d/2, closer where 3d/2 would exceed 1 (3.3)."""
    spread = min(density / 2, 1 - density)
    return density - spread, density, density + spread


def kept(density: float, blocks: int) -> int:
    """How many of ``blocks`` a row keeps: the nearest whole number, at least one."""
    return min(max(round(density * blocks), 1), blocks)


def _chunk(device: torch.device, heads: int, size: int, keys: int) -> tuple[int, int, int]:
    """Heads and query blocks whose scores are held at once, and query blocks whose sums over key blocks are."""
    block = size * keys
    limit = CHUNK.get(device.type, CHUNK["cpu"])
    some_heads = min(max(limit // block, 1), heads)
    some_blocks = max(limit // (some_heads * block), 1)
    strip = max(limit // (some_heads * size * -(-keys // size)), 1)
    return some_heads, some_blocks, -(-strip // some_blocks) * some_blocks


def _sums(x: Tensor, size: int) -> Tensor:
    """Sums over runs of ``size`` along the last dimension; the last run may be short."""
    whole = x.shape[-1] // size * size
    sums = x[..., :whole].unflatten(-1, (whole // size, size)).sum(-1)
    return sums if whole == x.shape[-1] else torch.cat([sums, x[..., whole:].sum(-1, keepdim=True)], -1)
