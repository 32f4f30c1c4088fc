"""Result files as markdown, and how time grows with length."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TITLES = (
    "shape", "tokens", "D", "case", "tier", "density", "best dense", "dense, ms", "ours, ms", "host, ms",
    "speed-up", "of 1/d, own dense", "of 1/d, best dense", "TFLOP/s", "of dense rate", "planning", "FlexAttention, ms",
    "partial", "longest row", "error",
)  # fmt: skip


def markdown(document: dict[str, Any]) -> str:
    """One line per case; then medians, the fitted exponent of a section over lengths, and what could not run."""
    rows = [row for row in document["rows"].values() if "failure" not in row]
    lines = [f"| {' | '.join(_TITLES)} |", "|---" * len(_TITLES) + "|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    notes = []
    for backend in sorted({row["backend"] for row in rows if row["method"]}):
        parts = [row["of_best"] for row in rows if row["backend"] == backend]
        notes.append(f"of 1/d, backend {backend}: median {statistics.median(parts):.2f}, least {min(parts):.2f}")
    if document["section"] == "scaling":
        for name, points in lengths(rows).items():
            if len(points) > 1:
                notes.append(f"{name}: time grows with length to the power {exponent(points):.2f}")
    if any("host" in row["times"]["sparse"] for row in rows):
        caches = "overwritten" if document.get("cold") else "left as it was"
        notes.append(f"times are the GPU's own, host: until the call returned; its L2 cache was {caches} between calls")
    notes += [_searches(row) for row in rows if row.get("run")]
    notes += [note for row in rows for note in _bound(row)]
    notes += [f"{key}: {row['failure']}" for key, row in document["rows"].items() if "failure" in row]
    return "\n".join([*lines, "", *notes])


def _cells(row: dict[str, Any]) -> list[str]:
    times, work = row["times"], row["work"]
    what = row["method"] or "dense"
    flex = times.get("flex")
    ours = times["sparse"]
    return [
        row["shape"], f"{row['tokens']:,}", str(row["dim"]), what + (f"+{row['quant']}" if row["quant"] else ""),
        f"{'+'.join(row['tiers'])}" + (f" ({row['backend']})" if row["backend"] != "auto" else ""),
        f"{row['kept']:.3f}", row["best_dense"], f"{1e3 * times[row['best_dense']]['median']:.2f}",
        f"{1e3 * ours['median']:.2f} (min {1e3 * ours['min']:.2f}, IQR {1e3 * ours['iqr']:.2f})",
        f"{1e3 * ours['host']['median']:.2f}" if "host" in ours else "–",
        f"{row['speedup']:.2f}", f"{row['of_own']:.2f}", f"{row['of_best']:.2f}", f"{row['rate']:.3g}",
        f"{row['of_rate']:.2f}", f"{row['planning_share']:.1%}" if "planning_share" in row else "–",
        f"{1e3 * flex['median']:.2f}" if flex else "–", f"{work['partial']:.0%}", f"{work['longest']:.2f}",
        f"{row['error']['kernel']:.1e}",
    ]  # fmt: skip


def _searches(row: dict[str, Any]) -> str:
    run, each = row["run"], 1e3 * row["times"]["search"]["median"]
    return (
        f"{row['shape']} {row['method']}: {run['searches']} searches of {each:.2f} ms in a run of {run['steps']} steps "
        f"are spread over its {run['sparse']} sparse calls in ratios and planning, not in ours, ms"
    )


def _bound(row: dict[str, Any]) -> list[str]:
    """Sides whose calls take the host longer than the device: run alone, they take the host's time."""
    slow = {
        name: taken["host"]["median"] for name, taken in row["times"].items()
        if name in ("sparse", row["best_dense"]) and "host" in taken and taken["host"]["median"] > taken["median"]
    }  # fmt: skip
    what = row["method"] or "dense"
    return [
        f"{row['shape']} {what}: {name} takes the host {1e3 * host:.2f} ms, waiting included, longer than the GPU"
        for name, host in slow.items()
    ]


def lengths(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(tokens, seconds) of ours and of the best dense kernel."""
    ordered = sorted(rows, key=lambda row: row["tokens"])
    found: dict[str, list[tuple[int, float]]] = {}
    for row in ordered:
        found.setdefault(row["method"] or "dense+quant", []).append((row["tokens"], row["times"]["sparse"]["median"]))
        found.setdefault("dense", []).append((row["tokens"], row["times"][row["best_dense"]]["median"]))
    return found


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of log seconds over log tokens, least squares."""
    x, y = ([math.log(value) for value in axis] for axis in zip(*points, strict=True))
    return statistics.linear_regression(x, y).slope


def plot(document: dict[str, Any], path: Path) -> None:
    """Seconds over tokens on logarithmic axes, with each line's exponent. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in document["rows"].values() if "failure" not in row]
    for name, points in lengths(rows).items():
        label = f"{name}, exponent {exponent(points):.2f}" if len(points) > 1 else name
        axes.loglog(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="tokens", ylabel="seconds")
    axes.legend()
    figure.savefig(path)
