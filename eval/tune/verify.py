"""From what short runs on some prompts said to a choice that full runs on other prompts confirm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .budget import Budget
from .estimate import Estimate
from .search import Found, Rules
from .space import Setting

Confirm = Callable[[Setting], Estimate]


@dataclass(frozen=True)
class Verdict:
    """``chosen``: the best confirmed setting, its trials from full runs, or None. ``confirmed``: all that were run in
    full, in that order. ``shift``: what full runs added to the budget's metric, in the mean."""

    chosen: Estimate | None
    confirmed: tuple[Estimate, ...]
    shift: float

    def nearest(self, budget: Budget) -> Estimate:
        return min(self.confirmed, key=lambda e: (e.shortfall(budget), -e.mean(budget.objective)))


def verify(found: Found, confirm: Confirm, budget: Budget, rules: Rules, rounds: int) -> Verdict:
    """Run up to ``rounds`` settings in full with ``confirm`` and return the best that meets the budget there.

    The first is the search's choice, or the nearest one. What full runs differ by from short ones then corrects the
    search's estimates: the next is the best setting that the corrected bounds allow, which may be a bolder one where
    the budget held, or a safer one where it did not.
    """
    confirmed: list[Estimate] = []
    short = {e.setting: e for e in found.measured}
    candidate: Estimate | None = found.chosen or found.nearest
    while candidate is not None and len(confirmed) < rounds:
        confirmed.append(confirm(candidate.setting))
        shift = _shift(confirmed, short, budget)
        candidate = _next(list(short.values()), confirmed, budget, rules, shift)
    return Verdict(_best(confirmed, budget), tuple(confirmed), _shift(confirmed, short, budget))


def _best(confirmed: Sequence[Estimate], budget: Budget) -> Estimate | None:
    fit = [e for e in confirmed if e.shortfall(budget) == 0]
    return max(fit, key=lambda e: e.mean(budget.objective), default=None)


def _shift(confirmed: Sequence[Estimate], short: dict[Setting, Estimate], budget: Budget) -> float:
    gains = [e.mean(budget.metric) - short[e.setting].mean(budget.metric) for e in confirmed]
    return sum(gains) / len(gains)


def _next(
    short: list[Estimate], confirmed: list[Estimate], budget: Budget, rules: Rules, shift: float
) -> Estimate | None:
    """The setting to run next, or None where none promises more."""
    best, tried = _best(confirmed, budget), {e.setting for e in confirmed}
    # Short and full runs measure the objective on scales of their own, so what is best so far is judged by the former.
    reached = next((e.mean(budget.objective) for e in short if best and e.setting == best.setting), None)
    floor = budget.floor if reached is None else reached * (1 + rules.tolerance)
    rest = [e for e in short if e.setting not in tried and e.mean(budget.objective) > floor]
    allowed = [e for e in rest if e.of(budget.metric, rules.confidence, rules.ahead).low + shift >= budget.least]
    if allowed:
        return max(allowed, key=lambda e: e.mean(budget.objective))
    return None if best else max(rest, key=lambda e: e.mean(budget.metric), default=None)
