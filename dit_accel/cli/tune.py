"""``dit-accel tune``: the fastest setting of a quality, or the best of a speed, kept as a preset."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from . import BUDGET_MISSED, OK

HELP = "find the setting that meets a budget of quality or speed"
DESCRIPTION = (
    "Search methods, densities, dense steps and dense layers for the fastest setting of a quality (psnr>=28) or the "
    "best of a speed (speed>=1.6), confirm it in full runs on prompts that were held back, and write a preset. PSNR is "
    "against dense attention from the same noise, speed that of the denoising loop, both means over prompts."
)
EXAMPLES = """examples:
  dit-accel tune --budget "psnr>=28" -o preset.json
  dit-accel tune prompts.txt --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 832x480 --frames 81 --budget "speed>=1.6"
  dit-accel render prompts.txt --preset preset.json

Interrupted, it goes on from the folder beside the preset. Exit code 3: no setting met the budget.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompts", nargs="?", metavar="PROMPTS", help="prompt file (default: the bundled model's own captions)")
    add("--budget", required=True, metavar="B", help="psnr>=DB or speed>=FACTOR, quoted")
    add("-o", "--out", type=lambda text: text and Path(text), default=Path("preset.json"), metavar="FILE",
        help="the preset (default: preset.json)")  # fmt: skip
    add("--model", help="pipeline folder or hub id (default: the bundled model)")
    add("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: bfloat16 on a GPU, else float32)")

    add = parser.add_argument_group("what the preset is for (default: the model's own)").add_argument
    add("--steps", type=int, metavar="N", help="denoising steps")
    add("--guidance", type=float, metavar="G", help="guidance scale")
    add("--negative-prompt", metavar="TEXT", help="what to avoid")
    add("--size", metavar="WxH", help="width x height in pixels")
    add("--frames", type=int, metavar="N", help="number of frames")
    add("--seed", type=int, default=42, metavar="N", help="seed of the initial noise (default: 42)")

    add = parser.add_argument_group("search").add_argument
    add(
        "--methods",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="methods to try (default: all that sparsify video)",
    )
    add("--calibration", type=int, default=3, metavar="N", help="prompts to search on (default: 3)")
    add("--held-back", type=int, default=2, metavar="N", help="other prompts, to confirm on (default: 2)")
    add("--short-steps", type=int, metavar="N", help="steps of the runs that search (default: an eighth, at least 4)")
    add("--renders", type=int, default=36, metavar="N", help="runs that search, at most (default: 36)")
    add("--rounds", type=int, default=2, metavar="N", help="settings run in full, at most (default: 2)")

    add = parser.add_argument_group("output").add_argument
    add("--overwrite", action="store_true", help="replace a preset that exists")
    add("--dry-run", action="store_true", help="load the model, say how long it would take, and stop")
    add("--json", action="store_true", help="JSON to stdout, text to stderr")
    add("--quiet", action="store_true", help="no text but errors and notes")


def run(args: argparse.Namespace) -> int:
    from .console import Console, calm_libraries, emit

    job = _job(args)
    from ..eval.tune.job import Tuning

    console = Console(json=args.json, quiet=args.quiet)
    calm_libraries()
    tuning = Tuning(job)
    for note in tuning.notes:
        console.note(f"note: {note}")
    tuning.load()
    seconds = tuning.seconds()
    _announce(console, tuning, seconds)
    if args.dry_run:
        if args.json:
            emit("tune", {"ok": True, "dry_run": True, "seconds": seconds})
        return OK
    outcome = tuning.run(lambda row: console.say(_row_line(row)))
    _report(console, job, tuning, outcome)
    if args.json:
        emit("tune", _document(job, outcome))
    return BUDGET_MISSED if outcome.verdict.chosen is None else OK


def _job(args: argparse.Namespace) -> Any:
    from ..eval.tune.budget import Budget
    from ..pipelines.prompts import parse_size, read_prompts

    budget = Budget.parse(args.budget)
    prompts = tuple(read_prompts(args.prompts)) if args.prompts else ()
    size = parse_size(args.size) if args.size else None
    from ..eval.tune.job import TuneJob

    same = ("out", "model", "device", "dtype", "steps", "guidance", "frames", "seed", "calibration", "held_back")
    given = {name: getattr(args, name) for name in (*same, "short_steps", "rounds", "overwrite")}
    given |= {"methods": tuple(args.methods)} if args.methods else {}
    return TuneJob(
        budget, prompts=prompts, size=size, negative=args.negative_prompt, limit=args.renders,
        command=shlex.join(["dit-accel", *sys.argv[1:]]), **given,
    )  # fmt: skip


def _announce(console: Any, tuning: Any, seconds: dict[str, float]) -> None:
    shot, job = tuning.full[0], tuning.job
    size = f"{shot.width}x{shot.height}, " if shot.width else ""
    console.say(f"model      {tuning.info.name}, {size}{shot.frames} frames, {shot.steps} steps on {tuning.device}")
    console.say(
        f"search     at most {job.limit} runs of {tuning.short_steps} steps on {job.calibration} prompts, from "
        f"{len(tuning.settings)} settings of {len(job.methods)} methods"
    )
    console.say(
        f"confirm    at most {job.rounds} settings in {shot.steps} steps on {job.held_back} prompts held back, each "
        "against dense"
    )
    parts = ", ".join(f"{name} {_minutes(value)}" for name, value in seconds.items() if value)
    console.say(f"this takes about {_minutes(sum(seconds.values()))} ({parts}); a dense step takes {tuning.step:.2f} s")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _row_line(row: dict[str, Any]) -> str:
    psnr = f"{row['psnr']:6.2f} dB" if "psnr" in row else " " * 9
    return f"  {row['setting']:<32} prompt {row['prompt'] + 1}  {psnr}  loop {row['seconds'].get('loop', 0):.2f} s"


def _report(console: Any, job: Any, tuning: Any, outcome: Any) -> None:
    from ..eval.tune.budget import worded
    from .console import table

    def cells(estimate: Any) -> tuple[str, ...]:
        return estimate.setting.name, worded("psnr", estimate.mean("psnr")), worded("speed", estimate.mean("speed"))

    for setting, why in outcome.found.failed.items():
        console.note(f"left out: {setting.name}: {why}")
    if not outcome.found.sure:
        console.note(f"note: the search is not sure of {job.budget}; full runs of what came nearest decide")
    if not outcome.found.complete:
        console.note(f"note: the search ended at --renders {job.limit}; more might find a better setting")
    console.say(f"no other setting is better in both, {tuning.short_steps} steps, {job.calibration} prompts:")
    rows = [cells(e) for e in outcome.found.front or [outcome.found.nearest]]
    for line in table([("setting", "PSNR", "loop"), *rows], right=frozenset({1, 2})):
        console.say(f"  {line}")
    console.say(f"in full, {tuning.full[0].steps} steps, {job.held_back} held-back prompt{'s' * (job.held_back > 1)}:")
    for line in table([("setting", "PSNR", "loop"), *map(cells, outcome.verdict.confirmed)], right=frozenset({1, 2})):
        console.say(f"  {line}")
    chosen = outcome.verdict.chosen
    if chosen is None:
        nearest = cells(outcome.verdict.nearest(job.budget))
        console.note(f"no setting met {job.budget}; the nearest is {nearest[0]} with {nearest[1]} and {nearest[2]}")
        return
    name, psnr, speed = cells(chosen)
    console.say(f"{job.budget}: {name} with {psnr} and {speed}")
    console.say(f"written to {', '.join(map(str, outcome.files))}; use it with --preset {job.out}")


def _document(job: Any, outcome: Any) -> dict[str, Any]:
    from ..eval.tune.job import figures

    def told(estimate: Any) -> dict[str, Any]:
        return {"setting": estimate.setting.name, **figures(estimate)}

    verdict, found = outcome.verdict, outcome.found
    return {
        "ok": verdict.chosen is not None,
        "budget": str(job.budget),
        "chosen": verdict.chosen and told(verdict.chosen),
        "nearest": told(verdict.nearest(job.budget)),
        "confirmed": [told(e) for e in verdict.confirmed],
        "front": [told(e) for e in found.front],
        "measured": [told(e) for e in found.measured],
        "measurements": found.measurements,
        "sure": found.sure,
        "complete": found.complete,
        "failed": {setting.name: why for setting, why in found.failed.items()},
        "files": [str(path) for path in outcome.files],
    }
