"""The render job: every prompt to a file and its sidecar, one failure never costing the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import DitAccelError, UsageError
from . import sidecar
from .acceleration import check_backend
from .compare import Pair, compare
from .device_state import describe as describe_device
from .generate import Result, generate
from .job import Job, Shot, digest, resolve
from .load import load, pick_device, pick_dtype
from .model import ModelInfo, inspect_model
from .outputs import Outputs, claim, explain, prepare_folder, set_aside
from .video import side_by_side, write_frames, write_gif, write_mp4, write_png

DONE, SKIPPED, DIFFERS, FAILED, PENDING = "done", "skipped", "differs", "failed", "pending"

Judge = Callable[[Pair], dict[str, Any]]
Listener = Callable[[str, dict[str, Any]], None]


@dataclass
class Outcome:
    """What became of one shot. ``status``: done, skipped, differs (kept, made with other settings), failed, pending.

    ``damaged``: files of it that are there and are not what was written; they are set aside, not overwritten.
    """

    shot: Shot
    file: Path
    settings: dict[str, Any]
    status: str = PENDING
    detail: str = ""
    record: dict[str, Any] | None = None
    damaged: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        result = {"number": self.shot.number, "prompt": self.shot.prompt, "file": str(self.file), "status": self.status}
        result["settings"] = self.settings
        if self.detail:
            result["detail"] = self.detail
        if self.shot.choice.notes:
            result["notes"] = list(self.shot.choice.notes)
        if self.record:
            result |= {key: self.record[key] for key in ("seconds", "attention", "compare") if key in self.record}
        return result


@dataclass
class Plan:
    """A checked job: nothing in it is left to fail but the rendering itself."""

    job: Job
    info: ModelInfo
    device: torch.device
    dtype: torch.dtype
    outcomes: list[Outcome] = field(default_factory=list)

    compiled: bool = False

    @property
    def todo(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.status == PENDING]


def plan_job(job: Job, *, dry: bool = False) -> Plan:
    """Check everything that can be checked before weights are loaded, and see which outputs exist already.

    ``dry``: nothing is created on disk. Raises ``UsageError`` or ``UnsupportedError``.
    """
    device = pick_device(job.device)
    dtype = pick_dtype(job.dtype, device)
    image = job.image is not None or any(p.image is not None for p in job.prompts)
    info = inspect_model(job.model, image=image)
    shots = resolve(job, info)
    if any(shot.choice.processor for shot in shots):
        check_backend(job.accel.backend, device, dtype)
    if not dry:
        prepare_folder(job.out)
        if job.frames_dir is not None:
            prepare_folder(job.frames_dir, "--frames-dir")
    plan = Plan(job, info, device, dtype)
    weights = info.revision or info.fingerprint()
    for shot in shots:
        kind = str(dtype).removeprefix("torch.")
        settings = shot.settings(job, info, weights=weights, device=device.type, dtype=kind)
        plan.outcomes.append(_existing(job, Outcome(shot, job.out / (shot.stem + shot.suffix), settings)))
    _refuse_overwriting(plan)
    return plan


def render(
    plan: Plan,
    *,
    only: list[Outcome] | None = None,
    judge: Judge | None = None,
    listen: Listener | None = None,
    progress: bool = True,
) -> None:
    """Render what is pending, or ``only`` these of its outcomes. They are updated in place, also when this raises.

    ``judge`` turns the pair of a comparison into numbers. ``listen`` hears ``("start" | "end" | "note", {...})``.
    ``progress``: draw a bar per output. ``KeyboardInterrupt`` passes through; finished files stay.
    """
    tell = listen or (lambda event, data: None)
    todo = plan.todo if only is None else only
    if not todo:
        return
    tell("loading", {"model": plan.info.name, "device": str(plan.device)})
    try:
        pipe = load(plan.info, dtype=plan.dtype, device=str(plan.device), options=plan.job.load)
    except torch.OutOfMemoryError as error:
        raise DitAccelError(describe(error)) from error
    for outcome in todo:
        pipe.set_progress_bar_config(disable=not progress, desc=outcome.shot.stem[:40], leave=False, dynamic_ncols=True)
        tell("start", {"outcome": outcome})
        try:
            with claim(outcome.file):
                if not _appeared(plan.job, outcome):
                    outcome.record = _one(pipe, plan, outcome, judge, tell)
                    outcome.status, outcome.detail = DONE, ""
        except Exception as error:
            outcome.status, outcome.detail = FAILED, describe(error)
        tell("end", {"outcome": outcome})


def describe(error: Exception) -> str:
    """One message for a failure, with remedies where they are known."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"out of memory: {str(error).splitlines()[0]} Use --offload, fewer --frames or a smaller --size; "
            "run again with --resume to keep what is finished"
        )
    if isinstance(error, DitAccelError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _one(pipe: Any, plan: Plan, outcome: Outcome, judge: Judge | None, tell: Listener) -> dict[str, Any]:
    job, shot = plan.job, outcome.shot
    record: dict[str, Any] = {
        "schema": sidecar.SCHEMA,
        "digest": digest(outcome.settings),
        "settings": outcome.settings,
        "notes": list(shot.choice.notes),
    }
    if shot.choice.asked is not None:
        record["density_asked"] = shot.choice.asked
    pair = None
    if job.compare and shot.choice.processor is not None:
        pair = compare(pipe, shot, repeats=job.repeats, swap=shot.number % 2 == 0, tell=tell)
        result = pair.fast[-1]
        record["compare"] = judge(pair) if judge else {}
    else:
        result = generate(pipe, shot, shot.choice.processor)
        record["notes"] += _compiling(plan, result)
    record["attention"], record["seconds"] = result.attention, dict(result.seconds)
    if result.peak_memory is not None:
        record["peak_memory_bytes"] = result.peak_memory["allocated"]
        record["peak_reserved_bytes"] = result.peak_memory["reserved"]
    record["device"] = describe_device(plan.device) | {"compiled": result.compiled}
    if result.clocks is not None:
        record["device"]["clocks"] = result.clocks
    record["versions"] = sidecar.versions()
    _write(job, outcome, result, pair, record)
    return record


def _compiling(plan: Plan, result: Result) -> list[str]:
    """What to say about the first output whose kernels were compiled on the way."""
    first = not plan.compiled and result.attention.get("tier") in ("flex", "triton")
    plan.compiled = plan.compiled or first
    return ["the times of this first accelerated output include compiling its kernels"] if first else []


def _write(job: Job, outcome: Outcome, result: Result, pair: Pair | None, record: dict[str, Any]) -> None:
    """All files of a shot, the sidecar last: a sidecar under its final name means that the shot is whole."""
    shot, path = outcome.shot, outcome.file
    started = time.perf_counter()
    try:
        with Outputs() as outputs:
            made = {path.name: outputs.add(path)}
            if shot.is_video:
                write_mp4(made[path.name], result.frames, shot.fps)
            else:
                write_png(made[path.name], result.frames[0])
            if job.gif and shot.is_video:
                moving = path.with_suffix(".gif")
                made[moving.name] = outputs.add(moving)
                write_gif(made[moving.name], result.frames, shot.fps)
            folders = []
            if job.frames_dir is not None:
                write_frames(outputs.add(job.frames_dir / shot.stem), result.frames)
                folders.append(str(job.frames_dir / shot.stem))
            if pair is not None:
                beside = _beside(outcome)
                both = side_by_side(pair.dense[-1].frames, pair.fast[-1].frames)
                made[beside.name] = outputs.add(beside)
                if shot.is_video:
                    write_mp4(made[beside.name], both, shot.fps)
                else:
                    write_png(made[beside.name], both[0])
            record["seconds"]["export"] = time.perf_counter() - started
            record["files"] = [*made, *folders]
            record["contents"] = {name: sidecar.content(partial) for name, partial in made.items()}
            if outcome.damaged and not job.overwrite:
                kept = ", ".join(set_aside(job.out / name).name for name in outcome.damaged)
                record["notes"].append(f"takes the place of a damaged output, kept as {kept}")
            sidecar.write(outputs.add(sidecar.sidecar_path(job.out, shot.stem)), record)
            outputs.commit()
    except OSError as error:
        raise explain(error, path) from error


def _existing(job: Job, outcome: Outcome) -> Outcome:
    """Mark an outcome whose files are there already."""
    old = sidecar.read(sidecar.sidecar_path(job.out, outcome.shot.stem))
    if not job.resume or not outcome.file.exists():
        return outcome
    if old and old.get("digest") == digest(outcome.settings):
        damage = sidecar.damaged(old, job.out)
        if damage:
            outcome.damaged = tuple(damage)
            outcome.detail = "; ".join(f"{name} is damaged: {how}" for name, how in damage.items())
        else:
            outcome.status, outcome.record = SKIPPED, old
    elif not job.overwrite:
        outcome.status = DIFFERS
        old_settings = old.get("settings", {}) if old else {}
        changed = sidecar.differences(old_settings, outcome.settings) if old else ["it has no readable sidecar"]
        outcome.detail = "; ".join(changed)
    return outcome


def _appeared(job: Job, outcome: Outcome) -> bool:
    """Whether another run has finished a pending shot meanwhile, as resuming would take it.

    Raises ``DitAccelError`` where a file has appeared that must be kept.
    """
    if job.overwrite or not outcome.file.exists():
        return False
    now = _existing(job, Outcome(outcome.shot, outcome.file, outcome.settings))
    if now.status == SKIPPED:
        outcome.status, outcome.record, outcome.detail = SKIPPED, now.record, ""
        return True
    if now.damaged:
        outcome.damaged = now.damaged
        return False
    raise DitAccelError(
        f"{outcome.file} has appeared since this run began, and is kept; run again with --resume, or give another -o"
    )


def _others(job: Job, outcome: Outcome) -> list[Path]:
    """What a shot would write over besides its own output: files that no record of that output names, and that record
    where it is of another output, an image for a video."""
    stem = outcome.shot.stem
    own = (sidecar.read(sidecar.sidecar_path(job.out, stem)) or {}).get("files", [])
    found = [job.out / own[0]] if own and own[0] != outcome.file.name else []
    if job.gif and outcome.shot.is_video and outcome.file.with_suffix(".gif").name not in own:
        found.append(outcome.file.with_suffix(".gif"))
    if job.compare and _beside(outcome).name not in own:
        found.append(_beside(outcome))
    if job.frames_dir is not None and str(job.frames_dir / stem) not in own:
        found.append(job.frames_dir / stem)
    return [path for path in found if path.exists()]


def _beside(outcome: Outcome) -> Path:
    return outcome.file.with_name(f"{outcome.shot.stem}-dense-vs-{outcome.shot.choice.name}{outcome.shot.suffix}")


def _refuse_overwriting(plan: Plan) -> None:
    other = [] if plan.job.overwrite else [str(path) for o in plan.todo for path in _others(plan.job, o)]
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise UsageError(
            f"{', '.join(other[:3])}{more} of another run would be lost; give another -o or --frames-dir, or "
            "--overwrite to write over it"
        )
    taken = [o.file.name for o in plan.todo if o.file.exists() and not o.damaged]
    if taken and not plan.job.overwrite:
        more = f" and {len(taken) - 3} more" if len(taken) > 3 else ""
        raise UsageError(
            f"{', '.join(taken[:3])}{more} already in {plan.job.out}; use --resume to keep finished videos "
            "and render the rest, --overwrite to render again, or another -o"
        )
