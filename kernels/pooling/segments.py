"""Sums over runs of tokens on CPUs, gathered and added in one pass.

A copy of the tokens in plan order costs several times what adding them does, above all where a head's rows lie apart.
``embedding_bag`` reads each token's row once, all heads together where they lie together, and makes no copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# Elements gathered at once: what two cores' second level caches hold.
CHUNK = 1 << 19


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


def segment_spreads(x: Tensor, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Means and mean absolute deviations (B, H, R, D) over the tokens of R segments of x (B, H, N, D), none empty.

    ``tokens`` and ``starts`` as in :func:`segment_sums`, for all samples. Segments of one length in a row are gathered
    once, all heads together where they lie together, and worked on in place.
    """
    batch, heads, _, dim = x.shape
    lengths = torch.diff(starts, append=starts.new_tensor([len(tokens)])).tolist()
    # Two tensors: autograd lets no view of one that was unpacked be written to.
    means, spreads = (x.new_empty((batch, heads, len(lengths), dim)) for _ in range(2))
    for b in range(batch):
        for some, rows in _rows(x[b]):
            for first, stop in _equal(lengths, max(CHUNK // rows.shape[1], 1)):
                begin, length = int(starts[first]), lengths[first]
                part = rows.index_select(0, tokens[begin : begin + (stop - first) * length])
                part = part.unflatten(0, (stop - first, length))
                mean = part.sum(1, keepdim=True).div_(length)
                spread = part.sub_(mean).abs_().sum(1).div_(length)
                for out, found in ((means, mean[:, 0]), (spreads, spread)):
                    out[b, some, first:stop] = found.unflatten(-1, (-1, dim)).transpose(0, 1)
    return means, spreads


def live_segments(tokens: Tensor, starts: Tensor, live: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """``tokens`` and ``starts`` of one sample each, without what is not live. ``live``: bool (B, len(tokens))."""
    before = torch.nn.functional.pad(live.cumsum(-1), (1, 0))
    return [tokens[alive] for alive in live], list(before[:, starts])


def _equal(lengths: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Runs of consecutive segments of one length, with no more than ``most`` tokens where they are several."""
    first = 0
    for at, length in enumerate(lengths):
        if length != lengths[first] or (at > first and (at - first + 1) * length > most):
            yield first, at
            first = at
    if lengths:
        yield first, len(lengths)


def _rows(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """x (H, N, D) as matrices with a row per token: of all heads where they lie side by side, else of one each."""
    heads, _, dim = x.shape
    if x.stride(0) == dim and x.stride(1) == heads * dim and x.stride(2) == 1:
        yield slice(None), x.transpose(0, 1).flatten(1)
    else:
        for h in range(heads):
            yield slice(h, h + 1), x[h]
