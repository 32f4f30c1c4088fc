"""What a few values say about all prompts: the mean, and a 95 % bootstrap interval where there are enough of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

DRAWS = 10_000
# Fewer prompts than this get no interval: its ends would be two of their values.
ENOUGH = 5


def bootstrap(
    values: Sequence[float], groups: Sequence[Hashable] | None = None, *, level: float = 0.95, draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """Percentile interval of the mean of ``values`` at ``level``.

    ``groups``: what each value belongs to, its prompt. Groups are drawn whole: two seeds of a prompt are alike, and
    counting them as two prompts would make every interval too narrow.
    """
    data = np.asarray(values, float)
    _, index = np.unique(range(len(data)) if groups is None else [repr(g) for g in groups], return_inverse=True)
    sums, counts = np.bincount(index, data), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [50 * (1 - level), 100 - 50 * (1 - level)])
    return float(low), float(high)


def interval(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """``mean`` with ``low`` and ``high``, or with the ``values`` themselves where there are fewer than five groups."""
    found: dict[str, Any] = {"mean": float(np.mean(values))}
    if len(values if groups is None else set(groups)) < ENOUGH:
        return found | {"values": [float(value) for value in values]}
    low, high = bootstrap(values, groups)
    return found | {"low": low, "high": high}


def spread(one: dict[str, Any], form: str = ".3f") -> str:
    """What stands in a column of intervals: ``"0.811 to 0.910"``, or ``"no interval: 0.5, 1.0"``."""
    if "low" in one:
        return f"{one['low']:{form}} to {one['high']:{form}}"
    return f"no interval: {', '.join(format(value, form) for value in one.get('values', ()))}"
