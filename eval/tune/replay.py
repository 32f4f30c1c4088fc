"""Trials of the search on a stored sweep: does the budget hold on prompts it did not see, how good is its choice?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import UsageError
from .bench import SCHEMA, Trial, trial
from .budget import Budget
from .estimate import Estimate
from .search import Rules, meets, search
from .space import Setting

CALIBRATION = 4
# The share of the best feasible choice that a choice may miss.
NEAR = 0.05


@dataclass(frozen=True)
class Stored:
    """A sweep as the search sees it: every setting's trial on every prompt."""

    settings: tuple[Setting, ...]
    prompts: tuple[str, ...]
    trials: dict[tuple[str, int], Trial]

    @classmethod
    def of(cls, document: dict[str, Any]) -> Stored:
        """From the JSON document of a sweep. Raises ``UsageError`` where it is another file, or not finished."""
        if document.get("schema") != SCHEMA or "settings" not in document.get("about", {}):
            raise UsageError("this is no sweep of this version; make one with `python -m dit_accel.eval.sweep -o FILE`")
        about, rows = document["about"], document["rows"]
        settings = tuple(Setting.from_dict(data) for data in about["settings"])
        trials = {(r["setting"], r["prompt"]): trial(rows, i) for i, r in enumerate(rows) if "psnr" in r}
        wanted = {(s.name, p) for s in settings for p in range(len(about["prompts"]))}
        if missing := wanted - trials.keys():
            raise UsageError(
                f"the sweep lacks {len(missing)} of {len(wanted)} renders; continue it with the command that began it"
            )
        return cls(settings, tuple(about["prompts"]), trials)

    def estimate(self, setting: Setting, prompts: Sequence[int]) -> Estimate:
        return Estimate(setting, {p: self.trials[setting.name, p] for p in prompts})


def replay(
    stored: Stored,
    budget: Budget,
    *,
    trials: int = 10,
    calibration: int = CALIBRATION,
    seed: int = 0,
    rules: Rules | None = None,
) -> dict[str, Any]:
    """``trials`` searches, each on its own random ``calibration`` prompts; plain JSON values.

    ``held``: the mean of the choice over the prompts held back meets the budget. ``best``: what a search that knew all
    prompts would choose, the best setting whose mean over all of them meets the budget with the confidence that the
    rules ask for. ``near``: the choice's objective over all prompts is within 5 % of that one's, or above. A search
    that finds nothing is right where there is no best one, and otherwise neither held nor near.
    """
    count = len(stored.prompts)
    if not 2 <= calibration < count:
        raise UsageError(f"a split needs 2 to {count - 1} of {count} prompts for calibration; got {calibration}")
    rules = replace(rules or Rules(), ahead=count - calibration)
    everything = [stored.estimate(s, range(count)) for s in stored.settings]
    fit = [e for e in everything if meets(e, budget, rules)]
    best = max(fit, key=lambda e: e.mean(budget.objective), default=None)
    rows = []
    for number in range(trials):
        order = random.Random(f"{seed} {number}").sample(range(count), count)
        seen, held_back = sorted(order[:calibration]), sorted(order[calibration:])
        found = search(stored.settings, seen, lambda s, p: stored.trials[s.name, p], budget, rules)
        row: dict[str, Any] = {
            "calibration": seen, "held_back": held_back, "measurements": found.measurements,
            "chosen": None, "held": best is None, "near": best is None,
        }  # fmt: skip
        if found.chosen is not None:
            setting = found.chosen.setting
            value = stored.estimate(setting, held_back).mean(budget.metric)
            gain = stored.estimate(setting, range(count)).mean(budget.objective)
            most = best.mean(budget.objective) if best else 0.0
            row |= {
                "chosen": setting.name, budget.metric: value, budget.objective: gain,
                "held": value >= budget.least, "near": gain >= most * (1 - NEAR),
            }  # fmt: skip
        rows.append(row)
    return {
        "budget": str(budget), "trials": rows,
        "held": sum(r["held"] for r in rows), "near": sum(r["near"] for r in rows),
        "best": best and {"setting": best.setting.name, **{m: best.mean(m) for m in ("psnr", "speed")}},
        "measurements_of_a_full_sweep": len(stored.settings) * calibration,
    }  # fmt: skip
