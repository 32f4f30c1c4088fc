"""Dead keys, which must not reach an output whatever they hold: 0 x NaN is NaN, and NaN - inf is NaN."""

from __future__ import annotations

import torch
from torch import Tensor

# Values up to here give finite logits and, weighted by 0, nothing.
HARMLESS = 2.0**40


def without_dead(k: Tensor, v: Tensor, kv_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """k (B, Hk, Nk, D) and v (B, Hk, Nk, Dv) with zeros in the place of keys from ``kv_valid``, int32 (B,), on.

    The inputs are left as they are. On a CPU the tail alone is read, and both come back uncopied where it holds
    nothing that can do harm; elsewhere that would be a host sync, and a copy costs little beside attention.
    """
    if kv_valid is None or (k.device.type == "cpu" and _harmless(k, v, int(kv_valid.min()))):
        return k, v
    dead = (torch.arange(k.shape[2], device=k.device) >= kv_valid.to(k.device)[:, None])[:, None, :, None]
    return k.masked_fill(dead, 0), v.masked_fill(dead, 0)


def _harmless(k: Tensor, v: Tensor, first: int) -> bool:
    """Whether all keys from ``first`` on are small numbers."""
    for x in (k, v):
        tail = x.detach()[:, :, max(first, 0) :]
        # Compared as a float: the limit is infinite in float16.
        if tail.numel() and not float(torch.stack(tail.aminmax()).abs().amax()) <= HARMLESS:
            return False
    return True
