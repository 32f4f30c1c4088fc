"""What planning costs: ``python -m dit_accel.eval.planning --grid 32x45x80``.

Each method plans in a fresh process, so that the peak memory it adds is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

from .command import token_grid


def measure(method: str, grid: tuple[int, int, int]) -> dict:
    """Seconds of the first plan, peak memory it added to the process, size of its index lists, density."""
    import resource

    from ..functional import plan
    from ..layout import Layout
    from ..methods import find

    unit = 1 if sys.platform == "darwin" else 1024
    layout, chosen = Layout(grid), find(method)()
    plan(None, None, None, chosen, layout=Layout((2, 3, 5)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    made = plan(None, None, None, chosen, layout=layout)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "method": method,
        "grid": list(grid),
        "tokens": layout.tokens,
        "density": round(made.density, 4),
        "seconds": round(seconds, 4),
        "peak_mb": round(peak * unit / 1e6, 1),
        "plan_mb": round(made.bytes() / 1e6, 2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_accel.eval.planning", description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=token_grid, default="32x45x80", help="T x H x W in tokens")
    parser.add_argument("--methods", nargs="+", default=["radial"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    grid = args.grid
    if args.one:
        print(json.dumps(measure(args.one, grid)))
        return 0
    for method in args.methods:
        command = [sys.executable, "-m", "dit_accel.eval.planning", "--grid", "x".join(map(str, grid)), "--one", method]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(json.dumps(row) if args.json else "  ".join(f"{key} {value}" for key, value in row.items()))
    return 0


if __name__ == "__main__":
    from .command import run as finish

    sys.exit(finish(main))
