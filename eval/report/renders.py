"""The sections of a report about renders: every comparison in a row, then each prompt with its players and charts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..speed import conditions
from . import charts
from .html import Markup, join, table, tag
from .players import DENSE, label_all, player
from .sources import Shelf, Source


def renders(sources: list[Source], shelf: Shelf) -> list[Markup | None]:
    """Overview and groups of all renders; the clips go onto ``shelf``."""
    labels, groups = label_all(sources), {}
    for source in sources:
        settings = source.data["settings"]
        groups.setdefault((settings["prompt"], settings["seed"]), []).append(source)
    compared = [source for source in sources if source.data.get("compare")]
    return [_overview(compared, labels), *(_group(key, own, shelf, labels) for key, own in groups.items())]


def _overview(sources: list[Source], labels: Mapping[Path, str]) -> Markup | None:
    """One row per comparison, doubts included, and speed against fidelity."""
    if not sources:
        return None
    rows, points, doubted = [], [], {}
    for source in sources:
        data = source.data
        compare, attention = data["compare"], data["attention"]
        speed, same = compare["speedup"] or {}, compare["fidelity"]
        rows.append([
            data["settings"]["prompt"], data["settings"]["seed"], labels[source.path], attention.get("tier", "-"),
            _number(attention.get("density")), _number(compare["effective_density"]),
            _times(speed.get("loop")), _times(compare["bound"]), _times(speed.get("end_to_end")),
            len(compare.get("loop_runs", {}).get("accelerated", [])) or "-",
            _number(same["psnr"], 2), _number(same["ssim"], 4), sum(attention.get("fallbacks", {}).values()),
            len(doubts := [*compare["doubts"], *([compare["refused"]] if "refused" in compare else [])]) or "none",
        ])  # fmt: skip
        for text in doubts:
            doubted.setdefault(text, []).append(f"{labels[source.path]}, {data['settings']['prompt'][:60]}")
        if speed.get("loop"):
            points.append((labels[source.path], data["settings"]["prompt"][:60], speed["loop"], same["psnr"]))
    chart = None
    if len(points) > 1:
        title = "Speed against fidelity: large marks are a method's median speed-up and mean PSNR over its prompts, "
        title += "filled where no other method is better in both"
        chart = charts.scatter(points, title=title, x="speed-up of the denoising loop", y="PSNR to dense, dB")
    note = tag("p", "loop, end to end: dense over accelerated seconds; bound: the most the loop can gain at the "
                    "effective density, which counts dense steps and layers; runs: timed runs per side.",
               class_="faint")  # fmt: skip
    doubts = [tag("p", f"doubtful: {text} ({'; '.join(names)})", class_="warn") for text, names in doubted.items()]
    return join([tag("h2", "Dense against accelerated"), table(_COLUMNS, rows), note, doubts, chart])


_COLUMNS = (
    "prompt", "seed", "method", "tier", "density", "effective", "loop", "bound", "end to end", "runs", "PSNR, dB",
    "SSIM", "fallbacks", "doubts",
)  # fmt: skip


def _group(key: tuple[str, int], sources: list[Source], shelf: Shelf, labels: Mapping[Path, str]) -> Markup:
    prompt, seed = key
    parts = [tag("h3", f"{prompt} (seed {seed})"), player(sources, shelf, labels), _curves(sources, labels)]
    parts += [_details(source, labels[source.path]) for source in sources]
    return tag("section", parts)


def _curves(sources: list[Source], labels: Mapping[Path, str]) -> Markup:
    """Fidelity over frames and seconds by phase, of all methods in the same axes."""
    figures: list[Markup] = []
    compared = [source for source in sources if source.data.get("compare")]
    for name, unit in (("psnr", ", dB"), ("ssim", "")):
        known = {
            labels[source.path]: same
            for source in compared
            if (same := source.data["compare"]["fidelity"])[f"{name}_frames"]
        }
        if known:
            variant = next(iter(known.values()))[f"{name}_variant"]
            figures.append(charts.lines({label: same[f"{name}_frames"] for label, same in known.items()}, x="frame",
                                        title=f"{name.upper()} per frame{unit} ({variant})"))  # fmt: skip
    sides: dict[str, dict[str, float]] = {}
    for source in sources:
        compare, label = source.data.get("compare"), labels[source.path]
        if compare:
            # Every comparison timed its own dense side, at its own time.
            sides[DENSE if len(compared) == 1 else f"dense / {label}"] = _phases(compare["seconds"]["dense"])
            sides[label] = _phases(compare["seconds"]["accelerated"])
        else:
            sides[label] = _phases(source.data["seconds"])
    figures.append(charts.bars(sides, title="Where the time goes, seconds" + (", medians" if compared else "")))
    return tag("div", figures, class_="row")


def _details(source: Source, label: str) -> Markup:
    """What was measured of one render, and its layers."""
    data, layers = source.data, source.data["attention"].get("layers", [])
    figures = [
        *_by_step(layers, "density", "Density by layer and step, dense calls included", (0.0, 1.0)),
        *_by_step(layers, "drift", "Drift by layer and step: error against exact attention on sampled rows"),
    ]
    attention = data["attention"]
    facts = [data["device"]["name"], *_speed(data.get("compare")), *_calls(attention), *_guard(attention)]
    warnings = [*attention.get("warnings", []), *data.get("notes", [])]
    return join([tag("h4", label), tag("p", "; ".join(facts), class_="faint"),
                 [tag("p", text, class_="warn") for text in warnings], tag("div", figures, class_="row")])  # fmt: skip


def _by_step(
    layers: list[dict[str, Any]], key: str, title: str, scale: tuple[float | None, float | None] = (0.0, None)
) -> list[Markup]:
    """A map of layers and steps, or a row of layers from records that hold no steps; nothing where nothing is known."""
    rows = [layer.get(f"{key}_steps") or [] for layer in layers]
    if any(value is not None for row in rows for value in row):
        names = [f"layer {i}" for i in range(len(rows))]
        return [charts.heat(rows, title=title, x="step", y=names, scale=scale)]
    row = [layer[key]["mean"] if isinstance(layer.get(key), dict) else layer.get(key) for layer in layers]
    if all(value is None for value in row):
        return []
    return [charts.heat([row], title=f"{key.capitalize()} by layer, over its calls", x="layer", y=[key], scale=scale)]


def _speed(compare: dict[str, Any] | None) -> list[str]:
    """The loop's medians with their spread, what attention is of it, and what is in no figure."""
    if not compare:
        return []
    told = []
    for side, spread in compare.get("loop_spread", {}).items():
        runs = f"{spread['runs']} runs, IQR {spread['iqr']:.2f} s" if spread["runs"] > 1 else "one run"
        told.append(f"loop {side} {spread['median']:.2f} s ({runs})")
    if compare["attention_share"] is not None:
        told.append(f"attention is {compare['attention_share']:.0%} of the dense loop")
    warm = ", ".join(f"{side} {seconds:.1f} s" for side, seconds in compare.get("warmup_seconds", {}).items())
    told += [f"warm-up apart: {warm}"] if warm else []
    return told + conditions(compare)


def _calls(attention: dict[str, Any]) -> list[str]:
    """How many attention calls were accelerated, and how many ran dense for what reason."""
    if not attention.get("sparse_calls"):
        return []
    dense = ", ".join(f"{number} {reason}" for reason, number in attention.get("dense_calls", {}).items())
    return [f"{attention['sparse_calls']} attention calls accelerated", f"dense: {dense or 'none'}"]


def _guard(attention: dict[str, Any]) -> list[str]:
    """What the guard looked at and what it took out of use."""
    checks, drift, events = attention.get("guard_checks"), attention.get("drift"), attention.get("guard_events", [])
    told = [f"guard: rows of {checks} calls checked, {len(events)} layers taken out of use"] if checks else []
    told += [f"drift mean {drift['mean']:.4f}, most {drift['max']:.4f}"] if drift else []
    for event in events:
        told.append(f"guard: layer {event['layer']} ran dense from step {event['step']} ({event.get('kind')})")
    return told


def _phases(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds that add up to the whole: attention and planning are parts of the loop, the rest is what no phase has."""
    attention, planning = seconds.get("attention") or 0.0, seconds.get("planning") or 0.0
    attention = min(attention, seconds.get("loop", 0.0))
    own = {
        "text": seconds.get("text", 0.0),
        "planning": min(planning, attention),
        "attention": attention - min(planning, attention),
        "loop, other": seconds.get("loop", 0.0) - attention,
        "vae": seconds.get("vae", 0.0),
    }
    own["other"] = max(seconds.get("total", 0.0) - sum(own.values()), 0.0)
    own["export"] = seconds.get("export", 0.0)
    return {name: max(value, 0.0) for name, value in own.items()}


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
