"""Sparse attention inside a window: any method that plans for queries and keys of different extent."""

from __future__ import annotations

import weakref

from torch import Tensor

from ...diffusers.ops import Primitive
from ...errors import UnsupportedError
from ...functional import attend
from ...layout import Layout
from ...methods import Method
from ...state import State
from ...step import Step
from .attention import Dense, Pass


class Sparse:
    """Window attention under ``method``, whose keys are the window's frames and whose queries are the chunk's.

    A chunk is a run of its own to methods that search: they search at its first steps. The ``context`` pass stays
    dense unless asked, since its error would stay in memory, and so does a chunk without history. Methods that take
    their masks from equal queries and keys raise ``UnsupportedError`` when the first such chunk comes.
    ``counts``: calls by what ran, ``{"sparse": ..., "dense": ...}``.
    """

    def __init__(self, method: Method, *, context: bool = False, backend: str = "auto"):
        self.method, self.context, self.backend = method, context, backend
        self.counts = {"sparse": 0, "dense": 0}
        self._states: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._dense = Dense()

    def __call__(self, layer: int, call: Primitive, now: Pass) -> Tensor:
        cache, grid = now.cache, now.cache.grid
        if (now.context and not self.context) or cache.visible == call.query.shape[1]:
            self.counts["dense"] += 1
            return self._dense(layer, call, now)
        if call.form != "BSHD" or call.attn_mask is not None:
            raise UnsupportedError("a window serves unmasked attention with tensors (B, N, H, D), as Wan's is")
        state = self._states.setdefault(cache, State())
        if layer == 0 and now.step == 0:
            state.close_run(now.chunk - 1)
        key, value = cache.window(layer)
        query, key, value = (x.transpose(1, 2) for x in (cache.rotated(layer, call.query), key, value))
        frames, window = (x.shape[2] // cache.frame_tokens for x in (query, key))
        step = Step(now.step, now.total, now.sigma, now.branch, now.chunk)
        self.counts["sparse"] += 1
        return attend(
            query, key, value, self.method, layout=Layout(grid=(frames, *grid)),
            kv_layout=Layout(grid=(window, *grid)), layer=layer, step=step, state=state, scale=call.scale,
            backend=self.backend,
        ).transpose(1, 2)  # fmt: skip

    def forget(self) -> None:
        """Drop what the method kept of earlier steps."""
        self._states.clear()
