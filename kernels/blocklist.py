"""BlockList: per query block, the indices of the key blocks it visits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .select import compact


@dataclass(frozen=True, eq=False)
class BlockList:
    """Index lists over key blocks.

    ``count``: int32 (B1, H1, nq). ``index``: int32 (B1, H1, nq, W) with ``W >= count.max()``; entries from
    ``count`` on are arbitrary but valid block indices. B1 and H1 are 1 or the batch and head counts.
    """

    count: Tensor
    index: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor, width: int | None = None) -> BlockList:
        """From a bool mask (B1, H1, nq, nk). ``width`` fixes W.

        None takes the largest count, on a GPU nk, since the count would have to be waited for.
        """
        if width is None:
            width = mask.shape[-1] if mask.is_cuda else max(int(mask.sum(-1).max()), 1)
        return cls(*compact(mask, width))

    @property
    def width(self) -> int:
        return self.index.shape[-1]

    def valid(self) -> Tensor:
        """bool (B1, H1, nq, W): which entries of ``index`` count."""
        return torch.arange(self.width, device=self.index.device) < self.count[..., None]

    def mask(self, blocks: int) -> Tensor:
        """bool (B1, H1, nq, blocks): the inverse of :meth:`from_mask`."""
        out = torch.zeros((*self.count.shape, blocks), dtype=torch.bool, device=self.index.device)
        # Entries past the count may repeat a listed block, so they must not write False over its True.
        return out.scatter_reduce_(-1, self.index.long(), self.valid(), reduce="amax")

    def to(self, device: torch.device) -> BlockList:
        return BlockList(self.count.to(device), self.index.to(device))

    def bytes(self) -> int:
        return self.count.nbytes + self.index.nbytes
