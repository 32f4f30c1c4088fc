"""Windows along one axis of a token grid: which keys a query coordinate sees, as one interval in rank order.

Dilation cuts an axis into interleaved groups. In *rank order* the groups follow one another, so a window is one
interval whatever its dilation, and a method over several axes is the product of such intervals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A neighbourhood along an axis of ``length`` tokens; 1 <= stride <= size and size * dilation <= length."""

    length: int
    size: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def interval(self, position: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [start, end) seen from ``position`` in a dilation group of ``group`` tokens, both int64.

        Queries of a stride group share the window of their leader: the centre one (the right of two), or the last
        one when causal. A window leans left by one when its size is even, and is moved inside the axis, never
        clipped; a causal one ends at the query and is cut at the start instead.
        """
        first = position // self.stride * self.stride
        if self.causal:
            leader = torch.minimum(first + self.stride - 1, group - 1)
            return (leader - self.size + 1).clamp_min(0), position + 1
        start = first + self.stride // 2 - self.size // 2
        start = torch.minimum(start, group - self.size).clamp_min(0)
        return start, start + self.size

    def groups(self) -> Tensor:
        """int64 (dilation,): tokens of each dilation group."""
        return (self.length - torch.arange(self.dilation) + self.dilation - 1) // self.dilation

    def axis(self) -> Axis:
        """The axis in rank order: group by group, each in its own order."""
        sizes = self.groups()
        offset = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        position = torch.arange(self.length) - offset
        group = torch.repeat_interleave(torch.arange(self.dilation), sizes)
        start, end = self.interval(position, sizes[group])
        return Axis(position * self.dilation + group, offset + start, offset + end)


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis in rank order, int64 (length,): the coordinate at each rank, and the ranks [lo, hi) seen from there."""

    coordinate: Tensor
    lo: Tensor
    hi: Tensor

    @classmethod
    def clipped(cls, length: int, reach: int) -> Axis:
        """Keys up to ``reach`` away, cut off at the ends of the axis."""
        i = torch.arange(length)
        return cls(i, (i - reach).clamp_min(0), (i + reach + 1).clamp_max(length))

    @property
    def length(self) -> int:
        return len(self.coordinate)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs along this axis."""
        return int((self.hi - self.lo).sum())

    @property
    def whole(self) -> bool:
        """Whether every query sees every key."""
        return self.pairs == self.length**2
