"""The table of methods: what each loses and gains at several densities. ``python -m dit_accel.eval.methods -o FILE``

Three measurements of the same candidates, each continued from the JSON where it was interrupted:

- ``error``: attention error and retained mass on the q, k and v of dense renders (:mod:`.attention`);
- ``quality``: whole renders from the same noise as dense ones: PSNR against dense, and the shape suite's grades;
- ``speed``: renders of the last prompt timed in turn, dense ones between, medians; they count for quality too. All of
  one machine, which is the file's ``environment``; ``--fresh-speed`` drops them and measures again.

A candidate is ``METHOD@DENSITY``, ``METHOD@DENSITY+QUANT`` or ``dense+QUANT``. PARO plans are calibrated on prompts
that are not measured.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..pipelines.acceleration import DENSE, Acceleration
from ..pipelines.calibrate import CalibrationJob, calibrate_paro, plan_shots
from ..pipelines.generate import Result, generate
from ..pipelines.job import Job, Shot, resolve
from ..pipelines.load import load, pick_device, pick_dtype
from ..pipelines.model import ModelInfo, inspect_model
from ..pipelines.outputs import read_json, write_json
from ..pipelines.prompts import Prompt, parse_size
from ..processors import Processor
from ..schedule import Schedule
from .attention import measure
from .command import output_file, positive
from .environment import differences, environment
from .fidelity import fidelity
from .intervals import interval
from .method_spec import PARAMETERS
from .shapes.grade import grade
from .shapes.job import paired
from .shapes.suite import prompts
from .speed import EMULATED
from .tables import machine

SCHEMA = 1
METHODS = ("radial", "gna", "paro", "adaspa", "vmoba", "pisa", "rectified", "pyramid")
DENSITIES = (0.5, 0.25, 0.15)
MEASUREMENTS = ("error", "quality", "speed")


@dataclass(frozen=True)
class Candidate:
    """``name`` as given. ``reached``: the density on video tokens that the method's own knobs came to, if known."""

    name: str
    processor: Processor
    reached: float | None = None


@dataclass(frozen=True)
class Settings:
    """What to measure. Candidates by name; prompts by number, spread over the bundled suite.

    ``fresh_speed``: forget every speed row of a file that is continued.
    """

    candidates: tuple[str, ...]
    measurements: tuple[str, ...] = MEASUREMENTS
    prompts: int = 4
    error_prompts: int = 1
    error_steps: int = 6
    repeats: int = 1
    fresh_speed: bool = False
    seed: int = 0
    steps: int | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    model: str | None = None
    device: str = "auto"
    plans: Path = field(default_factory=lambda: Path("paro-plans"))


def split(name: str) -> tuple[str, float | None, str | None]:
    """Method, density and quant of a candidate's name. Raises ``UsageError``."""
    rest, _, quant = name.partition("+")
    method, _, density = rest.partition("@")
    try:
        kept = float(density) if density else None
    except ValueError:
        kept = -1.0
    if not method or (kept is not None and not 0 < kept <= 1) or (method == DENSE and (kept is not None or not quant)):
        raise UsageError(
            f"candidate {name!r} is not understood; allowed are METHOD@DENSITY, METHOD@DENSITY+QUANT and dense+QUANT, "
            "with a density in (0, 1], for example radial@0.25 or pisa@0.25+sage2"
        )
    return method, kept, quant or None


def make(name: str, info: ModelInfo, settings: Settings, plan_file: Callable[[float], Path]) -> Candidate:
    """The candidate of that name, as ``dit-accel render`` would make it. ``plan_file``: PARO's plan at a density."""
    method, density, quant = split(name)
    parameters = dict(PARAMETERS.get(method, {}))
    kept = density
    if method == "paro":
        parameters["plan_file"], kept = str(plan_file(0.5 if density is None else density)), None
    accel = Acceleration(method, kept, parameters=parameters, quant=quant)
    prompt = Prompt(prompts("shapes-120")[0], 1)
    choice = resolve(Job((prompt,), settings.plans, accel=accel, **_same(settings)), info)[0].choice
    return Candidate(name, choice.processor, choice.density)


def run(settings: Settings, out: Path | None = None, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure, writing ``out`` after every render. Plain JSON values: ``rows`` of single renders, ``table``, and what
    they were made with. Raises ``UsageError`` where ``out`` holds another run, or speed rows of another machine."""
    info = inspect_model(settings.model)
    device = pick_device(settings.device)
    shots = _shots(info, settings)
    described = {
        "model": info.name, "weights": info.revision or info.fingerprint(), "steps": shots[0].steps,
        "seed": settings.seed, "size": [shots[0].width, shots[0].height], "frames": shots[0].frames,
    }  # fmt: skip
    document = _continued(out, described)
    here = _timing_machine(document, settings, out)
    candidates = [make(name, info, settings, _calibrated(settings, say)) for name in settings.candidates]
    document["candidates"] |= {one.name: one.processor.to_dict() | {"reached": one.reached} for one in candidates}
    pipe = load(info, dtype=pick_dtype("auto", device), device=str(device))
    pipe.set_progress_bar_config(disable=True)

    def keep() -> None:
        document["table"] = table(document)
        if out is not None:
            write_json(out, document)

    if "error" in settings.measurements:
        missing = {one.name: one.processor for one in candidates if one.name not in document["error"]}
        if missing:
            say(f"attention error of {len(missing)} candidates on {settings.error_prompts} dense renders")
            found = measure(pipe, shots[: settings.error_prompts], missing, steps=settings.error_steps)
            names = ("mean", "worst", "densities")
            document["error"] |= {name: {key: one[key] for key in names} for name, one in found.items()}
            keep()
    if "quality" in settings.measurements:
        for row in _quality(pipe, shots, candidates, document["rows"]):
            document["rows"].append(row)
            say(_line(row))
            keep()
    if "speed" in settings.measurements:
        shot = shots[-1]
        done = {row["side"] for row in document["rows"] if (row["prompt"], row["seed"]) == (shot.prompt, shot.seed)}
        for timing, result, dense in _speed(pipe, shot, candidates, settings.repeats):
            document["speed"].append(timing)
            document["environment"] = here
            if timing["candidate"] not in done:
                document["rows"].append(_row(shot, timing["candidate"], result, dense))
                done.add(timing["candidate"])
            say(f"{timing['candidate']}: loop {timing['seconds']['loop']:.2f} s")
            keep()
    keep()
    return document


def _quality(
    pipe: Any, shots: Sequence[Shot], candidates: list[Candidate], rows: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    done = {(row["prompt"], row["seed"], row["side"]) for row in rows}
    for shot in shots:
        names = [DENSE, *(one.name for one in candidates)]
        if all((shot.prompt, shot.seed, name) in done for name in names):
            continue
        dense = generate(pipe, shot, None)
        if (shot.prompt, shot.seed, DENSE) not in done:
            yield _row(shot, DENSE, dense, dense)
        for one in candidates:
            if (shot.prompt, shot.seed, one.name) not in done:
                yield _row(shot, one.name, generate(pipe, shot, one.processor), dense)


def _row(shot: Shot, side: str, result: Result, dense: Result) -> dict[str, Any]:
    video = (result.frames * 255 + 0.5).astype(np.uint8)
    row = {"prompt": shot.prompt, "seed": shot.seed, "side": side, "scores": grade(video, shot.prompt)}
    if side != DENSE:
        names = ("tier", "tiers", "density", "effective_density", "dense_calls", "fallbacks")
        row |= {key: result.attention.get(key) for key in names if key in result.attention}
        row["psnr"] = fidelity(dense.frames, result.frames).psnr
    return row


def _speed(
    pipe: Any, shot: Shot, candidates: list[Candidate], repeats: int
) -> Iterator[tuple[dict[str, Any], Result, Result]]:
    """Timing, render and the last dense render. Dense before every third one, so that a drift of the clock shows."""
    sides = [(one.name, one.processor) for one in candidates]
    # Compiling and the first touch of memory belong to no measurement.
    for processor in [Processor(None), *(processor for _, processor in sides)]:
        warm = copy.copy(processor)
        warm.schedule = Schedule.none()
        generate(pipe, shot, warm, steps=1)
    for _ in range(repeats):
        for number, (name, processor) in enumerate(sides):
            if number % 3 == 0:
                dense = generate(pipe, shot, Processor(None))
                yield _timing(DENSE, dense), dense, dense
            result = generate(pipe, shot, processor)
            yield _timing(name, result), result, dense


def _timing(name: str, result: Result) -> dict[str, Any]:
    tiers = result.attention.get("tiers")
    return {"candidate": name, "seconds": result.seconds, "cores": result.cores, "tiers": tiers}


def table(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per candidate: what its rows say. Medians of seconds; means of everything else, with 95 % intervals
    over prompts, or the values themselves where there are fewer than five."""
    dense = [row for row in document["rows"] if row["side"] == DENSE]
    baseline = _median(document["speed"], DENSE)
    entries = []
    for name in document["candidates"]:
        own = [row for row in document["rows"] if row["side"] == name]
        entry: dict[str, Any] = {"candidate": name, "videos": len(own)}
        error = document["error"].get(name)
        if error:
            entry |= {"rel_l1": error["mean"].get("rel_l1"), "recall": error["mean"].get("recall")}
            entry["density"] = error["densities"]["mask"]
        if own:
            texts = [row["prompt"] for row in own]
            entry["psnr"] = interval([row["psnr"] for row in own], texts)
            entry["effective_density"] = float(np.mean([row["effective_density"] for row in own]))
            entry["density"] = float(np.mean([row["density"] for row in own])) if own[0].get("density") else None
            entry["mean"] = interval([_mean(row) for row in own], texts)
            entry["difference"] = paired(dense, own).get("mean")
        seconds = _median(document["speed"], name)
        if seconds and baseline:
            tiers = next((row["tiers"] for row in document["speed"] if row["candidate"] == name), None) or {}
            entry["seconds"] = seconds
            entry["tiers"] = tiers
            if not set(tiers) & set(EMULATED):
                entry["speedup"] = {key: baseline[key] / seconds[key] for key in ("loop", "attention")}
                entry["planning_share"] = seconds.get("planning", 0.0) / seconds["attention"]
        entries.append(entry)
    return entries


def markdown(document: dict[str, Any]) -> str:
    """The table for a README, and what its brackets hold."""
    titles = (
        "candidate", "density", "effective", "attention error", "PSNR, dB", "suite mean", "against dense", "loop",
        "attention", "planning",
    )  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for entry in document["table"]:
        lines.append("| " + " | ".join(_cells(entry)) + " |")
    known = [entry["psnr"] for entry in document["table"] if "psnr" in entry]
    told = {"95 % intervals over prompts" for one in known if "low" in one}
    told |= {
        "the least and the largest of too few prompts for an interval"
        for one in known
        if len(one.get("values", ())) > 1
    }
    return "\n".join(lines + ([f"\nIn brackets: {', else '.join(sorted(told))}."] if told else []))


def _cells(entry: dict[str, Any]) -> list[str]:
    def number(value: Any, form: str) -> str:
        return "–" if value is None else format(value, form)

    def between(one: dict[str, Any] | None, form: str) -> str:
        if not one:
            return "–"
        values = one.get("values") or [one["low"], one["high"]]
        # One video has no spread, which is not a spread of nothing.
        ends = "" if len(values) < 2 else f" ({min(values):{form}} to {max(values):{form}})"
        return f"{one['mean']:{form}}{ends}"

    gain = entry.get("speedup") or {}
    return [
        entry["candidate"], number(entry.get("density"), ".2f"), number(entry.get("effective_density"), ".2f"),
        number(entry.get("rel_l1"), ".3f"), between(entry.get("psnr"), ".1f"), between(entry.get("mean"), ".2f"),
        between(entry.get("difference"), "+.2f"),
        number(gain.get("loop"), ".2f"), number(gain.get("attention"), ".2f"),
        number(entry.get("planning_share"), ".0%"),
    ]  # fmt: skip


def _median(rows: list[dict[str, Any]], name: str) -> dict[str, float]:
    own = [row["seconds"] for row in rows if row["candidate"] == name]
    keys = set.intersection(*(set(seconds) for seconds in own)) if own else set()
    return {key: statistics.median(seconds[key] for seconds in own) for key in sorted(keys)}


def _mean(row: dict[str, Any]) -> float:
    return float(np.mean([value for value in row["scores"].values() if value is not None]))


def _line(row: dict[str, Any]) -> str:
    psnr = f" {row['psnr']:.2f} dB" if "psnr" in row else ""
    return f"{row['side']}:{psnr} mean {_mean(row):.2f} - {row['prompt']}"


def _shots(info: ModelInfo, settings: Settings) -> list[Shot]:
    """The measured prompts, spread over the suite after the two that calibrate."""
    texts = prompts("shapes-120")[2:]
    if not 1 <= settings.prompts <= len(texts) or settings.error_prompts > settings.prompts:
        raise UsageError(f"prompts must be 1 to {len(texts)} and error_prompts no more; got {settings.prompts}")
    chosen = tuple(Prompt(texts[i * len(texts) // settings.prompts], i + 1) for i in range(settings.prompts))
    return plan_shots(CalibrationJob(settings.plans / "-", chosen, **_same(settings)), info)


def _same(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("model", "steps", "seed", "size", "frames")}


def _calibrated(settings: Settings, say: Callable[[str], None]) -> Callable[[float], Path]:
    def plan_file(density: float) -> Path:
        path = settings.plans / f"paro-{density:g}.safetensors"
        if not path.is_file():
            say(f"calibrating PARO at {density:g}")
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = tuple(Prompt(text, i + 1) for i, text in enumerate(prompts("shapes-120")[:2]))
            calibrate_paro(replace(CalibrationJob(path, texts, **_same(settings)), density=density), progress=False)
        return path

    return plan_file


def _continued(out: Path | None, described: dict[str, Any]) -> dict[str, Any]:
    empty = {"schema": SCHEMA, "settings": described, "candidates": {}, "error": {}, "rows": [], "speed": []}
    if out is None or not out.is_file():
        return empty
    old = read_json(out)
    if old.get("settings") != described:
        raise UsageError(f"{out} holds rows made with other settings; give another file or remove it")
    return empty | old


def _timing_machine(document: dict[str, Any], settings: Settings, out: Path | None) -> dict[str, Any] | None:
    """The environment of speed rows to come, None where none will. Leaves the document an environment only with speed
    rows, which it belongs to: quality is the same on any machine."""
    timed = "speed" in settings.measurements
    if settings.fresh_speed:
        if not timed:
            raise UsageError(
                f"--fresh-speed measures speed again and the measurements are {', '.join(settings.measurements)}; add "
                "speed to --measure, or leave --fresh-speed out"
            )
        document["speed"] = []
    if not document["speed"]:
        document.pop("environment", None)
    if not timed:
        return None
    here, there = environment(), document.get("environment")
    if document["speed"] and (there is None or differences(there, here)):
        which = "a machine that it does not name" if there is None else f"another machine: {machine(there)}"
        details = "" if there is None else f" They differ in {'; '.join(differences(there, here))}."
        raise UsageError(
            f"{out} holds {len(document['speed'])} speed rows of {which}; this one is {machine(here)}.{details} Times "
            "of two machines are not pooled; add --fresh-speed to drop the old speed rows and measure again (quality "
            "rows stay), give another file with -o, or leave speed out of --measure"
        )
    return here


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.eval.methods", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("candidates", nargs="*", help="METHOD@DENSITY[+QUANT] (default: every method at 0.5, 0.25 and 0.15)")
    add("--measure", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    add("--prompts", type=positive, default=4, help="prompts rendered by every candidate (default: 4)")
    add("--error-prompts", type=positive, default=1)
    add("--error-steps", type=positive, default=6, help="steps of a render at which errors are taken (default: 6)")
    add("--repeats", type=positive, default=1, help="timed renders of every candidate (default: 1)")
    add(
        "--fresh-speed",
        action="store_true",
        help="drop every speed row of the file, as of another machine, and measure again; quality rows stay",
    )
    add("--seed", type=int, default=0)
    add("--steps", type=int, help="denoising steps (default: the model's)")
    add("--size", metavar="WxH", help="width x height in pixels (default: the model's)")
    add("--frames", type=int, help="number of frames (default: the model's)")
    add("--model", help="pipeline folder or hub id (default: the bundled model)")
    add("--device", default="auto")
    add("--plans", type=Path, default=Path("paro-plans"), help="folder of PARO's calibrated plans")
    add("-o", "--out", type=output_file, help="JSON, written as it goes and continued from")
    args = vars(parser.parse_args(argv))
    out = args.pop("out")
    args["candidates"] = tuple(args["candidates"]) or tuple(f"{m}@{d:g}" for m in METHODS for d in DENSITIES)
    args["measurements"] = tuple(args.pop("measure"))
    args["size"] = parse_size(args["size"]) if args["size"] else None
    document = run(Settings(**args), out, lambda text: print(text, file=sys.stderr, flush=True))
    print(markdown(document))
    return 0


if __name__ == "__main__":
    from .command import run as finish

    sys.exit(finish(main))
