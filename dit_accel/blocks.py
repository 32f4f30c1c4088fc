"""Blocks: a partition of the tokens, in plan order, into consecutive runs."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Blocks:
    """A partition of n slots into consecutive blocks. ``bounds``: int64 (blocks + 1,) on the CPU.

    ``_memo``: what was derived from it. Methods keep a partition per layout, so that is done once.
    """

    bounds: Tensor
    _memo: dict = field(default_factory=dict, repr=False)

    @classmethod
    def uniform(cls, n: int, size: int) -> Blocks:
        """Blocks of ``size``; the last one may be shorter. Equal arguments give the same object."""
        return _uniform(n, size)

    @functools.cached_property
    def n(self) -> int:
        return int(self.bounds[-1])

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    @property
    def sizes(self) -> Tensor:
        return self.bounds.diff()

    @functools.cached_property
    def size(self) -> int | None:
        """The common size of all blocks but a shorter last one, or None."""
        sizes = self.sizes
        first = int(sizes[0])
        return first if bool((sizes[:-1] == first).all()) and int(sizes[-1]) <= first else None

    @functools.cached_property
    def largest(self) -> int:
        """Slots of the largest block."""
        return int(self.sizes.max())

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``bounds`` and :meth:`owner` on ``device``, copied there once: a copy to a GPU waits for it."""
        key = ("on", device)
        if key not in self._memo:
            with torch.inference_mode(False):
                self._memo[key] = self.bounds.to(device), self.owner().to(device)
        return self._memo[key]

    def owner(self) -> Tensor:
        """int64 (n,): the block of each slot."""
        return torch.repeat_interleave(torch.arange(self.count), self.sizes)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _uniform(n: int, size: int) -> Blocks:
    return Blocks(torch.cat([torch.arange(0, n, size), torch.tensor([n])]))
