"""The tuning job: short runs search, full runs on prompts held back confirm, a preset keeps what was found.

Short runs have the size and the length of the full ones, so that plans and speeds are those of the real thing, but an
eighth of the steps. Everything measured lies in a folder beside the preset, from which an interrupted job goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import DitAccelError, UsageError
from ...methods import find
from ...pipelines.acceleration import DENSE, Acceleration
from ...pipelines.calibrate import default_prompts
from ...pipelines.generate import generate
from ...pipelines.job import DEFAULT_SEED, Job, Shot, resolve
from ...pipelines.load import load, pick_device, pick_dtype
from ...pipelines.model import BUNDLED, ModelInfo, inspect_model
from ...pipelines.outputs import check_file
from ...pipelines.prompts import Prompt
from ...preset import Preset, write_preset
from ...processors import Processor
from ..environment import cpu, gpus, versions
from ..methods import METHODS
from ..shapes.suite import prompts as suite
from .bench import Bench, Store
from .budget import Budget
from .estimate import Estimate
from .plans import plan_path, write_plans
from .search import Found, Rules, search
from .space import DENSITIES, Setting, layer_groups, settings
from .verify import Verdict, verify

# Short runs have this share of the steps, and no fewer than so many.
SHORT, FEWEST = 1 / 8, 4
# A dense run that is watched for PARO, in ordinary dense runs.
WATCHED = 4
# Measurements kept for layer groups and quantised products of the best setting.
VARIANTS = 8
Say = Callable[[str], None]


@dataclass(frozen=True)
class TuneJob:
    """What to tune for. ``None`` takes the model's own default.

    ``prompts``: ``calibration`` of them are searched on and ``held_back`` others confirm; without any, the bundled
    model takes captions of its own. ``short_steps``: steps of the runs that search. ``limit``: how many of them, at
    most. ``rounds``: settings run in full, at most. ``command``: for the record.
    """

    budget: Budget
    out: Path
    prompts: tuple[Prompt, ...] = ()
    model: str | None = None
    methods: tuple[str, ...] = METHODS
    calibration: int = 3
    held_back: int = 2
    short_steps: int | None = None
    limit: int = 36
    rounds: int = 2
    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    seed: int = DEFAULT_SEED
    size: tuple[int, int] | None = None
    frames: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    overwrite: bool = False
    command: str = ""

    @property
    def folder(self) -> Path:
        """Where measurements and plans are kept."""
        return self.out.with_name(self.out.stem + ".tune")


@dataclass(frozen=True)
class Outcome:
    """``verdict``: of full runs. ``found``: what short ones said. ``files``: the preset and its plans, or none."""

    verdict: Verdict
    found: Found
    files: tuple[Path, ...]


class Tuning:
    """A checked job. ``short`` and ``full`` shots; the trial file numbers them one after the other. ``notes``: what
    the user should hear. Raises ``UsageError`` or ``UnsupportedError`` for what cannot work, before weights are loaded.
    """

    def __init__(self, job: TuneJob):
        self.job, self.device = job, pick_device(job.device)
        self.dtype = pick_dtype(job.dtype, self.device)
        self.info = inspect_model(job.model)
        _check(job)
        texts = _prompts(job, self.info)
        full = self._shots(texts, job.steps)
        steps = full[0].steps
        self.short_steps = job.short_steps or min(steps, max(FEWEST, math.ceil(steps * SHORT)))
        self.short = self._shots(texts[: job.calibration], self.short_steps)
        self.full = full[job.calibration :]
        self.sample = replace(texts[0], steps=steps)
        self.notes: list[str] = []
        quants: tuple[str | None, ...] = (None, "auto")
        if self.device.type == "cpu":
            quants = (None,)
            self.notes.append("quantised products are left out: on CPU they are emulated, and slower than float")
        self.quants = quants
        self.settings = [
            setting
            for method in job.methods
            for setting in settings((method,), dense_steps=(0.0,) if method == "adaspa" else (0.0, 0.25))
        ]
        self.store = Store(job.folder / "trials.json", self._about())

    def _about(self) -> dict[str, Any]:
        shot = self.full[0]
        return {
            "model": self.info.name, "weights": self.info.revision or self.info.fingerprint(), "frames": shot.frames,
            "size": [shot.width, shot.height], "steps": shot.steps, "short_steps": self.short_steps,
            "guidance": shot.call.get("guidance_scale"), "negative": shot.call.get("negative_prompt"),
            "seeds": [s.seed for s in (*self.short, *self.full)], "device": self.device.type, "dtype": str(self.dtype),
            "calibration": [s.prompt for s in self.short], "held_back": [s.prompt for s in self.full],
        }  # fmt: skip

    def _shots(self, prompts: Sequence[Prompt], steps: int | None) -> list[Shot]:
        given = tuple(replace(prompt, steps=steps or prompt.steps) for prompt in prompts)
        shots = resolve(self._job(given, Acceleration(DENSE)), self.info)
        for name in ("width", "height", "frames", "steps"):
            values = sorted({getattr(shot, name) for shot in shots}, key=str)
            if len(values) > 1:
                raise UsageError(
                    f"a preset serves one size and length of run; the prompts ask for {name} "
                    f"{', '.join(map(str, values))}. Give them all the same, and tune per size"
                )
        return shots

    def _job(self, prompts: tuple[Prompt, ...], accel: Acceleration) -> Job:
        job = self.job
        return Job(
            prompts, job.out.parent, model=job.model, accel=accel, guidance=job.guidance, negative=job.negative,
            seed=job.seed, size=job.size, frames=job.frames,
        )  # fmt: skip

    @property
    def calibrates(self) -> bool:
        """Whether PARO's plans are still to be made."""
        return "paro" in self.job.methods and not all(plan_path(self.job.folder, d).is_file() for d in DENSITIES)

    def load(self) -> None:
        """Load the pipeline and time one dense step. ``step`` and ``rest``: seconds of a step, and of a render beside
        its steps."""
        self.pipe = load(self.info, dtype=self.dtype, device=str(self.device))
        self.pipe.set_progress_bar_config(disable=True)
        # The first touches memory that the others find warm.
        runs = [generate(self.pipe, self.full[0], Processor(None), steps=1).seconds for _ in range(3)][1:]
        self.step = min(seconds.get("loop", seconds["total"]) for seconds in runs)
        self.rest = min(seconds["total"] for seconds in runs) - self.step

    def seconds(self) -> dict[str, float]:
        """How long what is left will take, by part, at most unless a method is slower than dense: every render counts
        as a dense one."""
        short, full = (n * self.step + self.rest for n in (self.short_steps, self.full[0].steps))
        done = sum(row["setting"] != DENSE and row["steps"] == self.short_steps for row in self.store.rows)
        renders, warm = max(self.job.limit - done, 0), self.step + self.rest
        dense = len(self.short) + renders / 6
        return {
            "calibration": WATCHED * short if self.calibrates else 0.0,
            "search": renders * (short + warm) + dense * short,
            "confirmation": len(self.full) * (1 + self.job.rounds) * full,
        }

    def run(self, tell: Callable[[dict[str, Any]], None] = lambda row: None) -> Outcome:
        """Search, confirm, and write the preset where a setting meets the budget. ``tell`` hears every row."""
        job, rules = self.job, Rules(ahead=self.job.held_back)
        if self.calibrates:
            first = self._shots(default_prompts(self.info)[:1], self.short_steps)
            write_plans(self.pipe, self.info, first, DENSITIES, job.folder)
        self.bench = Bench(self.pipe, [*self.short, *self.full], {}, self.store, tell=tell)
        prompts = range(len(self.short))
        reserve = min(VARIANTS, job.limit // 4)
        found = search(self._usable(self.settings), prompts, self._measure, job.budget,
                       replace(rules, limit=job.limit - reserve))  # fmt: skip
        base = found.chosen or found.nearest
        pool = [*self.settings, *self._variants(base.setting)]
        limit = replace(rules, limit=job.limit - found.measurements)
        found = replace(
            search(self._usable(pool), prompts, self._measure, job.budget, limit, known=found.measured),
            failed={**found.failed, **self.failed},
        )
        verdict = verify(found, self._confirm, job.budget, rules, job.rounds)
        files = () if verdict.chosen is None else tuple(write_preset(job.out, self._preset(verdict.chosen, found)))
        return Outcome(verdict, found, files)

    def _usable(self, pool: Sequence[Setting]) -> list[Setting]:
        """Settings that can run here and are not another under a second name; their processors go to the bench."""
        self.failed: dict[Setting, str] = {}
        known: dict[Processor, Setting] = {}
        for setting in pool:
            accel = setting.acceleration(lambda density: plan_path(self.job.folder, density))
            try:
                processor = resolve(self._job((self.sample,), accel), self.info)[0].choice.processor
            except DitAccelError as error:
                self.failed[setting] = str(error)
                continue
            if known.setdefault(processor, setting) is setting:
                self.bench.processors[setting.name] = processor
        return list(known.values())

    def _variants(self, base: Setting) -> list[Setting]:
        """The best setting and its sparser neighbour with each layer group dense, and on GPUs quantised."""
        sparser = [d for d in sorted(DENSITIES, reverse=True) if d < base.density][:1]
        groups = layer_groups(self.info.transformer.get("num_layers", 0)).values()
        return [
            replace(base, density=density, dense_layers=layers, quant=quant)
            for density in (base.density, *sparser)
            for quant in self.quants
            for layers in ((), *groups)
        ]

    def _measure(self, setting: Setting, prompt: int) -> Any:
        return self.bench.measure(setting.name, prompt)

    def _confirm(self, setting: Setting) -> Estimate:
        numbers = range(len(self.short), len(self.short) + len(self.full))
        for number in range(len(self.short)):
            self.bench.forget(number)
        return Estimate(setting, {n: self.bench.measure(setting.name, n) for n in numbers})

    def _preset(self, chosen: Estimate, found: Found) -> Preset:
        shot, about = self.full[0], self.store.document["about"]
        made_for = {
            "model": about["model"], "weights": about["weights"], "width": shot.width, "height": shot.height,
            "frames": shot.frames, "steps": shot.steps, "grid": self._grid(),
        }  # fmt: skip
        provenance = {
            "budget": str(self.job.budget), "setting": chosen.setting.to_dict(), "measured": figures(chosen),
            "searched": [figures(e) | {"setting": e.setting.name} for e in found.front],
            **{k: about[k] for k in ("calibration", "held_back", "seeds", "short_steps", "guidance", "negative")},
            "device": about["device"], "dtype": about["dtype"], "command": self.job.command, "library": __version__,
            "environment": {"versions": versions(), "cpu": cpu(), "gpus": gpus()},
        }  # fmt: skip
        return Preset(self.bench.processors[chosen.setting.name], made_for, provenance)

    def _grid(self) -> list[int] | None:
        from ...pipelines.geometry import geometry

        shot = self.full[0]
        return list(geometry(self.info).layout(shot.width, shot.height, shot.frames).grid) if shot.width else None


def figures(estimate: Estimate) -> dict[str, Any]:
    """What was measured of a setting: means, and each prompt's."""
    trials = [estimate.trials[number] for number in sorted(estimate.trials)]
    means = {"psnr": estimate.mean("psnr"), "speed": estimate.mean("speed"), "prompts": len(trials)}
    return means | {"by_prompt": [{"psnr": t.psnr, "speed": t.speed} for t in trials]}


def _check(job: TuneJob) -> None:
    for name, value, least in (
        ("--calibration", job.calibration, 2), ("--held-back", job.held_back, 1), ("--renders", job.limit, 4),
        ("--rounds", job.rounds, 1), ("--short-steps", job.short_steps, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise UsageError(f"{name} must be at least {least}; got {value}")
    for method in job.methods:
        find(method)
    if job.out.exists() and not job.overwrite:
        raise UsageError(f"{job.out} exists; give another -o, or --overwrite to replace it")
    for path in (job.out, job.folder / job.out.name):
        check_file(path)


def _prompts(job: TuneJob, info: ModelInfo) -> list[Prompt]:
    """Prompts to search on, then those held back."""
    count = job.calibration + job.held_back
    if not job.prompts and info.name == BUNDLED:
        texts = suite("shapes-120")
        return [Prompt(texts[i * len(texts) // count], i + 1) for i in range(count)]
    if len(job.prompts) < count:
        raise UsageError(
            f"tuning needs {count} prompts, {job.calibration} to search on and {job.held_back} held back, and got "
            f"{len(job.prompts)}; give a file with more of what you render, or lower --calibration or --held-back"
        )
    return list(job.prompts[:count])
