"""What one layer did at one step: density and drift, summed on the device and read once, late."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..plans import Plan


@dataclass
class Cell:
    """The calls of one layer at one step, both guidance branches and repeats included. Nothing here waits for a GPU."""

    calls: int = 0
    dense: int = 0
    # A static plan recurs, so there are few.
    _plans: dict[int, tuple[Plan, int]] = field(default_factory=dict)
    _kept: Tensor | None = None
    _drift: Tensor | None = None

    def add_dense(self) -> None:
        self.calls += 1
        self.dense += 1

    def add(self, kept: Plan | Tensor) -> None:
        """A sparse call under a static plan, or one whose kept share is a scalar on the device."""
        self.calls += 1
        if isinstance(kept, Tensor):
            self._kept = kept.clone() if self._kept is None else self._kept + kept
        else:
            self._plans[id(kept)] = kept, self._plans.get(id(kept), (kept, 0))[1] + 1

    def add_drift(self, drift: Tensor) -> None:
        """The relative error of a sampled call, a scalar; one that is not finite does not count."""
        known = drift.isfinite()
        seen = torch.stack((torch.where(known, drift, 0).float(), known.float()))
        self._drift = seen if self._drift is None else self._drift + seen.to(self._drift.device)

    @property
    def density(self) -> float | None:
        """Mean kept fraction of the calls, dense ones included; None without a call."""
        if not self.calls:
            return None
        kept = self.dense + sum(plan.density * n for plan, n in self._plans.values())
        return (kept + (0.0 if self._kept is None else float(self._kept))) / self.calls

    @property
    def drift(self) -> float | None:
        """Mean relative error of the sampled calls, None where none was."""
        if self._drift is None:
            return None
        total, calls = self._drift.tolist()
        return total / calls if calls else None


def series(cells: dict[int, Cell], name: str, steps: int) -> list[float | None]:
    """``density`` or ``drift`` of steps 0 to ``steps`` - 1, to four digits; None where there is none."""
    found = [getattr(cells[i], name) if i in cells else None for i in range(steps)]
    return [None if value is None else round(value, 4) for value in found]
