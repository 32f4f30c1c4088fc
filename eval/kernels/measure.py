"""One row: every side of a case on the same tensors, timed in turn, and its error against float64."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...functional import attend, plan, tiled
from ...kernels import TilePlan
from ...layout import Layout
from ...methods import AllBlocks, Method
from ...plans import Plan
from ...quant import resolve_quant
from ...rows import sample, spread_slots
from ...state import State
from . import rivals
from .cases import SHAPES, Case, Shape
from .clock import in_turn, observed
from .kept import Run, run_of
from .subjects import method_of, tensors

WHOLE = AllBlocks(block_size=128)
ROWS = 32
# Beyond this a rival did not run this plan, whatever it timed.
WRONG = 0.2
_WITHOUT_RIVALS = ("planning", "scaling", "cpu")

Side = Callable[[], Any]


@torch.inference_mode()
def measure(
    case: Case, device: str, *, seconds: float = 1.0, shape: Shape | None = None, cold: bool = False
) -> dict[str, Any]:
    """The row of ``case``. Raises what the method or the tier asked for raises.

    ``seconds``: to spend on each side. ``cold``: overwrite the L2 cache before every timed call. ``times`` holds a
    summary in seconds of ``sparse`` (planning included; static plans are kept, as pipelines keep them, others made in
    every call), ``kernel`` (the plan given), ``planning``, ``whole`` (our kernel on all pairs) and each rival. A method
    that searches on some steps only is timed between two searches, ``search`` apart; ratios spread it over ``run``.
    """
    shape = shape or SHAPES[case.shape]
    layout = shape.layout
    q, k, v = tensors(shape, device)
    method = WHOLE if case.method is None else method_of(case.method, case.density, layout)
    start, run, kept = time.perf_counter(), run_of(method), State()
    if run is not None:
        plan(q, k, v, method, layout=layout, state=kept, step=run.search)
    made = plan(q, k, v, method, layout=layout, state=kept, step=None if run is None else run.between)
    if made is None:
        raise ValueError(f"{case.key}: the method runs this call dense; choose one that has a plan at the first step")
    first = time.perf_counter() - start
    tiles = tiled(made, q, backend=case.backend, quant=resolve_quant(case.quant, q.device))
    how = {"layout": layout, "backend": case.backend, "quant": case.quant}
    whole = plan(None, None, None, WHOLE, layout=layout).to(q.device)
    for served in [tiled(whole, q, backend=case.backend), *([tiles] if case.quant is None else [])]:
        _warm(served, q, k, v, case.backend)
    sides = _sides(method, made, whole, q, k, v, how, run, kept)
    dense, why = rivals.dense(q, k, v)
    others: dict[str, Side] = {}
    if case.section not in _WITHOUT_RIVALS and case.method is not None:
        others, more = rivals.sparse(method, tiles, shape.grid, q, k, v, shape.text)
        why |= more
        if case.quant is None and device == "cuda":
            others["flex"] = lambda: attend(q, k, v, plan=made, layout=layout, backend="flex")
    with observed() as tiers:
        # Dynamic methods may plan anew, so what is checked is the output on the plan that the rows are taken from.
        own = {"kernel": sides["kernel"]()}
    error = _errors(own, rivals.usable(others, why), rivals.usable(dense, why), made, q, k, v)
    for name in [name for name in others if not error[name] < WRONG]:
        del others[name]
        why[name] = f"off by {error[name]:.2g} from the plan, so it is not compared"
    times = in_turn({**dense, **sides, **others}, device, seconds=seconds, cold=cold)
    exact = [name for name in dense if "quantised" not in name]
    best = min(exact, key=lambda name: times[name]["median"])
    work = workload(made, tiles, shape)
    return {
        **case.to_dict(), "tokens": layout.tokens, "heads": shape.heads, "dim": shape.dim, "kept": made.density,
        "tiers": tiers, "static": method.static, "times": times, "best_dense": best, "not_compared": why,
        "first_plan": first, "error": error, "work": work, "run": None if run is None else run.to_dict(),
        **_ratios(times, best, made.density, work, shape, layout, run),
    }  # fmt: skip


def _sides(
    method: Method, made: Plan, whole: Plan, q: Tensor, k: Tensor, v: Tensor, how: dict[str, Any], run: Run | None,
    kept: State,
) -> dict[str, Side]:  # fmt: skip
    layout, step = how["layout"], None if run is None else run.between

    def state() -> State:
        return kept if method.static or run is not None else State()

    sides = {
        "sparse": lambda: attend(q, k, v, method, state=state(), step=step, **how),
        "kernel": lambda: attend(q, k, v, plan=made, **how),
        "planning": lambda: plan(q, k, v, method, layout=layout, state=state(), step=step),
        "whole": lambda: attend(q, k, v, plan=whole, **{**how, "quant": None}),
    }
    if run is not None:
        sides["search"] = lambda: plan(q, k, v, method, layout=layout, state=State(), step=run.search)
    return sides if method != WHOLE else {name: sides[name] for name in ("sparse", "kernel", "whole")}


def _warm(tiles: TilePlan, q: Tensor, k: Tensor, v: Tensor, backend: str) -> None:
    """Block sizes are found before anything is timed, for each kind of call: a ratio of two sides, one of them on the
    table's sizes, would tell of the tuning."""
    if q.device.type == "cuda" and backend in ("auto", "triton"):
        from ...kernels import autotune

        autotune.warm(tiles, q, k, v)


def _errors(own, others, dense, made: Plan, q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """||out - truth|| / ||truth|| on sampled rows, truth in float64: the plan's pairs, for dense kernels all pairs."""
    slots = spread_slots(made.q_blocks.n, ROWS, 0.0, q.device)
    rows = sample(*(x.double() for x in (q, k, v)), made, slots)
    found = {}
    for outs, truth in (({**own, **others}, rows.planned), (dense, rows.exact)):
        for name, out in outs.items():
            picked = out.gather(2, rows.tokens.expand(q.shape[1], -1)[None, :, :, None].expand(*truth.shape))
            found[name] = float((picked.double() - truth).norm() / truth.norm())
    return found


def workload(made: Plan, tiles: TilePlan, shape: Shape) -> dict[str, float]:
    """What a kernel has to do for a plan, and what makes it uneven.

    ``executed``, ``visible``: share of all pairs, in visited tiles and seen. ``partial``: share of visited tiles that
    test their pairs. ``longest``: the row of tiles with most work over the mean row. ``flops``: of executed pairs,
    representatives apart. ``plan_bytes``; ``bytes``: q, k, v and the output read or written once.
    """
    full = tiles.full.count.double()
    partial = torch.zeros_like(full) if tiles.partial is None else tiles.partial.count.double()
    seen = full + partial
    mean = float(seen.mean())
    n, size = shape.layout.tokens, 2 if tiles.device.type == "cuda" else 4
    executed = mean / tiles.tiles_k
    return {
        "executed": executed, "visible": made.density, "partial": float(partial.mean()) / mean,
        "longest": float(seen.max()) / mean, "flops": 4.0 * n * n * shape.dim * shape.heads * executed,
        "tile_q": tiles.tile_q, "tile_k": tiles.tile_k, "plan_bytes": made.bytes(),
        "bytes": 4.0 * n * shape.heads * shape.dim * size,
    }  # fmt: skip


def _ratios(
    times, best: str, kept: float, work: dict[str, float], shape: Shape, layout: Layout, run: Run | None
) -> dict[str, float]:
    """``of_own``, ``of_best``: share of the 1/d limit, planning included, against our kernel on all pairs and the best
    dense one. ``rate``: TFLOP/s of executed pairs in the kernel; ``of_rate``: over the best dense kernel's. The
    searches of a ``run`` count as planning, each as long as one that starts afresh."""
    dense, sparse, kernel = (times[name]["median"] for name in (best, "sparse", "kernel"))
    search = 0.0 if run is None else run.spread(times["search"]["median"])
    sparse += search
    rate = work["flops"] / kernel / 1e12
    dense_rate = 4.0 * layout.tokens**2 * shape.dim * shape.heads / dense / 1e12
    found = {
        "of_own": kept * times["whole"]["median"] / sparse, "of_best": kept * dense / sparse, "speedup": dense / sparse,
        "kernel_of_best": kept * dense / kernel, "rate": rate, "of_rate": rate / dense_rate, "dense_rate": dense_rate,
    }  # fmt: skip
    if "planning" in times:
        found["planning_share"] = (times["planning"]["median"] + search) / dense
    return found
