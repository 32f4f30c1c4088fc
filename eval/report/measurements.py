"""Sections of a report for measurements: attention error, fidelity of folders, graded shapes, speed, VBench."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..intervals import spread
from ..speed import conditions
from . import charts
from .html import Markup, join, table, tag
from .sources import SHAPES, Gathered, Source


def sections(found: Gathered) -> list[Markup]:
    """A section for every kind that is there; kinds unknown here are shown among the raw records only."""
    return [
        join([tag("h2", title), [tag("section", tag("h3", str(source.path)), show(source)) for source in own]])
        for kind, (title, show) in _KINDS.items()
        if (own := found.of(kind))
    ]


def _attention(source: Source) -> Markup:
    data, parts = source.data, []
    head = (
        "method",
        "layer",
        "relative L1",
        "worst head",
        "cosine",
        "RMSE",
        "largest",
        "mass kept",
        "least 5 %",
        "calls",
    )
    rows = []
    for name, one in data["methods"].items():
        for row in one["layers"]:
            worst = row["worst_head"]
            rows.append([
                name, row["layer"], f"{row['rel_l1']:.4f}", f"{worst['rel_l1']:.4f} (head {worst['head']})",
                f"{row['cosine']:.4f}", f"{row['rmse']:.4f}", f"{row['max_abs']:.4f}", f"{row['recall']:.4f}",
                f"{row['recall_low']:.4f}", row["calls"],
            ])  # fmt: skip
        density = ", ".join(f"{kind} {value:.4f}" for kind, value in one["densities"].items() if value is not None)
        parts.append(tag("p", f"{name}: density {density}"))
        parts.append(tag("div", _maps(name, one), class_="row"))
    told = (
        f"{data['layout']}, {data['steps']} steps, {data['rows_per_call']} query rows per call, against exact attention"
    )
    return join([tag("p", told, class_="faint"), table(head, rows), parts])


def _maps(name: str, one: dict[str, Any]) -> list[Markup]:
    titles = {"rel_l1": "relative L1 error", "recall": "mass kept", "density": "density"}
    scales = {"recall": (None, None), "density": (0.0, 1.0)}
    layers = [f"layer {row['layer']}" for row in one["layers"]]
    maps = [
        charts.heat(one["heat"][key], title=f"{name}: {title}", x="step", y=layers, scale=scales.get(key, (0.0, None)))
        for key, title in titles.items()
        if one["heat"].get(key)
    ]
    if one["heads"]:
        rows = [one["heads"][str(row["layer"])] for row in one["layers"]]
        maps.append(charts.heat(rows, title=f"{name}: relative L1 by head", x="head", y=layers))
    return maps


def _fidelity(source: Source) -> Markup:
    data = source.data
    summary = []
    for name, one in data["summary"].items():
        if not one["clips"]:
            continue
        worst = one["worst"]
        summary.append(
            [name, f"{one['mean']:.4f}", spread(one, ".4f"), one["clips"], f"{worst['value']:.4f}", worst["prompt"]]
        )
    curves = {f"{row['prompt'][:40]} s{row['seed']}": row["psnr_frames"] for row in data["rows"][:6]}
    conventions = "; ".join(f"{name}: {text}" for name, text in data["conventions"].items())
    marks = (
        None if data["lossless"] else tag("p", "read from video files: the codec lowers these figures", class_="warn")
    )
    return join([
        tag("p", conventions, class_="faint"), marks,
        table(("metric", "mean", "95 % interval", "clips", "worst", "of"), summary),
        charts.lines(curves, title="PSNR per frame, dB", x="frame"),
    ])  # fmt: skip


def _shapes(source: Source) -> Markup:
    data, parts = source.data, []
    for side, summary in data["summary"].items():
        rows = [[*_interval(name, row), f"{row['passed']:.0%}"] for name, row in summary["dimensions"].items()]
        rows.append([*_interval("mean", summary), ""])
        parts.append(
            tag("div", tag("h3", side), table(("dimension", "mean", "95 % interval", "videos", "passed"), rows))
        )
    if "paired" in data:
        rows = [_interval(name, row, sign="+") for name, row in data["paired"].items() if name != "psnr"]
        head = ("dimension", "accelerated minus dense", "95 % interval", "videos")
        parts.append(tag("div", tag("h3", "paired by prompt and seed"), table(head, rows)))
        if "psnr" in data["paired"]:
            one = data["paired"]["psnr"]
            parts.append(tag("p", f"PSNR {one['mean']:.2f} dB ({spread(one, '.2f')})"))
    return tag("div", parts, class_="row")


def _interval(name: str, row: dict[str, Any], sign: str = "") -> list[Any]:
    return [name, f"{row['mean']:{sign}.3f}", spread(row, f"{sign}.3f"), row["videos"]]


def _speed(source: Source) -> Markup:
    rows = []
    for row in source.data["rows"]:
        compare = row["compare"]
        speed = compare["speedup"] or {}
        cells = [f"{speed[name]:.2f}x" if name in speed else "-" for name in ("loop", "attention", "end_to_end")]
        bound = "-" if compare["bound"] is None else f"{compare['bound']:.2f}x"
        runs = ", ".join(f"{s:.2f}" for s in compare["loop_runs"]["accelerated"])
        doubts = "; ".join([*compare["doubts"], *([compare["refused"]] if "refused" in compare else [])]) or "none"
        tier = row["attention"].get("tier", "-")
        rows.append([row["prompt"], row["seed"], tier, *cells, bound, runs, doubts])
    head = ("prompt", "seed", "tier", "loop", "attention", "end to end", "bound", "loop runs, s", "doubts")
    told = [tag("p", f"{row['prompt']}: {text}", class_="faint") for row in source.data["rows"]
            for text in conditions(row["compare"])]  # fmt: skip
    return join([table(head, rows), told])


def _vbench(source: Source) -> Markup:
    data = source.data
    rows = [[name, f"{row['score']:.4f}", row["videos"]] for name, row in data["dimensions"].items()]
    if data["complete"]:
        told = ", ".join(f"{name} {100 * value:.2f} %" for name, value in data["totals"].items())
    else:
        told = f"partial, so there are no totals ({'; '.join(data['lacking'][:4])}); "
        told += f"{data['mean']['label']}: {data['mean']['value']:.4f}"
    return join([table(("dimension", "score", "videos"), rows), tag("p", told)])


def _formula(source: Source) -> Markup:
    """Scores that are none of VBench's stand in a box of their own."""
    data = source.data
    told = tag("p", f"{data['name']} {data['score']:.6f}")
    return tag("div", told, tag("p", f"No VBench score: {data['meaning']}.", class_="faint"), class_="apart")


def _proxies(source: Source) -> Markup:
    """Differences to dense that are no scores, in a box of their own."""
    data = source.data
    rows = []
    for name, one in data["summary"].items():
        if one["clips"]:
            rows.append([name, f"{one['mean']:+.4f}", spread(one, "+.4f"), one["clips"], data["meaning"][name]])
    wrong = [tag("p", f"{row['prompt']}: {text}", class_="warn") for row in data["rows"] for text in row["sanity"]]
    head = ("proxy", "accelerated minus dense", "95 % interval", "clips", "meaning")
    return tag("div", tag("p", f"{data['note']}.", class_="faint"), table(head, rows), wrong, class_="apart")


_KINDS: dict[str, tuple[str, Callable[[Source], Markup]]] = {
    "attention": ("Attention error", _attention),
    "fidelity": ("Fidelity to the dense output", _fidelity),
    SHAPES: ("Graded shapes", _shapes),
    "speed": ("Speed", _speed),
    "vbench-totals": ("VBench", _vbench),
    "vbench-run": ("VBench", _vbench),
    "proxies": ("Proxies, no VBench scores", _proxies),
    "vbench-flicker": ("Formulas of VBench, no VBench scores", _formula),
}
