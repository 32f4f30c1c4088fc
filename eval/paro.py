"""Does PARO's reordering pay? ``python -m dit_accel.eval.paro --out paro.json``

Calibrates on some prompts and measures on others, at each density twice: with the orders that calibration chose, and
with the row-major order for every head under the same thresholding and the same block budget. Attention error: relative
L2 distance to dense attention on the q, k and v of dense runs. PSNR: whole renders, every step sparse, against dense
ones from the same noise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..drift import recall
from ..errors import UsageError
from ..functional import attend
from ..methods import Call, Paro
from ..methods.orders import NAMES
from ..methods.paro_calibration import calibrate
from ..methods.paro_file import PlanFile, write
from ..methods.paro_statistics import Statistics
from ..pipelines.calibrate import CalibrationJob, describe_run, observe, plan_shots
from ..pipelines.generate import generate
from ..pipelines.job import Shot
from ..pipelines.load import load, pick_device, pick_dtype
from ..pipelines.model import ModelInfo, inspect_model
from ..pipelines.outputs import write_json
from ..pipelines.prompts import Prompt
from ..processors import Processor
from ..schedule import Schedule
from .command import output_file, positive
from .fidelity import fidelity
from .intervals import bootstrap

SIDES = ("reordered", "unordered")
Plans = dict[tuple[float, str], Paro]


@dataclass(frozen=True)
class Study:
    """What to measure. ``calibration`` and ``test`` prompts should differ. ``error_steps``: how many steps of a run
    the attention error looks at, evenly spread. ``None`` takes the model's own default."""

    calibration: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    densities: tuple[float, ...] = (0.5, 0.3)
    model: str | None = None
    bins: int = 4
    metric: str = "mass"
    budget: str = "layer"
    block_size: int = 64
    steps: int | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    error_steps: int = 8
    error_prompts: int = 2
    seed: int = 42
    backend: str = "auto"
    device: str = "auto"


def study(settings: Study, folder: Path, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Run all of it; plan files go to ``folder``. Plain JSON values, see the module for what they mean."""
    device = pick_device(settings.device)
    info = inspect_model(settings.model)
    base = _job(settings, settings.calibration, folder)
    shots, tests = plan_shots(base, info), plan_shots(_job(settings, settings.test, folder), info)
    pipe = load(info, dtype=pick_dtype("auto", device), device=str(device))
    statistics, started = Statistics(bins=settings.bins, block_size=settings.block_size), time.perf_counter()
    say(f"calibrating on {len(shots)} prompts")
    observe(pipe, shots, statistics.observe, backend=settings.backend)
    seconds = time.perf_counter() - started
    plans = write_plans(pipe, info, shots, statistics, settings, folder)
    say("attention error on dense runs")
    meter = ErrorMeter(plans, settings.error_steps, settings.backend)
    observe(pipe, tests[: settings.error_prompts], meter.observe, backend=settings.backend)
    say("renders")
    return {
        "model": info.name,
        "weights": info.revision or info.fingerprint(),
        "layout": str(statistics.shape.layout),
        "device": str(device),
        "steps": tests[0].steps,
        "bins": settings.bins,
        "block_size": settings.block_size,
        "metric": settings.metric,
        "budget": settings.budget,
        "prompts": {"calibration": [s.prompt for s in shots], "test": [s.prompt for s in tests]},
        "calibration_seconds": seconds,
        "orders": orders_chosen(plans),
        "plans": {_name(key): _plan_summary(method) for key, method in plans.items()},
        "attention_error": meter.result(),
        "psnr": psnr(pipe, tests, plans, settings.backend, say),
    }


def write_plans(
    pipe: Any, info: ModelInfo, shots: list[Shot], statistics: Statistics, settings: Study, folder: Path
) -> Plans:
    """One plan file per density and side."""
    plans: Plans = {}
    for density in settings.densities:
        for side in SIDES:
            path = folder / f"paro-{density:g}-{side}.safetensors"
            job = CalibrationJob(out=path, density=density, metric=settings.metric, budget=settings.budget)
            order = None if side == "reordered" else 0
            chosen = calibrate(statistics, density=density, metric=settings.metric, budget=settings.budget, order=order)
            write(path, describe_run(pipe, info, shots, statistics, job), chosen)
            plans[density, side] = Paro(path)
    return plans


class ErrorMeter:
    """A listener that runs every plan beside a dense call and keeps the relative L2 error and the recall."""

    def __init__(self, plans: Plans, steps: int, backend: str, rows: int = 64):
        self.plans, self.steps, self.backend, self.rows = plans, steps, backend, rows
        self._generator = torch.Generator().manual_seed(0)
        self._found: dict[tuple[float, str], dict[int, list[tuple[float, float]]]] = {}
        for key in plans:
            self._found[key] = defaultdict(list)

    @torch.no_grad()
    def observe(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        total = call.step.total or 1
        wanted = {(2 * i + 1) * total // (2 * min(self.steps, total)) for i in range(min(self.steps, total))}
        if call.step.index not in wanted:
            return
        dense = attend(q, k, v, layout=call.layout, kv_valid=call.kv_valid, scale=call.scale).float()
        for key, method in self.plans.items():
            plan = method.plan(q, k, v, call)
            out = attend(
                q, k, v, plan=plan, layout=call.layout, kv_valid=call.kv_valid, scale=call.scale, backend=self.backend
            )
            # Per head, so that a head of small values counts like any other.
            error = ((out - dense).float().norm(dim=(-2, -1)) / dense.norm(dim=(-2, -1))).mean()
            kept = recall(q, k, plan, self.rows, self._generator, scale=call.scale, kv_valid=call.kv_valid)
            self._found[key][call.layer].append((float(error), kept))

    def result(self) -> dict[str, Any]:
        """By density: per layer the mean error and recall of both sides, and on how many layers reordering is lower."""
        results = {}
        for density in sorted({key[0] for key in self.plans}, reverse=True):
            rows = []
            for layer in sorted(self._found[density, SIDES[0]]):
                row: dict[str, Any] = {"layer": layer}
                for side in SIDES:
                    values = np.array(self._found[density, side][layer])
                    row[side] = float(values[:, 0].mean())
                    row[f"{side}_recall"] = float(values[:, 1].mean())
                    row["calls"] = len(values)
                rows.append(row)
            lower = sum(row["reordered"] < row["unordered"] for row in rows)
            means = {side: float(np.mean([row[side] for row in rows])) for side in SIDES}
            results[f"{density:g}"] = {"layers": rows, "layers_lower": lower, "of": len(rows), "mean": means}
        return results


def psnr(pipe: Any, shots: list[Shot], plans: Plans, backend: str, say: Callable[[str], None]) -> dict[str, Any]:
    """By density: PSNR of both sides against dense, per prompt and as mean with a 95 % bootstrap interval over prompts,
    and the same of their paired difference."""
    values: dict[tuple[float, str], list[float]] = {key: [] for key in plans}
    effective: dict[tuple[float, str], list[float]] = {key: [] for key in plans}
    for shot in shots:
        dense = generate(pipe, shot, None)
        for key, method in plans.items():
            run = generate(pipe, shot, Processor(method, schedule=Schedule.none(), backend=backend))
            values[key].append(fidelity(dense.frames, run.frames).psnr)
            effective[key].append(run.attention["effective_density"])
        say(f"  {shot.prompt}: " + ", ".join(f"{_name(key)} {v[-1]:.2f} dB" for key, v in values.items()))
    results: dict[str, Any] = {}
    for density in sorted({key[0] for key in plans}, reverse=True):
        one = {side: _interval(values[density, side]) for side in SIDES}
        for side in SIDES:
            one[side]["effective_density"] = float(np.mean(effective[density, side]))
        gain = [a - b for a, b in zip(values[density, SIDES[0]], values[density, SIDES[1]], strict=True)]
        results[f"{density:g}"] = {**one, "difference": _interval(gain)}
    return results


def orders_chosen(plans: Plans) -> list[list[str]]:
    """Names of the axis orders, [layer][head]."""
    method = next(method for (_, side), method in plans.items() if side == "reordered")
    return [[NAMES[i] for i in row] for row in PlanFile.open(method.plan_file).orders.tolist()]


def _plan_summary(method: Paro) -> dict[str, Any]:
    header = PlanFile.open(method.plan_file).header
    return {"density": header.reached, "recall": header.recall, "bytes": Path(method.plan_file).stat().st_size}


def _interval(values: list[float]) -> dict[str, Any]:
    low, high = bootstrap(values)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "values": values}


def _name(key: tuple[float, str]) -> str:
    return f"{key[0]:g} {key[1]}"


def _job(settings: Study, prompts: tuple[Prompt, ...], folder: Path) -> CalibrationJob:
    same = ("model", "steps", "size", "frames", "seed")
    return CalibrationJob(folder / "-", prompts, **{name: getattr(settings, name) for name in same})


def report(found: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    lines = [f"{found['model']}, {found['layout']}, {found['steps']} steps; orders by layer and head:"]
    lines += [f"  layer {layer}: {' '.join(row)}" for layer, row in enumerate(found["orders"])]
    for density, error in found["attention_error"].items():
        lines.append(f"density {density}: attention error, recall (reordered / row-major)")
        for row in error["layers"]:
            lines.append(
                f"  layer {row['layer']}: {row['reordered']:.4f} / {row['unordered']:.4f}, "
                f"{row['reordered_recall']:.3f} / {row['unordered_recall']:.3f}"
            )
        lines.append(f"  lower on {error['layers_lower']} of {error['of']} layers")
        quality = found["psnr"][density]
        for side in (*SIDES, "difference"):
            one = quality[side]
            lines.append(f"  PSNR {side}: {one['mean']:.2f} dB [{one['low']:.2f}, {one['high']:.2f}]")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_accel.eval.paro", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", help="pipeline folder or hub id (default: the bundled model)")
    add("--densities", type=float, nargs="+", default=[0.5, 0.3])
    add("--calibration", type=positive, default=2, metavar="N", help="prompts to calibrate on (default: 2)")
    add("--prompts", type=positive, default=8, metavar="N", help="other prompts to measure on (default: 8)")
    add("--file", help="prompt file (default: the bundled shape suite)")
    add("--bins", type=int, default=4)
    add("--metric", default="mass")
    add("--budget", default="layer")
    add("--block-size", type=int, default=64)
    add("--steps", type=int)
    add("--error-steps", type=positive, default=8)
    add("--error-prompts", type=int, default=2)
    add("--seed", type=int, default=42)
    add("--backend", default="auto")
    add("--keep", metavar="DIR", help="keep the plan files here")
    add("-o", "--out", type=output_file, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args(argv)
    same = (
        "model",
        "bins",
        "metric",
        "budget",
        "block_size",
        "steps",
        "error_steps",
        "error_prompts",
        "seed",
        "backend",
    )
    calibration, test = _prompts(args.file, args.calibration, args.prompts)
    settings = Study(calibration, test, tuple(args.densities), **{name: getattr(args, name) for name in same})
    _calm_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.keep or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = study(settings, folder, lambda text: print(text, file=sys.stderr, flush=True))
    print("\n".join(report(found)))
    if args.out:
        write_json(args.out, found, indent=2)
    return 0


def _calm_libraries() -> None:
    """Loading bars would bury the lines of the study."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _prompts(file: str | None, calibration: int, test: int) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """The first ``calibration`` prompts of a file, and ``test`` others spread over the rest."""
    from importlib import resources

    from ..pipelines.prompts import read_prompts

    path = Path(file) if file else Path(str(resources.files("dit_accel.assets"))) / "prompts" / "shapes-120.txt"
    found = read_prompts(path)
    if calibration < 1 or test < 1 or calibration + test > len(found):
        raise UsageError(f"{path} has {len(found)} prompts; {calibration} to calibrate and {test} to test do not fit")
    rest = found[calibration:]
    spread = [rest[i * len(rest) // test] for i in range(test)]
    return tuple(found[:calibration]), tuple(spread)


if __name__ == "__main__":
    from .command import run as finish

    sys.exit(finish(main))
