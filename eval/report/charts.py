"""Charts as inline SVG: lines over frames, heat maps, bars, and a scatter of speed against fidelity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .html import Markup, tag

FAINT, GRID = "#66717d", "#dfe3e7"
TOP = 8  # pixels above what is drawn
COLOURS = ("#1f5f8b", "#d7263d", "#2e8b57", "#f2a33c", "#7b4fa3", "#66717d")


def lines(series: Mapping[str, Sequence[float]], *, title: str, x: str, unit: str = "") -> Markup:
    """One line per series over the index of its values."""
    width, height, left, bottom = 430, 190, 46, 34
    values = [v for own in series.values() for v in own]
    low, high = _range(values)
    longest = max(len(own) for own in series.values())
    across, down = width - left - 12, height - bottom - TOP

    def at(index: int, value: float) -> str:
        return f"{left + across * index / max(longest - 1, 1):.1f},{TOP + down * (high - value) / (high - low):.1f}"

    parts = _axes(width, height, left, bottom, low, high, unit)
    parts += [_text(left, height - 8, "0"), _text(left + across, height - 8, longest - 1, "end")]
    parts.append(_text(left + across / 2, height - 8, x, "middle"))
    for (name, own), colour in zip(series.items(), COLOURS * 9, strict=False):
        points = " ".join(at(i, v) for i, v in enumerate(own))
        label = tag("title", f"{name}: mean {sum(own) / len(own):.4g}")
        # A single value would be a line of no length.
        mark = tag("circle", label, cx=points.split(",")[0], cy=points.split(",")[1], r=3, fill=colour)
        line = tag("polyline", label, points=points, fill="none", stroke=colour, stroke_width=1.6)
        parts.append(line if len(own) > 1 else mark)
    return _figure(width, height, title, parts, list(series) if len(series) > 1 else [])


def heat(
    rows: Sequence[Sequence[float | None]],
    *,
    title: str,
    x: str,
    y: Sequence[str],
    scale: tuple[float | None, float | None] = (0.0, None),
) -> Markup:
    """A cell per value, darker where larger, grey where there is none. ``scale``: its ends; None takes the values'."""
    columns = max(len(row) for row in rows)
    left, top, cell = 64, TOP, min(26.0, max(9.0, 380 / columns))
    known = [v for row in rows for v in row if v is not None]
    least = min(known, default=0.0) if scale[0] is None else scale[0]
    most = max(known, default=1.0) if scale[1] is None else scale[1]
    parts = []
    for i, row in enumerate(rows):
        parts.append(_text(left - 6, top + cell * (i + 0.7), y[i], "end"))
        for j, value in enumerate(row):
            share = None if value is None else (value - least) / (most - least or 1)
            told = "not measured" if value is None else f"{value:.4g}"
            parts.append(
                tag("rect", tag("title", f"{y[i]}, {x} {j}: {told}"), x=f"{left + cell * j:.1f}",
                    y=f"{top + cell * i:.1f}", width=f"{cell - 1:.1f}", height=f"{cell - 1:.1f}", fill=_shade(share))
            )  # fmt: skip
    bottom = top + cell * len(rows)
    width = left + cell * columns + 12
    parts += [_text(left, bottom + 14, f"{x} 0"), _text(width - 12, bottom + 14, columns - 1, "end")]
    key = f"{least:.3g} (pale) to {most:.3g} (dark); grey: not measured or dense"
    return _figure(max(width, 430), bottom + 36, title, [*parts, _text(left, bottom + 29, key)], [])


def bars(sides: Mapping[str, Mapping[str, float]], *, title: str) -> Markup:
    """A stacked bar of seconds by phase for every side."""
    width, left, each = 560, 90, 26
    phases = list(dict.fromkeys(name for own in sides.values() for name in own))
    most = max((sum(own.values()) for own in sides.values()), default=0) or 1
    parts = []
    for i, (side, own) in enumerate(sides.items()):
        parts.append(_text(left - 6, TOP + each * i + 14, side, "end"))
        start = float(left)
        for phase, seconds in own.items():
            wide = (width - left - 70) * seconds / most
            colour = COLOURS[phases.index(phase) % len(COLOURS)]
            label = tag("title", f"{side}, {phase}: {seconds:.3f} s")
            parts.append(
                tag("rect", label, x=f"{start:.1f}", y=TOP + each * i, width=f"{wide:.1f}", height=20, fill=colour)
            )
            start += wide
        parts.append(_text(start + 5, TOP + each * i + 14, f"{sum(own.values()):.2f} s"))
    return _figure(width, 2 * TOP + each * len(sides), title, parts, phases)


def scatter(points: Sequence[tuple[str, float, float]], *, title: str, x: str, y: str) -> Markup:
    """Named points; those that no other beats in both directions are filled."""
    width, height, left, bottom = 430, 260, 46, 40
    across, down = width - left - 16, height - bottom - TOP
    (x0, x1), (y0, y1) = _range([p[1] for p in points]), _range([p[2] for p in points])
    parts = _axes(width, height, left, bottom, y0, y1, "")
    for value, anchor, place in ((x0, "start", left), (x1, "end", left + across)):
        parts.append(_text(place, height - 22, f"{value:.3g}", anchor))
    parts.append(_text(left + across / 2, height - 8, x, "middle"))
    for name, h, v in points:
        best = not any(a >= h and b >= v and (a, b) != (h, v) for _, a, b in points)
        where = left + across * (h - x0) / (x1 - x0), TOP + down * (y1 - v) / (y1 - y0)
        label = tag("title", f"{name}: {x} {h:.3f}, {y} {v:.2f}")
        parts.append(tag("circle", label, cx=f"{where[0]:.1f}", cy=f"{where[1]:.1f}", r=5, stroke=COLOURS[0],
                         fill=COLOURS[0] if best else "white", stroke_width=1.5))  # fmt: skip
    return _figure(width, height, f"{title} ({y}; filled: no other is better in both)", parts, [])


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) * 0.1 or 1.0
    return low - 0.06 * spread, high + 0.06 * spread


def _axes(width: int, height: int, left: int, bottom: int, low: float, high: float, unit: str) -> list[Markup]:
    parts = []
    for i in range(4):
        place = TOP + (height - bottom - TOP) * i / 3
        value = high - (high - low) * i / 3
        parts.append(tag("line", x1=left, x2=width - 12, y1=f"{place:.1f}", y2=f"{place:.1f}", stroke=GRID))
        parts.append(_text(left - 5, place + 4, f"{value:.{_digits(high - low)}f}{unit}", "end"))
    return parts


def _digits(spread: float) -> int:
    return max(0, min(5, 2 - math.floor(math.log10(spread))))


def _shade(share: float | None) -> str:
    if share is None:
        return "#e6e8ea"
    start, end = (235, 243, 250), (16, 66, 106)
    return "#" + "".join(f"{round(a + (b - a) * min(max(share, 0), 1)):02x}" for a, b in zip(start, end, strict=True))


def _text(x: float, y: float, text: Any, anchor: str = "start") -> Markup:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, fill=FAINT, font_size=11)


def _figure(width: float, height: float, title: str, parts: Sequence[Markup], legend: Sequence[str]) -> Markup:
    keys = [tag("span", tag("i", style=f"background:{c}"), name) for name, c in zip(legend, COLOURS * 9, strict=False)]
    drawing = tag("svg", list(parts), viewBox=f"0 0 {width:.0f} {height:.0f}", width=f"{width:.0f}",
                  height=f"{height:.0f}", role="img")  # fmt: skip
    return tag("figure", tag("figcaption", title), drawing, tag("div", keys, class_="legend") if keys else None)
