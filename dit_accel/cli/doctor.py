"""``dit-accel doctor``: what this machine offers, what is usable and why not; a block to paste into a bug report."""

from __future__ import annotations

import argparse

HELP = "show versions, devices, usable tiers and why others are not"
DESCRIPTION = "Show versions, devices, the execution tiers that work here and why others do not."
EXAMPLES = """examples:
  dit-accel doctor
  dit-accel doctor --json > environment.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON to stdout")


def run(args: argparse.Namespace) -> int:
    from ..eval.environment import environment
    from .console import Console, emit

    found = environment()
    if args.json:
        emit("doctor", found)
        return 0
    console = Console()
    for title, section in found.items():
        console.say(title.replace("_", " "))
        for name, value in section.items():
            console.say(f"  {name:<18}{_text(value)}")
    return 0


def _text(value) -> str:
    if isinstance(value, dict):
        if "usable" in value:
            return "usable" if value["usable"] else f"not usable: {value['why']}"
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_text(item) for item in value) or "none"
    if value is None:
        return "not installed"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
