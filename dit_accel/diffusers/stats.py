"""Stats: what an engine counted, per layer and over the run."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout
from ..plans import Plan
from .by_step import Cell

# Dense on purpose; every other reason is a fallback. "method": its own dense steps; "guide": FreeSwim's full path.
INTENDED = frozenset({"schedule", "method", "baseline", "cross", "guide"})


@dataclass
class LayerStats:
    """One attention site. ``dense``: calls by reason. ``tiers``: sparse calls by execution tier.

    ``layout``: of the tokens of the last call that was understood. ``tier_reason``: why the last tier was chosen.
    ``last``: what the last call did, ``"sparse"`` or the dense reason. ``checks``: calls whose rows the guard sampled.
    ``steps``: the same by index of the denoising step.
    """

    name: str
    kind: str
    dense: Counter[str] = field(default_factory=Counter)
    tiers: Counter[str] = field(default_factory=Counter)
    tier_reason: str = ""
    last: str = ""
    layout: Layout | None = None
    checks: int = 0
    steps: dict[int, Cell] = field(default_factory=dict)
    _drift: Tensor | None = None
    _kept: Plan | Tensor | None = None

    @property
    def sparse(self) -> int:
        """Calls that ran the method."""
        return self.tiers.total()

    @property
    def fallback(self) -> int:
        """Dense calls that were not meant to be dense."""
        return sum(n for reason, n in self.dense.items() if reason not in INTENDED)

    @property
    def drift(self) -> dict[str, float] | None:
        """``mean`` and ``max`` relative error against exact attention over the calls sampled for it, or None."""
        if self._drift is None:
            return None
        total, most, calls = self._drift.tolist()
        return {"mean": total / calls, "max": most} if calls else None

    @property
    def density(self) -> float | None:
        """Kept fraction of the last sparse call, or None before the first."""
        return None if self._kept is None else _density(self._kept)


class Stats:
    """Counters of one engine since it was attached or reset.

    ``forwards``: transformer forwards; ``repeats``: those that the guard ran again; ``flag_reads``: host syncs
    of the guard. ``guard_events``: one per layer taken out of use, ``{"layer", "name", "step", "kind"}`` and the
    ``value`` that passed its ``limit``. ``warnings``: each once.
    ``timing``: set it to measure attention calls, dense ones too.
    """

    def __init__(self, sites: list[tuple[str, str]]):
        self._sites = sites
        self.timing = False
        self.reset()

    def reset(self) -> None:
        """Start counting afresh; ``timing`` stays as it is."""
        self.layers = [LayerStats(name, kind) for name, kind in self._sites]
        self.forwards = self.repeats = self.flag_reads = 0
        self.guard_events: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self._pairs = self._dense_pairs = 0
        # Pairs computed under each plan. A static plan recurs, so there are few; their densities are read once, late.
        self._static: dict[int, tuple[Plan, int]] = {}
        self._dynamic: list[Tensor] = []
        self._seconds: Counter[str] = Counter()
        self._events: list[tuple[str, Any, Any]] = []

    @property
    def sparse(self) -> int:
        return sum(layer.sparse for layer in self.layers)

    @property
    def fallback(self) -> int:
        return sum(layer.fallback for layer in self.layers)

    @property
    def dense(self) -> dict[str, int]:
        """Dense calls by reason."""
        return dict(sum((layer.dense for layer in self.layers), Counter()))

    @property
    def tiers(self) -> dict[str, int]:
        """Sparse calls by execution tier."""
        return dict(sum((layer.tiers for layer in self.layers), Counter()))

    @property
    def checks(self) -> int:
        """Calls whose rows the guard sampled."""
        return sum(layer.checks for layer in self.layers)

    @property
    def drift(self) -> dict[str, float] | None:
        """Mean over the layers sampled for drift and the largest of any call, or None."""
        return drift_over(self.layers)

    @property
    def density(self) -> float | None:
        """Mean kept fraction over the layers that ran sparse, as of their last call."""
        values = [layer.density for layer in self.layers if layer.density is not None]
        return sum(values) / len(values) if values else None

    @property
    def effective_density(self) -> float | None:
        """Kept query-key pairs over all pairs of the calls counted, dense steps and layers included."""
        kept = self._dense_pairs + sum(plan.density * pairs for plan, pairs in self._static.values())
        kept += sum(float(pairs) for pairs in self._dynamic)
        return kept / self._pairs if self._pairs else None

    @property
    def attention_seconds(self) -> float | None:
        """Seconds inside attention calls, or None when ``timing`` is off. Waits until the GPU is through with them."""
        return self._spent("attention")

    @property
    def planning_seconds(self) -> float | None:
        """The part of ``attention_seconds`` that made plans, or None when ``timing`` is off."""
        return self._spent("planning")

    def _spent(self, what: str) -> float | None:
        if not self.timing:
            return None
        if self._events:
            for name, start, end in self._events:
                end.synchronize()
                self._seconds[name] += start.elapsed_time(end) / 1e3
            self._events.clear()
        return float(self._seconds[what])

    def count_dense(self, layer: int, reason: str, pairs: int, step: int) -> None:
        entry = self.layers[layer]
        entry.steps.setdefault(step, Cell()).add_dense()
        entry.dense[reason] += 1
        entry.last = reason
        self._pairs += pairs
        self._dense_pairs += pairs

    def count_sparse(self, layer: int, plan: Plan, static: bool, tier: str, reason: str, pairs: int, step: int) -> None:
        entry = self.layers[layer]
        cell = entry.steps.setdefault(step, Cell())
        entry.tiers[tier] += 1
        entry.tier_reason, entry.last = reason, "sparse"
        self._pairs += pairs
        if static:
            entry._kept = plan
            cell.add(plan)
            self._static[id(plan)] = plan, self._static.get(id(plan), (plan, 0))[1] + pairs
            return
        entry._kept = _visited(plan)
        cell.add(entry._kept)
        if not self._dynamic:
            self._dynamic.append(_zeros((), torch.float64, plan.device))
        self._dynamic[0] += entry._kept * pairs

    def count_check(self, layer: int, drift: Tensor | None, step: int) -> None:
        """A call was sampled; ``drift``: its scalar on the device, where that was measured. No host sync."""
        entry = self.layers[layer]
        entry.checks += 1
        if drift is None:
            return
        entry.steps.setdefault(step, Cell()).add_drift(drift)
        if entry._drift is None or entry._drift.device != drift.device:
            entry._drift = _zeros((3,), torch.float32, drift.device)
        known = drift.isfinite()
        value = torch.where(known, drift, 0).float()
        entry._drift[0] += value
        entry._drift[1] = torch.maximum(entry._drift[1], value)
        entry._drift[2] += known

    @contextlib.contextmanager
    def timed(self, what: str, device: torch.device) -> Iterator[None]:
        """Adds the time spent inside to ``what``, where ``timing`` is on. Does not wait for the device."""
        if not self.timing:
            yield
        elif device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # An event is recorded on the current device's stream, which is not where a second GPU's model runs.
            with torch.cuda.device(device):
                start.record()
            yield
            with torch.cuda.device(device):
                end.record()
            self._events.append((what, start, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds[what] += time.perf_counter() - start

    def to_dict(self) -> dict[str, Any]:
        return {
            "forwards": self.forwards,
            "repeats": self.repeats,
            "flag_reads": self.flag_reads,
            "sparse_calls": self.sparse,
            "dense_calls": self.dense,
            "fallback_calls": self.fallback,
            "tiers": self.tiers,
            "density": self.density,
            "effective_density": self.effective_density,
            "attention_seconds": self.attention_seconds,
            "planning_seconds": self.planning_seconds,
            "guard_checks": self.checks,
            "drift": self.drift,
            "guard_events": list(self.guard_events),
            "warnings": list(self.warnings),
        }


def drift_over(layers: Iterable[LayerStats]) -> dict[str, float] | None:
    """Mean over the layers sampled for drift and the largest of any call, or None."""
    found = [drift for drift in (layer.drift for layer in layers) if drift]
    if not found:
        return None
    return {"mean": sum(one["mean"] for one in found) / len(found), "max": max(one["max"] for one in found)}


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What forwards add to. Made in inference mode, it could be added to in no other."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)


def _visited(plan: Plan) -> Tensor:
    """float64 scalar on the plan's device: visited share of the pairs, by blocks, without a host sync.

    A representative counts as one key, as in :attr:`Plan.density`.
    """
    lists = [entry for entry in (plan.full, plan.partial) if entry is not None]
    exact = sum(entry.count.to(torch.float64).mean() for entry in lists) / plan.k_blocks.count
    reps = sum(group.seen.count.to(torch.float64).mean() * group.width for group in plan.reps)
    return exact + reps / plan.k_blocks.n


def _density(kept: Plan | Tensor) -> float:
    return float(kept) if isinstance(kept, Tensor) else kept.density
