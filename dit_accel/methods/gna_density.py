"""GNA windows for a wanted density."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..layout import Layout
from .tiles import densities
from .windows import Window

# Largest tile side that alignment aims at.
TILE_SIDE = 8
CLOSE, FAR_OFF = 0.1, 0.2


def density_of(windows: Iterable[Window], layout: Layout) -> float:
    """Density on ``layout``, text included, without making a plan."""
    return densities(layout, math.prod(window.axis().pairs for window in windows))[0]


def solve(windows: Sequence[Window], density: float, layout: Layout) -> tuple[list[Window], float]:
    """Windows whose density on ``layout`` is nearest to the wanted one, and that density.

    Windows become length * (size / length) ** t for one t, which leaves axes seen whole as they are. Sizes that keep
    tiles whole are preferred while they come within 10 %; axes seen whole are thinned, from a half on, where all are
    whole or the others miss by more than 20 %.
    """
    half = [replace(w, size=-(-w.length // 2)) if w.size == w.length else w for w in windows]
    thinned = any(w.size < w.length for w in windows)
    best = None
    for start, aligned, tolerance in ((windows, True, CLOSE), (windows, False, FAR_OFF), (half, False, 0)):
        if start is windows and not thinned:
            continue
        allowed = [_sizes(window, aligned) for window in start]
        for choice in _near(start, allowed, density, layout):
            reached = density_of(choice, layout)
            if best is None or abs(reached - density) < abs(best[1] - density):
                best = choice, reached
        if abs(best[1] - density) <= tolerance * density:
            break
    return best


def _sizes(window: Window, aligned: bool) -> list[int]:
    """Sizes that an axis allows, ascending. ``aligned``: their ends fall on tiles that divide the stride."""
    if window.size == window.length:
        return [window.length]
    tile = min(window.stride & -window.stride, TILE_SIDE) if aligned else 1
    most = window.length // window.dilation
    found = list(range(window.stride, most + 1, 2 * tile)) if tile > 1 else list(range(1, most + 1))
    return found if found[-1] == most else [*found, most]


def _resized(window: Window, size: int) -> Window:
    """A window smaller than the stride takes half of itself as stride: neighbouring windows must overlap."""
    return replace(window, size=size, stride=window.stride if size >= window.stride else max(size // 2, 1))


def _near(
    windows: Sequence[Window], allowed: list[list[int]], density: float, layout: Layout
) -> list[list[Window]]:  # fmt: skip
    """Choices around the point where windows of size length * (size / length) ** t cross the density."""

    def at(power: float) -> list[int]:
        wanted = [w.length * (w.size / w.length) ** power for w in windows]
        return [
            min(range(len(sizes)), key=lambda i, x=x, sizes=sizes: abs(sizes[i] - x))
            for sizes, x in zip(allowed, wanted, strict=True)
        ]

    def made(index: Iterable[int]) -> list[Window]:
        return [_resized(w, sizes[i]) for w, sizes, i in zip(windows, allowed, index, strict=True)]

    low, high = 0.0, 256.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if density_of(made(at(middle)), layout) > density else (low, middle)
    around = [
        sorted({i + step for i in pair for step in (-1, 0, 1) if 0 <= i + step < len(sizes)})
        for pair, sizes in zip(zip(at(low), at(high), strict=True), allowed, strict=True)
    ]
    return [made(index) for index in itertools.product(*around)]
