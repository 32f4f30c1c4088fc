"""What a method's plans are on a layout, as far as that shows without running the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from .. import cost
from ..errors import DitAccelError
from ..functional import plan as make_plan
from ..layout import Layout
from ..lowering import lower
from ..methods import Call, Method, Paro
from ..methods.paro_file import PlanFile
from ..plans import Plan
from ..step import Step
from .atlas import synthetic_tensors
from .flops import Operations

# Tokens per axis of the grid on which a content-dependent method is tried.
_TRIAL = (5, 12, 12)


@dataclass(frozen=True)
class Probe:
    """A method's plan on the layout, as far as it can be known. ``visited``: share of key tiles visited.

    ``plan`` is that of the layout, ``trial`` one of a smaller grid that shows how a content-dependent plan is built, or
    ``why`` there is none. ``by_layer``: densities where layers differ.
    """

    density: float | None
    source: str
    visited: float | None
    plan: Plan | None = None
    trial: Plan | None = None
    why: str | None = None
    by_layer: dict[int, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, method: Method, layout: Layout, operations: Operations, density: float | None) -> Probe:
        if method.static:
            plan = make_plan(None, None, None, method, layout=layout)
            tiles = cost.plan_cost(plan)
            return cls(plan.density, "the plan itself", tiles.mean / tiles.total, plan)
        if isinstance(method, Paro):
            return cls._calibrated(method, layout, operations)
        trials, why = _try(method, layout, operations.layers)
        known = (
            (density, "what --density reaches; the method decides per call"),
            (getattr(method, "density", None), "the method's density parameter; it decides per call"),
        )
        for value, source in known:
            if value is not None:
                return cls(value, source, value, None, trials[0] if trials else None, why)
        if not trials:
            return cls(None, f"unknown before a run: {why}", None, why=why)
        by_layer = {layer: trial.density for layer, trial in enumerate(trials)}
        mean = sum(by_layer.values()) / len(by_layer)
        source = f"made-up tensors on {trials[0].layout}; it decides per call, give --density for a firmer answer"
        return cls(mean, source, mean, None, trials[0], None, by_layer)

    @classmethod
    def _calibrated(cls, method: Paro, layout: Layout, operations: Operations) -> Probe:
        """A calibrated method's plans are in its file; they read no tensor."""
        file = PlanFile.open(method.plan_file)
        bins = range(file.header.bins)
        by_layer = {
            layer: sum(float(file.map(layer, b).double().mean()) for b in bins) / len(bins)
            for layer in file.header.layers
        }
        call = Call(layout, layer=file.header.layers[0])
        trial = method.plan(torch.empty((1, operations.heads, 0, 1)), None, None, call)
        mean = file.header.reached
        return cls(mean, "the plan file", mean, None, trial, None, by_layer)

    @property
    def padding(self) -> dict[str, Any] | None:
        """Slots that the kernel tiles add to the sequence."""
        if self.plan is None:
            return None
        tiles = lower(self.plan)
        whole = -(-tiles.n_k // tiles.tile_k) * tiles.tile_k
        return {"tile": [tiles.tile_q, tiles.tile_k], "slots": whole, "share": whole / self.plan.k_blocks.n - 1}

    @property
    def tables(self) -> int | None:
        """Bytes of the tables of plans that are kept, of all layers; None where a plan is made for every call."""
        if self.plan is not None:
            return _bytes(self.plan)
        return _bytes(self.trial) * len(self.by_layer) if self.trial is not None and self.trial.kept else None


def _try(method: Method, layout: Layout, layers: int) -> tuple[list[Plan], str | None]:
    """A plan per layer that shows what a content-dependent method does, or why there is none.

    Made-up tensors on a small grid, at a step in the middle of a run, past those on which a method may be dense.
    """
    grid = tuple(min(n, limit) for n, limit in zip(layout.grid, _TRIAL, strict=True))
    small = Layout(grid=grid, text=min(layout.text, 8))
    # Two heads that differ, so that a plan which may differ by head shows it.
    two = [synthetic_tensors(small, seed) for seed in (0, 1)]
    q, k, v = (torch.cat(part, 1) for part in zip(*two, strict=True))
    step = Step(index=12, total=50)
    try:
        plans = [make_plan(q, k, v, method, layout=small, step=step, layer=layer) for layer in range(layers)]
    except (DitAccelError, ValueError) as error:
        return [], str(error)
    return ([], "the method is dense on the step tried") if None in plans else (plans, None)


def _bytes(plan: Plan) -> int:
    """Of everything a plan keeps: lists, orders, predicate tables."""
    seen = [plan.order, plan.kv_order]
    if plan.predicate is not None:
        seen += [getattr(plan.predicate, f.name) for f in dataclasses.fields(plan.predicate)]
    tensors = {id(x): x for x in seen if isinstance(x, torch.Tensor)}
    return plan.bytes() + sum(x.nbytes for x in tensors.values())
