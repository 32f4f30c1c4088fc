"""Sparse attention, planning included, against dense: ``python -m dit_accel.eval.kernels --section cpu``.

Both sides run in one process, alternating, after a warm-up apart. ``fraction`` is the share of the 1/d limit that is
reached: density * dense seconds / sparse seconds. Cases that a result file already holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SECTIONS = ("cpu",)
GRIDS = ((4, 32, 32), (8, 32, 32), (16, 32, 32))
DENSITIES = (0.2, 0.5, 0.1, 0.35)
METHODS = ("random-blocks", "rectified")


@dataclass(frozen=True)
class Case:
    """One method at one density on one grid; tokens are the product of the grid."""

    method: str
    density: float
    grid: tuple[int, int, int]
    dim: int = 64
    heads: int = 2

    @property
    def key(self) -> str:
        return f"{self.method} d{self.density:g} {'x'.join(map(str, self.grid))} D{self.dim} H{self.heads}"


def cases(grids: Sequence[tuple[int, int, int]] = GRIDS, densities=DENSITIES, methods=METHODS) -> list[Case]:
    """Most telling first: a density on every length before the next density."""
    return [Case(method, density, grid) for density in densities for method in methods for grid in grids]


def fraction(dense: float, sparse: float, density: float) -> float:
    """Share of the 1/d limit: 1 where sparse seconds are density times dense seconds."""
    return density * dense / sparse


def measure(case: Case, repeats: int = 5, backend: str = "flex") -> dict[str, Any]:
    """Medians and extremes in seconds; every sparse call plans afresh. Random q, k, v in float32 on the CPU."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from ..functional import attend, plan, tiled
    from ..kernels.block_sparse.api import choose
    from ..layout import Layout
    from ..methods import RandomBlocks, find

    layout = Layout(case.grid)
    made = find(case.method) if case.method != RandomBlocks.name else RandomBlocks
    method = made(density=case.density, block_size=128)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((1, case.heads, layout.tokens, case.dim), generator=generator) for _ in range(3))
    kept = plan(q, k, v, method, layout=layout)
    if kept is None:
        raise ValueError(f"{case.key}: the method runs this call dense; choose one that has a plan at the first step")
    tier, why = choose(q, tiled(kept, q, backend=backend), backend=backend)
    sides: dict[str, Callable[[], Any]] = {
        "dense": lambda: scaled_dot_product_attention(q, k, v),
        "sparse": lambda: attend(q, k, v, method, layout=layout, backend=backend),
        "planning": lambda: plan(q, k, v, method, layout=layout),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with torch.inference_mode():
        for run in sides.values():
            run()
        for _ in range(repeats):
            for name, run in sides.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        **asdict(case), "grid": list(case.grid), "tokens": layout.tokens, "density": case.density,
        "kept": kept.density, "tier": tier, "why": why, "seconds": middle,
        "spread": {name: [min(taken), max(taken)] for name, taken in seconds.items()},
        "fraction": fraction(middle["dense"], middle["sparse"], kept.density),
    }  # fmt: skip


def run(
    todo: Sequence[Case], rows: dict[str, Any], minutes: float, one: Callable[[Case], dict[str, Any]] = measure,
    save: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic,
) -> bool:  # fmt: skip
    """Measure what ``rows`` lacks into it, saving after each case; False where the time ended first."""
    end = clock() + 60 * minutes
    for case in todo:
        if case.key in rows:
            continue
        if clock() >= end:
            return False
        rows[case.key] = one(case)
        save()
    return True


def markdown(rows: dict[str, Any]) -> str:
    """A table of the rows; times in milliseconds."""
    lines = [
        "| case | tier | density | dense, ms | sparse, ms | planning, ms | of 1/d |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, row in rows.items():
        dense, sparse, planning = (f"{1e3 * row['seconds'][side]:.1f}" for side in ("dense", "sparse", "planning"))
        lines.append(
            f"| {key} | {row['tier']} | {row['kept']:.3f} | {dense} | {sparse} | {planning} | {row['fraction']:.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_accel.eval.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--section", choices=SECTIONS, default="cpu")
    parser.add_argument("--minutes", type=float, default=8, help="no case starts after this; run again to go on")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--grids", nargs="+", help="T x H x W in tokens, such as 4x32x32")
    parser.add_argument("--backend", default="flex", help="flex, flash, gather or auto")
    parser.add_argument("-o", "--output", type=Path, help="JSON; an existing one is continued")
    args = parser.parse_args(argv)
    from .environment import environment

    head = {"section": args.section, "backend": args.backend, "environment": environment()}
    found = {**head, "rows": {}}
    if args.output and args.output.exists():
        found = json.loads(args.output.read_text())
        for name, value in head.items():
            if found[name] != value:
                parser.error(f"{args.output} holds another {name}; name another file with -o")

    def save() -> None:
        if args.output:
            args.output.write_text(json.dumps(found, indent=1) + "\n")

    grids = [tuple(int(n) for n in grid.split("x")) for grid in args.grids] if args.grids else GRIDS
    done = run(
        cases(grids, args.densities, args.methods), found["rows"], args.minutes,
        lambda case: measure(case, backend=args.backend), save,
    )  # fmt: skip
    print(markdown(found["rows"]))
    parts = [row["fraction"] for row in found["rows"].values()]
    if parts:
        print(f"of 1/d: median {statistics.median(parts):.2f}, least {min(parts):.2f}, {len(parts)} cases")
    if not done:
        print("the time ended first; the same command with the same -o goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
