"""``dit-accel eval attention``: what methods lose against exact attention on a dense run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import record

HELP = "attention error per layer, step and head, several methods on one dense run"
DESCRIPTION = (
    "Render a few prompts densely and attend, at every call, also under each method on the same tensors: relative L1, "
    "cosine, RMSE, worst head, retained mass, densities, operations, on sampled query rows."
)
EXAMPLES = """methods are written NAME or NAME:PARAMETER=VALUE:..., see `dit-accel methods`

examples:
  dit-accel eval attention --method radial gna
  dit-accel eval attention --method radial:decay=0.5 radial:decay=0.2 --prompts mini-12 --limit 2 -o errors.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--method", nargs="+", action="extend", metavar="SPEC", help="methods to measure (default: radial)")
    add("--density", type=float, metavar="D", help="kept fraction in (0, 1]; each method solves its own parameters")
    add("--quant", metavar="NAME", help="quantised products under every method; the method dense is then allowed")
    add("--prompts", metavar="NAME|FILE", help="mini-12, shapes-120 or a text file (default: the model's own two)")
    add("--limit", type=int, default=1, metavar="N", help="only the first N prompts (default: 1)")
    add("--rows", type=int, default=64, metavar="N", help="query rows sampled per call (default: 64)")
    add("--measure-steps", type=int, metavar="N", help="measure N evenly spread steps (default: all)")
    add("--dense-steps", type=float, default=0.0, metavar="F", help="leading fraction left dense (default: 0)")
    add("--model", metavar="DIR|ID", help="pipeline folder or hub id (default: the bundled model)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: bfloat16 on a GPU, else float32)")
    add("--steps", type=int, metavar="N", help="denoising steps (default: the model's)")
    add("--size", metavar="WxH", help="width x height in pixels (default: the model's)")
    add("--frames", type=int, metavar="N", help="number of frames (default: the model's)")
    add("--seed", type=int, default=42, metavar="N", help="seed of the initial noise (default: 42)")
    add("--backend", default="auto", help="execution tier (default: auto)")
    record.add_arguments(parser, "everything, heat maps included")


def run(args: argparse.Namespace) -> int:
    from ..pipelines.prompts import parse_size
    from .console import Console, calm_libraries, table

    console = Console(json=args.json)
    size = parse_size(args.size) if args.size else None
    from ..eval.attention import measure
    from ..pipelines.load import load

    info, shots, layout = _shots(args, size)
    processors = _processors(args, info, layout)
    calm_libraries()
    pipe = load(info, dtype=args.dtype, device=args.device)
    found = measure(pipe, shots, processors, rows=args.rows, steps=args.measure_steps, backend=args.backend)
    rows = [("method", "layer", "rel. L1", "worst head", "cosine", "RMSE", "mass kept", "least 5 %")]
    for name, one in found.items():
        rows += [(name, str(row["layer"]), *_cells(row)) for row in one["layers"]]
        if one["mean"]:
            worst = {"head": one["worst"]["head"], "rel_l1": one["worst"]["rel_l1"]}
            rows.append((name, "mean", *_cells({**one["mean"], "worst_head": worst})))
    for line in table(rows, right=frozenset(range(1, 8))):
        console.say(line)
    for name, one in found.items():
        console.say(f"{name}: {_densities(one)}")
    data = {
        "model": info.name, "layout": str(layout), "rows_per_call": args.rows, "steps": shots[0].steps,
        "prompts": [{"prompt": s.prompt, "seed": s.seed} for s in shots], "methods": found,
    }  # fmt: skip
    record.finish(args, "attention", data)
    return 0


def _shots(args: argparse.Namespace, size: tuple[int, int] | None) -> tuple[Any, list[Any], Any]:
    from ..errors import UsageError
    from ..eval.shapes.suite import prompts
    from ..pipelines.acceleration import Acceleration
    from ..pipelines.calibrate import default_prompts
    from ..pipelines.geometry import geometry
    from ..pipelines.job import Job, resolve
    from ..pipelines.model import inspect_model
    from ..pipelines.prompts import Prompt

    if args.limit < 1:
        raise UsageError(f"--limit must be at least 1; got {args.limit}")
    info = inspect_model(args.model)
    texts = [Prompt(t, i) for i, t in enumerate(prompts(args.prompts), 1)] if args.prompts else default_prompts(info)
    same = {name: getattr(args, name) for name in ("model", "steps", "frames", "seed")}
    job = Job(tuple(texts[: args.limit]), Path("."), size=size, accel=Acceleration("dense"), **same)
    shots = resolve(job, info)
    first = shots[0]
    layout = geometry(info).layout(first.width, first.height, first.frames) if first.width else None
    return info, shots, layout


def _processors(args: argparse.Namespace, info: Any, layout: Any) -> dict[str, Any]:
    from ..errors import UnsupportedError, UsageError
    from ..eval.method_spec import build
    from ..processors import Processor
    from ..schedule import Schedule

    args.method = args.method or ["radial"]
    if len(set(args.method)) < len(args.method):
        raise UsageError(f"the same method twice: {', '.join(args.method)}")
    if "dense" in args.method and args.quant is None:
        raise UsageError("dense attention has no error to measure; give it --quant, or name a sparse method")
    specs = [spec for spec in args.method if spec != "dense"]
    # What the model itself brings along for a method, as rendering takes it; a spec's own values win.
    tuned = info.defaults.get("methods", {})
    asked = {spec.partition(":")[0].strip() for spec in specs} & tuned.keys()
    methods = build(specs, [f"{name}.{key}={value}" for name in asked for key, value in tuned[name].items()])
    if args.density is not None:
        if layout is None:
            raise UnsupportedError("--density needs the token grid, which this model's configuration does not tell")
        methods = [method.with_density(args.density, layout)[0] for method in methods]
    made = dict(zip(specs, methods, strict=True))
    same = {"quant": args.quant, "schedule": Schedule(first=args.dense_steps), "backend": args.backend}
    return {spec: Processor(made.get(spec), **same) for spec in args.method}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    worst = row["worst_head"]
    return (f"{row['rel_l1']:.4f}", f"{worst['rel_l1']:.4f} ({worst['head']})", f"{row['cosine']:.4f}",
            f"{row['rmse']:.4f}", f"{row['recall']:.4f}", f"{row['recall_low']:.4f}")  # fmt: skip


def _densities(one: dict[str, Any]) -> str:
    found, work = one["densities"], one["flops"]
    parts = [f"{name} {value:.4f}" for name, value in found.items() if value is not None]
    kept, dense = (work[name] / 1e12 for name in ("attention", "dense_attention"))
    return f"density {', '.join(parts)}; attention {kept:.3f} of {dense:.3f} TFLOP"
