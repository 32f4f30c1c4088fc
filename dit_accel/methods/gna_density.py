"""GNA windows for a wanted density."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..layout import Layout
from .tile_shapes import choose, counter
from .tiles import densities
from .windows import Window

CLOSE, FAR_OFF = 0.1, 0.2
# Sizes looked at on either side of the proportional one, for one that keeps tiles of these sides whole.
REACH, SIDES = 12, (2, 4, 8)
# Below this a window is no neighbourhood.
SMALLEST = 3


def density_of(windows: Iterable[Window], layout: Layout) -> float:
    """Density on ``layout``, text included, without making a plan."""
    return densities(layout, math.prod(_axis(window).pairs for window in windows))[0]


def solve(windows: Sequence[Window], density: float, layout: Layout) -> tuple[Sequence[Window], float]:
    """Windows near the wanted density on ``layout`` whose tiles waste least, and the density they have.

    Windows become length * (size / length) ** t for the t that meets the density, which leaves axes seen whole as
    they are; these are thinned too, from a half on, where all are whole or the others miss by more than 20 %.
    Around that point, of the sizes within 10 % of the density those are taken that keep most tiles whole.
    """
    half = [replace(w, size=-(-w.length // 2)) if w.size == w.length else w for w in windows]
    starts = [windows, half] if any(w.size < w.length for w in windows) else [half]
    best = None
    for start in starts:
        found = _solve(start, density, layout)
        if best is None or abs(found[1] - density) < abs(best[1] - density):
            best = found
        if abs(best[1] - density) <= FAR_OFF * density:
            break
    return best


def _solve(windows: Sequence[Window], density: float, layout: Layout) -> tuple[Sequence[Window], float]:
    def at(power: float) -> list[Window]:
        return [_resized(w, round(w.length * (w.size / w.length) ** power)) for w in windows]

    low, high = 0.0, 256.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if density_of(at(middle), layout) > density else (low, middle)
    ends = zip(windows, at(low), at(high), strict=True)
    choices = [(density_of(c, layout), c) for c in itertools.product(*(_around(*end) for end in ends))]
    close = [choice for choice in choices if abs(choice[0] - density) <= CLOSE * density]
    if not close:
        reached, chosen = min(choices, key=lambda choice: abs(choice[0] - density))
    else:
        reached, chosen = min(close, key=lambda choice: _waste(choice[1]) * (1 + abs(choice[0] / density - 1)))
    return chosen, reached


def _around(window: Window, upper: Window, lower: Window) -> list[Window]:
    """Windows near those on both sides of the crossing, and the nearest whose ends keep tiles whole."""
    if window.size == window.length:
        return [window]
    sizes = {w.size + step for w in (upper, lower) for step in (-1, 0, 1)}
    if abs(window.size - upper.size) <= REACH:
        sizes.add(window.size)
    for side in SIDES:
        for steps in (range(REACH + 1), range(-1, -REACH - 1, -1)):
            exact = (step for step in steps if _exact(_resized(window, upper.size + step), side))
            sizes |= {upper.size + step for step in itertools.islice(exact, 1)}
    return sorted({_resized(window, size) for size in sizes}, key=lambda w: w.size)


def _resized(window: Window, size: int) -> Window:
    """``window`` with the nearest possible size. One smaller than the stride takes half of itself as stride:
    neighbouring windows must overlap."""
    most = window.length // window.dilation
    size = max(min(size, most), min(SMALLEST, most))
    return replace(window, size=size, stride=window.stride if size >= window.stride else max(size // 2, 1))


def _waste(windows: Sequence[Window]) -> float:
    """Expected time of the best tiling over that of the visible pairs alone."""
    extent = tuple(w.length for w in windows)
    return choose([_counter(w) for w in windows], extent)[0] / math.prod(_axis(w).pairs for w in windows)


def _exact(window: Window, side: int) -> bool:
    seen, whole = _counter(window)(min(side, window.length))
    return seen == whole


@functools.lru_cache(maxsize=1024)
def _axis(window: Window):
    return window.axis()


@functools.lru_cache(maxsize=1024)
def _counter(window: Window):
    return counter(_axis(window))
