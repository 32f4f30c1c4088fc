"""``dit-accel eval proxies``: weight-free figures of two folders of renders, as differences."""

from __future__ import annotations

import argparse

from . import folders, record

HELP = "weight-free figures of renders against their dense partners; no VBench scores"
DESCRIPTION = (
    "Motion, persistence of appearance, sharpness, noise, blocks and damage of every clip of FAST, as differences to "
    "the clip of DENSE that has the same prompt and seed. None is a VBench score and none enters a total."
)
EXAMPLES = """examples:
  dit-accel eval proxies dense radial --dense-frames dense/frames --fast-frames radial/frames -o proxies.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    folders.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..eval.proxies import compare_folders
    from .console import Console, table

    console = Console(json=args.json)
    found = compare_folders(args.dense, args.fast, dense_frames=args.dense_frames, fast_frames=args.fast_frames)
    rows = [("proxy", "difference", "95 % interval", "clips", "meaning")]
    for name, one in found["summary"].items():
        interval = f"{one['low']:+.4f} to {one['high']:+.4f}" if "low" in one else "-"
        mean = f"{one['mean']:+.4f}" if one["clips"] else "-"
        rows.append((name, mean, interval, str(one["clips"]), found["meaning"][name]))
    for line in table(rows, right=frozenset({1, 3})):
        console.say(line)
    console.say(f"accelerated minus dense; {found['note']}")
    for row in found["rows"]:
        for text in row["sanity"]:
            console.note(f"{row['prompt'][:60]} (seed {row['seed']}): {text}")
        if not row["reliable"]:
            console.note(f"{row['prompt'][:60]} (seed {row['seed']}): the flow does not come back; its figures are "
                         "unreliable")  # fmt: skip
    record.finish(args, "proxies", found)
    return 0
