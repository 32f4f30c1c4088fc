"""Which attention a shot gets: method, parameters, dense steps and layers, said aloud where the tool decided."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from ..diffusers.families import known_families
from ..errors import DitAccelError, UnsupportedError, UsageError
from ..guard import Guard
from ..kernels.block_sparse import flex
from ..layout import Layout
from ..methods import Method, find
from ..precision import read_precision
from ..preset import read_preset
from ..processors import Processor, QuantProcessor
from ..schedule import Schedule
from .model import ModelInfo

DENSE = "dense"
MISS = 0.2


@dataclass(frozen=True)
class Acceleration:
    """What the user asked of attention. ``method=None`` lets the tool choose; ``"dense"`` is stock attention.

    ``density``: kept fraction in (0, 1]. ``dense_steps``: leading steps left dense, a count or a fraction.
    ``dense_layers``: leading layers left dense, a count or a set of layer indices. ``parameters``: the method's
    own, by name. ``backend``: an execution tier or ``"auto"``. ``quant``: a preset of quantised products, by name, or
    ``"auto"``; with ``"dense"`` too. ``preset``: a file of `dit-accel tune`, which says all of this but the backend and
    the guard. ``guard``: run-time checks, None for the default ones.
    """

    method: str | None = None
    density: float | None = None
    dense_steps: int | float | None = None
    dense_layers: int | frozenset[int] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    quant: str | None = None
    preset: str | None = None
    guard: Guard | None = None


@dataclass(frozen=True)
class Choice:
    """The decision. ``processor`` is None for dense attention. ``density``: the plan's on the video tokens, if known.

    ``notes``: what the user should hear. ``asked``: the density that was asked for, if any.
    """

    processor: Processor | None
    density: float | None = None
    notes: tuple[str, ...] = ()
    asked: float | None = None

    def missed(self, had: float | None) -> bool:
        """Whether a run that ``had`` this density misses the one asked for by more than a fifth."""
        return self.asked is not None and had is not None and abs(had - self.asked) > MISS * self.asked

    @property
    def name(self) -> str:
        return self.processor.name if self.processor else DENSE


def choose(accel: Acceleration, info: ModelInfo, *, layout: Layout | None, frames: int, steps: int) -> Choice:
    """Decide for one shot of ``frames`` frames and ``steps`` steps; ``layout`` holds its tokens, if known.

    Raises ``UsageError`` for values that cannot be, ``UnsupportedError`` where the method named has no meaning here.
    """
    if accel.preset is not None:
        return _preset(accel, info, layout, frames, steps)
    if accel.density is not None and not 0 < accel.density <= 1:
        raise UsageError(f"--density is the kept fraction and lies in (0, 1]; got {accel.density}")
    name, why = (accel.method, None) if accel.method else _default(accel, info, layout, frames)
    _check_steps(accel, steps)
    _check_layers(accel, info)
    dense = name.lower() == DENSE
    notes = []
    if dense:
        _refuse_leftovers(accel, why)
        notes = [f"dense attention: {why}"] if why else []
        if accel.quant is None:
            return Choice(None, 1.0, tuple(notes))
    method = None if dense else _method(name, accel, info.defaults)
    if method is not None and (layout is not None or frames < 2):
        method.check(layout or Layout(grid=(1, 1, 64)))
    _check_family(name, info)
    if method is None:
        processor = QuantProcessor(accel.quant, schedule=_schedule(accel, None), **_running(accel))
        density = 1.0
    else:
        method, density, miss = _with_density(method, accel.density, layout)
        notes += miss
        schedule = _schedule(accel, method)
        processor = Processor(method, quant=accel.quant, schedule=schedule, **_running(accel))
    _check_precision(processor)
    if len(processor.dense_steps(steps)) >= steps:
        notes.append(f"all {steps} steps run dense under this schedule; nothing is accelerated (lower --dense-steps)")
    return Choice(processor, density, tuple(notes), accel.density)


def _preset(accel: Acceleration, info: ModelInfo, layout: Layout | None, frames: int, steps: int) -> Choice:
    """What a preset says, and a note where this run is another than it was tuned for."""
    given = _given(accel) + ([f"--method {accel.method}"] if accel.method else [])
    given += [f"--quant {accel.quant}"] if accel.quant else []
    if given:
        raise UsageError(f"--preset {accel.preset} sets all of attention; leave out {', '.join(given)}")
    preset = read_preset(accel.preset)
    processor = copy.copy(preset.processor)
    if accel.backend != "auto":
        processor.backend = accel.backend
    if accel.guard is not None:
        processor.guard = accel.guard
    _check_family(processor.name, info)
    _check_precision(processor)
    if processor.method is not None and layout is not None:
        processor.method.check(layout)
    here = {"weights": info.revision or info.fingerprint(), "frames": frames, "steps": steps}
    here["grid"] = None if layout is None else list(layout.grid)
    other = preset.differences(here)
    notes = [f"{accel.preset} was tuned for another run, its figures do not hold: {'; '.join(other)}"] if other else []
    density = 1.0 if processor.method is None else planned_density(processor.method, layout)
    return Choice(processor, density, tuple(notes))


def _check_family(name: str, info: ModelInfo) -> None:
    if info.family is None:
        known = ", ".join(sorted(model for family in known_families() for model in family.models))
        raise UnsupportedError(
            f"{name} cannot run on {info.transformer_class}, which no family row knows; use --method dense, or "
            f"register a row (dit_accel.diffusers.register_family). Known: {known}"
        )


def _check_precision(processor: Processor) -> None:
    """That the precision file can be read, if there is one. Raises ``UsageError``."""
    file = getattr(processor.quant, "plan_file", None)
    if file is not None:
        read_precision(file)


def _running(accel: Acceleration) -> dict[str, Any]:
    """How a processor runs, whatever it runs."""
    return {"backend": accel.backend, "guard": accel.guard}


def _default(accel: Acceleration, info: ModelInfo, layout: Layout | None, frames: int) -> tuple[str, str | None]:
    """The default method, and why it is dense where it is: the model's own plan where that fits, else Radial."""
    if info.family is None:
        return DENSE, f"no family row knows {info.transformer_class}, so nothing can be accelerated"
    own = info.defaults.get("method")
    if own and layout is not None and accel.density is None and not accel.parameters:
        try:
            _method(own, accel, info.defaults).check(layout)
        except DitAccelError:
            pass  # made for another size or length
        else:
            return own, None
    if frames > 1:
        return "radial", None
    kind = "a single frame" if info.is_video else "an image model"
    return DENSE, f"{kind} has no default method yet; name one with --method"


def _check_steps(accel: Acceleration, steps: int) -> None:
    first = accel.dense_steps
    if isinstance(first, int) and first > steps:
        raise UsageError(f"--dense-steps {first} is more than the {steps} steps of the run; give 0 to {steps}")


def _check_layers(accel: Acceleration, info: ModelInfo) -> None:
    """Layers that the model cannot have. Its configuration tells how many there are at most, if anything."""
    given = accel.dense_layers
    known = [n for key, n in info.transformer.items() if re.fullmatch(r"num_(\w+_)?layers", key) and isinstance(n, int)]
    wanted = given if isinstance(given, int) else max(given or [-1]) + 1
    if given is not None and known and wanted > sum(known):
        told = given if isinstance(given, int) else ",".join(map(str, sorted(given)))
        raise UsageError(
            f"--dense-layers {told} goes beyond the {sum(known)} layers of {info.name}; give a count of 0 to "
            f"{sum(known)}, or indices of 0 to {sum(known) - 1}"
        )


def _schedule(accel: Acceleration, method: Method | None) -> Schedule:
    given = {"first": accel.dense_steps, "layers": accel.dense_layers}
    given = {key: value for key, value in given.items() if value is not None}
    return replace(Schedule.none() if method is None else method.default_schedule(), **given)


def _method(name: str, accel: Acceleration, defaults: dict[str, Any]) -> Method:
    cls = find(name)
    allowed = [f.name for f in fields(cls)]
    unknown = accel.parameters.keys() - set(allowed)
    if unknown:
        raise UsageError(
            f"method {cls.name!r} has no parameter {', '.join(sorted(unknown))}; "
            f"allowed: {', '.join(allowed) or 'none'}"
        )
    tuned = defaults.get("methods", {}).get(cls.name, {})
    return cls(**{**tuned, **accel.parameters})


def _with_density(
    method: Method, density: float | None, layout: Layout | None
) -> tuple[Method, float | None, list[str]]:
    if density is None:
        return method, planned_density(method, layout), []
    if layout is None:
        raise UnsupportedError(
            "--density needs the token grid, which this model's configuration does not tell; "
            "set the method's own parameters with --param instead"
        )
    method, reached = method.with_density(density, layout)
    if abs(reached - density) <= MISS * density:
        return method, reached, []
    note = f"density {density:g} is out of reach of {method.name} on {layout}; the nearest is {reached:.3f}"
    return method, reached, [note]


def planned_density(method: Method, layout: Layout | None) -> float | None:
    """The density of a method's plans on ``layout``; None where it depends on the tensors."""
    return None if layout is None else method.known_density(layout)


def check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ``UnsupportedError`` when the tier named cannot run on ``device``, before any weight is loaded."""
    if backend == "triton":
        try:
            from ..kernels.block_sparse import triton as tier
        except ImportError as error:
            raise UnsupportedError(f"--backend triton: not importable ({error}); pip install triton") from None
        # The verdict follows from the query's device, dtype and head size; the smallest one does.
        why = tier.refuses(torch.empty((1, 1, 1, 64), dtype=dtype, device=device), None)
    elif backend == "flex":
        why = flex.unavailable(device.type)
    else:
        return
    if why:
        raise UnsupportedError(f"--backend {backend} cannot run here: {why}; use --backend auto")


def _refuse_leftovers(accel: Acceleration, why: str | None) -> None:
    given = _given(accel)
    if not given:
        return
    which = f"{', '.join(given)} set{'s' if len(given) == 1 else ''} a sparse method"
    if accel.method is None:
        raise UsageError(f"{which}, and there is none by default: {why}")
    raise UsageError(f"{which}, and --method dense has none; leave {'it' if len(given) == 1 else 'them'} out")


def _given(accel: Acceleration) -> list[str]:
    """The flags of a sparse method that were given; with quantised products a schedule stands without one."""
    flags = (
        ("--density", accel.density),
        ("--dense-steps", accel.dense_steps if accel.quant is None else None),
        ("--dense-layers", accel.dense_layers if accel.quant is None else None),
        ("--param", accel.parameters or None),
    )
    return [flag for flag, value in flags if value is not None]
