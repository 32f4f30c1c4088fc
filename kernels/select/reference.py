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
    count = mask.sum(-1, dtype=torch.int32)
    index = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)[..., :width]
    return count, index.to(torch.int32).contiguous()
