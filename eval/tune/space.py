"""The settings that tuning chooses from: method, density, dense steps, dense layer groups, quantised products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...pipelines.acceleration import Acceleration
from ..method_spec import PARAMETERS

DENSITIES = (0.4, 0.3, 0.2, 0.12)
# The published rule leaves the first quarter dense.
DENSE_STEPS = (0.0, 0.25)
GROUPS = ("early", "middle", "late")


@dataclass(frozen=True)
class Setting:
    """One way to run attention.

    ``density``: kept fraction. ``dense_steps``: leading part of the run that stays dense. ``dense_layers``: indices of
    the layers that stay dense, neither sparse nor quantised. ``quant``: a preset's name.
    """

    method: str
    density: float
    dense_steps: float = 0.0
    dense_layers: tuple[int, ...] = ()
    quant: str | None = None

    @property
    def name(self) -> str:
        """``"pisa@0.25+sage2 steps=0.25 layers=0,1"``; unique."""
        parts = [f"{self.method}@{self.density:g}" + (f"+{self.quant}" if self.quant else "")]
        parts += [f"steps={self.dense_steps:g}"] if self.dense_steps else []
        parts += [f"layers={','.join(map(str, self.dense_layers))}"] if self.dense_layers else []
        return " ".join(parts)

    @property
    def line(self) -> tuple[Any, ...]:
        """What this setting shares with those that differ in density alone."""
        return self.method, self.dense_steps, self.dense_layers, self.quant

    def acceleration(self, plan_file: Callable[[float], Path]) -> Acceleration:
        """As ``dit-accel render`` is told. ``plan_file``: PARO's plan at a density, which brings its density."""
        parameters, density = dict(PARAMETERS.get(self.method, {})), self.density
        if self.method == "paro":
            parameters, density = {"plan_file": str(plan_file(self.density))}, None
        return Acceleration(
            self.method,
            density,
            dense_steps=self.dense_steps,
            dense_layers=frozenset(self.dense_layers) if self.dense_layers else None,
            parameters=parameters,
            quant=self.quant,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"dense_layers": list(self.dense_layers)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Setting:
        return cls(**{**data, "dense_layers": tuple(data["dense_layers"])})


def layer_groups(layers: int) -> dict[str, tuple[int, ...]]:
    """The model's layers as three groups of neighbours, as even as they go. Fewer than three layers have none."""
    if layers < len(GROUPS):
        return {}
    cuts = [round(i * layers / len(GROUPS)) for i in range(len(GROUPS) + 1)]
    return {name: tuple(range(cuts[i], cuts[i + 1])) for i, name in enumerate(GROUPS)}


def settings(
    methods: Iterable[str],
    *,
    densities: Sequence[float] = DENSITIES,
    dense_steps: Sequence[float] = DENSE_STEPS,
    dense_layers: Sequence[tuple[int, ...]] = ((),),
    quants: Sequence[str | None] = (None,),
) -> list[Setting]:
    """All combinations, densities innermost."""
    return [
        Setting(method, density, first, tuple(layers), quant)
        for method in methods
        for first in dense_steps
        for layers in dense_layers
        for quant in quants
        for density in densities
    ]
