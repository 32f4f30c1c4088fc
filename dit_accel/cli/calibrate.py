"""``dit-accel calibrate``: the plan file that a calibrated method runs on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "make the plan file of a calibrated method (paro), or of adaptive precision (precision)"
DESCRIPTION = "Render a few prompts densely, look at the attention, and write what was found to a file."
EXAMPLES = """examples:
  dit-accel calibrate paro -o plan.safetensors
  dit-accel calibrate paro --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 832x480 --frames 81 -o plan.safetensors
  dit-accel calibrate paro --prompts two.txt --density 0.3 --bins 10 --steps 30 -o plan.safetensors
  dit-accel render prompts.txt --method paro --param plan_file=plan.safetensors --dense-steps 0
  dit-accel calibrate precision -o precision.json
  dit-accel render prompts.txt --method dense --quant precision.json
"""
PARO = (
    "PARO's plan: an axis order per head and block maps per timestep bin. A plan serves one model, one size and one "
    "frame count."
)
PRECISION = (
    "Bits of quantised attention: the error of 4 and 8 bits per layer, part of the run and head, and a table that "
    "gives each head 4, 8 or 16. First and last steps never run below 8."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True, title="what to calibrate")
    for name, text, add_own, out in (
        ("paro", PARO, _add_paro, "plan.safetensors"), ("precision", PRECISION, _add_precision, "precision.json")
    ):  # fmt: skip
        kind = kinds.add_parser(name, help=text.partition(":")[0], description=text, allow_abbrev=False)
        kind.add_argument("-o", "--out", metavar="FILE", default=out, help=f"file to write (default: {out})")
        kind.add_argument(
            "--prompts", metavar="FILE", help="text or JSONL file; one or two prompts do (default: two built-in ones)"
        )
        add_own(kind.add_argument_group("plan").add_argument)
        _add_runs(kind)


def _add_paro(add: Any) -> None:
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


def _add_precision(add: Any) -> None:
    add("--frac-8bit", type=float, default=0.5, metavar="F", help="least share at 8 bits or more (default: 0.5)")
    add("--bins", type=int, default=4, metavar="N", help="parts of a run with bits of their own (default: 4)")
    add("--blocks", type=int, default=1, metavar="N", help="blocks of queries measured in every call (default: 1)")


def _add_runs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="DIR|ID", help="pipeline folder or hub id (default: the bundled model)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: bfloat16 on a GPU, else float32)")
    add("--offload", action="store_true", help="keep each part of the model on the CPU until it runs")

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
    add("--overwrite", action="store_true", help="replace an existing file")
    add("--json", action="store_true", help="JSON to stdout, text to stderr")
    add("--quiet", action="store_true", help="no text but errors and notes, no progress bar")


# Arguments that a job has under the same name.
_RUNS = ("model", "steps", "guidance", "image", "seed", "frames", "overwrite", "device", "dtype", "offload", "backend")
_OWN = {
    "paro": (
        "density", "bins", "metric", "alpha", "maximize_sparse", "budget", "block_size", "rows", "orders_first",
    ),
    "precision": ("frac_8bit", "bins", "blocks"),
}  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from ..pipelines.prompts import parse_size, read_prompts
    from .console import Console, calm_libraries

    # Reading the prompts first reports a wrong path before torch has been loaded.
    prompts = tuple(read_prompts(args.prompts)) if args.prompts else ()
    settings = {name: getattr(args, name) for name in (*_RUNS, *_OWN[args.what])}
    settings |= {"prompts": prompts, "size": parse_size(args.size) if args.size else None}
    settings |= {"out": Path(args.out), "negative": args.negative_prompt}
    calm_libraries()
    return {"paro": _paro, "precision": _precision}[args.what](
        settings, Console(json=args.json, quiet=args.quiet), json=args.json
    )


def _paro(settings: dict[str, Any], console: Any, *, json: bool) -> int:
    from ..pipelines.calibrate import CalibrationJob, calibrate_paro
    from .console import emit, table

    found = calibrate_paro(CalibrationJob(**settings), listen=_show(console), progress=console.progress)
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
    if json:
        emit("calibrate", {"ok": True, **found.to_dict()})
    return 0


def _precision(settings: dict[str, Any], console: Any, *, json: bool) -> int:
    from ..pipelines.calibrate_precision import PrecisionJob, calibrate_precision
    from .console import emit, table

    found = calibrate_precision(PrecisionJob(**settings), listen=_show(console), progress=console.progress)
    bins = found.table.bits
    rows = [("layer", *(f"part {number}" for number in range(1, len(bins) + 1)))]
    for layer in range(len(bins[0])):
        rows.append((str(layer), *(" ".join(map(str, row[layer])) for row in bins)))
    for line in table(rows, right=frozenset({0})):
        console.say(line)
    share = ", ".join(f"{bits} bits {part:.0%}" for bits, part in found.table.share.items())
    console.say(f"{found.path}  bits by layer, head and part of the run: {share}; {found.seconds:.0f} s of dense runs")
    console.say(f"use it: dit-accel render prompts.txt --method dense --quant {found.path}")
    if json:
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
