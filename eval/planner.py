"""What a setting costs and can gain, before anything is downloaded or loaded: from configuration files alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..diffusers.facts import facts_of
from ..errors import UnsupportedError, UsageError
from ..functional import tier_of
from ..layout import Layout
from ..lowering import lower
from ..methods import Method
from ..pipelines.acceleration import Acceleration
from ..pipelines.geometry import geometry
from ..pipelines.job import Job, Shot, resolve
from ..pipelines.load import pick_device, pick_dtype
from ..pipelines.model import ModelInfo, inspect_model
from ..pipelines.prompts import Prompt
from ..processors import Processor
from ..quant import resolve_quant
from ..schedule import Schedule
from ..step import Step
from .devices import CLASSES
from .flops import Operations, count, skeleton
from .probe import Probe
from .speed import amdahl

# Gains below WORTH do not pay for a method. Below SMALL with attention for free, attention's share is what is lacking.
WORTH, SMALL = 1.1, 1.25


@dataclass(frozen=True)
class Question:
    """What to plan. ``None`` takes the model's own default. ``image``: as an image-to-video pipeline."""

    model: str | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    image: bool = False
    accel: Acceleration = dataclasses.field(default_factory=Acceleration)
    device: str = "auto"
    dtype: str = "auto"


def answer(question: Question) -> dict[str, Any]:
    """The plan of a run as plain JSON values; the sections are those that ``dit-accel plan`` prints.

    Raises ``UsageError`` and ``UnsupportedError`` as rendering would, before any weight is asked for.
    """
    info = inspect_model(question.model, image=question.image)
    shot = _shot(question, info)
    layout, words = _tokens(info, shot)
    model = skeleton(info)
    operations = count(model, info.family, layout, words)
    device = pick_device(question.device)
    dtype = pick_dtype(question.dtype, device)
    branches = _branches(info, shot)
    processor = shot.choice.processor
    result: dict[str, Any] = {
        "model": {"name": info.name, "pipeline": info.pipeline_class.__name__, "transformer": info.transformer_class},
        "run": {
            "width": shot.width, "height": shot.height, "frames": shot.frames, "steps": shot.steps,
            "forwards_per_step": branches,
        },
        "tokens": {
            "sequence": layout.tokens, "grid": list(layout.grid), "text_in_sequence": layout.text,
            "text_attended": words, "layout": str(layout),
        },
        "operations": _operations(operations, shot.steps * branches),
        "notes": list(shot.choice.notes),
    }  # fmt: skip
    if processor is not None and processor.quant is not None:
        result["notes"].append("quantised products are not part of the prediction")
    if processor is None or processor.method is None:
        result["method"] = None
        return result | {"verdict": _dense_verdict(operations)}
    method, schedule = processor.method, processor.schedule
    method.check_model(facts_of(model, info.family))
    found = Probe.of(method, layout, operations, shot.choice.density)
    layers = _layers(method, schedule, shot.steps, operations.layers, found)
    sparse = 1 - sum(row["dense_steps"] for row in layers) / len(layers)
    density = None if found.density is None else sum(row["density"] for row in layers) / len(layers)
    result |= {
        "method": method.to_dict(),
        "schedule": schedule.to_dict(),
        "density": {
            "plan": found.density, "source": found.source, "effective": density, "sparse_share": sparse,
            "layers": layers,
        },
        "padding": found.padding,
        "bound": {
            "operations": None if density is None else amdahl(operations.share, density),
            "free_attention": amdahl(operations.share, 1 - sparse),
        },
        "predictions": _predictions(operations, found, sparse),
        "memory": {
            "plan_tables": found.tables,
            "state": method.state_bytes(layout, layers=operations.layers, heads=operations.heads, batch=branches),
        },
        "tier": _tier(found, device, dtype, operations, processor),
    }  # fmt: skip
    return result | {"verdict": _verdict(result)}


def _shot(question: Question, info: ModelInfo) -> Shot:
    same = {name: getattr(question, name) for name in ("model", "size", "frames", "steps", "guidance", "accel")}
    (shot,) = resolve(Job((Prompt("a prompt"),), Path("."), **same), info)
    if shot.width is None:
        raise UsageError(f"{info.name} does not say its own size; give --size WxH")
    return shot


def _tokens(info: ModelInfo, shot: Shot) -> tuple[Layout, int]:
    """The sequence, and how many text tokens it or the cross-attention holds."""
    known = info.call_arguments.get("max_sequence_length")
    words = info.defaults.get("max_sequence_length") or (known if isinstance(known, int) else 0)
    joint = bool(info.family and info.family.joint)
    layout = geometry(info).layout(shot.width, shot.height, shot.frames, words if joint else 0)
    if layout is None:
        raise UnsupportedError(f"the configuration of {info.name} does not tell its token grid, so nothing can be said")
    return layout, words


def _branches(info: ModelInfo, shot: Shot) -> int:
    """Forwards per step: two under classifier-free guidance, one where the guidance scale is an input of the model."""
    return 1 if info.transformer.get("guidance_embeds") or shot.call.get("guidance_scale", 1.0) <= 1 else 2


def _operations(found: Operations, forwards: int) -> dict[str, Any]:
    return {
        "attention": found.attention, "cross_attention": found.cross, "linear": found.linear,
        "attention_share": found.share, "layers": found.layers, "heads": found.heads, "width": found.width,
        "run_total": found.total * forwards, "run_attention": found.attention * forwards,
    }  # fmt: skip


def _layers(method: Method, schedule: Schedule, steps: int, layers: int, found: Probe) -> list[dict[str, Any]]:
    """Per layer the density of its plan, the share of steps that leave it dense, and the effective density."""
    own, rows = set(method.dense_steps(steps)), []
    for layer in range(layers):
        kept = found.by_layer.get(layer, found.density)
        dense = sum(i in own or schedule.is_dense(Step(index=i, total=steps), layer) for i in range(steps)) / steps
        rows.append({
            "layer": layer, "plan": kept, "dense_steps": dense,
            "density": None if kept is None else dense + (1 - dense) * kept,
        })  # fmt: skip
    return rows


def _predictions(operations: Operations, found: Probe, sparse: float) -> list[dict[str, Any]]:
    if found.visited is None:
        return []
    rest = operations.cross + operations.linear
    return [device.predict(operations.attention, rest, found.visited, sparse) for device in CLASSES]


def _tier(
    found: Probe, device: torch.device, dtype: torch.dtype, operations: Operations, processor: Processor
) -> dict[str, Any]:
    """The tier that would run on this machine, and why those before it would not; and the one of NVIDIA GPUs."""
    plan, dim = found.plan or found.trial, operations.width // operations.heads
    where = {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "on_gpus": _on_gpus(dim)}
    if plan is None:
        return {**where, "name": None, "why": found.why}
    # The verdict follows from device, dtype, head size and the plan's form.
    q = torch.empty((1, operations.heads, 1, dim), dtype=dtype, device=device)
    quant = resolve_quant(processor.quant, device)
    name, why = tier_of(lower(plan.to(device)), q, backend=processor.backend, quant=quant)
    return {**where, "name": name, "why": why}


def _on_gpus(dim: int) -> dict[str, Any]:
    """What NVIDIA GPUs of compute capability 8.0 and newer would run in bfloat16, as far as it shows without one."""
    try:
        from ..kernels.block_sparse import triton
    except ImportError as error:
        return {"name": "flex", "why": f"triton is not importable here ({error})"}
    why = triton.unsuited(torch.bfloat16, dim)
    return {"name": "flex", "why": f"triton: {why}"} if why else {"name": "triton", "why": "first choice there"}


def _dense_verdict(operations: Operations) -> dict[str, Any]:
    return _no(f"dense attention: nothing is accelerated; attention is {operations.share:.0%} of a step")


def _verdict(result: dict[str, Any]) -> dict[str, Any]:
    share, bound = result["operations"]["attention_share"], result["bound"]
    sparse, effective = result["density"]["sparse_share"], result["density"]["effective"]
    free = f"attention is {share:.0%} of a step; the loop would gain {bound['free_attention']:.2f}x if attention cost "
    free += f"nothing on the {sparse:.0%} of its calls that run sparse"
    if sparse == 0:
        return _no("will not help: every step is dense under this schedule; lower --dense-steps")
    if bound["free_attention"] < WORTH:
        return _no(f"will not help: {free}")
    if effective is None:
        return {"helps": None, "text": f"unknown: the density shows only in a run; {free}"}
    gains = [p["loop"] for p in result["predictions"]]
    low, high = min(gains), max(gains)
    limits = f"effective density {effective:.2f} bounds the loop at {bound['operations']:.2f}x by operations"
    if high >= WORTH:
        return {
            "helps": True,
            "text": f"can help: attention is {share:.0%} of a step, {limits}; predicted {low:.2f}x to {high:.2f}x by "
            "device class",
        }
    if bound["free_attention"] < SMALL:
        return _no(f"will not help: attention is {share:.0%} of a step, {limits}")
    if bound["operations"] < WORTH:
        return _no(f"will not help: {limits}; give a lower --density or fewer --dense-steps")
    return _no(f"will hardly help: {limits}, of which the kernel's own cost is predicted to leave {high:.2f}x")


def _no(text: str) -> dict[str, Any]:
    return {"helps": False, "text": text}
