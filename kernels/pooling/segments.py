"""Sums over runs of tokens on CPUs, gathered and added in one pass.

A copy of the tokens in plan order costs several times what adding them does, above all where a head's rows lie apart.
``embedding_bag`` reads each token's row once, all heads together where they lie together, and makes no copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def serves(x: Tensor) -> bool:
    """Whether :func:`segment_sums` is the way to pool x: it adds up in the dtype of x, and is fast for float32."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def segment_sums(x: Tensor, tokens: list[Tensor], starts: list[Tensor]) -> Tensor:
    """Sums (B, H, R, D) over the tokens of R segments of x (B, H, N, D), which may be empty.

    ``tokens``: int64, token indices of all segments one after the other; ``starts``: int64 (R,), where in them each
    segment starts. One of each per sample, or one for all samples. Everything is on the CPU.
    """
    batch, heads, _, dim = x.shape
    out = x.new_empty((batch, heads, len(starts[0]), dim))
    for b in range(batch):
        which, first = tokens[min(b, len(tokens) - 1)], starts[min(b, len(starts) - 1)]
        for some, rows in _rows(x[b]):
            sums = embedding_bag(which, rows, first, mode="sum")
            out[b, some] = sums.unflatten(-1, (-1, dim)).transpose(0, 1)
    return out


def live_segments(tokens: Tensor, starts: Tensor, live: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """``tokens`` and ``starts`` of one sample each, without what is not live. ``live``: bool (B, len(tokens))."""
    before = torch.nn.functional.pad(live.cumsum(-1), (1, 0))
    return [tokens[alive] for alive in live], list(before[:, starts])


def _rows(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """x (H, N, D) as matrices with a row per token: of all heads where they lie side by side, else of one each."""
    heads, _, dim = x.shape
    if x.stride(0) == dim and x.stride(1) == heads * dim and x.stride(2) == 1:
        yield slice(None), x.transpose(0, 1).flatten(1)
    else:
        for h in range(heads):
            yield slice(h, h + 1), x[h]
