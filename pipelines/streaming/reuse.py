"""FlashBlock (arXiv 2602.05305): within a chunk, what history contributes is computed once and reused by later steps.

A softmax over history and chunk is exactly the two softmaxes apart, weighted by their sums of exponentials. While a
chunk is denoised its history stays the same and the output of attending to it changes little, so later steps compute
the chunk's own part alone. The history's part then comes from an older query: the only approximation.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...diffusers.ops import Primitive
from ...errors import UnsupportedError, UsageError
from ...functional import WHOLE, attend
from ...layout import Layout
from .attention import Pass
from .cache import StreamCache

Part = tuple[Tensor, Tensor]


def merge(a: Part, b: Part) -> Part:
    """Attention over two disjoint sets of keys: from (out (B, H, N, D), natural-log LSE (B, H, N)) of each, of both."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((x - lse).exp()[..., None] for x in (lse_a, lse_b))
    return weight_a * out_a.to(lse.dtype) + weight_b * out_b.to(lse.dtype), lse


@dataclass
class Similarity:
    """How much the history's part changes by the step, per head: what :class:`FlashBlock` measures when asked.

    ``cosine`` and ``lse``: by (layer, step), float64 (H,): mean cosine between the part at that step and the one at
    step 0, and mean absolute change of its LSE.
    """

    cosine: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    lse: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _count: defaultdict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int), repr=False)

    def add(self, layer: int, step: int, now: Part, then: Part) -> None:
        """Average one more measurement in."""
        cosine = cosine_similarity(now[0].double(), then[0].double(), dim=-1).mean((0, 2)).cpu()
        change = (now[1] - then[1]).double().abs().mean((0, 2)).cpu()
        key = (layer, step)
        n = self._count[key]
        self.cosine[key] = (self.cosine.get(key, torch.zeros_like(cosine)) * n + cosine) / (n + 1)
        self.lse[key] = (self.lse.get(key, torch.zeros_like(change)) * n + change) / (n + 1)
        self._count[key] = n + 1


@dataclass
class _Kept:
    cache: StreamCache
    chunk: int
    part: Part


class FlashBlock:
    """Window attention that reuses the history's part within a chunk.

    ``similarity``: what a stream with ``measure=True`` found. A head whose part changed by more than ``min_cosine`` or
    ``max_lse`` allow at a step computes it there and keeps the new one (released: 0.85 and 0.05); without a measurement
    every head reuses at every step. Step 0 always computes. ``context``: reuse in the pass that fills the cache too,
    whose error would then stay in memory. ``measure``: compute everything, exactly, and fill ``similarity``.

    ``computed`` and ``reused`` count heads of history parts.
    """

    def __init__(
        self,
        similarity: Similarity | None = None,
        *,
        min_cosine: float = 0.85,
        max_lse: float = 0.05,
        context: bool = False,
        measure: bool = False,
        backend: str = "auto",
    ):
        if max_lse < 0:
            raise UsageError(f"max_lse is a change of a logarithm, 0 or more; got {max_lse}")
        self.similarity = Similarity() if measure and similarity is None else similarity
        self.min_cosine, self.max_lse, self.context, self.measure = min_cosine, max_lse, context, measure
        self.backend = backend
        self.computed = self.reused = 0
        self._kept: dict[tuple[str, int], _Kept] = {}

    def __call__(self, layer: int, call: Primitive, now: Pass) -> Tensor:
        if call.form != "BSHD" or call.attn_mask is not None:
            raise UnsupportedError("FlashBlock serves unmasked attention with tensors (B, N, H, D), as Wan's is")
        cache = now.cache
        query = cache.rotated(layer, call.query)
        own = self._attend(query, *cache.own(layer), call.scale)
        if cache.visible == query.shape[1]:
            return own[0].to(call.query.dtype).transpose(1, 2)
        out, _ = merge(self._history(layer, query, now, call.scale), own)
        return out.to(call.query.dtype).transpose(1, 2)

    def forget(self) -> None:
        """Drop what is kept; counters stay."""
        self._kept.clear()

    def bytes(self) -> int:
        """Bytes kept between steps: (D + 1) numbers per head and token of a chunk, layer and branch."""
        return sum(tensor.nbytes for kept in self._kept.values() for tensor in kept.part)

    def _history(self, layer: int, query: Tensor, now: Pass, scale: float | None) -> Part:
        kept = self._kept.get((now.branch, layer))
        heads = query.shape[2]
        valid = kept is not None and kept.cache is now.cache and kept.chunk == now.chunk and now.step > 0
        stale = self._stale(layer, now, heads) if valid else torch.ones(heads, dtype=torch.bool)
        count = int(stale.sum())
        self.computed += count
        self.reused += heads - count
        if not count:
            return kept.part
        pick = slice(None) if count == heads else stale.nonzero().flatten().to(query.device)
        key, value = now.cache.history(layer)
        part = self._attend(query[:, :, pick], key[:, :, pick], value[:, :, pick], scale)
        if valid and self.measure:
            self.similarity.add(layer, now.step, part, kept.part)
            return part
        if valid and count < heads:
            out, lse = (tensor.clone() for tensor in kept.part)
            out[:, pick], lse[:, pick] = part
            part = out, lse
        self._kept[now.branch, layer] = _Kept(now.cache, now.chunk, part)
        return part

    def _stale(self, layer: int, now: Pass, heads: int) -> Tensor:
        """bool (H,) on the CPU: which heads compute at this step."""
        if self.measure or (now.context and not self.context):
            return torch.ones(heads, dtype=torch.bool)
        if self.similarity is None:
            return torch.zeros(heads, dtype=torch.bool)
        key = (layer, now.step)
        if key not in self.similarity.cosine:
            raise UsageError(
                f"nothing was measured for layer {layer}, step {now.step}; measure with the same model and steps, over "
                "at least two chunks"
            )
        return (self.similarity.cosine[key] < self.min_cosine) | (self.similarity.lse[key] > self.max_lse)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Part:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        layout, kv_layout = (Layout(grid=(1, 1, x.shape[2])) for x in (query, key))
        return attend(
            query, key, value, WHOLE, layout=layout, kv_layout=kv_layout, scale=scale, backend=self.backend,
            return_lse=True,
        )  # fmt: skip
