"""Planning as a share of attention time over a run: ``python -m dit_accel.eval.planning_share``

One layer lives through the steps of a run on random q, k and v, dense steps included, as a pipeline would call it: what
a method searches for once, it searches for once. Attention is everything between q, k, v and the output, planning,
lowering and dense calls included. A run that is dense throughout follows each: planning is also given as a share of
that, the time that a method is there to shorten. The default shape is the bundled model's, one guidance branch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..functional import attend, plan
from ..layout import Layout
from ..methods import find
from ..processors import Processor
from ..state import State
from ..step import Step
from .command import positive, token_grid
from .environment import environment
from .method_spec import PARAMETERS
from .methods import split

DYNAMIC = ("adaspa", "vmoba", "pisa", "rectified", "pyramid")
DENSITIES = (0.5, 0.25, 0.15)


@dataclass(frozen=True)
class Shape:
    """``grid`` (T, H, W) of tokens, ``heads`` of ``dim`` channels, ``steps`` of a run."""

    grid: tuple[int, int, int] = (33, 8, 10)
    heads: int = 4
    dim: int = 32
    steps: int = 30


def measure(name: str, shape: Shape, repeats: int = 7) -> dict[str, Any]:
    """Seconds of planning and attention in a run of ``METHOD@DENSITY`` and of attention in a dense one, and planning's
    share in either: medians of ``repeats`` runs of both in turn after one that warms up, shares with least and most.

    Raises ``UsageError`` for a name that is not understood.
    """
    kind, density, _ = split(name)
    layout = Layout(shape.grid)
    method = find(kind)(**PARAMETERS.get(kind, {}))
    if density is not None:
        method, density = method.with_density(density, layout)
    processor = Processor(method)
    g = torch.Generator().manual_seed(0)
    # Heads side by side in memory, as projections leave them.
    size = (1, layout.tokens, shape.heads, shape.dim)
    q, k, v = (torch.randn(size, generator=g).transpose(1, 2) for _ in range(3))
    runs = []
    for _ in range(repeats + 1):
        run = _run(processor, q, k, v, layout, shape.steps)
        runs.append(run | {"dense": _run(None, q, k, v, layout, shape.steps)["attention"]})
    runs = runs[1:]
    shares, of_dense = ([run["planning"] / run[whole] for run in runs] for whole in ("attention", "dense"))
    return {
        "method": name, "density": density, "dense_steps": len(processor.dense_steps(shape.steps)), "runs": repeats,
        "planning": median(run["planning"] for run in runs), "attention": median(run["attention"] for run in runs),
        "dense": median(run["dense"] for run in runs),
        "share": median(shares), "share_range": [min(shares), max(shares)],
        "of_dense": median(of_dense), "of_dense_range": [min(of_dense), max(of_dense)],
    }  # fmt: skip


def _run(processor: Processor | None, q: Tensor, k: Tensor, v: Tensor, layout: Layout, steps: int) -> dict[str, float]:
    state, planning = State(), 0.0
    started = time.perf_counter()
    for index in range(steps):
        step = Step(index=index, total=steps)
        made = None
        if processor is not None and not processor.schedule.is_dense(step, 0):
            before = time.perf_counter()
            made = plan(q, k, v, processor.method, layout=layout, step=step, state=state)
            planning += time.perf_counter() - before
        attend(q, k, v, plan=made, layout=layout, step=step)
    return {"planning": planning, "attention": time.perf_counter() - started}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.eval.planning_share", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("methods", nargs="*", help="METHOD@DENSITY (default: those that plan every call, at 0.5, 0.25 and 0.15)")
    add("--grid", type=token_grid, default="33x8x10", help="T x H x W in tokens (default: 33x8x10)")
    add("--heads", type=positive, default=Shape.heads)
    add("--dim", type=positive, default=Shape.dim)
    add("--steps", type=positive, default=Shape.steps)
    add("--json", action="store_true")
    args = parser.parse_args(argv)
    shape = Shape(args.grid, args.heads, args.dim, args.steps)
    names = args.methods or [f"{method}@{density:g}" for method in DYNAMIC for density in DENSITIES]
    rows = []
    for name in names:
        rows.append(row := measure(name, shape))
        if not args.json:
            print(f"{name:<16} planning {row['planning']:6.3f} s" + "".join(
                f", of {row[whole]:6.3f} s {what} {row[share]:.1%} ({row[f'{share}_range'][0]:.1%} to "
                f"{row[f'{share}_range'][1]:.1%})"
                for whole, what, share in (("attention", "attention", "share"), ("dense", "dense", "of_dense"))
            ), flush=True)  # fmt: skip
    if args.json:
        shown = {"grid": list(shape.grid), "heads": shape.heads, "dim": shape.dim, "steps": shape.steps}
        print(json.dumps({"schema": 1, **shown, "rows": rows, "environment": environment()}, indent=1))
    return 0


if __name__ == "__main__":
    from .command import run as finish

    sys.exit(finish(main))
