"""Render and grade the suite under any method, alone or paired with dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UsageError
from ...pipelines.acceleration import Choice
from ...pipelines.generate import generate
from ...pipelines.job import Job, Shot, resolve
from ...pipelines.load import load
from ...pipelines.model import inspect_model
from ...pipelines.outputs import read_json, write_json
from ...pipelines.prompts import Prompt
from ..environment import environment
from ..fidelity import fidelity
from ..intervals import interval
from .grade import DIMENSIONS, grade
from .suite import Suite, summarize

SCHEMA = 1
DENSE = "dense"


def evaluate(
    suite: Suite,
    job: Job,
    *,
    out: Path | None = None,
    sheet: Path | None = None,
    tell: Callable[[dict[str, Any]], None] = lambda row: None,
    command_line: str | None = None,
) -> dict[str, Any]:
    """Grade ``suite`` rendered as ``job`` says (model, method, steps; its prompts and seed are the suite's).

    ``out``: JSON written after every video and continued from. ``sheet``: PNG with nine frames of every video
    rendered now. ``tell`` hears every row. ``command_line``: what the document says made it. Returns ``rows``, one per
    prompt, seed and side, with ``scores`` by dimension and, for the accelerated side of a pair, ``psnr``; ``summary``
    per side; ``density_missed`` where rows had another density than was asked for; with ``compare`` also ``paired``,
    accelerated minus dense per dimension.
    Raises ``UsageError`` when ``out`` holds rows of another run.
    """
    info = inspect_model(job.model)
    shots = list(_shots(suite, job, info))
    settings = {
        "model": info.name, "weights": info.revision or info.fingerprint(), "steps": shots[0].steps,
        "guidance": shots[0].call.get("guidance_scale"), "frames": shots[0].frames,
        "attention": shots[0].choice.processor.to_dict() if shots[0].choice.processor else None,
    }  # fmt: skip
    rows = _continued(out, settings)
    done = {(row["prompt"], row["seed"], row["side"]) for row in rows}
    pipe, strips = None, []
    for shot in shots:
        names = _sides(suite, shot)
        if all((shot.prompt, shot.seed, name) in done for name in names):
            continue
        if pipe is None:
            pipe = load(info, dtype=job.dtype, device=job.device)
            pipe.set_progress_bar_config(disable=True)
        rows = [row for row in rows if (row["prompt"], row["seed"]) != (shot.prompt, shot.seed)]
        for row, video in _graded(pipe, shot, names, suite.dimensions):
            rows.append(row)
            strips.append(video[:: max(len(video) // 8, 1)][:9])
            tell(row)
        if out is not None:
            write_json(out, document(suite, settings, rows, shot.choice, command_line))
    if sheet is not None and strips:
        from ...pipelines.mini.sheets import save_rows

        save_rows(strips, sheet)
    return document(suite, settings, rows, shots[0].choice, command_line)


def document(
    suite: Suite,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    choice: Choice,
    command_line: str | None = None,
) -> dict[str, Any]:
    """The result as plain JSON values."""
    sides = {side: [row for row in rows if row["side"] == side] for side in dict.fromkeys(r["side"] for r in rows)}
    result: dict[str, Any] = {
        "schema": SCHEMA,
        **({"command_line": command_line} if command_line else {}),
        "settings": settings,
        "environment": environment(),
        "seeds": list(suite.seeds),
        "summary": {side: summarize(own, suite.dimensions) for side, own in sides.items()},
        "rows": rows,
    }
    had = [row["density"] for row in rows if choice.missed(row.get("density"))]
    if had:
        result["density_missed"] = {"asked": choice.asked, "had": had}
    if suite.compare and len(sides) == 2:
        (other,) = set(sides) - {DENSE}
        result["paired"] = paired(sides[DENSE], sides[other], suite.dimensions)
    return result


def paired(
    dense: Sequence[dict[str, Any]], fast: Sequence[dict[str, Any]], dimensions: Sequence[str] = DIMENSIONS
) -> dict[str, Any]:
    """Accelerated minus dense, per dimension and over all, paired by prompt and seed: mean, 95 % interval over
    prompts (the values themselves where there are fewer than five), videos."""
    by_key = {(row["prompt"], row["seed"]): row["scores"] for row in dense}
    keyed = [(key, row["scores"]) for row in fast if (key := (row["prompt"], row["seed"])) in by_key]
    pairs = [(key[0], by_key[key], scores) for key, scores in keyed]
    result = {}
    for name in dimensions:
        known = [one for one in pairs if one[1].get(name) is not None and one[2].get(name) is not None]
        if known:
            result[name] = _interval([(prompt, b[name] - a[name]) for prompt, a, b in known])
    if pairs:
        result["mean"] = _interval([(prompt, _mean(b) - _mean(a)) for prompt, a, b in pairs])
    decibels = [(row["prompt"], row["psnr"]) for row in fast if "psnr" in row]
    if decibels:
        result["psnr"] = _interval(decibels)
    return result


def _interval(pairs: Sequence[tuple[str, float]]) -> dict[str, Any]:
    prompts, values = zip(*pairs, strict=True)
    return {**interval(values, prompts), "videos": len(values)}


def _mean(scores: dict[str, float | None]) -> float:
    return float(np.mean([value for value in scores.values() if value is not None]))


def _shots(suite: Suite, job: Job, info: Any) -> Iterator[Shot]:
    prompts = tuple(Prompt(text, line) for line, text in enumerate(suite.texts, 1))
    for seed in suite.seeds:
        yield from resolve(replace(job, prompts=prompts, seed=seed, compare=False), info)


def _sides(suite: Suite, shot: Shot) -> list[str]:
    return [DENSE, shot.choice.name] if suite.compare and shot.choice.processor else [shot.choice.name]


def _graded(
    pipe: Any, shot: Shot, names: list[str], dimensions: tuple[str, ...]
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    before = None
    for name in names:
        result = generate(pipe, shot, None if name == DENSE else shot.choice.processor)
        video = (result.frames * 255 + 0.5).astype(np.uint8)
        row = {"prompt": shot.prompt, "seed": shot.seed, "side": name, "scores": grade(video, shot.prompt, dimensions)}
        if name != DENSE:
            row |= {key: result.attention.get(key) for key in ("tier", "density", "effective_density", "fallbacks")}
            if before is not None:
                row["psnr"] = fidelity(before, result.frames).psnr
        before = result.frames
        yield row, video


def _continued(out: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    if out is None or not out.is_file():
        return []
    old = read_json(out)
    if old.get("settings") != settings:
        raise UsageError(f"{out} holds rows made with other settings; give another file or remove it")
    return old["rows"]
