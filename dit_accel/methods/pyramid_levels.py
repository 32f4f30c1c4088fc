"""How PSA (arXiv 2512.04025) ranks key blocks and gives each a level of the pyramid.

Importance is attention among few tokens, those at the same random places of every block: of a query block and a key
block the largest exp(logit - largest logit of the query), not divided by a sum. Blocks in falling order then fill
the levels from fine to coarse, by shares of the importance or by quotas of blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.select.api import on_gpu

# One token of so many stands for its block.
SAMPLED = 4

# Logits held at once, in elements.
CHUNK = {"cpu": 1 << 21, "cuda": 1 << 26}

# What the energy of a block may exceed a bound by and still count as within.
TOLERANCE = 1e-6


def generator(seed: int, layer: int, step: int) -> torch.Generator:
    """A generator of its own for one attention site and step, the same on every machine."""
    digest = hashlib.blake2b(f"{seed} {layer} {step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def sample_places(size: int, source: torch.Generator) -> Tensor:
    """int64 (max(size // 4, 1),): places within a block, none twice, ascending."""
    return torch.randperm(size, generator=source)[: max(size // SAMPLED, 1)].sort().values


def sample_tokens(tokens: Tensor, places: Tensor, live: Tensor | None) -> Tensor:
    """int64 (B or 1, blocks, places): the tokens at ``places`` of each block, ``tokens`` int64 (blocks, size).

    ``live``: bool (B, blocks, size), or None where all are. Places are then counted over live tokens, and what lies
    behind the last of them is that one, as if a short block were padded with it.
    """
    if live is None:
        return tokens[None, :, places]
    ranked = (~live).to(torch.uint8).argsort(dim=-1, stable=True)
    place = torch.minimum(places, live.sum(-1, keepdim=True) - 1).clamp_min(0)
    return tokens.expand(len(live), -1, -1).gather(-1, ranked.gather(-1, place))


@torch.no_grad()
def importance(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor, scale: float, dead: Tensor | None) -> Tensor:
    """Importance of n key blocks to m query blocks, rows summing to 1: (B, H, m, n), float32, or float64 for such.

    q (B, H, Nq, D), k (B, Hk, Nk, D). ``rows``: int64 (1, m, places) and ``columns``: int64 (B or 1, n, places), the
    sampled tokens. ``dead``: bool (B or 1, n), blocks without a live key, which have none, or None.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    (b, h), groups = q.shape[:2], q.shape[1] // k.shape[1]
    (_, m, per_row), (_, n, per_column) = rows.shape, columns.shape
    out = torch.empty((b, h, m, n), dtype=dtype, device=q.device)
    if on_gpu(q.device):
        from ..kernels.scores import triton

        if triton.serves(q, per_row, per_column):
            for i in range(b):
                queries, keys = _gathered(q[i], rows[0]), _gathered(k[i], columns[min(i, len(columns) - 1)])
                hidden = None if dead is None else dead[min(i, len(dead) - 1)]
                out[i] = triton.peaks(queries, keys, per_row, per_column, scale=scale, dead=hidden)
            return _shares(out)
    limit = CHUNK.get(q.device.type, CHUNK["cpu"])
    some_heads = min(max(limit // (per_row * n * per_column), 1), h)
    some_rows = max(limit // (some_heads * per_row * n * per_column), 1)
    for i in range(b):
        keys = _gathered(k[i], columns[min(i, len(columns) - 1)]).to(dtype) * scale
        hidden = None if dead is None else dead[min(i, len(dead) - 1)]
        for first in range(0, h, some_heads):
            heads = torch.arange(first, min(first + some_heads, h), device=q.device)
            wide = keys[first : first + some_heads] if groups == 1 else keys.index_select(0, heads // groups)
            for row in range(0, m, some_rows):
                which = rows[0, row : row + some_rows]
                queries = _gathered(q[i, first : first + some_heads], which).to(dtype)
                # Queries last: maxima over few keys are slow where those lie side by side.
                best = (wide @ queries.mT).unflatten(1, (n, per_column)).amax(2)
                if hidden is not None:
                    best = best.masked_fill(hidden[:, None], -torch.inf)
                top = best.amax(1, keepdim=True).clamp_min(torch.finfo(dtype).min)
                # The largest exp is that of the largest.
                best = best.sub_(top).unflatten(-1, (-1, per_row)).amax(-1).exp_()
                out[i, first : first + some_heads, row : row + some_rows] = best.mT
    return _shares(out)


def _shares(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _gathered(x: Tensor, tokens: Tensor) -> Tensor:
    """Tokens of x (H, N, D), token by token: heads mostly lie side by side in memory."""
    return x.transpose(0, 1).index_select(0, tokens.flatten()).transpose(0, 1)


def quota_ends(blocks: int, bounds: Sequence[float], steps: Sequence[int]) -> list[int]:
    """How many of ``blocks`` have each level or a finer one, where level i ends at the share ``bounds[i]`` of them.

    The length of a level is rounded up to a multiple of ``steps[i]``, down where no blocks are left.
    """
    ends, start = [], 0
    for bound, step in zip(bounds, steps, strict=True):
        length = max(int(blocks * bound) - start, 0)
        start += min(-(-length // step) * step, (blocks - start) // step * step)
        ends.append(start)
    return ends


def threshold_ends(ranked: Tensor, bounds: Sequence[float], steps: Sequence[int], least: int) -> list[Tensor]:
    """As :func:`quota_ends`, int64 (.., 1) for each row of ``ranked`` (.., blocks), importance in falling order.

    A level ends with the block whose cumulated share of the row crosses its bound, and is empty where the first block
    of the row already exceeds it. ``least``: what the first level ends at or behind.
    """
    total, blocks = ranked.cumsum(-1), ranked.shape[-1]
    energy = total / total[..., -1:].clamp_min(torch.finfo(total.dtype).tiny)
    ends, start = [], torch.zeros_like(energy[..., :1], dtype=torch.int64)
    for number, (bound, step) in enumerate(zip(bounds, steps, strict=True)):
        within = (energy <= bound + TOLERANCE).sum(-1, keepdim=True)
        end = torch.where(within > 0, within + 1, start).clamp_min(0 if number else least).clamp_max(blocks)
        length = (end - start).clamp_min(0)
        start = start + torch.minimum((length + step - 1) // step * step, (blocks - start) // step * step)
        ends.append(start)
    return ends


def ranked_levels(blocks: int, levels: Sequence[int], ends: Sequence[int | Tensor], device: torch.device) -> Tensor:
    """uint8 (.., blocks): the level of the block of each rank, 0 for skipped; the best block is never skipped.

    Levels from fine to coarse, each ending before rank ``ends[i]``, an int or int64 (.., 1).
    """
    rank = torch.arange(blocks, device=device)
    out, start = torch.zeros_like(rank, dtype=torch.uint8), 0
    for level, end in zip(levels, ends, strict=True):
        out = torch.where((rank >= start) & (rank < end), level, out)
        start = end
    return torch.where((rank == 0) & (out == 0), levels[0], out)
