"""Observe: dense attention that shows the tensors of every call to a listener. For calibration and measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..plans import Plan
from .base import Call, Method
from .testing import AllBlocks

Listener = Callable[[Tensor, Tensor, Tensor, Call], None]


@dataclass(frozen=True, eq=False)
class Observe(Method):
    """Attends to every block and calls ``listener(q, k, v, call)`` first: q (B, H, N, D), k and v (B, Hk, N, D).

    Not in the registry: it has no published parameters and cannot be written to a file.
    """

    static: ClassVar[bool] = False

    listener: Listener
    block_size: int = 128

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        self.listener(q, k, v, call)
        dense = AllBlocks(self.block_size)
        key = (dense, call.layout, call.kv_layout, call.device)
        return call.state.plan(key, lambda: dense.plan(None, None, None, call).to(call.device))

    def to_dict(self) -> dict[str, Any]:
        return {"method": "observe", "block_size": self.block_size}
