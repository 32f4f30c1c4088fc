"""``dit-accel report``: one offline page from the records of renders and measurements."""

from __future__ import annotations

import argparse

HELP = "make one self-contained HTML page from renders and measurements"
DESCRIPTION = (
    "Gather every JSON record below the folders given (render --compare, eval ... -o) into one page: players on one "
    "clock with their difference, per-frame curves, heat maps, break-down, environment, commands, raw records. The "
    "page asks the network for nothing."
)
EXAMPLES = """examples:
  dit-accel render prompts.txt --compare -o runs
  dit-accel eval attention --method radial -o runs/attention.json
  dit-accel report runs -o report.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="folders of renders, or JSON files of measurements")
    add("-o", "--out", metavar="FILE", default="report.html", help="page to write (default: report.html)")
    add("--title", default="", metavar="TEXT", help="heading of the page")
    add(
        "--max-mb", type=float, default=25, metavar="N", help="videos up to N MiB in all go into the page (default: 25)"
    )
    add("--json", action="store_true", help="JSON to stdout, text to stderr")


def run(args: argparse.Namespace) -> int:
    from ..errors import UsageError
    from .console import Console, emit

    if not 0 <= args.max_mb < 2**20:
        raise UsageError(f"--max-mb is a size in MiB, 0 to link every video beside the page; got {args.max_mb}")
    from ..eval.report import report
    from ..pipelines.outputs import check_file

    check_file(args.out)
    console = Console(json=args.json)
    found = report(args.paths, args.out, title=args.title, limit=int(args.max_mb * 2**20))
    console.say(f"wrote {found['page']} from {len(found['sources'])} records ({found['bytes'] / 2**20:.1f} MiB)")
    for one in found["skipped"]:
        console.note(f"left out: {one['file']} ({one['why']})")
    if found["linked"]:
        console.note(f"note: {len(found['linked'])} videos did not fit and are linked; keep them beside the page")
    if args.json:
        emit("report", {"ok": True, **found})
    return 0
