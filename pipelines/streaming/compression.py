"""Participative compression: which tokens of the past the present looks at (Deep Forcing, arXiv 2512.05081)."""

from __future__ import annotations

import torch
from torch import Tensor


def most_watched(query: Tensor, key: Tensor, count: int) -> Tensor:
    """Indices (B, ``count``), increasing, of the keys with the largest sum of logits over heads and queries.

    ``query`` (B, R, H, D) and ``key`` (B, N, H, D) are rotated. The paper's eq. 7 sums raw dot products, no softmax,
    so the queries can be summed first; its constant factor does not change the choice. All heads share it.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    score = torch.einsum("bhd,bnhd->bn", query.to(wide).sum(1), key.to(wide))
    return score.topk(count, dim=1).indices.sort(1).values
