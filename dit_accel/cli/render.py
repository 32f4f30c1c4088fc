"""``dit-accel render``: prompts to videos or images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

HELP = "render every prompt of a file to a video or image"
DESCRIPTION = "Render every prompt of a file to a video (mp4) or image (png), each with a JSON record beside it."
EXAMPLES = """prompt file: one prompt per line; # starts a comment; a line may be JSON to set more for that prompt:
  {"prompt": "a red circle moves right", "seed": 7, "size": "80x64", "frames": 65, "negative": "blur"}

examples:
  dit-accel render prompts.txt
  dit-accel render prompts.txt --compare --density 0.25
  dit-accel render prompts.txt --model ./Wan2.1-T2V-1.3B-Diffusers --size 832x480 --frames 81 --resume -o out
  dit-accel render prompts.txt --dry-run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompts", metavar="PROMPTS", help="text or JSONL file with the prompts")
    add("-o", "--out", metavar="DIR", default="out", help="folder for the results (default: out)")

    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="DIR|ID", help="pipeline folder or hub id (default: the bundled model)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: bfloat16 on a GPU, else float32)")
    add("--offload", action="store_true", help="keep each part of the model on the CPU until it runs")

    add = parser.add_argument_group("attention").add_argument
    add("--method", metavar="NAME", help="a method of `dit-accel methods`, or dense (default: radial for video)")
    add("--density", type=float, metavar="D", help="kept fraction of attention in (0, 1]; solves the method's knobs")
    add("--dense-steps", metavar="N|F", help="leading steps left dense, a count or a fraction (default: 0.25)")
    add("--dense-layers", metavar="N|I,J", help="leading layers left dense, or a list of layer indices (default: 0)")
    add("--param", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method; repeatable")
    add("--backend", default="auto", help="execution tier: auto, triton, flex, gather, reference (default: auto)")

    add = parser.add_argument_group("sampling (default: the model's own)").add_argument
    add("--steps", type=int, metavar="N", help="denoising steps")
    add("--guidance", type=float, metavar="G", help="guidance scale")
    add("--negative-prompt", metavar="TEXT", help="what to avoid")
    add("--image", metavar="FILE", help="first frame, for image-to-video models")
    add("--seed", type=int, default=42, metavar="N", help="seed of the initial noise (default: 42)")
    add("--size", metavar="WxH", help="width x height in pixels")
    add("--frames", type=int, metavar="N", help="number of frames; 1 writes a PNG")

    add = parser.add_argument_group("output").add_argument
    add("--fps", type=int, metavar="N", help="frames per second of the file (default: the model family's)")
    add("--gif", action="store_true", help="write a GIF besides the mp4")
    add("--frames-dir", metavar="DIR", help="write every frame as PNG into a folder per video below DIR")
    add("--compare", action="store_true", help="render dense and accelerated from the same noise and compare them")
    add("--repeats", type=int, default=1, metavar="N", help="timed runs per side of --compare (default: 1)")
    add("--resume", action="store_true", help="skip what is finished with the same settings")
    add("--overwrite", action="store_true", help="render again what exists")
    add("--dry-run", action="store_true", help="check everything and show what would be rendered")
    add("--json", action="store_true", help="JSON to stdout, text to stderr")
    add("--quiet", action="store_true", help="no text but errors and notes, no progress bar")


def run(args: argparse.Namespace) -> int:
    from .console import Console, emit
    from .render_report import end_of_job, planned, show

    console = Console(json=args.json, quiet=args.quiet)
    job = _job(args)
    from ..pipelines.render import plan_job, render

    _calm_libraries(console)
    plan = plan_job(job, dry=args.dry_run)
    planned(console, plan, dry=args.dry_run)
    if args.dry_run:
        if args.json:
            emit("render", {"ok": True, "dry_run": True, "videos": [o.to_dict() for o in plan.outcomes]})
        return 0
    interrupted = False
    try:
        render(plan, judge=_judge(job), listen=show(console), progress=console.progress)
    except KeyboardInterrupt:
        interrupted = True
    code = end_of_job(console, plan, interrupted=interrupted)
    if args.json:
        videos = [o.to_dict() for o in plan.outcomes]
        emit("render", {"ok": code == 0, "interrupted": interrupted, "videos": videos})
    return code


def _judge(job: Any):
    if not job.compare:
        return None
    from ..eval.compare import judge

    return judge


def _job(args: argparse.Namespace) -> Any:
    from ..pipelines.prompts import parse_size, read_prompts

    # Reading the prompts first reports a wrong path before torch has been loaded.
    prompts = tuple(read_prompts(args.prompts))
    size = parse_size(args.size) if args.size else None
    from ..pipelines.acceleration import Acceleration
    from ..pipelines.job import Job

    accel = Acceleration(
        method=args.method,
        density=args.density,
        dense_steps=_steps(args.dense_steps),
        dense_layers=_layers(args.dense_layers),
        parameters=dict(_parameter(p) for p in args.param),
        backend=args.backend,
    )
    return Job(
        prompts=prompts,
        out=Path(args.out),
        model=args.model,
        accel=accel,
        steps=args.steps,
        guidance=args.guidance,
        negative=args.negative_prompt,
        image=args.image,
        seed=args.seed,
        size=size,
        frames=args.frames,
        fps=args.fps,
        gif=args.gif,
        frames_dir=Path(args.frames_dir) if args.frames_dir else None,
        compare=args.compare,
        repeats=args.repeats,
        resume=args.resume,
        overwrite=args.overwrite,
        device=args.device,
        dtype=args.dtype,
        offload=args.offload,
    )


def _steps(text: str | None) -> int | float | None:
    from ..errors import UsageError

    if text is None:
        return None
    try:
        value = int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        value = -1
    if value < 0 or (isinstance(value, float) and not value <= 1):
        raise UsageError(f"--dense-steps is a count (3) or a fraction of the run (0.25); got {text!r}")
    return value


def _layers(text: str | None) -> int | frozenset[int] | None:
    from ..errors import UsageError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise UsageError(f"--dense-layers is a count of leading layers (2) or a list of indices (0,1,5); got {text!r}")
    return int(parts[0]) if "," not in text else frozenset(int(part) for part in parts)


def _parameter(text: str) -> tuple[str, Any]:
    import json

    from ..errors import UsageError

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--param is NAME=VALUE, like --param block_size=64; got {text!r}")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    if isinstance(parsed, list):
        parsed = tuple(parsed)
    return name.strip().replace("-", "_"), parsed


def _calm_libraries(console: Any) -> None:
    """Loading bars and advice of the libraries would bury the tool's own lines."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    if not console.progress:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    sys.stdout.flush()
