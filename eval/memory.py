"""Peak memory of one attention call beyond its inputs and output. ``python -m dit_accel.eval.memory -o FILE``

Every method runs in a process of its own, planning included, on white noise at a real size. The figure is the largest
resident memory during the call less that before it, set against the bytes of q, k, v and the output; the output itself
counts as extra until it is returned, so a call that allocates nothing else shows 0.25.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..functional import attend
from ..kernels.block_sparse import choose
from ..layout import Layout
from ..lowering import lower
from ..methods import Call, find
from ..pipelines.outputs import write_json
from ..state import State
from ..step import Step
from .command import output_file, positive, token_grid
from .environment import ALLOCATOR, environment
from .method_spec import PARAMETERS

#: Methods that look at q and k, as measured by default; Pyramid and PISA with and without their token order.
CASES: dict[str, dict[str, Any]] = {
    "pisa": {},
    "pisa, no reorder": {"tile": None},
    "pyramid": {},
    "pyramid, no reorder": {"curve": None},
    "rectified": {},
    "rectified, no reorder": {"curve": None},
    "vmoba": {},
    "adaspa": {},
}


@dataclass(frozen=True)
class Size:
    """Of one call: the token grid, heads, head dim, samples. Defaults: Wan 2.1 at 480p, 81 frames."""

    grid: tuple[int, int, int] = (21, 30, 52)
    heads: int = 24
    dim: int = 128
    batch: int = 1
    dtype: str = "bfloat16"


def measure(case: str, size: Size, density: float = 0.15) -> dict[str, Any]:
    """One call of ``case`` in this process: ``extra`` bytes, ``ratio`` to q + k + v + out, the ``tier`` that ran."""
    name = case.partition(",")[0]
    parameters = {**PARAMETERS.get(name, {}), **CASES.get(case, {})}
    layout = Layout(grid=size.grid)
    method, _ = find(name)(**parameters).with_density(density, layout)
    dtype = getattr(torch, size.dtype)
    small = Layout(grid=(2, 8, 8))
    _call(method, small, [torch.randn(1, 2, small.tokens, size.dim).to(dtype) for _ in range(3)])
    shape = (size.batch, size.heads, layout.tokens, size.dim)
    q, k, v = (torch.empty(shape, dtype=dtype).normal_() for _ in range(3))
    with _Peak() as peak:
        plan = _call(method, layout, (q, k, v))
    tier, _ = choose(q, lower(plan))
    inputs = 4 * q.nbytes
    return {
        "case": case, "density": plan.density, "tier": tier, "reordered": plan.order is not None,
        "inputs": inputs, "extra": peak.extra, "ratio": peak.extra / inputs, "representatives": _represented(plan),
    }  # fmt: skip


def _call(method: Any, layout: Layout, tensors: Any) -> Any:
    q, k, v = tensors
    # One step of one: a method with state searches and runs.
    call = Call(layout, step=Step(), state=State(), device=q.device)
    plan = method.plan(q, k, v, call)
    attend(q, k, v, plan=plan, layout=layout)
    return plan


def _represented(plan: Any) -> float:
    """Elements of K representatives over those of K."""
    return sum(group.size for group in plan.reps) / plan.k_blocks.n


class _Peak:
    """Largest resident memory while open less that at the start, by looking every few milliseconds."""

    def __enter__(self) -> _Peak:
        self._stop = threading.Event()
        self._start = self._largest = _resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.extra = self._largest - self._start

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._largest = max(self._largest, _resident())
            time.sleep(0.003)


def _resident() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return pages * resource.getpagesize()


def run(cases: list[str], size: Size, density: float) -> dict[str, Any]:
    """:func:`measure` of every case, each in a new process."""
    os.environ.update(ALLOCATOR)
    context = multiprocessing.get_context("spawn")
    rows = []
    for case in cases:
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (case, size, density)))
    document = {"size": asdict(size), "density": density, "allocator": ALLOCATOR, "rows": rows}
    return document | {"environment": environment()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_accel.eval.memory", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("cases", nargs="*", help=f"of {', '.join(repr(case) for case in CASES)} (default: all)")
    add("--grid", type=token_grid, default="21x30x52", help="tokens (default: Wan 480p, 81 frames: 32,760)")
    add("--heads", type=positive, default=24)
    add("--dim", type=positive, default=128)
    add("--density", type=float, default=0.15)
    add("-o", "--out", type=output_file)
    args = parser.parse_args(argv)
    unknown = set(args.cases) - CASES.keys()
    if unknown:
        raise UsageError(f"unknown case {', '.join(sorted(unknown))}; choose of {', '.join(CASES)}")
    size = Size(args.grid, args.heads, args.dim)
    found = run(args.cases or list(CASES), size, args.density)
    print("| case | density | tier | extra, MiB | over q + k + v + out |\n|---|---|---|---|---|")
    for row in found["rows"]:
        extra = f"{row['extra'] / 2**20:.0f} | {row['ratio']:.2f}"
        print(f"| {row['case']} | {row['density']:.2f} | {row['tier']} | {extra} |")
    if args.out:
        write_json(args.out, found)
    return 0


if __name__ == "__main__":
    from .command import run as finish

    sys.exit(finish(main))
