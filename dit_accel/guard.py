"""Guard: run-time checks of the attention output, with an announced dense fallback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Guard:
    """Which checks run on accelerated calls.

    ``nonfinite``: flag any NaN or Inf in an accelerated output. Flags gather on the device; the engine reads
    them once per transformer forward and repeats that forward with the named layers dense.
    """

    nonfinite: bool = True

    @property
    def active(self) -> bool:
        return self.nonfinite


class Flags:
    """Per-layer flags of one forward, kept on the device: one int32 per layer, read with a single transfer."""

    def __init__(self, layers: int, device: torch.device):
        self._raised = torch.zeros(layers, dtype=torch.int32, device=device)

    @property
    def device(self) -> torch.device:
        return self._raised.device

    def check(self, layer: int, out: torch.Tensor) -> None:
        """Raise layer's flag when ``out`` holds a non-finite value. No host sync; one read of ``out``.

        The sum is non-finite whenever an element is; a finite tensor whose float32 sum overflows is flagged
        too, which costs a dense repeat, never a missed fault.
        """
        total = out.sum(dtype=torch.float32)
        self._raised[layer] |= (~torch.isfinite(total)).to(torch.int32)

    def read(self, group: Any = None) -> list[int]:
        """Layers whose flag is raised, on any rank of a process ``group``. The one host sync of a forward."""
        if group is not None:
            torch.distributed.all_reduce(self._raised, torch.distributed.ReduceOp.MAX, group=group)
        return torch.nonzero(self._raised).flatten().tolist()

    def clear(self) -> None:
        self._raised.zero_()
