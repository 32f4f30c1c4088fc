"""``dit-accel render``: prompts to videos or images."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import INTERRUPTED, OK, attention

HELP = "render every prompt of a file to a video or image"
DESCRIPTION = "Render every prompt of a file to a video (mp4) or image (png), each with a JSON record beside it."
EXAMPLES = """prompt file: one prompt per line; # starts a comment; a line may be JSON to set more for that prompt:
  {"prompt": "a red circle moves right", "seed": 7, "size": "80x64", "frames": 65, "negative": "blur"}

examples:
  dit-accel render prompts.txt
  dit-accel render prompts.txt --compare --density 0.25
  dit-accel render prompts.txt --model ./Wan2.1-T2V-1.3B-Diffusers --size 832x480 --frames 81 --resume -o out
  dit-accel render prompts.txt --dry-run
  accelerate launch --num_processes 4 -m dit_accel render prompts.txt --resume -o out
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompts", metavar="PROMPTS", help="text or JSONL file with the prompts")
    add("-o", "--out", metavar="DIR", default="out", help="folder for the results (default: out)")

    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="DIR|ID", help="pipeline folder or hub id (default: the bundled model)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: bfloat16 on a GPU, else float32)")
    add("--offload", nargs="?", const="model", metavar="KIND",
        help="keep weights on the CPU until they run: model (default), group, sequential")  # fmt: skip
    add("--device-map", metavar="MAP", help="spread the parts over the devices as diffusers does, e.g. balanced")
    add("--quantize", metavar="KIND", help="quantised transformer weights: bnb-8bit, bnb-4bit")
    add("--lora", action="append", default=[], metavar="FILE[=SCALE]", help="a LoRA; repeatable")
    add("--cache", metavar="KIND", help="skip steps' blocks by diffusers' cache: firstblock, or firstblock=THRESHOLD")
    add("--vae-tiling", action="store_true", help="decode in tiles: less memory, slightly other pixels")
    add("--compile", action="store_true", help="compile the transformer's blocks")

    attention.add_arguments(parser)

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
    add("--resume", action="store_true",
        help="keep what is finished with the same settings; damaged files are set aside and made again")  # fmt: skip
    add("--overwrite", action="store_true",
        help="render again what exists; with --resume only what was made with other settings")  # fmt: skip
    add("--dry-run", action="store_true", help="check everything and show what would be rendered")
    add("--json", action="store_true", help="JSON to stdout, text to stderr")
    add("--quiet", action="store_true", help="no text but errors and notes, no progress bar")


def run(args: argparse.Namespace) -> int:
    from .console import Console, calm_libraries, emit
    from .render_report import end_of_job, planned, show, summary_report

    job = _job(args)
    from ..pipelines import shares
    from ..pipelines.render import plan_job, render

    share = shares.Share(cpu=args.device == "cpu") if shares.launched() else None
    others = share is not None and not share.is_main
    console = Console(json=args.json, quiet=args.quiet or others)
    calm_libraries()
    plan = plan_job(share.place(job) if share else job, dry=args.dry_run)
    if not others:
        planned(console, plan, dry=args.dry_run)
    if args.dry_run:
        if args.json and not others:
            emit("render", {"ok": True, "dry_run": True, "videos": [o.to_dict() for o in plan.outcomes]})
        return 0
    interrupted = False
    try:
        own = share.split(plan) if share else plan.todo
        with _ending_like_an_interrupt():
            render(plan, only=own, judge=_judge(job), listen=show(console), progress=console.progress)
        if share:
            share.collect(plan, own)
    except KeyboardInterrupt:
        interrupted = True
    if others:
        return INTERRUPTED if interrupted else OK  # the main process reports for all, and its exit code is the job's
    summary = _summary(plan)
    if summary:
        for line in summary_report(summary):
            console.say(line)
    code = end_of_job(console, plan, interrupted=interrupted)
    if args.json:
        videos = [o.to_dict() for o in plan.outcomes]
        emit("render", {"ok": code == 0, "interrupted": interrupted, "videos": videos, "summary": summary})
    return code


@contextlib.contextmanager
def _ending_like_an_interrupt() -> Iterator[None]:
    """SIGTERM, which launchers and schedulers send, as Ctrl-C: no partial file stays, finished ones do."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _summary(plan: Any) -> dict[str, Any] | None:
    """The comparisons of a job as one, skipped ones included; None for fewer than two."""
    verdicts = [o.record["compare"] for o in plan.outcomes if o.record and o.record.get("compare")]
    if len(verdicts) < 2:
        return None
    from ..eval.compare import summarise

    return summarise(verdicts)


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
    from ..pipelines.job import Job
    from ..pipelines.options import LoadOptions

    return Job(
        prompts=prompts,
        out=Path(args.out),
        model=args.model,
        accel=attention.chosen(args),
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
        load=LoadOptions(
            offload=args.offload,
            compile=args.compile,
            vae_tiling=args.vae_tiling,
            cache=args.cache,
            lora=tuple(args.lora),
            quantize=args.quantize,
            device_map=args.device_map,
        ),
    )
