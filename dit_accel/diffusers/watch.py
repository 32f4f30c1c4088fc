"""Watch: the guard at work on one engine. Looks at accelerated outputs and remembers which layers are out of use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..guard import DRIFT, FAULT, NONFINITE, Flags, Guard, drift_of, fault_of, tolerance
from ..kernels.live import without_dead
from ..plans import Plan
from ..quant import Quant
from ..rows import Rows, sample, spread_slots, take
from ..step import Step
from .stats import Stats

_WHAT = {
    NONFINITE: "non-finite attention output",
    FAULT: "attention output that is not its plan's, by {value:.2g} of a row's size where {limit:.2g} is allowed,",
    DRIFT: "attention {value:.2f} off the exact one, over its budget of {limit:.2f},",
}

_HIDDEN = "non-finite attention input that the output does not show"
_TOLD = {FAULT: "attention output that is not its plan's", DRIFT: "drift over its budget", None: "a rank's fault"}


@dataclass(frozen=True)
class Ran:
    """One accelerated call and what it gave: q, k, v and ``out`` as (B, H, N, D), the tokens in the plan's order of
    the caller, ``valid`` int32 (B,) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    plan: Plan
    scale: float | None
    valid: Tensor | None
    quant: Quant | None

    def rows(self, count: int, shift: float) -> tuple[Tensor, Rows]:
        """The output and the reference at ``count`` sampled rows. Rows behind the last live token count as right."""
        slots = spread_slots(self.plan.q_blocks.n, count, shift, self.q.device)
        rows = sample(self.q, self.k, self.v, self.plan, slots, scale=self.scale, kv_valid=self.valid)
        return take(self.out, rows.tokens), rows

    def live(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v with nothing harmful in dead tokens."""
        q = without_dead(self.q, self.q, self.valid)[0] if self.q.shape[2] == self.k.shape[2] else self.q
        return q, *without_dead(self.k, self.v, self.valid)

    def finite(self) -> bool:
        """Whether the live inputs hold no NaN and no Inf. A host sync."""
        return all(bool(torch.isfinite(x).all()) for x in self.live())

    def summed(self) -> Tensor:
        """Scalar: not finite where a live input is not. No host sync."""
        return sum(x.sum(dtype=torch.float32) for x in self.live())


class Watch:
    """``faulty``: layers that run dense until the run ends, since a fault that was seen once would otherwise cost a
    repeat at every step."""

    def __init__(self, guard: Guard, stats: Stats, warn: Callable[[str], None]):
        self.guard = guard
        self.faulty: set[int] = set()
        self._stats = stats
        self._warn = warn
        self._flags: Flags | None = None
        self._met: set[int] = set()

    def begin_run(self) -> None:
        """Trust every layer again, and sample the first call of each."""
        self.faulty.clear()
        self._met.clear()

    @torch.no_grad()
    def look(self, layer: int, step: Step, ran: Ran) -> bool:
        """Check a call without a host sync; whether there is a flag to read."""
        guard, flagged = self.guard, False
        if self._flags is None or self._flags.device != ran.out.device:
            self._flags = Flags(len(self._stats.layers), ran.out.device)
        if guard.nonfinite:
            self._flags.check(layer, ran.out)
            flagged = True
        if not guard.active or (layer in self._met and not guard.due(step, layer)):
            return flagged
        self._met.add(layer)
        if guard.nonfinite:
            # A plan made of inputs that are not finite may leave out the very keys that would show it.
            self._flags.put(NONFINITE, layer, ~torch.isfinite(ran.summed()))
        if not guard.samples:
            return flagged
        for kind, value, limit in self._measured(layer, step, ran):
            if limit is not None:
                self._flags.put(kind, layer, value > limit)
                flagged = True
        return flagged

    @torch.no_grad()
    def passes(self, layer: int, step: Step, ran: Ran, ulysses: Any = None) -> bool:
        """Every check of a call on the spot; a call that fails is told and its layer out of use. Host syncs.

        ``ulysses``: the ranks that share the call and have to decide alike.
        """
        found = self._found(layer, step, ran)
        if ulysses is not None:
            if ulysses.agree(found is None, ran.out.device):
                return True
        elif found is None:
            return True
        self.blame(layer, step, *(found or (None, None, None)))
        return False

    def read(self, group: Any = None) -> dict[int, str]:
        """Layer -> what was raised since the last read. One host sync."""
        self._stats.flag_reads += 1
        raised = self._flags.read(group)
        if raised:
            self._flags.clear()
        return raised

    def forget(self) -> None:
        """Lower every flag unread. No host sync."""
        self._flags.clear()

    def blame(
        self, layer: int, step: Step, kind: str | None, value: float | None = None, limit: float | None = None,
        what: str | None = None,
    ) -> None:  # fmt: skip
        """Name a layer that failed a check and keep it dense until the run ends. ``kind`` None: another rank's find.

        ``what``: other words for it than the usual ones.
        """
        self.faulty.add(layer)
        name = self._stats.layers[layer].name
        event = {"layer": layer, "name": name, "step": step.index, "kind": kind}
        self._stats.guard_events.append(event | ({} if value is None else {"value": value, "limit": limit}))
        what = (
            what or _WHAT[kind].format(value=value, limit=limit)
            if value is not None or kind == NONFINITE
            else _TOLD[kind]
        )
        self._warn(f"guard: {what} at layer {layer} ({name}), step {step.index}; the layer runs dense until the run "
                   "ends")  # fmt: skip

    def _found(self, layer: int, step: Step, ran: Ran) -> tuple | None:
        """The first check that fails, as the last arguments of :meth:`blame`."""
        if self.guard.nonfinite:
            sound = bool(torch.isfinite(ran.out).all())
            # From inputs that are not finite the dense output is no better; what hides them is.
            if sound != ran.finite():
                return (NONFINITE, None, None, _HIDDEN) if sound else (NONFINITE, None, None)
        if self.guard.samples:
            for kind, value, limit in self._measured(layer, step, ran):
                if limit is not None and float(value) > limit:
                    return kind, float(value), limit
        return None

    def _measured(self, layer: int, step: Step, ran: Ran) -> list[tuple[str, Tensor, float | None]]:
        """Kind, value on the device and limit of every check on sampled rows; counts them."""
        guard = self.guard
        out, rows = ran.rows(guard.rows, guard.shift(step, layer))
        measured = []
        if guard.fault:
            measured.append((FAULT, fault_of(out, rows), tolerance(ran.q.dtype, ran.quant)))
        if guard.drift:
            measured.append((DRIFT, drift_of(out, rows), guard.budget_of(layer)))
        self._stats.count_check(layer, measured[-1][1] if guard.drift else None, step.index)
        return measured
