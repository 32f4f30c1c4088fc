"""Smoothing: means taken out of q, k and v before they are quantised, exact in real arithmetic.

Softmax ignores what is constant along a row, so keys may lose any one vector (SageAttention, 2410.02367, section 4.2).
Queries lose one vector per block, whose product with the keys is added back (SageAttention2, 2411.10958, section 3.1).
Values lose one vector, which the output gets back because weights sum to 1 (ibid., section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean(x: Tensor, live: Tensor | None = None) -> Tensor:
    """float32 (B, H, 1, D): mean over the live tokens of x (B, H, N, D), 0 without any.

    ``live``: bool (B or 1, H or 1, N) or None for all. Dead tokens may hold anything, NaN included.
    """
    x = x.float()
    if live is None:
        return x.mean(2, keepdim=True) if x.shape[2] else x.new_zeros((*x.shape[:2], 1, x.shape[3]))
    live = live[..., None]
    return x.masked_fill(~live, 0).sum(2, keepdim=True) / live.sum(2, keepdim=True).clamp_min(1)


def block_mean(x: Tensor, block: int, live: Tensor | None = None) -> Tensor:
    """float32 (B, H, ceil(N / block), D): the mean of each block's live tokens."""
    b, h, n, d = x.shape
    blocks = -(-n // block)
    live = torch.ones((1, 1, n), dtype=torch.bool, device=x.device) if live is None else live
    live = torch.nn.functional.pad(live, (0, blocks * block - n)).unflatten(-1, (blocks, block))
    x = torch.nn.functional.pad(x.float(), (0, 0, 0, blocks * block - n)).view(b, h, blocks, block, d)
    return x.masked_fill(~live[..., None], 0).sum(3) / live.sum(-1).clamp_min(1)[..., None]
