"""AdaSpa's search (arXiv 2502.21079, 3.2 and 3.3): attention mass per block, and the blocks that each head keeps.

The mass of block (p, q) is the sum of its softmax weights exp(q.k scale - LSE). With a row's LSE at hand one pass over
its scores gives them; without, the LSE is taken from the same scores first. Scores exist for a few rows and heads at a
time, never N x N; on NVIDIA GPUs in registers alone (``kernels.scores``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.select.api import on_gpu
from ..layout import Layout

RECALL = 0.8  # of the mass; heads above it can do with fewer blocks (3.3)

# Scores held at once, in elements.
CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}

# An LSE of another step may be off without bound; sums over all blocks stay finite in float32.
_LARGEST = 1e30

# How far below its bound an LSE may lie: what a row then sums up is still far from float32's least numbers.
_FAR = 40.0


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
    used = torch.empty((batch, heads, rows), dtype=dtype, device=q.device) if lse is None else lse
    if not rows:
        return mass, used
    if on_gpu(q.device):
        from ..kernels.scores import triton

        if triton.serves(q, size):
            return triton.block_mass(q, k, size, scale=scale, lse=lse, kv_valid=kv_valid)
    turns = Turns.of(q.device, heads, mass.shape[2], size, keys)
    for b in range(batch):
        dead = None if kv_valid is None else torch.arange(keys, device=q.device) >= kv_valid[b].to(q.device)
        for h in range(0, heads, turns.heads):
            own = slice(h, min(h + turns.heads, heads))
            columns = k[b].index_select(0, torch.arange(own.start, own.stop, device=k.device) // groups).to(dtype)
            if dead is not None:
                columns = columns.masked_fill(dead[:, None], 0)
            queries = q[b, own].to(dtype) * scale
            if lse is not None:
                mass[b, own], _ = _mass(queries, columns, size, lse[b, own], True, dead, turns)
                continue
            found = None
            if q.device.type == "cpu":
                # |q| |k| is never below a score and saves two passes for the largest one, but may be far above it.
                bound = queries.norm(dim=-1) * columns.norm(dim=-1).amax(-1, keepdim=True)
                mass[b, own], found = _mass(queries, columns, size, bound, False, dead, turns)
                found = None if (found < bound - _FAR).any() else found
            if found is None:
                mass[b, own], found = _mass(queries, columns, size, None, False, dead, turns)
            used[b, own] = found
    return mass.clamp_max_(_LARGEST), used


def _mass(
    queries: Tensor, columns: Tensor, size: int, offset: Tensor | None, final: bool, dead: Tensor | None, turns: Turns
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Mass (H, ceil(R / size), ceil(N / size)) and LSE (H, R) of queries (H, R, D), scaled, over columns (H, N, D).

    ``offset`` (H, R): what is subtracted from the scores, None for the largest of each query. ``final``: it is the LSE,
    so what results is the mass; no other is returned. ``dead``: bool (N,).
    """
    heads, blocks, limits = len(queries), -(-queries.shape[1] // size), torch.finfo(queries.dtype)
    if offset is not None:
        # The product subtracts it as one channel more.
        queries = torch.cat([queries, -offset[..., None]], -1)
        columns = torch.cat([columns, torch.ones_like(columns[..., :1])], -1)
    columns = columns.mT.contiguous()
    # One buffer for all scores: fresh memory of that size costs as much as what is done with it.
    buffer = queries.new_empty((heads, turns.blocks * size, columns.shape[-1]))
    member = torch.eye(turns.blocks, dtype=buffer.dtype, device=buffer.device).repeat_interleave(size, 1)
    mass, tops, totals = [], [], []
    for first in range(0, blocks, turns.strip):
        lines = []
        for block in range(first, min(first + turns.strip, blocks), turns.blocks):
            part = queries[:, block * size : (block + turns.blocks) * size]
            scores = torch.bmm(part, columns, out=buffer[:, : part.shape[1]])
            if dead is not None:
                scores.masked_fill_(dead, -torch.inf)
            if offset is None:
                tops.append(scores.amax(-1, keepdim=True).clamp_min_(limits.min))
                scores.sub_(tops[-1])
            scores.exp_()
            # Over queries first: whole rows add up several times as fast as parts of them.
            if final:
                lines.append(_sums(scores, size, 1))
                continue
            totals.append(scores.sum(-1, keepdim=True).clamp_min_(limits.tiny))
            weights = member[: min(turns.blocks, blocks - block), : part.shape[1]] / totals[-1].mT
            lines.append(torch.bmm(weights, scores))
        mass.append(_sums(torch.cat(lines, 1), size, 2))
    mass = torch.cat(mass, 1)
    if final:
        return mass, None
    base = torch.cat(tops, 1)[..., 0] if offset is None else offset
    return mass, (base + torch.cat(totals, 1)[..., 0].log()).clamp_min_(limits.min)


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


@dataclass(frozen=True)
class Turns:
    """How much is held at once: scores of ``heads`` x ``blocks`` query blocks, sums over queries of ``strip`` ones."""

    heads: int
    blocks: int
    strip: int

    @classmethod
    def of(cls, device: torch.device, heads: int, rows: int, size: int, keys: int) -> Turns:
        """For ``rows`` query blocks of ``size`` and ``keys`` keys."""
        block = size * keys
        limit = CHUNK.get(device.type, CHUNK["cpu"])
        heads = -(-heads // -(-heads // max(limit // block, 1)))
        blocks = min(max(limit // (heads * block), 1), rows)
        return cls(heads, blocks, -(-max(limit // (heads * keys), 1) // blocks) * blocks)


def _sums(x: Tensor, size: int, dim: int) -> Tensor:
    """Sums over runs of ``size`` along dimension ``dim``; the last run may be short."""
    whole = x.shape[dim] // size * size
    sums = x.narrow(dim, 0, whole).unflatten(dim, (whole // size, size)).sum(dim + 1)
    rest = x.narrow(dim, whole, x.shape[dim] - whole)
    return torch.cat([sums, rest.sum(dim, keepdim=True)], dim) if rest.numel() else sums
