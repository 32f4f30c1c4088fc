"""The search: which setting meets a budget and is best beyond it, with as few measurements as that takes.

It knows settings, a callback that measures one on one prompt, and nothing of pipelines, so a stored sweep can replay
it. Best first: the setting that could still be the best is measured on its next prompt, until nothing unmeasured can
beat the best one that meets the budget. What a setting can still reach follows from its own trials, or from those of
its line, the same setting at other densities: fewer keys neither come closer to dense nor take longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import DitAccelError
from .bench import Trial
from .budget import Budget
from .estimate import Estimate, front
from .space import Setting

Measure = Callable[[Setting, int], Trial]
EMULATED = "only an emulated tier ran, whose time says nothing (see `dit-accel doctor`)"


@dataclass(frozen=True)
class Rules:
    """``confidence``: with which the budget must hold, in the mean over ``ahead`` further prompts. ``giving_up``:
    confidence with which a setting must be out of reach to be measured no further. ``tolerance``: gain, as a share,
    below which a better setting is not looked for. ``limit``: measurements at most."""

    confidence: float = 0.9
    ahead: int | None = 2
    giving_up: float = 0.8
    tolerance: float = 0.02
    limit: int | None = None


@dataclass(frozen=True)
class Found:
    """``chosen``: None where no setting meets the budget. ``sure``: it does with the confidence that the rules ask for;
    otherwise its mean does, and it is the safest such one. ``nearest``: the measured setting that misses it least.
    ``measured``: all that were, ``front`` those of them seen on every prompt that no other beats in both.
    ``complete``: False where the limit ended the search. ``failed``: why settings could not be measured."""

    chosen: Estimate | None
    sure: bool
    nearest: Estimate
    measured: tuple[Estimate, ...]
    measurements: int
    complete: bool
    prompts: int
    failed: Mapping[Setting, str] = field(default_factory=dict)

    @property
    def front(self) -> list[Estimate]:
        return front([e for e in self.measured if len(e.trials) == self.prompts])


def search(
    settings: Sequence[Setting],
    prompts: Sequence[int],
    measure: Measure,
    budget: Budget,
    rules: Rules | None = None,
    known: Sequence[Estimate] = (),
) -> Found:
    """Search ``settings`` with ``measure(setting, prompt)`` over ``prompts``; ``known`` has been measured before.

    A setting meets the budget when the lower bound of its mean does, after every prompt; where there is none, the one
    of the highest bound is chosen whose mean does. One whose measurement raises ``DitAccelError`` is left out. Raises
    ``DitAccelError`` where none could be timed.
    """
    found = _Search(settings, prompts, measure, budget, rules or Rules())
    found.trials |= {estimate.setting: dict(estimate.trials) for estimate in known}
    return found.run()


def meets(estimate: Estimate, budget: Budget, rules: Rules) -> bool:
    """Whether the lower bound of a setting's mean is within the budget, and it is of use at all."""
    useful = estimate.mean(budget.objective) > budget.floor
    return useful and estimate.of(budget.metric, rules.confidence, rules.ahead).low >= budget.least


class _Search:
    def __init__(
        self, settings: Sequence[Setting], prompts: Sequence[int], measure: Measure, budget: Budget, rules: Rules
    ):
        self.settings, self.prompts, self.measure, self.budget, self.rules = settings, prompts, measure, budget, rules
        self.trials: dict[Setting, dict[int, Trial]] = {}
        self.dropped: dict[Setting, str] = {}
        self.lines: dict[tuple, list[Setting]] = {}
        for setting in sorted(settings, key=lambda s: s.density):
            self.lines.setdefault(setting.line, []).append(setting)

    def run(self) -> Found:
        count, complete = 0, True
        while rivals := self._rivals():
            if self.rules.limit is not None and count >= self.rules.limit:
                complete = False
                break
            setting = min(rivals, key=self._turn)
            prompt = next(p for p in self.prompts if p not in self.trials.get(setting, {}))
            count += 1
            try:
                trial = self.measure(setting, prompt)
            except DitAccelError as error:
                self.dropped[setting] = str(error)
                continue
            if trial.speed is None:
                self.dropped[setting] = EMULATED
            self.trials.setdefault(setting, {})[prompt] = trial
        measured = tuple(self._estimate(s) for s in self.settings if s in self.trials and s not in self.dropped)
        if not measured:
            reasons = "; ".join(dict.fromkeys(self.dropped.values())) or "there is none to search"
            raise DitAccelError(f"no setting could be measured: {reasons}")
        best = self._best()
        nearest = min(measured, key=lambda e: (e.shortfall(self.budget), -self._bound(e)))
        safest = nearest if nearest.shortfall(self.budget) == 0 and self._whole(nearest.setting) else None
        return Found(
            chosen=best or safest, sure=best is not None, nearest=nearest, measured=measured, measurements=count,
            complete=complete, prompts=len(self.prompts), failed=self.dropped,
        )  # fmt: skip

    def _estimate(self, setting: Setting) -> Estimate:
        return Estimate(setting, self.trials[setting])

    def _best(self) -> Estimate | None:
        whole = [self._estimate(s) for s in self.trials if self._whole(s) and s not in self.dropped]
        fit = [e for e in whole if meets(e, self.budget, self.rules)]
        return max(fit, key=lambda e: e.mean(self.budget.objective), default=None)

    def _bound(self, estimate: Estimate) -> float:
        return estimate.of(self.budget.metric, self.rules.confidence, self.rules.ahead).low

    def _whole(self, setting: Setting) -> bool:
        return len(self.trials.get(setting, ())) == len(self.prompts)

    def _rivals(self) -> list[Setting]:
        """Settings not measured on every prompt that may meet the budget and beat the best so far."""
        best = self._best()
        floor = self.budget.floor if best is None else best.mean(self.budget.objective) * (1 + self.rules.tolerance)
        return [
            s
            for s in self.settings
            if s not in self.dropped
            and not self._whole(s)
            and self._reach(s, self.budget.metric) >= self.budget.least
            and self._reach(s, self.budget.objective) > floor
        ]

    def _reach(self, setting: Setting, metric: str) -> float:
        """The most that a setting can plausibly have of a metric."""
        if setting in self.trials:
            return self._estimate(setting).of(metric, self.rules.giving_up).high
        known = [s for s in self.lines[setting.line] if s in self.trials and s not in self.dropped]
        ceilings = []
        for other in known:
            high = self._estimate(other).of(metric, self.rules.giving_up).high
            if metric == "psnr" and other.density >= setting.density:
                ceilings.append(high)
            elif metric == "speed":
                # Even a loop that were nothing but attention could not shrink more than its pairs do.
                ceilings.append(high * max(1.0, other.density / setting.density))
        return min(ceilings, default=math.inf)

    def _turn(self, setting: Setting) -> tuple:
        """Sort key: lines nothing is known of first, at their middle; then what promises most."""
        line = self.lines[setting.line]
        fresh = not any(s in self.trials for s in line)
        middle = abs(line.index(setting) - (len(line) - 1) // 2)
        return not fresh, middle if fresh else 0, -self._reach(setting, self.budget.objective)
