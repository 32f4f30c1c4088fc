"""The calibration job: render a few prompts densely, keep block statistics, write a PARO plan file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__
from ..diffusers.api import denoisers
from ..diffusers.facts import facts_of
from ..diffusers.families import family_of
from ..errors import DitAccelError, UsageError
from ..guard import Guard
from ..methods.base import check_density
from ..methods.observe import Listener as Watch
from ..methods.observe import Observe
from ..methods.orders import NAMES
from ..methods.paro_calibration import LayerPlan, OrderVotes, calibrate, check_budget, check_metric, needs_detail
from ..methods.paro_file import Header, describe_layout, write
from ..methods.paro_statistics import Statistics
from ..processors import Processor
from ..schedule import Schedule
from .acceleration import Acceleration
from .generate import generate
from .geometry import geometry
from .job import DEFAULT_SEED, Job, Shot, resolve
from .load import load, pick_device, pick_dtype
from .model import BUNDLED, ModelInfo, inspect_model
from .options import LoadOptions
from .outputs import check_file
from .prompts import Prompt, read_prompts

# The published calibration takes one or two example prompts of the model's own.
GENERIC = (
    "a golden retriever runs along a sandy beach at sunset, waves rolling in behind it",
    "a slow aerial shot over a snowy mountain village with lights in the windows",
)

# Settings of a render job that a calibration has under the same name.
_SAME = ("model", "steps", "guidance", "negative", "image", "seed", "size", "frames")

Listener = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class DenseRuns:
    """The dense renders that a calibration watches. ``None`` takes the model's own default.

    ``out``: the file to write. ``prompts``: one or two do; without any, two built-in ones. ``size``: (width, height) in
    pixels, as what is calibrated will be used with.
    """

    out: Path
    prompts: tuple[Prompt, ...] = ()
    model: str | None = None
    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    image: str | None = None
    seed: int = DEFAULT_SEED
    size: tuple[int, int] | None = None
    frames: int | None = None
    overwrite: bool = False
    device: str = "auto"
    dtype: str = "auto"
    offload: bool = False
    backend: str = "auto"


@dataclass(frozen=True)
class CalibrationJob(DenseRuns):
    """A PARO plan to calibrate. ``density``: kept fraction.

    ``bins``: timestep bins with a map each (released: 10 for CogVideoX, 4 for Wan). ``metric``, ``alpha``,
    ``maximize_sparse``: how orders are chosen, see :func:`~dit_accel.methods.paro_calibration.costs`. ``budget``: what
    meets the density, every ``"layer"`` or the ``"model"`` in the mean. ``rows``: fraction of query rows looked at.
    ``orders_first``: choose the orders in runs of their own, a sixth of the memory and twice the time; None does so
    where memory is short.
    """

    density: float = 0.5
    bins: int = 4
    metric: str = "mass"
    alpha: float = 1.0
    maximize_sparse: bool = False
    budget: str = "layer"
    block_size: int = 64
    rows: float = 1.0
    orders_first: bool | None = None


@dataclass(frozen=True)
class Outcome:
    """What was written. ``layers``: per layer its index, heads per axis order, density and recall. ``seconds``: of the
    dense runs, and of choosing and writing."""

    path: Path
    header: Header
    layers: tuple[dict[str, Any], ...]
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        keep = (
            "model",
            "steps",
            "bins",
            "block_size",
            "heads",
            "density",
            "reached",
            "recall",
            "metric",
            "alpha",
            "budget",
        )
        values = {key: getattr(self.header, key) for key in keep}
        values |= {"layout": str(self.header.layout), "fingerprint": self.header.fingerprint}
        return {
            "file": str(self.path),
            "bytes": self.path.stat().st_size,
            **values,
            "seconds": self.seconds,
            "layers": list(self.layers),
        }


def calibrate_paro(job: CalibrationJob, *, listen: Listener | None = None, progress: bool = True) -> Outcome:
    """Run ``job`` and write its plan. Everything that can be checked is, before weights are loaded.

    ``listen`` hears ``("loading" | "orders first" | "start", {...})``. Raises ``UsageError`` or ``UnsupportedError``
    for what cannot work, ``DitAccelError`` where memory for the statistics is short.
    """
    tell = listen or (lambda event, data: None)
    _check(job)
    pipe, info, shots = prepare(job, tell)
    first = _orders_first(job, pipe, info, shots[0])
    started = time.perf_counter()
    run = {"backend": job.backend, "tell": tell, "progress": progress}
    orders = None
    if first:
        tell("orders first", {"asked": bool(job.orders_first)})
        votes = OrderVotes(block_size=job.block_size, rows=job.rows, **_choice(job))
        observe(pipe, shots, votes.observe, **run)
        orders = votes.winners()
    statistics = _statistics(job, orders)
    observe(pipe, shots, statistics.observe, **run)
    ran = time.perf_counter()
    header = describe_run(pipe, info, shots, statistics, job)
    layers: list[dict[str, Any]] = []

    def plans() -> Any:
        for layer, plan in calibrate(statistics, density=job.density, budget=job.budget, **_choice(job)):
            layers.append(summary(layer, plan))
            yield layer, plan

    header = write(job.out, header, plans())
    seconds = {"run": ran - started, "choose": time.perf_counter() - ran}
    return Outcome(job.out, header, tuple(layers), seconds)


def prepare(job: DenseRuns, tell: Listener) -> tuple[Any, ModelInfo, list[Shot]]:
    """The loaded pipeline of a job, its model, and its renders."""
    device = pick_device(job.device)
    dtype = pick_dtype(job.dtype, device)
    info = inspect_model(job.model, image=job.image is not None or any(p.image for p in job.prompts))
    shots = plan_shots(job, info)
    tell("loading", {"model": info.name, "device": str(device)})
    options = LoadOptions(offload="model" if job.offload else None)
    return load(info, dtype=dtype, device=str(device), options=options), info, shots


def plan_shots(job: DenseRuns, info: ModelInfo) -> list[Shot]:
    """The dense renders of a job. Raises ``UsageError`` where prompts ask for different sizes or step counts."""
    prompts = job.prompts or default_prompts(info)
    same = {name: getattr(job, name) for name in _SAME}
    request = Job(prompts, job.out.parent, accel=Acceleration(method="dense"), **same)
    shots = resolve(request, info)
    for name in ("width", "height", "frames", "steps"):
        values = sorted({getattr(shot, name) for shot in shots}, key=str)
        if len(values) > 1:
            raise UsageError(
                f"a plan serves one size and length of run; the prompts ask for {name} {', '.join(map(str, values))}. "
                "Give them all the same, and make one plan per size"
            )
    return shots


def default_prompts(info: ModelInfo) -> tuple[Prompt, ...]:
    """Two prompts: captions that the bundled model understands, or sentences for any other."""
    if info.name == BUNDLED:
        return tuple(read_prompts(Path(str(resources.files("dit_accel.assets") / "prompts" / "prompt.txt")))[:2])
    return tuple(Prompt(text, number) for number, text in enumerate(GENERIC, 1))


def observe(
    pipe: Any,
    shots: list[Shot],
    watch: Watch,
    *,
    backend: str = "auto",
    tell: Listener | None = None,
    progress: bool = False,
) -> None:
    """Render ``shots`` densely while ``watch`` sees every call; one that it cannot see raises."""
    processor = Processor(
        Observe(watch), schedule=Schedule.none(), guard=Guard.off(), backend=backend, on_unsupported="error"
    )
    for shot in shots:
        pipe.set_progress_bar_config(disable=not progress, desc=shot.stem[:40], leave=False, dynamic_ncols=True)
        if tell:
            tell("start", {"shot": shot, "shots": len(shots)})
        generate(pipe, shot, processor)


def describe_run(pipe: Any, info: ModelInfo, shots: list[Shot], statistics: Statistics, job: CalibrationJob) -> Header:
    """The header of the plan that a run gives; :func:`~dit_accel.methods.paro_file.write` completes it."""
    model = denoisers(pipe)[0]
    facts = facts_of(model, family_of(model))
    return Header(
        model=facts.name,
        config=facts.config,
        segments=describe_layout(statistics.shape.layout),
        steps=shots[0].steps,
        bins=statistics.bins,
        block_size=statistics.block_size,
        layers=(),
        heads=0,
        density=job.density,
        reached=0.0,
        recall=0.0,
        metric=job.metric,
        alpha=job.alpha,
        budget=job.budget,
        library=__version__,
        weights=f"{info.name} {info.revision or info.fingerprint()}",
        scheduler=type(pipe.scheduler).__name__,
        prompts=tuple(shot.prompt for shot in shots),
    )


def summary(layer: int, plan: LayerPlan) -> dict[str, Any]:
    """One layer's choices as plain JSON values."""
    orders = {NAMES[i]: int((plan.orders == i).sum()) for i in plan.orders.unique().tolist()}
    density, recall = sum(plan.density) / len(plan.density), float(plan.recall.mean())
    return {"layer": layer, "orders": orders, "density": density, "recall": recall}


def _choice(job: CalibrationJob) -> dict[str, Any]:
    return {"metric": job.metric, "alpha": job.alpha, "maximize_sparse": job.maximize_sparse}


def _statistics(job: CalibrationJob, orders: dict[int, Tensor] | None = None) -> Statistics:
    detail = orders is None and needs_detail(job.metric, job.alpha)
    return Statistics(bins=job.bins, block_size=job.block_size, detail=detail, rows=job.rows, orders=orders)


def _check(job: CalibrationJob) -> None:
    """Raise ``UsageError`` for settings that make no sense."""
    check_density(job.density)
    check_budget(job.budget)
    check_metric(job.metric, job.alpha, detail=True)
    _statistics(job)
    check_out(job)


def check_out(job: DenseRuns) -> None:
    """Raise ``UsageError`` where the file cannot be written."""
    if not job.out.parent.is_dir():
        raise UsageError(f"-o {job.out}: there is no folder {job.out.parent}; create it, or give another -o")
    if job.out.exists() and not job.overwrite:
        raise UsageError(f"{job.out} exists; give another -o, or --overwrite to replace it")
    check_file(job.out)


def _orders_first(job: CalibrationJob, pipe: Any, info: ModelInfo, shot: Shot) -> bool:
    """Whether the orders take runs of their own. Raises ``DitAccelError`` where even then memory is short: said before
    the run, not half-way."""
    import psutil

    layout = geometry(info).layout(shot.width, shot.height, shot.frames) if shot.width else None
    models = denoisers(pipe)
    heads = dict(models[0].config).get("num_attention_heads")
    if layout is None or not isinstance(heads, int):
        return bool(job.orders_first)
    layers, have = facts_of(models[0], family_of(models[0])).layers, psutil.virtual_memory().available
    if not job.orders_first and _statistics(job).bytes(layout, heads, layers) <= have:
        return False
    if job.orders_first is False:
        need = _statistics(job).bytes(layout, heads, layers)
        way = "leave orders_first to the tool"
    else:
        need = _statistics(job, {}).bytes(layout, heads, layers)
        way = f"use fewer --bins (now {job.bins}) or a larger --block-size (now {job.block_size})"
    if need > have:
        raise DitAccelError(
            f"the statistics of {info.name} on {layout} take {need / 1e9:.1f} GB and {have / 1e9:.1f} GB of memory are "
            f"free; {way}, or free some memory"
        )
    return True
