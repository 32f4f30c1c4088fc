"""How a chunk attends to its window: densely, by the stock attention backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from ...diffusers.ops import Primitive
from .cache import StreamCache


@dataclass(frozen=True)
class Pass:
    """One forward of a chunk. ``step``: of the denoising; the context pass that remembers the chunk has the last."""

    cache: StreamCache
    branch: str
    chunk: int
    step: int
    total: int
    sigma: float
    context: bool = False


class WindowAttention(Protocol):
    """Attention of a chunk to its window, whose own keys are already in the cache."""

    def __call__(self, layer: int, call: Primitive, now: Pass) -> Tensor:
        """The result in the layout of ``call``, whose query (B, tokens, H, D) is not rotated yet."""
        ...

    def forget(self) -> None:
        """What was kept of earlier chunks no longer holds: the prompt or the cache has changed."""
        ...


class Dense:
    """Every query sees the whole window."""

    def __call__(self, layer: int, call: Primitive, now: Pass) -> Tensor:
        key, value = now.cache.window(layer)
        return replace(call, query=now.cache.rotated(layer, call.query), key=key, value=value).dense()

    def forget(self) -> None:
        pass
