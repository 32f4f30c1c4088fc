"""``dit-accel eval metrics``: what can be measured here, and why the rest cannot."""

from __future__ import annotations

import argparse

HELP = "list every metric, what it needs and whether it can be had here"
DESCRIPTION = "List every metric by family, what it needs, which way is better, and why some cannot be had here."
EXAMPLES = """examples:
  dit-accel eval metrics
  dit-accel eval metrics --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON to stdout")


def run(args: argparse.Namespace) -> int:
    from ..eval.registry import METRICS
    from .console import Console, emit, table

    found = [metric.to_dict() for metric in METRICS]
    if args.json:
        emit("eval", {"ok": True, "kind": "metrics", "metrics": found})
        return 0
    rows = [("metric", "family", "better", "here", "meaning")]
    for one in found:
        better = "higher" if one["higher_is_better"] else "lower"
        rows.append((one["name"], one["family"], better, "yes" if one["available"] else "no", one["meaning"]))
    console = Console()
    for line in table(rows):
        console.say(line)
    for why in dict.fromkeys(one["why_not"] for one in found if one["why_not"]):
        names = [one["name"] for one in found if one["why_not"] == why]
        console.say(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {why}")
    return 0
