"""Wan's rotary embedding at any position in time, from its frequencies instead of a table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UnsupportedError, UsageError

Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rotary:
    """Rotation of channel pairs (2j, 2j + 1) by time, row and column, each with its share of the head's channels.

    ``dims``: channels that turn with (time, row, column), even numbers; ``theta``: base of the frequencies, whose
    exponent runs over each axis by itself. Positions are integers of any size and sign: only differences show in
    attention, so a stream may count from wherever it likes.
    """

    dims: tuple[int, int, int]
    theta: float = 10000.0

    def __post_init__(self) -> None:
        if any(d % 2 or d < 0 for d in self.dims):
            raise UsageError(f"rotated channels come in pairs: dims must be three even numbers; got {self.dims}")

    @classmethod
    def of(cls, rope: torch.nn.Module) -> Rotary:
        """That of a ``WanRotaryPosEmbed``. Raises ``UnsupportedError`` where its frequencies are not Wan's."""
        found = cls((rope.t_dim, rope.h_dim, rope.w_dim))
        one = torch.ones(1, dtype=torch.int64)
        stock = torch.stack([rope.freqs_cos[1, ::2], rope.freqs_sin[1, 1::2]]).cpu().double()
        if not torch.allclose(torch.cat(found.tables(one, one, one)), stock, atol=1e-6):
            raise UnsupportedError(
                f"this model's rotary embedding ({type(rope).__name__}) does not turn with base {found.theta:g}; a "
                "stream can only rotate keys of Wan's own embedding"
            )
        return found

    def tables(self, frames: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype = torch.float64) -> Tables:
        """Cosines and sines (..., N, D / 2) for tokens at integer positions, each (..., N)."""
        angles = []
        for position, dim in zip((frames, rows, columns), self.dims, strict=True):
            # float64 until the end, as upstream's tables are made: positions reach tens of thousands.
            exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=position.device) / dim
            angles.append(position.double()[..., None] * self.theta**-exponent)
        shape = torch.broadcast_shapes(*(angle.shape[:-1] for angle in angles))
        angle = torch.cat([angle.expand(*shape, -1) for angle in angles], -1)
        return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """``x`` (B, N, H, D) turned by ``tables`` (N or (B, N), D / 2), in their precision, in x's dtype."""
    cos, sin = (table[..., None, :] for table in tables)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2).to(x.dtype)
