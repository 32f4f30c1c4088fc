"""``python -m dit_accel.eval.kernels --section sparse -o eval/results/kernels-sparse.json``"""

from __future__ import annotations

import argparse
import sys

import torch

from ...errors import UsageError
from ...kernels.faults import DeviceLost
from ..command import output_file
from ..environment import environment
from .cases import SECTIONS, SHAPES, cases
from .document import fill, opened, write
from .measure import measure
from .table import markdown, plot


def main(argv: list[str] | None = None) -> int:
    """0 done, 1 where the time ended first or the GPU's context broke, 2 for a usage error."""
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m dit_accel.eval.kernels", description="Kernels against dense ones")
    add = parser.add_argument
    add("--section", choices=SECTIONS, default="cpu")
    add("--minutes", type=float, default=8, help="no case starts after this; run again with the same -o to go on")
    add("--seconds", type=float, default=1.0, help="to spend on each side of a case")
    add("--shapes", nargs="+", choices=tuple(SHAPES), help="of the section's, these alone")
    add("--methods", nargs="+", help="of the section's, these alone")
    add("--cold", action="store_true", help="overwrite the GPU's L2 cache before every timed call")
    add("-o", "--output", type=output_file, help="JSON; an existing one is continued")
    add("--plot", type=output_file, help="picture of time over length; needs matplotlib")
    args = parser.parse_args(given)
    device = "cpu" if args.section == "cpu" or not torch.cuda.is_available() else "cuda"
    if device == "cpu" and args.section != "cpu":
        print(f"section {args.section} needs a CUDA device; on this machine --section cpu runs", file=sys.stderr)
        return 2
    todo = [
        case for case in cases(args.section)
        if (not args.shapes or case.shape in args.shapes) and (not args.methods or case.method in args.methods)
    ]  # fmt: skip
    try:
        document = opened(args.output, args.section, environment(), given, cold=args.cold)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    save = (lambda: write(document, args.output)) if args.output else lambda: None
    one = lambda case: measure(case, device, seconds=args.seconds, cold=args.cold)  # noqa: E731
    try:
        done = fill(document, todo, args.minutes, one, save)
    except DeviceLost as error:
        print(markdown(document))
        print(f"{error}\nThe finished rows are {f'in {args.output}' if args.output else 'above'}", file=sys.stderr)
        return 1
    print(markdown(document))
    if args.plot:
        plot(document, args.plot)
    if not done:
        print("the time ended first; the same command with the same -o goes on")
    return 0 if done else 1


if __name__ == "__main__":
    from ..command import run as finish

    sys.exit(finish(main))
