"""``dit-accel eval vbench``: official totals, the official package in its own environment, names of videos."""

from __future__ import annotations

import argparse
from typing import Any

from . import record

HELP = "VBench 1.0: totals of results, the official package's doctor and run, video names"
DESCRIPTION = (
    "totals: official totals of *_eval_results.json in a folder or zip. doctor: what each dimension lacks in the "
    "environment of --python. run: score a folder of videos there. missing: videos that the standard suite wants. "
    "flicker: the one dimension that needs no weights, by its formula, under a name of its own."
)
EXAMPLES = """examples:
  dit-accel eval vbench totals results.zip
  dit-accel eval vbench doctor --python ~/vbench/bin/python
  dit-accel eval vbench run videos/ --python ~/vbench/bin/python --mode custom_input -o scores.json
  dit-accel eval vbench missing videos/ --info VBench_full_info.json --dimensions scene color
  dit-accel eval vbench flicker out/0001-a-red-ball-s42.mp4
"""
ACTIONS = ("totals", "doctor", "run", "missing", "flicker")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS))
    add("path", nargs="?", metavar="PATH", help="results, a folder of videos, or a clip, as the action takes it")
    add("--python", metavar="FILE", help="interpreter of the environment in which vbench is installed")
    add("--cache", metavar="DIR", help="folder of its weights (default: $VBENCH_CACHE_DIR or ~/.cache/vbench)")
    add("--mode", default="vbench_standard", help="vbench_standard or custom_input (default: vbench_standard)")
    add("--dimensions", nargs="+", metavar="NAME", help="only these")
    add("--info", metavar="FILE", help="VBench_full_info.json (default for run: the installed one)")
    add("--results", default="vbench-results", metavar="DIR", help="where run keeps raw results")
    add("--device", default="cuda", help="device of run (default: cuda)")
    add("--local", action="store_true", help="let vbench load DINO and CLIP from its cache folder")
    record.add_arguments(parser, "everything")


def run(args: argparse.Namespace) -> int:
    from .console import Console

    console = Console(json=args.json)
    found, code = _ACTIONS[args.action](args, console)
    record.finish(args, f"vbench-{args.action}", found)
    return code


def _totals(args: argparse.Namespace, console: Any) -> tuple[dict[str, Any], int]:
    from ..eval.vbench import judge_results, read_results

    found = judge_results(read_results(_path(args)), args.mode)
    _show(found, console)
    return found, 0


def _doctor(args: argparse.Namespace, console: Any) -> tuple[dict[str, Any], int]:
    from ..eval.vbench_official import doctor

    found = doctor(_python(args), args.cache)
    for name, one in found["dimensions"].items():
        console.say(f"{name:<24}{'ready' if one['ready'] else 'missing ' + ', '.join(one['missing'])}")
    return found, 0


def _run(args: argparse.Namespace, console: Any) -> tuple[dict[str, Any], int]:
    from ..eval.vbench_official import run_official

    found = run_official(
        _path(args), args.results, python=_python(args), dimensions=args.dimensions, mode=args.mode, cache=args.cache,
        info=args.info, device=args.device, local=args.local, tell=lambda name: console.say(f"scoring {name}"),
    )  # fmt: skip
    _show(found, console)
    for name, why in found["failed"].items():
        console.note(f"failed: {name}: {why}")
    return found, 1 if found["failed"] else 0


def _missing(args: argparse.Namespace, console: Any) -> tuple[dict[str, Any], int]:
    from ..errors import UsageError
    from ..eval.vbench import DIMENSIONS, missing_videos, suite

    if not args.info:
        raise UsageError("--info names the VBench_full_info.json of the vbench package; it lists the prompts")
    wanted = suite(args.info, args.dimensions or DIMENSIONS)
    lacking = missing_videos(_path(args), wanted)
    console.say(f"{len(lacking)} of {sum(wanted.values())} videos are missing for {len(wanted)} prompts")
    for name in lacking[:10]:
        console.say(f"  {name}")
    return {"prompts": len(wanted), "videos": sum(wanted.values()), "missing": lacking}, 0


def _flicker(args: argparse.Namespace, console: Any) -> tuple[dict[str, Any], int]:
    from ..eval.frames import read_clip
    from ..eval.vbench import temporal_flickering
    from ..pipelines.video import to_uint8

    found = temporal_flickering(to_uint8(read_clip(_path(args)).frames))
    console.say(f"{found['name']} {found['score']:.6f} (no VBench score: {found['meaning']})")
    return found, 0


_ACTIONS = {"totals": _totals, "doctor": _doctor, "run": _run, "missing": _missing, "flicker": _flicker}


def _show(found: dict[str, Any], console: Any) -> None:
    for name, row in found["dimensions"].items():
        console.say(f"{name:<36}{row['score']:.4f}  {row['videos']} videos")
    if found["complete"]:
        console.say(", ".join(f"{name} {100 * value:.2f} %" for name, value in found["totals"].items()))
        return
    console.say(f"{found['mean']['label']}: {found['mean']['value']:.4f}")
    lacking = found["lacking"]
    more = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
    console.note(f"partial, so there are no totals: {'; '.join(lacking[:4])}{more}")


def _path(args: argparse.Namespace) -> str:
    from ..errors import UsageError

    if not args.path:
        raise UsageError(f"eval vbench {args.action} needs a path; see dit-accel eval vbench --help")
    return args.path


def _python(args: argparse.Namespace) -> str:
    from ..errors import UsageError

    if not args.python:
        raise UsageError("--python names the interpreter of the environment in which vbench is installed")
    return args.python
