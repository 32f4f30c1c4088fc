"""Schedule: which steps and layers run dense. Composes with every method."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from .checks import known_fields, plain, several, whole
from .errors import UsageError
from .step import Step


@dataclass(frozen=True)
class Schedule:
    """Which attention calls stay dense.

    ``first`` and ``last``: how many steps at either end, a count (int) or a fraction of the run (float in
    [0, 1), rounded up). ``layers``: how many leading layers (int), or the set of layer indices. ``steps``: further step
    indices. ``table``: explicit ``(step, layer)`` pairs. Steps are global over all denoisers of a run.

    The defaults follow Radial Attention's released scripts and their maintainers' rule of a quarter of the
    steps at a model's native length (radial-attention issue 46).
    """

    first: int | float = 0.25
    last: int | float = 0
    layers: int | frozenset[int] = 0
    steps: frozenset[int] = frozenset()
    table: frozenset[tuple[int, int]] = frozenset()

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            value = plain(given := getattr(self, name))
            if value is None or not (0 <= value <= 1 if isinstance(value, float) else value >= 0):
                raise UsageError(
                    f"Schedule.{name} must be a step count (int >= 0) or a fraction (float in [0, 1]); got {given!r}"
                )
            object.__setattr__(self, name, value)
        count = plain(self.layers)
        if count is None:
            count = _indices("layers", self.layers, "layer indices, or is a count of leading layers")
        elif not isinstance(count, int) or count < 0:
            raise UsageError(f"Schedule.layers must be a count >= 0 or a set of layer indices; got {self.layers!r}")
        object.__setattr__(self, "layers", count)
        object.__setattr__(self, "steps", _indices("steps", self.steps, "step indices, like {0, 20}"))
        what = "pairs of a step and a layer, like {(0, 3), (1, 3)}"
        pairs = (several("Schedule.table", pair, what) for pair in several("Schedule.table", self.table, what))
        table = frozenset(tuple(whole("Schedule.table", i, f"{what}, each", 0) for i in pair) for pair in pairs)
        if any(len(pair) != 2 for pair in table):
            raise UsageError(f"Schedule.table holds {what}; got {self.table!r}")
        object.__setattr__(self, "table", table)

    @classmethod
    def none(cls) -> Schedule:
        """Nothing dense: the method runs on every step and layer."""
        return cls(first=0)

    def is_dense(self, step: Step, layer: int) -> bool:
        """Whether this call runs dense. An unknown ``step.total`` makes fractions and ``last`` count as zero steps."""
        if layer < self.layers if isinstance(self.layers, int) else layer in self.layers:
            return True
        if step.index in self.steps or (step.index, layer) in self.table:
            return True
        if step.index < _steps(self.first, step.total):
            return True
        return step.total is not None and step.index >= step.total - _steps(self.last, step.total)

    def dense_steps(self, total: int) -> list[int]:
        """Indices of the steps on which every layer is dense, for a run of ``total`` steps."""
        probe = _beyond(self)
        return [i for i in range(total) if self.is_dense(Step(index=i, total=total), layer=probe)]

    def to_dict(self) -> dict:
        return {
            "first": self.first,
            "last": self.last,
            "layers": self.layers if isinstance(self.layers, int) else sorted(self.layers),
            "steps": sorted(self.steps),
            "table": sorted(self.table),
        }

    @classmethod
    def from_dict(cls, data: dict) -> Schedule:
        """The inverse of :meth:`to_dict`. Raises ``UsageError`` for a name that is no field."""
        known_fields("Schedule", data, [f.name for f in fields(cls)])
        return cls(**data)


def _indices(name: str, values: Iterable[int], what: str) -> frozenset[int]:
    held = several(f"Schedule.{name}", values, what)
    return frozenset(whole(f"Schedule.{name}", i, f"a set of {what}, each", 0) for i in held)


def _steps(value: int | float, total: int | None) -> int:
    if isinstance(value, float):
        return math.ceil(value * total) if total else 0
    return value


def _beyond(schedule: Schedule) -> int:
    """A layer index that no layer rule of the schedule names."""
    layers: Iterable[int] = range(schedule.layers) if isinstance(schedule.layers, int) else schedule.layers
    return max([*layers, *(layer for _, layer in schedule.table)], default=-1) + 1
