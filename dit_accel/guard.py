"""Guard: run-time checks of the attention output, with an announced dense fallback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .checks import flag, known_fields, number, several, whole
from .errors import UsageError
from .kernels.quant.recipe import Recipe
from .rows import Rows
from .step import Step

NONFINITE, FAULT, DRIFT = KINDS = ("nonfinite", "fault", "drift")
# How far a row of a right kernel may be from the reference, as a share of the row's size: four times and more what the
# tests see of any method. Quantised products add their own rounding.
_EXACT = {torch.float64: 0.01, torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.05}
_QK = {None: 0.0, "int8": 0.1, "int4": 1.0}
_PV = {None: 0.0, "fp16": 0.02, "fp8": 0.1, "int8": 0.1}


@dataclass(frozen=True)
class Guard:
    """Which checks run on accelerated calls, and how often. Frozen, hashable, picklable.

    ``nonfinite``: any NaN or Inf in an output; every call. ``fault``: the kernel against the reference of the same plan
    on ``rows`` sampled query rows. ``drift``: the same rows against exact attention, measured, and over ``budget`` a
    reason to run the layer dense: the relative error ||o - exact|| / ||exact|| that a layer may have, one figure or
    one for each layer. ``rate``: share of the calls whose rows are sampled, evenly over steps and layers, besides the
    first call of each layer in a run.

    Flags gather on the device; the engine reads them once per transformer forward and repeats that forward with the
    named layers dense. Raises ``UsageError`` for values that cannot be.
    """

    nonfinite: bool = True
    fault: bool = True
    drift: bool = False
    rate: float = 1 / 32
    rows: int = 16
    budget: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in KINDS:
            object.__setattr__(self, name, flag(f"Guard: {name}", getattr(self, name)))
        rate = number("Guard: rate", self.rate, "a share of the calls in (0, 1]", 0, 1, above=True)
        object.__setattr__(self, "rate", rate)
        object.__setattr__(self, "rows", whole("Guard: rows", self.rows, "a number of query rows", 2))
        if self.budget is None:
            return
        if not self.drift:
            raise UsageError("Guard: budget is for drift, which is not measured; set drift=True")
        what = "a relative error above 0, one or one per layer"
        many = isinstance(self.budget, Iterable)
        given = several("Guard: budget", self.budget, what) if many else (self.budget,)
        budgets = tuple(number("Guard: budget", one, what, 0, above=True) for one in given)
        if not budgets:
            raise UsageError(f"Guard: budget is {what}; got none")
        object.__setattr__(self, "budget", budgets if many else budgets[0])

    @classmethod
    def off(cls) -> Guard:
        """No check at all."""
        return cls(nonfinite=False, fault=False)

    @property
    def active(self) -> bool:
        return self.nonfinite or self.samples

    @property
    def samples(self) -> bool:
        """Whether any check looks at sampled rows."""
        return self.fault or self.drift

    def due(self, step: Step, layer: int) -> bool:
        """Whether the rows of this call are sampled by the rate; the same for equal steps and layers."""
        return (layer + step.index) % max(1, round(1 / self.rate)) == 0

    def shift(self, step: Step, layer: int) -> float:
        """In [0, 1): where the sampled rows of this call lie. The same for equal steps and layers."""
        return (0.7548776662466927 * step.index + 0.5698402909980532 * layer) % 1

    def budget_of(self, layer: int) -> float | None:
        """The drift that ``layer`` may have. A list that is too short ends in its last figure."""
        if self.budget is None:
            return None
        budgets = self._budgets()
        return budgets[min(layer, len(budgets) - 1)]

    def _budgets(self) -> tuple[float, ...]:
        return self.budget if isinstance(self.budget, tuple) else (self.budget,)

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        return data | {"budget": list(self.budget)} if isinstance(self.budget, tuple) else data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Guard:
        """The inverse of :meth:`to_dict`. Raises ``UsageError`` for a name that is no field."""
        known_fields("Guard", data, [f.name for f in fields(cls)])
        return cls(**data)


def tolerance(dtype: torch.dtype, quant: Recipe | None = None) -> float:
    """The share of its size by which a row of a right kernel may miss the reference, inputs of ``dtype``."""
    rounding = _EXACT.get(dtype, _EXACT[torch.bfloat16])
    return rounding if quant is None else rounding + _QK[quant.qk] + _PV[quant.pv]


def fault_of(out: Tensor, rows: Rows) -> Tensor:
    """Scalar: the worst row's error as a share of its size. ``out`` (B, H, R, Dv): what the kernel gave.

    Inf where one of the two rows is finite and the other is not; 0 where neither is.
    """
    error = (out.to(rows.planned.dtype) - rows.planned).square().sum(-1).sqrt()
    share = torch.where(error == 0, 0.0, error / rows.size)
    share = torch.where(share.isfinite(), share, torch.inf)
    neither = ~(rows.planned.isfinite().all(-1) | out.isfinite().all(-1))
    return torch.where(neither, 0.0, share).amax()


def drift_of(out: Tensor, rows: Rows) -> Tensor:
    """Scalar: ||out - exact|| / ||exact|| over all sampled rows and heads. NaN where either is not finite."""
    exact = rows.exact
    return ((out.to(exact.dtype) - exact).square().sum() / exact.square().sum().clamp_min(1e-30)).sqrt()


class Flags:
    """What the checks of one forward found, kept on the device: a flag per kind and layer, read with one transfer."""

    def __init__(self, layers: int, device: torch.device):
        # Flags outlive the forward that made them: one made in inference mode could be raised in no other.
        with torch.inference_mode(False):
            self._raised = torch.zeros((len(KINDS), layers), dtype=torch.int32, device=device)

    @property
    def device(self) -> torch.device:
        return self._raised.device

    def check(self, layer: int, out: Tensor) -> None:
        """Raise layer's flag when ``out`` holds a non-finite value. No host sync; one read of ``out``.

        The sum is non-finite whenever an element is; a finite tensor whose float32 sum overflows is flagged
        too, which costs a dense repeat, never a missed fault.
        """
        self.put(NONFINITE, layer, ~torch.isfinite(out.sum(dtype=torch.float32)))

    def put(self, kind: str, layer: int, raised: Tensor) -> None:
        """Raise a flag where the scalar ``raised`` is true. No host sync."""
        self._raised[KINDS.index(kind), layer] |= raised.to(torch.int32)

    def read(self, group: Any = None) -> dict[int, str]:
        """Layer -> the first kind raised, on any rank of a process ``group``. The guard's host sync."""
        if group is not None:
            torch.distributed.all_reduce(self._raised, torch.distributed.ReduceOp.MAX, group=group)
        found: dict[int, str] = {}
        for kind, layers in zip(KINDS, self._raised.tolist(), strict=True):
            for layer, raised in enumerate(layers):
                if raised:
                    found.setdefault(layer, kind)
        return dict(sorted(found.items()))

    def clear(self) -> None:
        self._raised.zero_()
