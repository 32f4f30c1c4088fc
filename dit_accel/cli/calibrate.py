"""``dit-accel calibrate``: the plan file that a calibrated method runs on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "make the plan file of a calibrated method (paro)"
DESCRIPTION = (
    "Render a few prompts densely, look at the attention, and write a plan: for PARO an axis order per head and block "
    "maps per timestep bin. A plan serves one model, one size and one frame count."
)
EXAMPLES = """examples:
  dit-accel calibrate paro -o plan.safetensors
  dit-accel calibrate paro --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 832x480 --frames 81 -o plan.safetensors
  dit-accel calibrate paro --prompts two.txt --density 0.3 --bins 10 --steps 30 -o plan.safetensors
  dit-accel render prompts.txt --method paro --param plan_file=plan.safetensors --dense-steps 0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("method", choices=["paro"], help="the method to calibrate")
    add("-o", "--out", metavar="FILE", default="plan.safetensors", help="plan to write (default: plan.safetensors)")
    add("--prompts", metavar="FILE", help="text or JSONL file; one or two prompts do (default: two built-in ones)")

    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="DIR|ID", help="pipeline folder or hub id (default: the bundled model)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: bfloat16 on a GPU, else float32)")
    add("--offload", action="store_true", help="keep each part of the model on the CPU until it runs")

    add = parser.add_argument_group("plan").add_argument
    add("--density", type=float, default=0.5, metavar="D", help="kept fraction of attention in (0, 1] (default: 0.5)")
    add("--bins", type=int, default=4, metavar="N", help="timestep bins with a map each (default: 4)")
    add("--metric", default="mass", help="how orders are chosen: mass, or paper, the printed formula (default: mass)")
    add("--alpha", type=float, default=1.0, metavar="A", help="weight of sparsity against peakedness (default: 1)")
    add("--maximize-sparse", action="store_true", help="turn the sign of the printed formula's sparsity term")
    add(
        "--budget",
        default="layer",
        help="what meets the density: every layer, or the model in the mean (default: layer)",
    )
    add("--block-size", type=int, default=64, metavar="N", help="tokens per block (default: 64)")
    add(
        "--orders-first",
        action="store_true",
        default=None,
        help="choose orders in runs of their own: a sixth of the memory, twice the time (default: where it is short)",
    )
    add("--rows", type=float, default=1.0, metavar="F", help="fraction of query rows looked at (default: 1)")

    add = parser.add_argument_group("sampling (default: the model's own)").add_argument
    add("--steps", type=int, metavar="N", help="denoising steps")
    add("--guidance", type=float, metavar="G", help="guidance scale")
    add("--negative-prompt", metavar="TEXT", help="what to avoid")
    add("--image", metavar="FILE", help="first frame, for image-to-video models")
    add("--seed", type=int, default=42, metavar="N", help="seed of the initial noise (default: 42)")
    add("--size", metavar="WxH", help="width x height in pixels")
    add("--frames", type=int, metavar="N", help="number of frames")

    add = parser.add_argument_group("output").add_argument
    add("--backend", default="auto", help="execution tier of the dense runs (default: auto)")
    add("--overwrite", action="store_true", help="replace an existing plan")
    add("--json", action="store_true", help="JSON to stdout, text to stderr")
    add("--quiet", action="store_true", help="no text but errors and notes, no progress bar")


def run(args: argparse.Namespace) -> int:
    from ..pipelines.prompts import parse_size, read_prompts
    from .console import Console, calm_libraries, emit, table

    # Reading the prompts first reports a wrong path before torch has been loaded.
    prompts = tuple(read_prompts(args.prompts)) if args.prompts else ()
    size = parse_size(args.size) if args.size else None
    from ..pipelines.calibrate import CalibrationJob, calibrate_paro

    console = Console(json=args.json, quiet=args.quiet)
    same = (
        "model",
        "density",
        "bins",
        "metric",
        "alpha",
        "maximize_sparse",
        "budget",
        "block_size",
        "rows",
        "orders_first",
        "steps",
        "guidance",
    )
    same += ("image", "seed", "frames", "overwrite", "device", "dtype", "offload", "backend")
    job = CalibrationJob(
        out=Path(args.out), prompts=prompts, size=size, negative=args.negative_prompt,
        **{name: getattr(args, name) for name in same},
    )  # fmt: skip
    calm_libraries()
    found = calibrate_paro(job, listen=_show(console), progress=console.progress)
    header = found.header
    rows = [("layer", "orders (heads)", "density", "recall")]
    for entry in found.layers:
        orders = ", ".join(f"{name} {count}" for name, count in entry["orders"].items())
        rows.append((str(entry["layer"]), orders, f"{entry['density']:.3f}", f"{entry['recall']:.3f}"))
    for line in table(rows, right=frozenset({0, 2, 3})):
        console.say(line)
    if abs(header.reached - header.density) > 0.2 * header.density:
        console.note(
            f"note: density {header.density:g} is out of reach on {header.layout}; the plan has {header.reached:.3f}"
        )
    console.say(
        f"{found.path}  {found.path.stat().st_size / 1e6:.2f} MB for {header.model}, {header.layout}; density "
        f"{header.reached:.3f}, recall {header.recall:.3f}; {found.seconds['run']:.0f} s of dense runs"
    )
    console.say(f"use it: dit-accel render prompts.txt --method paro --param plan_file={found.path} --dense-steps 0")
    if args.json:
        emit("calibrate", {"ok": True, **found.to_dict()})
    return 0


def _show(console: Any):
    def listen(event: str, data: dict[str, Any]) -> None:
        if event == "start":
            shot = data["shot"]
            console.say(f"dense run {shot.number} of {data['shots']}: {shot.prompt} ({shot.steps} steps)")
        elif event == "orders first":
            why = "" if data["asked"] else ": block sums of all orders at once would not fit in memory"
            console.say(f"two passes, orders first{why}")
        elif event == "loading":
            console.say(f"model      {data['model']} on {data['device']}")

    return listen
