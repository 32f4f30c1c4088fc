"""The report: one HTML page, made from JSON records alone, that needs no network."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ... import __version__
from .html import Markup, join, tag
from .measurements import sections
from .renders import renders
from .sources import RENDER, Gathered, Shelf, gather, render_command
from .style import CSS, SCRIPT

LIMIT = 25 * 2**20
START = "<!doctype html>"
# Nothing from anywhere but this file; linked media lie beside it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: 'self' file:; "
POLICY += "media-src data: 'self' file:"


def report(paths: Iterable[str | Path], out: str | Path, *, title: str = "", limit: int = LIMIT) -> dict[str, Any]:
    """Write the page ``out`` from every record in ``paths``; what went in, as plain JSON values.

    ``limit``: bytes of video and images carried inside the page; what does not fit is linked beside it and named in
    ``linked``. Raises ``UsageError`` where there is no record, the page cannot be written, or ``out`` is
    a file that is no page.
    """
    from ...errors import UsageError

    out = Path(out)
    _refuse_overwriting(out)
    found = gather(paths)
    shelf = Shelf(limit, out)
    text = page(found, shelf, title or "dit-accel report")
    part = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UsageError(f"cannot write {out}: {error.strerror or error}; give another -o") from None
    return {
        "page": str(out),
        "sources": [str(source.path) for source in found.sources],
        "skipped": [{"file": str(path), "why": why} for path, why in found.skipped],
        "linked": [str(path) for path in shelf.linked],
        "bytes": out.stat().st_size,
    }


def _refuse_overwriting(out: Path) -> None:
    """A page may be written again; any other file is somebody's."""
    from ...errors import UsageError

    if out.is_dir():
        raise UsageError(f"{out} is a folder; -o is the page to write, for example -o {out / 'report.html'}")
    if out.is_file() and out.stat().st_size:
        with open(out, "rb") as file:
            if file.read(len(START)) != START.encode():
                raise UsageError(f"{out} is there and is no HTML page, so it is kept; give another -o")


def page(found: Gathered, shelf: Shelf, title: str) -> str:
    """The whole document as text."""
    body = [
        tag("h1", title),
        tag("p", f"{len(found.sources)} records; dit-accel {__version__}. Speed, fidelity to the dense output and "
            "quality are told apart; every figure is the record's own.", class_="faint"),
        renders(found.of(RENDER), shelf),
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
    return START + "\n" + tag("html", head, tag("body", body, tag("script", Markup(SCRIPT))), lang="en") + "\n"


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
            seen.setdefault(text, []).append(str(source.path))
    blocks = []
    for text, files in seen.items():
        head = tag("summary", f"{_fingerprint(json.loads(text))}: {len(files)} record{'s' * (len(files) > 1)}")
        blocks.append(tag("details", head, tag("pre", text), tag("pre", "\n".join(files))))
    return join([tag("h2", "Environment"), blocks])


def _fingerprint(environment: dict[str, Any]) -> str:
    """One line: what computed, and under which versions."""
    device, cpu = environment.get("device") or {}, environment.get("cpu") or {}
    gpus = [text for name, text in (environment.get("gpus") or {}).items() if ":" in name]
    told = [device.get("name") or ", ".join(gpus) or cpu.get("name") or "device not recorded"]
    threads = device.get("threads") or cpu.get("threads")
    told += [f"{threads} thread{'s' * (threads > 1)}"] if threads else []
    versions = {name.replace("_", "-"): value for name, value in (environment.get("versions") or {}).items()}
    told += [f"{name} {versions[name]}" for name in ("torch", "diffusers", "dit-accel") if versions.get(name)]
    return ", ".join(told)


def _commands(found: Gathered) -> Markup:
    told = []
    for source in found.sources:
        if source.kind == RENDER:
            compare = source.data.get("compare") or {}
            runs = len(compare.get("loop_runs", {}).get("accelerated", ()))
            compiled = any(compare.get("compiled", {}).values())
            told.append(render_command(source.data["settings"], bool(compare), repeats=runs, compiled=compiled))
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
