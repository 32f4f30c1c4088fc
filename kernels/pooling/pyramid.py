"""Pyramids of means: runs of 2, 4 and 8 tokens of a block, each level summed from the one below, some heads at a time.

Blocks are given as a table of places: ``tokens``, int64 (blocks, size), the token at each place, and ``live``, bool
(B or 1, blocks, size), which places hold one that counts. Blocks shorter than ``size`` end in places that do not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .segments import live_segments, segment_sums, serves

# Elements of the largest temporary, unless a single head is larger.
CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class Runs:
    """What of a pyramid does not depend on the tensors it averages. ``counts``: as :func:`pyramid_counts`.

    ``divisors``: those, float32 (B or 1, 1, R, 1) and at least 1. ``tokens`` and ``starts``: the runs of the finest
    level as ``segments.segment_sums`` takes them, on CPUs alone: elsewhere their number would have to be waited for.
    """

    counts: list[Tensor]
    divisors: list[Tensor]
    tokens: list[Tensor]
    starts: list[Tensor]

    @classmethod
    def of(cls, tokens: Tensor, live: Tensor, levels: Sequence[int]) -> Runs:
        """The runs of ``levels``, arguments as in :func:`pyramid_means`."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        if levels and tokens.device.type == "cpu":
            starts = torch.arange(0, tokens.numel(), levels[0])
            found = live_segments(tokens.flatten(), starts, live.flatten(1))
        counts = pyramid_counts(live, levels)
        return cls(counts, [count.clamp_min(1)[..., None].float() for count in counts], *found)


def pyramid_means(
    x: Tensor, tokens: Tensor, live: Tensor, levels: Sequence[int], runs: Runs | None = None
) -> list[Tensor]:  # fmt: skip
    """Means over the live tokens of every run of h places, for each h in ``levels``, ascending powers of two.

    x (B, H, N, D). Returns per level (B, H, blocks x size / h, D) in the dtype of x, 0 where no place is live. Sums are
    float32, for float64 inputs float64. ``size`` is a multiple of every level.
    ``runs``: those of the other arguments, where they are kept between calls.
    """
    if not levels:
        return []
    runs = Runs.of(tokens, live, levels) if runs is None else runs
    if serves(x):
        return _summed(x, levels, runs)
    counts = runs.counts
    means = [x.new_empty((*x.shape[:2], count.shape[-1], x.shape[-1])) for count in counts]
    for heads, places in _parts(x, tokens):
        sums, done = places.masked_fill_(~live.flatten(1)[:, None, :, None], 0), 1
        for level, count, mean in zip(levels, counts, means, strict=True):
            sums, done = sums.unflatten(2, (-1, level // done)).sum(3), level
            mean[:, heads] = (sums / count[..., None].clamp_min(1)).to(x.dtype)
    return means


def _summed(x: Tensor, levels: Sequence[int], runs: Runs) -> list[Tensor]:
    """The finest level as segments of live tokens, the others from it."""
    sums, done = segment_sums(x, runs.tokens, runs.starts), levels[0]
    means = []
    for level, divisor in zip(levels, runs.divisors, strict=True):
        if level > done:
            # A reduction over so few costs several times what adding them does.
            sums, done = functools.reduce(torch.add, sums.unflatten(2, (-1, level // done)).unbind(3)), level
        means.append(sums / divisor)
    return means


def pyramid_counts(live: Tensor, levels: Sequence[int]) -> list[Tensor]:
    """int32 (B or 1, 1, blocks x size / h) per level h: how many live tokens each mean stands for."""
    return [live.flatten(1).unflatten(1, (-1, h)).sum(-1, dtype=torch.int32)[:, None] for h in levels]


def pyramid_similarity(x: Tensor, tokens: Tensor, live: Tensor, levels: Sequence[int]) -> Tensor:
    """How alike the tokens are that a level merges: (B, H, blocks, levels), float32 or for float64 inputs float64.

    Per block the mean cosine between the first and the last token of each run of h, over runs where both are live; 0
    for a block without any (PSA, arXiv 2512.04025).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    found = x.new_zeros((*x.shape[:2], len(tokens), len(levels)), dtype=dtype)
    for heads, places in _parts(x, tokens):
        unit = torch.nn.functional.normalize(places, dim=-1).unflatten(2, tuple(tokens.shape))
        for number, h in enumerate(levels):
            cosine = (unit[..., 0::h, :] * unit[..., h - 1 :: h, :]).sum(-1)
            both = (live[..., 0::h] & live[..., h - 1 :: h])[:, None]
            found[:, heads, :, number] = cosine.masked_fill(~both, 0).sum(-1) / both.sum(-1).clamp_min(1)
    return found


def _parts(x: Tensor, tokens: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Heads of x (B, H, N, D) and what they hold at every place, in the dtype of sums: (B, heads, places, D)."""
    dtype, places = torch.promote_types(x.dtype, torch.float32), tokens.flatten()
    room = max(CHUNK // (x.shape[0] * len(places) * x.shape[3]), 1)
    for first in range(0, x.shape[1], room):
        heads = slice(first, first + room)
        yield heads, x[:, heads].index_select(2, places).to(dtype)
