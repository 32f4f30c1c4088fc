"""Charts as inline SVG: lines over frames, heat maps, bars, and a scatter of speed against fidelity."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .html import Markup, tag

# Names of the page's style, which has a light and a dark value for each.
FAINT, GRID, PAPER, NONE = "var(--faint)", "var(--rule)", "var(--paper)", "var(--none)"
COLOURS = tuple(f"var(--c{i})" for i in range(6))
TOP = 8  # pixels above what is drawn
WRITTEN = 10  # so many columns at most have room for their figures inside the cells


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
    left = 24 + 6 * max(map(len, y))
    wide = min(36.0 if columns <= WRITTEN else 26.0, max(9.0, 380 / columns))
    tall = min(26.0, wide, max(7.0, 420 / len(rows)))
    known = [v for row in rows for v in row if v is not None]
    least = min(known, default=0.0) if scale[0] is None else scale[0]
    most = max(known, default=1.0) if scale[1] is None else scale[1]
    every = math.ceil(12 / tall)  # a label needs so many rows
    parts = []
    for i, row in enumerate(rows):
        if i % every == 0:
            parts.append(_text(left - 6, TOP + tall * (i + 0.5) + 4, y[i], "end"))
        for j, value in enumerate(row):
            share = None if value is None else (value - least) / (most - least or 1)
            told = "not measured" if value is None else f"{value:.4g}"
            place = left + wide * j, TOP + tall * i
            parts.append(
                tag("rect", tag("title", f"{y[i]}, {x} {j}: {told}"), x=f"{place[0]:.1f}", y=f"{place[1]:.1f}",
                    width=f"{wide - 1:.1f}", height=f"{tall - 1:.1f}", fill=_shade(share))
            )  # fmt: skip
            if share is not None and columns <= WRITTEN and tall > 14:
                ink = "#ffffff" if share > 0.5 else "#1d2733"
                parts.append(tag("text", _short(value), x=f"{place[0] + wide / 2 - 0.5:.1f}", text_anchor="middle",
                                 y=f"{place[1] + tall / 2 + 3:.1f}", fill=ink, font_size=10))  # fmt: skip
    bottom = TOP + tall * len(rows)
    parts += [_text(left, bottom + 14, f"{x} 0"), _text(left + wide * columns, bottom + 14, columns - 1, "end")]
    parts += _key(left, bottom + 24, least, most)
    return _figure(max(left + wide * columns + 12, 430), bottom + 44, title, parts, [])


def _key(left: float, top: float, least: float, most: float) -> list[Markup]:
    """The scale of a heat map: its ends, the shades between, and the grey."""
    low, high, missing = f"{least:.3g}", f"{most:.3g}", "none measured"
    start = left + 7 * len(low) + 4
    squares = [tag("path", d=f"M{start + 14 * i:.1f} {top:.1f}h14v10h-14z", fill=_shade(i / 7)) for i in range(8)]
    grey = start + 14 * 8 + 7 * len(high) + 22
    squares.append(tag("path", d=f"M{grey:.1f} {top:.1f}h14v10h-14z", fill=NONE))
    return [_text(left, top + 9, low), _text(start + 116, top + 9, high), _text(grey + 19, top + 9, missing), *squares]


def bars(sides: Mapping[str, Mapping[str, float]], *, title: str) -> Markup:
    """A stacked bar of seconds by phase for every side; phases in the order of the first side that has them."""
    width, left, each = 460, min(160, 12 + 7 * max(map(len, sides))), 26
    phases = list(dict.fromkeys(name for own in sides.values() for name in own))
    phases = [name for name in phases if any(own.get(name) for own in sides.values())]
    most = max((sum(own.values()) for own in sides.values()), default=0) or 1
    parts = []
    for i, (side, own) in enumerate(sides.items()):
        parts.append(_text(left - 6, TOP + each * i + 14, side, "end"))
        start = float(left)
        for phase, seconds in ((name, own[name]) for name in phases if own.get(name)):
            wide = (width - left - 60) * seconds / most
            colour = COLOURS[phases.index(phase) % len(COLOURS)]
            label = tag("title", f"{side}, {phase}: {seconds:.3f} s")
            parts.append(
                tag("rect", label, x=f"{start:.1f}", y=TOP + each * i, width=f"{wide:.1f}", height=20, fill=colour)
            )
            start += wide
        parts.append(_text(start + 5, TOP + each * i + 14, f"{sum(own.values()):.2f} s"))
    return _figure(width, 2 * TOP + each * len(sides), title, parts, phases)


def scatter(points: Sequence[tuple[str, str, float, float]], *, title: str, x: str, y: str) -> Markup:
    """Points (series, name, across, up): a small mark for each, and a large, labelled one where its series lies.

    That is the median across and the mean up. It is filled where no other series is at least as good in both.
    """
    width, height, left, bottom = 560, 300, 58, 44
    across, down = width - left - 16, height - bottom - TOP
    (x0, x1), (y0, y1) = _range([1.0, *(p[2] for p in points)]), _range([p[3] for p in points])

    def at(h: float, v: float) -> tuple[float, float]:
        return left + across * (h - x0) / (x1 - x0), TOP + down * (y1 - v) / (y1 - y0)

    parts = _axes(width, height, left, bottom, y0, y1, "")
    for i in range(5):
        value = x0 + (x1 - x0) * i / 4
        anchor = "start" if i == 0 else "end" if i == 4 else "middle"
        parts.append(_text(at(value, y0)[0], height - 26, f"{value:.2f}x", anchor))
    parts.append(_text(left + across / 2, height - 8, x, "middle"))
    parts.append(tag("text", y, x=14, y=f"{TOP + down / 2:.1f}", fill=FAINT, font_size=11, text_anchor="middle",
                     transform=f"rotate(-90 14 {TOP + down / 2:.1f})"))  # fmt: skip
    one = f"{at(1.0, y0)[0]:.1f}"
    parts.append(tag("line", x1=one, x2=one, y1=TOP, y2=TOP + down, stroke=FAINT, stroke_dasharray="3 3"))
    series = list(dict.fromkeys(p[0] for p in points))
    own = {name: [p for p in points if p[0] == name] for name in series}
    centre = {
        name: (statistics.median(p[2] for p in at_), sum(p[3] for p in at_) / len(at_)) for name, at_ in own.items()
    }
    for name, colour in zip(series, COLOURS * 9, strict=False):
        for _, told, h, v in own[name] if len(own[name]) > 1 else []:
            small, label = at(h, v), tag("title", f"{told}: {x} {h:.3f}, {y} {v:.2f}")
            parts.append(tag("circle", label, cx=f"{small[0]:.1f}", cy=f"{small[1]:.1f}", r=3, fill=colour,
                             opacity=0.5))  # fmt: skip
        h, v = centre[name]
        place, best = at(h, v), not any(a >= h and b >= v and (a, b) != (h, v) for a, b in centre.values())
        label = tag("title", f"{name}: {x} {h:.3f}, {y} {v:.2f}, of {len(own[name])}")
        parts.append(tag("circle", label, cx=f"{place[0]:.1f}", cy=f"{place[1]:.1f}", r=6, stroke=colour,
                         fill=colour if best else PAPER, stroke_width=2))  # fmt: skip
        right = place[0] > left + across * 0.7
        shift = -10 if right else 10
        parts.append(_text(place[0] + shift, place[1] + 4, name, "end" if right else "start", "var(--ink)"))
    return _figure(width, height, title, parts, [])


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
        return NONE
    start, end = (235, 243, 250), (16, 66, 106)
    return "#" + "".join(f"{round(a + (b - a) * min(max(share, 0), 1)):02x}" for a, b in zip(start, end, strict=True))


def _short(value: float) -> str:
    """Few enough characters for a cell."""
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}"


def _text(x: float, y: float, text: Any, anchor: str = "start", fill: str = FAINT) -> Markup:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, fill=fill, font_size=11)


def _figure(width: float, height: float, title: str, parts: Sequence[Markup], legend: Sequence[str]) -> Markup:
    keys = [tag("span", tag("i", style=f"background:{c}"), name) for name, c in zip(legend, COLOURS * 9, strict=False)]
    drawing = tag("svg", list(parts), viewBox=f"0 0 {width:.0f} {height:.0f}", width=f"{width:.0f}",
                  height=f"{height:.0f}", role="img")  # fmt: skip
    return tag("figure", tag("figcaption", title), drawing, tag("div", keys, class_="legend") if keys else None)
