"""``dit-accel eval shapes``: grade videos by what their captions say, without learned judges."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import attention, record

HELP = "render the bundled suite of shapes and grade every video exactly"
DESCRIPTION = (
    "Render the shape suite and grade every video by computer vision. Every caption is a list of facts (colour, "
    "motion, shape, size, count, relation, background), so the grade is exact and needs no learned judge. "
    'Needs OpenCV: pip install "dit-accel[eval]".'
)
EXAMPLES = """examples:
  dit-accel eval shapes --method dense -o dense.json
  dit-accel eval shapes --method radial --density 0.25 --compare -o radial.json
  dit-accel eval shapes --prompts mini-12 --steps 30 --sheet sheet.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompts", default="shapes-120", metavar="NAME|FILE", help="mini-12, shapes-120 or a text file")
    add("--limit", type=int, metavar="N", help="only the first N prompts")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="seeds of the initial noise (default: 0)")
    add("--compare", action="store_true", help="render dense too, from the same noise, and give paired differences")
    add("-o", "--out", metavar="FILE", help="JSON with every row, written as it goes and continued from")
    add("--sheet", metavar="FILE", help="PNG with nine frames of every video")
    add("--json", action="store_true", help="JSON to stdout, text to stderr")
    add("--quiet", action="store_true", help="no text but errors and notes")

    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="DIR|ID", help="pipeline folder or hub id (default: the bundled model)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: bfloat16 on a GPU, else float32)")
    add("--steps", type=int, metavar="N", help="denoising steps (default: the model's)")
    add("--guidance", type=float, metavar="G", help="guidance scale (default: the model's)")

    attention.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from .console import Console, emit

    console = Console(json=args.json, quiet=args.quiet)
    suite, job = _suite(args), _job(args)
    from ..eval.shapes.job import DENSE, evaluate
    from ..eval.shapes.suite import difference_table, table
    from .render_report import density_note

    result = evaluate(
        suite,
        job,
        out=Path(args.out) if args.out else None,
        sheet=Path(args.sheet) if args.sheet else None,
        tell=lambda row: console.say(_line(row)),
        command_line=record.command_line(),
    )
    for side, summary in result["summary"].items():
        console.say(f"\n{side}")
        console.say(table(summary))
        console.say(f"colour and motion both passed: {summary['color_and_motion']} of {summary['videos']}")
    if "paired" in result:
        console.say("\naccelerated minus dense, paired by prompt and seed")
        console.say(difference_table(result["paired"]))
    if "density_missed" in result:
        missed, name = result["density_missed"], next(side for side in result["summary"] if side != DENSE)
        console.note(density_note(name, missed["asked"], missed["had"], result["summary"][name]["videos"]))
    if args.json:
        emit("eval", {"ok": True, **{key: value for key, value in result.items() if key != "schema"}})
    return 0


def _line(row: dict[str, Any]) -> str:
    scores = " ".join(f"{name} {value:.2f}" for name, value in row["scores"].items() if value is not None)
    return f"{row['side']:8} {row['prompt']} (seed {row['seed']}): {scores}"


def _suite(args: argparse.Namespace) -> Any:
    from ..errors import UsageError
    from ..eval.shapes.measure import need_opencv
    from ..eval.shapes.suite import Suite, prompts

    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit must be at least 1; got {args.limit}")
    # Minutes of rendering should not end in a missing package.
    need_opencv()
    return Suite(tuple(prompts(args.prompts)[: args.limit]), tuple(args.seeds), compare=args.compare)


def _job(args: argparse.Namespace) -> Any:
    from ..errors import UsageError
    from ..pipelines.job import Job

    if args.compare and args.method == "dense":
        raise UsageError("--compare sets a method against dense attention; --method dense leaves nothing to compare")
    return Job(
        prompts=(),
        out=Path("."),
        model=args.model,
        accel=attention.chosen(args),
        steps=args.steps,
        guidance=args.guidance,
        device=args.device,
        dtype=args.dtype,
    )
