"""What few prompts tell about others: means with bounds, from a spread that few values do not have to show alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from .bench import Trial
from .budget import Budget
from .space import Setting

# Spread between prompts that is assumed before any is seen, worth PRIOR observations: PSNR in dB, speed as a share.
SPREAD = {"psnr": 3.0, "speed": 0.03}
PRIOR = 2


@dataclass(frozen=True)
class Interval:
    """``low`` and ``high``: one-sided bounds, each of the confidence asked for."""

    mean: float
    low: float
    high: float


def quantile(confidence: float, freedom: float) -> float:
    """Student's t quantile by Cornish and Fisher's expansion; right to 1 % from 2 degrees of freedom on at 0.9."""
    z = NormalDist().inv_cdf(confidence)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def interval(values: list[float], metric: str, confidence: float, ahead: int | None = None) -> Interval:
    """Mean of ``metric`` with bounds on its mean over all prompts like these, or over ``ahead`` further ones.

    Speeds are averaged as logarithms, since they are ratios. The variance is that of the values, pooled with the prior.
    """
    scaled = [math.log(v) for v in values] if metric == "speed" else values
    n, mean = len(scaled), math.fsum(scaled) / len(scaled)
    freedom = PRIOR + n - 1
    variance = (PRIOR * SPREAD[metric] ** 2 + math.fsum((v - mean) ** 2 for v in scaled)) / freedom
    half = quantile(confidence, freedom) * math.sqrt(variance * (1 / n + (1 / ahead if ahead else 0)))
    ends = mean, mean - half, mean + half
    return Interval(*(map(math.exp, ends) if metric == "speed" else ends))


@dataclass(frozen=True)
class Estimate:
    """A setting and its trials by prompt; at least one."""

    setting: Setting
    trials: Mapping[int, Trial]

    def of(self, metric: str, confidence: float, ahead: int | None = None) -> Interval:
        """See :func:`interval`."""
        return interval([getattr(trial, metric) for trial in self.trials.values()], metric, confidence, ahead)

    def mean(self, metric: str) -> float:
        """Arithmetic for PSNR, geometric for speed."""
        return self.of(metric, 0.9).mean

    def shortfall(self, budget: Budget) -> float:
        """How far the mean is below the budget, as a share of it; what is of no use counts as far below."""
        useless = self.mean(budget.objective) <= budget.floor
        return useless + max(0.0, 1 - self.mean(budget.metric) / budget.least)


def front(estimates: list[Estimate]) -> list[Estimate]:
    """Those that no other beats in both means, fastest first."""
    ordered = sorted(estimates, key=lambda e: (-e.mean("speed"), -e.mean("psnr")))
    best, kept = -math.inf, []
    for estimate in ordered:
        if estimate.mean("psnr") > best:
            best = estimate.mean("psnr")
            kept.append(estimate)
    return kept
