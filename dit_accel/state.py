"""State: what methods keep between calls, and the plans that a layout alone determines."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .step import Step


class State:
    """Memory of one user of the attention layer (an engine, or a caller of :func:`dit_accel.attend`).

    Two stores, both emptied by dropping the object: ``plans`` holds what depends on static keys only (method,
    layout, device); ``slots`` holds what a method saw during a run, keyed (run, branch, layer), so that a
    skipped layer, a missing guidance branch or an interrupted run never leaves anything stale behind.
    """

    def __init__(self) -> None:
        self._plans: dict[Hashable, Any] = {}
        self._slots: dict[tuple[int, str, int], dict[Hashable, Any]] = {}

    def plan(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """The cached value of ``key``, built on first use, so that it serves every later call: with gradients too."""
        if key not in self._plans:
            with torch.inference_mode(False):
                self._plans[key] = build()
        return self._plans[key]

    def slot(self, step: Step, layer: int) -> dict[Hashable, Any]:
        """What the method kept for this run, branch and layer; a new, empty dict on first use."""
        return self._slots.setdefault((step.run, step.branch, layer), {})

    def close_run(self, run: int) -> None:
        """Forget everything kept for ``run`` and for every earlier one."""
        self._slots = {key: value for key, value in self._slots.items() if key[0] > run}

    def bytes(self) -> dict[int, int]:
        """Bytes that methods keep, by layer, over all runs and branches: tensors and whatever has ``bytes()``.

        Plans that follow from the layout are not counted.
        """
        held: dict[int, int] = {}
        for (_, _, layer), slot in self._slots.items():
            held[layer] = held.get(layer, 0) + sum(map(_bytes, slot.values()))
        return held

    def __len__(self) -> int:
        return len(self._slots)


def _bytes(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) else value.bytes() if hasattr(value, "bytes") else 0
