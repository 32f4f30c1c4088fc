"""The report: one HTML page, made from JSON records alone, that needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ... import __version__
from . import charts
from .html import Markup, join, table, tag
from .measurements import sections
from .players import method_of, player
from .sources import RENDER, Gathered, Shelf, Source, gather, render_command
from .style import CSS, SCRIPT

LIMIT = 25 * 2**20
# Nothing from anywhere but this file; linked media lie beside it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: 'self' file:; "
POLICY += "media-src data: 'self' file:"


def report(paths: Iterable[str | Path], out: str | Path, *, title: str = "", limit: int = LIMIT) -> dict[str, Any]:
    """Write the page ``out`` from every record in ``paths``; what went in, as plain JSON values.

    ``limit``: bytes of video and images carried inside the page; what does not fit is linked beside it and named in
    ``linked``. Raises ``UsageError`` where there is no record, or the page cannot be written.
    """
    from ...errors import UsageError

    out = Path(out)
    found = gather(paths)
    shelf = Shelf(limit, out)
    text = page(found, shelf, title or "dit-accel report")
    part = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}; give another -o") from None
    return {
        "page": str(out),
        "sources": [str(source.path) for source in found.sources],
        "skipped": [{"file": str(path), "why": why} for path, why in found.skipped],
        "linked": [str(path) for path in shelf.linked],
        "bytes": out.stat().st_size,
    }


def page(found: Gathered, shelf: Shelf, title: str) -> str:
    """The whole document as text."""
    renders = found.of(RENDER)
    groups: dict[tuple[str, int], list[Source]] = {}
    for source in renders:
        settings = source.data["settings"]
        groups.setdefault((settings["prompt"], settings["seed"]), []).append(source)
    body = [
        tag("h1", title),
        tag("p", f"{len(found.sources)} records; dit-accel {__version__}. Speed, fidelity to the dense output and "
            "quality are told apart; every figure is the record's own.", class_="faint"),
        _overview([s for s in renders if s.data.get("compare")]),
        [_group(key, own, shelf) for key, own in groups.items()],
        sections(found),
        _environments(found),
        _commands(found),
        _raw(found),
    ]  # fmt: skip
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(CSS)),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", body, tag("script", Markup(SCRIPT))), lang="en") + "\n"


def _overview(renders: list[Source]) -> Markup | None:
    """One row per comparison, doubts included, and speed against fidelity."""
    if not renders:
        return None
    rows, points = [], []
    for source in renders:
        data = source.data
        compare, attention = data["compare"], data["attention"]
        speed, same = compare["speedup"] or {}, compare["fidelity"]
        rows.append([
            data["settings"]["prompt"], data["settings"]["seed"], method_of(data), attention.get("tier", "-"),
            number(attention.get("density")), number(compare["effective_density"]),
            _times(speed.get("loop")), _times(speed.get("end_to_end")), _times(compare["bound"]),
            number(same["psnr"], 2), number(same["ssim"], 4), sum(attention.get("fallbacks", {}).values()),
            "; ".join([*compare["doubts"], *([compare["refused"]] if "refused" in compare else [])]) or "none",
        ])  # fmt: skip
        if speed.get("loop"):
            name = f"{method_of(data)}, {data['settings']['prompt'][:50]}"
            points.append((name, speed["loop"], same["psnr"]))
    chart = None
    if len(points) > 1:
        chart = charts.scatter(points, title="Speed against fidelity", x="speed-up of the loop", y="PSNR, dB")
    return join([tag("h2", "Dense against accelerated"), table(_COLUMNS, rows), chart])


_COLUMNS = (
    "prompt", "seed", "method", "tier", "density", "effective", "loop", "end to end", "bound", "PSNR, dB", "SSIM",
    "fallbacks", "doubts",
)  # fmt: skip


def _group(key: tuple[str, int], sources: list[Source], shelf: Shelf) -> Markup:
    prompt, seed = key
    parts = [tag("h3", f"{prompt} (seed {seed})"), player(sources, shelf)]
    for source in sources:
        parts.append(_details(source))
    return tag("section", parts)


def _details(source: Source) -> Markup:
    """Curves, break-down and layers of one render."""
    data = source.data
    compare, figures = data.get("compare"), []
    if compare:
        same = compare["fidelity"]
        figures.append(charts.lines({"PSNR": same["psnr_frames"]}, title=f"PSNR per frame, dB ({same['psnr_variant']})",
                                    x="frame"))  # fmt: skip
        if same["ssim_frames"]:
            figures.append(charts.lines({"SSIM": same["ssim_frames"]}, title=f"SSIM per frame ({same['ssim_variant']})",
                                        x="frame"))  # fmt: skip
        sides = {side: _phases(seconds) for side, seconds in compare["seconds"].items()}
    else:
        sides = {method_of(data): _phases(data["seconds"])}
    figures.append(charts.bars(sides, title="Where the time goes, seconds" + (", medians" if compare else "")))
    layers = data["attention"].get("layers", [])
    figures += _by_layer(layers, "density", "Density by layer, as of its last sparse call", (0.0, 1.0))
    drifts = [{"drift": row["drift"]["mean"] if row.get("drift") else None} for row in layers]
    figures += _by_layer(drifts, "drift", "Drift by layer: mean error against exact attention on sampled rows")
    facts = [f"{method_of(data)} on {data['device']['name']}"]
    if compare and compare["attention_share"] is not None:
        facts.append(f"attention is {compare['attention_share']:.0%} of the dense loop")
    facts += _guard(data["attention"])
    warnings = [*data["attention"].get("warnings", []), *data.get("notes", [])]
    return join([tag("p", "; ".join(facts), class_="faint"), [tag("p", text, class_="warn") for text in warnings],
                 tag("div", figures, class_="row")])  # fmt: skip


def _by_layer(
    layers: list[dict[str, Any]], key: str, title: str, scale: tuple[float | None, float | None] = (0.0, None)
) -> list[Markup]:
    """A row of one figure over the layers; nothing where no layer has it."""
    row = [layer[key] for layer in layers]
    known = any(value is not None for value in row)
    return [charts.heat([row], title=title, x="layer", y=[key], scale=scale)] if known else []


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
    return {name: value for name, value in own.items() if value > 0}


def _environments(found: Gathered) -> Markup:
    """Every distinct environment once, with the records made in it."""
    seen: dict[str, list[str]] = {}
    for source in found.sources:
        data = source.data
        if source.kind == RENDER:
            environment = {"device": data.get("device"), "versions": data.get("versions")}
        else:
            environment = data.get("environment")
        if environment:
            text = json.dumps(environment, indent=1, sort_keys=True, ensure_ascii=False)
            seen.setdefault(text, []).append(source.path.name)
    blocks = []
    for text, files in seen.items():
        more = " ..." if len(files) > 4 else ""
        head = tag("summary", f"{len(files)} records: {', '.join(files[:4])}{more}")
        blocks.append(tag("details", head, tag("pre", text)))
    return join([tag("h2", "Environment"), blocks])


def _commands(found: Gathered) -> Markup:
    told = []
    for source in found.sources:
        if source.kind == RENDER:
            told.append(render_command(source.data["settings"], bool(source.data.get("compare"))))
        elif source.data.get("command_line"):
            told.append(source.data["command_line"])
    return join([tag("h2", "Commands"), tag("pre", "\n".join(dict.fromkeys(told)) or "not recorded")])


def _raw(found: Gathered) -> Markup:
    rows = [
        tag("details", tag("summary", str(source.path)),
            tag("pre", json.dumps(source.data, indent=1, ensure_ascii=False), data_record=str(source.path)))
        for source in found.sources
    ]  # fmt: skip
    skipped = [tag("p", f"left out: {path} ({why})", class_="faint") for path, why in found.skipped]
    return join([tag("h2", "Raw records"), rows, skipped])


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
