"""``dit-accel eval speed``: dense against a method in turn, without writing videos."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import attention, record

HELP = "time dense against a method, in turn, with the break-down and the bound"
DESCRIPTION = (
    "Run dense and accelerated from the same noise in one process, in turn, after a warm-up that no figure contains: "
    "medians and spread of the denoising loop, attention and the whole call, the bound, fidelity, and every reason to "
    "doubt the timings."
)
EXAMPLES = """examples:
  dit-accel eval speed --method radial --repeats 3
  dit-accel eval speed --method gna --density 0.25 --size 80x64 --frames 33 -o speed.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompts", default="mini-12", metavar="NAME|FILE", help="mini-12, shapes-120 or a text file")
    add("--limit", type=int, default=1, metavar="N", help="only the first N prompts (default: 1)")
    add("--repeats", type=int, default=3, metavar="N", help="timed runs per side (default: 3)")
    add("--model", metavar="DIR|ID", help="pipeline folder or hub id (default: the bundled model)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: bfloat16 on a GPU, else float32)")
    add("--steps", type=int, metavar="N", help="denoising steps (default: the model's)")
    add("--size", metavar="WxH", help="width x height in pixels (default: the model's)")
    add("--frames", type=int, metavar="N", help="number of frames (default: the model's)")
    add("--seed", type=int, default=42, metavar="N", help="seed of the initial noise (default: 42)")
    record.add_arguments(parser, "every run")
    attention.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..pipelines.prompts import parse_size
    from .console import Console, calm_libraries
    from .render_report import attention_line, attention_report, compare_report, density_report, summary_report

    console = Console(json=args.json)
    size = parse_size(args.size) if args.size else None
    from ..eval.compare import judge, summarise
    from ..pipelines.compare import compare
    from ..pipelines.load import load

    info, shots = _shots(args, size)
    calm_libraries()
    pipe = load(info, dtype=args.dtype, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    rows, verdicts, runs = [], [], []
    for number, shot in enumerate(shots):
        pair = compare(pipe, shot, repeats=args.repeats, swap=bool(number % 2))
        verdict = judge(pair)
        verdicts.append(verdict)
        fast = pair.fast[-1]
        runs.append((shot, fast.attention))
        rows.append({"prompt": shot.prompt, "seed": shot.seed, "compare": verdict, "attention": fast.attention,
                     "peak_memory_bytes": fast.peak_memory and fast.peak_memory["allocated"]})  # fmt: skip
        console.say(f"{shot.prompt} (seed {shot.seed}): {attention_line(shot)}")
        for line in [*attention_report(fast.attention), *compare_report(verdict)]:
            console.say(f"  {line}")
    summary = summarise(verdicts)
    if len(verdicts) > 1:
        for line in summary_report(summary):
            console.say(line)
    for line in density_report(runs):
        console.note(line)
    record.finish(args, "speed", {"model": info.name, "steps": shots[0].steps, "rows": rows, "summary": summary})
    return 0


def _shots(args: argparse.Namespace, size: tuple[int, int] | None) -> tuple[Any, list[Any]]:
    from ..errors import UsageError
    from ..eval.shapes.suite import prompts
    from ..pipelines.job import Job, resolve
    from ..pipelines.model import inspect_model
    from ..pipelines.prompts import Prompt

    if args.limit < 1:
        raise UsageError(f"--limit must be at least 1; got {args.limit}")
    info = inspect_model(args.model)
    texts = tuple(Prompt(text, line) for line, text in enumerate(prompts(args.prompts)[: args.limit], 1))
    same = {name: getattr(args, name) for name in ("model", "steps", "frames", "seed", "repeats")}
    job = Job(texts, Path("."), size=size, accel=attention.chosen(args), compare=True, **same)
    return info, resolve(job, info)
