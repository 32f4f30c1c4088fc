"""State: what methods keep between calls, and the plans that a layout alone determines."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from .step import Step


class State:
    """Memory of one user of the attention layer (an engine, or a caller of :func:`dit_accel.attend`).

    Two stores, both emptied by dropping the object: ``plans`` holds what depends on static keys only (method,
    layout, device); ``slots`` holds what a method saw during a run, keyed (run, branch, layer), so that a
    skipped layer, a missing guidance branch or an interrupted run never leaves anything stale behind.
    """

    def __init__(self) -> None:
        self._plans: dict[Hashable, Any] = {}
        self._slots: dict[tuple[int, str, int], dict[str, Any]] = {}

    def plan(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """The cached value of ``key``, built on first use."""
        if key not in self._plans:
            self._plans[key] = build()
        return self._plans[key]

    def slot(self, step: Step, layer: int) -> dict[str, Any]:
        """What the method kept for this run, branch and layer; a new, empty dict on first use."""
        return self._slots.setdefault((step.run, step.branch, layer), {})

    def close_run(self, run: int) -> None:
        """Forget everything kept for ``run`` and for every earlier one."""
        self._slots = {key: value for key, value in self._slots.items() if key[0] > run}

    def __len__(self) -> int:
        return len(self._slots)
