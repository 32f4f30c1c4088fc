"""Masks: what an attention mask means for a sparse call."""

from __future__ import annotations

import torch
from torch import Tensor


class Unreadable(ValueError):
    """The mask is not a key-padding prefix; the message says what it is."""


def kv_valid(mask: Tensor | None, batch: int, keys: int) -> Tensor | None:
    """How many leading keys each sample has: int32 (batch,), or None where every key is live.

    ``mask``: a boolean key mask (1 or batch, 1, 1, keys), true where live. One host sync. Raises
    :class:`Unreadable` for any other mask; such a call runs the stock path.
    """
    if mask is None:
        return None
    shape = tuple(mask.shape)
    if mask.dtype != torch.bool:
        raise Unreadable(f"a {mask.dtype} mask of shape {shape}; only boolean key masks are read")
    if mask.ndim != 4 or shape[1:] != (1, 1, keys) or shape[0] not in (1, batch):
        raise Unreadable(f"a mask of shape {shape}; only key masks (batch, 1, 1, {keys}) are read")
    live = mask[:, 0, 0]
    count = live.sum(-1, dtype=torch.int32)
    prefix = (live == (torch.arange(keys, device=mask.device) < count[:, None])).all()
    is_prefix, fewest = torch.stack([prefix.to(torch.int32), count.min()]).tolist()
    if not is_prefix or not fewest:
        raise Unreadable("a key mask whose dead keys are not all at the end of the sequence")
    return None if fewest == keys else count.expand(batch)
