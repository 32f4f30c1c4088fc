"""Representatives: pooled keys and values that stand for many tokens each, inside the same softmax as exact keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .blocklist import BlockList


@dataclass(frozen=True, eq=False)
class Group:
    """One set of representatives and who sees them.

    ``key``: (B, Hk or H, R, D), ``value``: (B, Hk or H, R, Dv), means over the live tokens that each stands for, in
    the dtype of q. ``count``: int32 (B1, H1, R), how many those are; a representative of none is never seen. One that
    stands for n tokens carries ``+log n`` on its logit. ``seen``: per query tile the blocks of ``width`` consecutive
    representatives that it sees. ``bounds``: int64 (R + 1,) on the CPU, representative r stands for the key slots
    ``bounds[r] .. bounds[r + 1]`` of the plan.
    """

    key: Tensor
    value: Tensor
    count: Tensor
    seen: BlockList
    bounds: Tensor
    width: int = 1

    @property
    def size(self) -> int:
        """R, the number of representatives."""
        return self.key.shape[2]

    @property
    def blocks(self) -> int:
        return self.size // self.width

    def bias(self) -> Tensor:
        """float32 (B1, H1, R): the log of the count, -inf where it is 0."""
        return self.count.float().log()

    def mask(self) -> Tensor:
        """bool (B1, H1, tiles, R): which representatives each query tile sees."""
        return self.seen.mask(self.blocks).repeat_interleave(self.width, -1) & (self.count > 0)[:, :, None]

    def of_tiles(self, owner: Tensor) -> Group:
        """The same for other query tiles: tile i sees what tile ``owner[i]`` saw."""
        seen = BlockList(self.seen.count.index_select(2, owner), self.seen.index.index_select(2, owner))
        return replace(self, seen=seen)

    def to(self, device: torch.device) -> Group:
        key, value, count, seen = (x.to(device) for x in (self.key, self.value, self.count, self.seen))
        return replace(self, key=key, value=value, count=count, seen=seen)

    def bytes(self) -> int:
        return self.key.nbytes + self.value.nbytes + self.count.nbytes + self.seen.bytes()
