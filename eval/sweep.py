"""The stored sweep that judges tuning: a fixed grid of 48 settings, each rendered for six prompts of the bundled model.

``python -m dit_accel.eval.sweep -o sweep.json`` measures, and continues where it was interrupted; renders that other
work kept waiting are made again. ``--replay sweep.json`` then searches the stored rows, ten times per budget, each
time on other prompts, and tells whether the budget held on the rest and how good the choice was. The sweep is done at
a short setting, 49 frames and 4 steps, so that it takes 25 minutes on two cores; a quarter of the run is one step.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..pipelines.acceleration import DENSE, Acceleration
from ..pipelines.job import Job, Shot, resolve
from ..pipelines.load import load, pick_device, pick_dtype
from ..pipelines.model import ModelInfo, inspect_model
from ..pipelines.prompts import Prompt
from .command import output_file
from .environment import environment
from .shapes.suite import prompts
from .tune.bench import Bench, Store, read
from .tune.budget import Budget
from .tune.plans import plan_path, write_plans
from .tune.replay import Stored, replay
from .tune.space import Setting, layer_groups, settings

PROMPTS = 6
# PARO's plans are calibrated on the first prompts of the suite, which are not measured.
CALIBRATION = 2
# Accelerated renders between two dense ones.
EVERY = 8
BUDGETS = ("psnr>=28", "speed>=1.1")


@dataclass(frozen=True)
class Sweep:
    """What to measure. ``grid``: None is :func:`grid` of the model's layers. ``plans``: where PARO's plans are kept."""

    prompts: int = PROMPTS
    frames: int | None = 49
    steps: int | None = 4
    size: tuple[int, int] | None = None
    seed: int = 0
    model: str | None = None
    device: str = "auto"
    grid: tuple[Setting, ...] | None = None
    plans: Path = field(default_factory=lambda: Path("paro-plans"))


def grid(layers: int) -> list[Setting]:
    """The 48 settings: five methods at four densities with and without a dense first quarter, AdaSpa with its own dense
    steps, PARO with the early layers dense."""
    found = settings(("radial", "gna", "paro", "vmoba", "pisa"))
    found += settings(("adaspa",), dense_steps=(0.0,))
    found += settings(("paro",), dense_steps=(0.0,), dense_layers=(layer_groups(layers)["early"],))
    return found


def run(sweep: Sweep, out: Path | None = None, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure what is missing and return the document, plain JSON values. Raises ``UsageError`` where ``out`` holds
    another sweep."""
    info, device = inspect_model(sweep.model), pick_device(sweep.device)
    chosen = sweep.grid or tuple(grid(info.transformer.get("num_layers", 0)))
    calibration, shots = _shots(info, sweep)
    about = {
        "model": info.name, "weights": info.revision or info.fingerprint(), "size": [shots[0].width, shots[0].height],
        "frames": shots[0].frames, "steps": shots[0].steps, "guidance": shots[0].call.get("guidance_scale"),
        "seed": sweep.seed, "device": device.type, "prompts": [shot.prompt for shot in shots],
        "settings": [setting.to_dict() for setting in chosen],
    }  # fmt: skip
    store = Store(out, about)
    pipe = load(info, dtype=pick_dtype("auto", device), device=str(device))
    pipe.set_progress_bar_config(disable=True)
    densities = sorted({setting.density for setting in chosen if setting.method == "paro"}, reverse=True)
    plans = sweep.plans / f"{shots[0].frames}-frames-{shots[0].steps}-steps"
    if densities:
        say(f"PARO's plans in {plans}")
        write_plans(pipe, info, calibration, densities, plans)
    processors = {}
    for setting in chosen:
        accel = setting.acceleration(lambda density: plan_path(plans, density))
        choice = resolve(Job((Prompt(shots[0].prompt),), Path(), accel=accel, **_same(sweep)), info)[0].choice
        processors[setting.name] = choice.processor
    bench = Bench(pipe, shots, processors, store, every=EVERY, tell=lambda row: say(_line(row)))
    for number in range(len(shots)):
        # Another order for every prompt, the same in every run: no setting is always the one after a dense render.
        names = [setting.name for setting in chosen if store.missing(setting.name, number)]
        random.Random(number).shuffle(names)
        say(f"prompt {number + 1} of {len(shots)}: {len(names)} of {len(chosen)} settings to render")
        for name in names:
            bench.measure(name, number, again=True)
        bench.forget(number)
    if store.rows[-1]["setting"] != DENSE:
        bench.dense(len(shots) - 1)
    store.document["environment"] = environment()
    store.document["command"] = "python -m dit_accel.eval.sweep -o FILE"
    store.save()
    return store.document


def table(document: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Name, mean PSNR and mean speed-up of the loop of every setting, fastest first."""
    stored = Stored.of(document)
    everything = [stored.estimate(setting, range(len(stored.prompts))) for setting in stored.settings]
    return sorted(((e.setting.name, e.mean("psnr"), e.mean("speed")) for e in everything), key=lambda entry: -entry[2])


def told(found: dict[str, Any]) -> str:
    """One line on a budget's trials."""
    best = found["best"]
    ideal = f"{best['setting']} ({best['psnr']:.1f} dB, {best['speed']:.2f} x)" if best else "no setting"
    choices = Counter(row["chosen"] or "none" for row in found["trials"])
    measured = sum(row["measurements"] for row in found["trials"]) / len(found["trials"])
    return (
        f"{found['budget']}: held in {found['held']} of {len(found['trials'])}, within 5 % of the best in "
        f"{found['near']}; chosen {', '.join(f'{name} ({n})' for name, n in choices.most_common())}; with all prompts "
        f"{ideal}; {measured:.0f} of {found['measurements_of_a_full_sweep']} measurements"
    )


def _shots(info: ModelInfo, sweep: Sweep) -> tuple[list[Shot], list[Shot]]:
    """The shots that calibrate PARO, and the measured ones, spread over the rest of the suite."""
    texts = prompts("shapes-120")
    rest = texts[CALIBRATION:]
    if not 1 <= sweep.prompts <= len(rest):
        raise UsageError(f"--prompts must be 1 to {len(rest)}; got {sweep.prompts}")
    chosen = [*texts[:CALIBRATION], *(rest[i * len(rest) // sweep.prompts] for i in range(sweep.prompts))]
    job = Job(tuple(map(Prompt, chosen)), Path(), accel=Acceleration(DENSE), **_same(sweep))
    shots = resolve(job, info)
    return shots[:CALIBRATION], shots[CALIBRATION:]


def _same(sweep: Sweep) -> dict[str, Any]:
    return {name: getattr(sweep, name) for name in ("model", "frames", "steps", "size", "seed")}


def _line(row: dict[str, Any]) -> str:
    psnr = f"{row['psnr']:.2f} dB" if "psnr" in row else ""
    return f"  {row['setting']:<28} loop {row['seconds']['loop']:.2f} s  {psnr}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_accel.eval.sweep", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("-o", "--out", type=output_file, help="JSON, written as it goes and continued from")
    add("--prompts", type=int, default=PROMPTS, help=f"prompts per setting (default: {PROMPTS})")
    add("--frames", type=int, default=Sweep.frames, help=f"frames of a render (default: {Sweep.frames})")
    add("--steps", type=int, default=Sweep.steps, help=f"denoising steps of a render (default: {Sweep.steps})")
    add("--seed", type=int, default=0)
    add("--model", help="pipeline folder or hub id (default: the bundled model)")
    add("--device", default="auto")
    add("--plans", type=Path, default=Path("paro-plans"), help="folder of PARO's plans (default: paro-plans)")
    add("--replay", type=Path, metavar="FILE", help="search a stored sweep instead of measuring one")
    add("--budget", nargs="+", default=BUDGETS, help=f"budgets of --replay (default: {' '.join(BUDGETS)})")
    args = vars(parser.parse_args(argv))
    out, stored, budgets = (args.pop(name) for name in ("out", "replay", "budget"))
    if stored:
        if not stored.is_file():
            raise UsageError(f"--replay: there is no file {stored}; give the JSON that -o of a sweep wrote")
        for budget in budgets:
            print(told(replay(Stored.of(read(stored)), Budget.parse(budget))))
        return 0
    document = run(replace(Sweep(), **args), out, lambda text: print(text, file=sys.stderr, flush=True))
    for name, psnr, speed in table(document):
        print(f"{name:<28} {psnr:6.2f} dB  {speed:5.2f}x")
    return 0


if __name__ == "__main__":
    from .command import run as finish

    sys.exit(finish(main))
