"""Selection in plain torch: what the kernels compute."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(values: Tensor, count: int | Tensor) -> Tensor:
    """bool like ``values`` (.., n): along the last axis the ``count`` largest, among equals the first ones.

    ``count``: one for all rows, or int (..); at most 0 takes none, n and more take all. -inf may be taken, last.
    """
    # A stable sort puts equals in their order, which torch.topk does not promise.
    order = values.argsort(dim=-1, descending=True, stable=True)
    count = count[..., None] if isinstance(count, Tensor) else count
    taken = (torch.arange(values.shape[-1], device=values.device) < count).expand(values.shape)
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, taken)


def compact(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Counts int32 (..) of the set entries of a bool mask (.., n), and int32 (.., width) where they are, ascending.

    What lies past a row's count is any valid index; entries past ``width`` are left out of the index, not of the count.
    """
    # Each set entry is written where it ranks, all else into a column that is dropped: half the time of a sort.
    rank = mask.cumsum(-1)
    slot = torch.where(mask, (rank - 1).clamp_max(width), width)
    index = torch.zeros((*mask.shape[:-1], width + 1), dtype=torch.int32, device=mask.device)
    places = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    index.scatter_(-1, slot, places.expand(mask.shape))
    return rank[..., -1].int(), index[..., :width].contiguous()
