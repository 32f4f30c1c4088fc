"""Products of two parameters of which a part runs by default and the rest is ``slow``."""

from collections.abc import Callable, Iterable

import pytest


def diagonal(
    first: Iterable, second: Iterable, *, step: int = 2, also: Callable[[object, object], bool] = lambda a, b: False
) -> list:
    """All pairs, for ``parametrize``: every ``step``-th diagonal and those of ``also`` by default, the others slow.

    Each value of either side comes at least once among the defaults, or this raises.
    """
    first, second = list(first), list(second)
    chosen = {
        (i, j) for i, a in enumerate(first) for j, b in enumerate(second) if (i + j) % step == 0 or also(a, b)
    }  # fmt: skip
    if {i for i, _ in chosen} != set(range(len(first))) or {j for _, j in chosen} != set(range(len(second))):
        raise ValueError(
            f"diagonals {step} apart leave values of {len(first)} x {len(second)} out; take a smaller step"
        )
    return [
        pytest.param(a, b, marks=[] if (i, j) in chosen else pytest.mark.slow)
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]
