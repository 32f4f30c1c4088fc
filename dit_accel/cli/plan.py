"""``dit-accel plan``: what a setting costs and can gain, before weights are downloaded."""

from __future__ import annotations

import argparse
from typing import Any

from . import attention

HELP = "predict cost and gain of a setting, without weights or a GPU"
DESCRIPTION = (
    "Say what sparse attention can gain on a model and size: tokens, attention's share, density, the bound "
    "and a prediction per device class, memory, the tier that would run. Reads configuration files only."
)
EXAMPLES = """examples:
  dit-accel plan
  dit-accel plan --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 832x480 --frames 81 --method radial
  dit-accel plan --model ./HunyuanVideo --size 1280x720 --frames 129 --method gna --density 0.25 --json

gains by device class are predictions from published efficiency figures, not measurements; render --compare measures
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="DIR|ID", help="pipeline folder or hub id (default: the bundled model)")
    add("--size", metavar="WxH", help="width x height in pixels (default: the model's own)")
    add("--frames", type=int, metavar="N", help="number of frames (default: the model's own)")
    add("--steps", type=int, metavar="N", help="denoising steps (default: the model's own)")
    add("--guidance", type=float, metavar="G", help="guidance scale; above 1 most models run twice per step")
    add("--image", nargs="?", const=True, metavar="FILE", help="plan the image-to-video pipeline; no file is read")
    add("--device", default="auto", help="whose tier to name: auto, cpu, cuda (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: bfloat16 on a GPU, else float32)")
    add("--json", action="store_true", help="JSON to stdout")
    attention.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..pipelines.prompts import parse_size
    from .console import Console, calm_libraries, emit

    console = Console(json=args.json)
    size = parse_size(args.size) if args.size else None
    from ..eval.planner import Question, answer

    calm_libraries()
    found = answer(
        Question(
            model=args.model,
            size=size,
            frames=args.frames,
            steps=args.steps,
            guidance=args.guidance,
            image=bool(args.image),
            accel=attention.chosen(args),
            device=args.device,
            dtype=args.dtype,
        )
    )
    if args.json:
        emit("plan", {"ok": True, **found})
        return 0
    for line in lines(found):
        console.say(line)
    return 0


def lines(found: dict[str, Any]) -> list[str]:
    """The answer as text."""
    run, tokens, work = found["run"], found["tokens"], found["operations"]
    grid = "x".join(map(str, tokens["grid"]))
    text = f", of which text {tokens['text_in_sequence']}" if tokens["text_in_sequence"] else ""
    told = [
        f"model       {found['model']['name']} ({found['model']['pipeline']})",
        f"run         {run['width']}x{run['height']}, {run['frames']} frames, {run['steps']} steps, "
        f"{run['forwards_per_step']} forward{'s' * (run['forwards_per_step'] > 1)} per step",
        f"tokens      {tokens['sequence']:,}{text}; grid {grid}, {work['layers']} layers, {work['heads']} heads",
        f"operations  {_si(work['run_total'])}FLOP for the run; attention {work['attention_share']:.0%} of a step",
    ]
    if found["method"] is not None:
        told += _method_lines(found)
    told += [f"note        {note}" for note in found["notes"]]
    return [*told, f"verdict     {found['verdict']['text']}"]


def _method_lines(found: dict[str, Any]) -> list[str]:
    from .console import table

    own = {key: value for key, value in found["method"].items() if value is not None}
    name, density, bound, tier = own.pop("method"), found["density"], found["bound"], found["tier"]
    told = [f"method      {name} ({', '.join(f'{key} {_short(value)}' for key, value in own.items())})"]
    if density["plan"] is None:
        told.append(f"density     {density['source']}")
    else:
        told.append(f"density     {density['plan']:.4f} from {density['source']}; effective {density['effective']:.4f} "
                    f"with {density['sparse_share']:.0%} of the attention calls sparse")  # fmt: skip
        told += _by_layer(density["layers"])
        told.append(f"bound       {bound['operations']:.2f}x for the denoising loop, by operations")
    if found["padding"]:
        told.append(f"padding     {found['padding']['share']:.1%} (tiles of {found['padding']['tile'][0]} queries by "
                    f"{found['padding']['tile'][1]} keys)")  # fmt: skip
    told.append(f"memory      {_memory(found['memory'])}")
    runs = tier["name"] or "unknown"
    told.append(
        f"tier        {runs} on {tier['device']} in {tier['dtype']}" + (f" ({tier['why']})" if tier["why"] else "")
    )
    gpus = tier["on_gpus"]
    told.append(f"  on GPUs   {gpus['name']} from sm80 on, in bfloat16 ({gpus['why']})")
    if found["predictions"]:
        told.append("predicted gain of the loop, not measured")
        rows = [("class", "devices", "attention's time", "gain", "with a perfect kernel")]
        for p in found["predictions"]:
            rows.append(
                (p["name"], p["devices"], f"{p['time_share']:.0%}", f"{p['loop']:.2f}x", f"{p['ceiling']:.2f}x")
            )
        told += [f"  {line}" for line in table(rows, right=frozenset({2, 3, 4}))]
    return told


def _by_layer(layers: list[dict[str, Any]]) -> list[str]:
    """Runs of layers of equal density; nothing where all are equal."""
    groups: list[list[dict[str, Any]]] = []
    for row in layers:
        if groups and f"{groups[-1][-1]['density']:.3f}" == f"{row['density']:.3f}":
            groups[-1].append(row)
        else:
            groups.append([row])
    if len(groups) < 2:
        return []
    spans = [(g[0]["layer"], g[-1]["layer"], g[0]["density"]) for g in groups]
    parts = [f"{a}..{b} {d:.3f}" if b > a else f"{a} {d:.3f}" for a, b, d in spans]
    return [f"  by layer  {', '.join(parts)}"]


def _memory(memory: dict[str, Any]) -> str:
    tables = memory["plan_tables"]
    kept = "plan tables are made for every call" if tables is None else f"plan tables {_si(tables)}B over all layers"
    return f"{kept}; method state {_si(memory['state'])}B" if memory["state"] else f"{kept}; no method state"


def _si(value: float) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}"
    return f"{value:.4g} "


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
