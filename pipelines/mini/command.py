"""What the training commands share: their arguments, their configurations, and stages that run until a deadline."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def load_config(name: str, kind: str = "") -> dict[str, Any]:
    """Reads a shipped config of ``kind`` (``cpu``, ``gpu``) or a JSON file."""
    prefix = f"config_{kind}"
    shipped = Path(__file__).parent / f"{prefix}{name}.json"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        found = (p.stem.removeprefix(prefix) for p in shipped.parent.glob(f"{prefix}*.json"))
        known = ", ".join(sorted(stem for stem in found if "_" not in stem))
        raise SystemExit(f"--config {name!r} is neither a file nor a shipped config; shipped: {known}")
    return json.loads(path.read_text())


def parser(module: str, doc: str, stages: Sequence[str], product: str) -> argparse.ArgumentParser:
    """The arguments of ``module``, which exports ``product`` to OUT/``product`` unless told otherwise."""
    made = argparse.ArgumentParser(prog=f"python -m dit_accel.pipelines.mini.{module}", description=doc.splitlines()[0])
    add = made.add_argument
    add("--config", default="cpu", help="a shipped config (cpu, gpu) or a JSON file")
    add("--out", type=Path, required=True, help="folder for checkpoints, logs and pictures")
    add("--stage", choices=("all", *stages), default="all")
    add("--export", type=Path, help=f"where to write the {product} (default: OUT/{product})")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--max-minutes", type=float, help="stop at a checkpoint after this long")
    made.set_defaults(product=product)
    return made


def parse(made: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments and their ``deadline``, which counts from here; the number of threads is set."""
    args = made.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.deadline = time.monotonic() + 60 * args.max_minutes if args.max_minutes else None
    return args


def work(
    args: argparse.Namespace, steps: dict[str, Callable[[float | None], bool]], export: Callable[[Path], None]
) -> int:
    """Runs the stage asked for, or all ``steps`` in their order and then ``export``. 1 where the deadline came first:
    the same command goes on; else 0."""
    for stage in (*steps, "export") if args.stage == "all" else (args.stage,):
        if stage == "export":
            export(args.export or args.out / args.product)
        elif not steps[stage](args.deadline):
            print(f"stopped in stage {stage!r} after {args.max_minutes} minutes; the same command continues")
            return 1
    return 0
