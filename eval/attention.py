"""Attention error: what a method's output loses against exact attention, per layer, step and head.

``python -m dit_accel.eval.attention --method radial`` runs the model densely and, at every call, also attends under
the methods asked for, on the same q, k and v. On sampled query rows the outputs are set against exact attention in
float32; no map is stored. Relative L1, cosine and RMSE are those of SpargeAttn's tuning (arXiv 2502.18137), retained
mass is what Sparse VideoGen 2 (arXiv 2505.18875) calls recall. A method with representatives for skipped keys,
or corrects its output, keeps more than its retained mass tells: read it beside the error.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..drift import row_recall
from ..errors import UsageError
from ..functional import attend, make_plan
from ..lowering import lower
from ..methods import Call
from ..pipelines.calibrate import observe
from ..pipelines.job import Shot
from ..plans import Plan
from ..processors import Processor
from ..state import State
from .flops import attention_flops

#: Per head and call. ``recall_low``: the 5th percentile over rows.
METRICS = ("rel_l1", "cosine", "rmse", "max_abs", "recall", "recall_low")


def output_errors(out: Tensor, exact: Tensor) -> Tensor:
    """float32 (4, B, H): relative L1, cosine, RMSE and largest absolute error of every head.

    out, exact: (B, H, rows, D). A head whose exact output is zero has relative L1 of 0 if ``out`` is zero too.
    """
    o, r = out.float(), exact.float()
    difference, size = (o - r).abs(), r.abs().sum((-2, -1))
    missed = difference.sum((-2, -1))
    relative = torch.where(size > 0, missed / size, torch.where(missed > 0, torch.inf, 0.0))
    norms = o.flatten(2).norm(dim=-1) * r.flatten(2).norm(dim=-1)
    cosine = torch.where(norms > 0, (o * r).sum((-2, -1)) / norms, (missed == 0).float())
    return torch.stack([relative, cosine, (o - r).square().mean((-2, -1)).sqrt(), difference.amax((-2, -1))])


def exact_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float, kv_valid: Tensor | None = None) -> Tensor:
    """Exact attention of some query rows in float32: (B, H, rows, D). Memory is rows x Nk."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(groups, 1) for x in (k, v))
    scores = (q[:, :, rows].float() * scale) @ k.mT
    if kv_valid is not None:
        dead = torch.arange(k.shape[2], device=k.device) >= kv_valid.to(k.device)[:, None, None, None]
        scores = scores.masked_fill(dead, -torch.inf)
    return scores.softmax(-1) @ v


def kernel_density(plan: Plan) -> float:
    """Pairs that the kernel computes, whole tiles and padding included, over all pairs; the mean over heads."""
    tiles = lower(plan)
    lists = [entry for entry in (tiles.full, tiles.partial) if entry is not None]
    visited = sum(float(entry.count.double().sum((-1,)).mean()) for entry in lists)
    return visited * tiles.tile_q * tiles.tile_k / (plan.q_blocks.n * plan.k_blocks.n)


@dataclass
class _Tally:
    """Of one candidate: per (layer, step) the sums over calls of a float64 (H, metrics) table, and of densities."""

    state: State = field(default_factory=State)
    run: int | None = None
    errors: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    calls: dict[tuple[int, int], int] = field(default_factory=dict)
    densities: dict[tuple[int, int], list[tuple[float, float]]] = field(default_factory=dict)
    pairs: float = 0.0
    kept: float = 0.0
    flops: float = 0.0
    dense_flops: float = 0.0


class Collector:
    """An :class:`~dit_accel.methods.observe.Observe` listener that measures several processors on one dense run.

    ``rows``: query rows sampled per call, the same for every candidate. ``steps``: how many steps of a run are
    measured, evenly spread; None measures all. A candidate's own schedule holds: calls it leaves dense are counted with
    density 1 and no error. Methods that keep state see every call.
    """

    def __init__(self, processors: Mapping[str, Processor], *, rows: int = 64, steps: int | None = None, seed: int = 0):
        if rows < 1 or (steps is not None and steps < 1):
            raise UsageError(f"rows and steps must be at least 1; got rows={rows}, steps={steps}")
        self.processors = dict(processors)
        self.rows, self.steps = rows, steps
        self._generator = torch.Generator().manual_seed(seed)
        self._tallies = {name: _Tally() for name in self.processors}
        self.total_steps = 0

    @torch.no_grad()
    def observe(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        """One attention call: q (B, H, N, D), k and v (B, Hk, N, D)."""
        self.total_steps = max(self.total_steps, call.step.index + 1)
        measured = self._measured(call)
        scale = call.scale if call.scale is not None else q.shape[-1] ** -0.5
        rows = torch.randperm(q.shape[2], generator=self._generator)[: self.rows].sort().values.to(q.device)
        seed = int(torch.randint(2**31, (), generator=self._generator))
        exact = exact_rows(q, k, v, rows, scale, call.kv_valid) if measured else None
        for name, processor in self.processors.items():
            tally = self._tallies[name]
            if tally.run != call.step.run:
                tally.state, tally.run = State(), call.step.run
            plan, sparse = self._plan(processor, q, k, v, replace(call, state=tally.state))
            flops = q.shape[0] * attention_flops(q.shape[2], k.shape[2], q.shape[1] * q.shape[3])
            pairs = float(q.shape[:-1].numel() * k.shape[2])
            density = (plan.density if plan is not None else 1.0) if sparse else 1.0
            tally.pairs, tally.kept = tally.pairs + pairs, tally.kept + pairs * density
            tally.dense_flops, tally.flops = tally.dense_flops + flops, tally.flops + flops * density
            if not (sparse and measured):
                continue
            out = attend(
                q, k, v, plan=plan, layout=call.layout, kv_valid=call.kv_valid, scale=call.scale,
                quant=processor.quant, backend=processor.backend,
            )  # fmt: skip
            kept = self._recall(q, k, plan, scale, call, seed)
            self._add(tally, call, output_errors(out[:, :, rows], exact), kept, density, plan)

    def _measured(self, call: Call) -> bool:
        total = call.step.total
        if self.steps is None or not total or self.steps >= total:
            return True
        return call.step.index in {(2 * i + 1) * total // (2 * self.steps) for i in range(self.steps)}

    @staticmethod
    def _plan(processor: Processor, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Plan | None, bool]:
        """The candidate's plan (None: all pairs), and whether it runs this call at all."""
        if processor.schedule.is_dense(call.step, call.layer):
            return None, False
        if processor.method is None:
            return None, processor.quant is not None
        plan = make_plan(q, k, v, processor.method, call)
        return plan, plan is not None

    def _recall(self, q: Tensor, k: Tensor, plan: Plan | None, scale: float, call: Call, seed: int) -> Tensor:
        if plan is None:
            return torch.ones((*q.shape[:2], 1), device=q.device)
        generator = torch.Generator().manual_seed(seed)
        return row_recall(q, k, plan, self.rows, generator, scale=scale, kv_valid=call.kv_valid)

    @staticmethod
    def _add(tally: _Tally, call: Call, errors: Tensor, kept: Tensor, density: float, plan: Plan | None) -> None:
        low = torch.quantile(kept.float(), 0.05, dim=-1)
        table = torch.cat([errors, kept.mean(-1)[None], low[None]]).double().mean(1).mT.cpu()  # (H, metrics)
        key = (call.layer, call.step.index)
        tally.errors[key] = tally.errors.get(key, torch.zeros_like(table)) + table
        tally.calls[key] = tally.calls.get(key, 0) + 1
        tally.densities.setdefault(key, []).append((density, 1.0 if plan is None else kernel_density(plan)))

    def result(self) -> dict[str, Any]:
        """By candidate: ``mean`` of every metric, ``layers``, ``heads``, ``heat`` maps, ``densities``, ``flops``."""
        return {name: self._one(self.processors[name], tally) for name, tally in self._tallies.items()}

    def _one(self, processor: Processor, tally: _Tally) -> dict[str, Any]:
        tables = {key: total / tally.calls[key] for key, total in tally.errors.items()}
        layers = sorted({layer for layer, _ in tables})
        rows, heads = [], {}
        for layer in layers:
            own = torch.stack([table for (at, _), table in tables.items() if at == layer])
            by_head = own.mean(0)
            worst = int(by_head[:, 0].argmax())
            heads[str(layer)] = by_head[:, 0].tolist()
            row = {"layer": layer, "calls": sum(n for (at, _), n in tally.calls.items() if at == layer)}
            row |= dict(zip(METRICS, by_head.mean(0).tolist(), strict=True))
            # The mean over heads hides a broken one; the largest error and the lowest recall are told as they are.
            row["max_abs"] = float(own[..., METRICS.index("max_abs")].max())
            row["recall_low"] = float(own[..., METRICS.index("recall_low")].min())
            rows.append(row | {"worst_head": {"head": worst, "rel_l1": float(by_head[worst, 0])}})
        worst = max(rows, key=lambda row: row["worst_head"]["rel_l1"], default=None)
        seen = [pair for values in tally.densities.values() for pair in values]
        mask, kernel = ([pair[i] for pair in seen] for i in (0, 1))
        heat = {name: self._heat(tables, layers, METRICS.index(name)) for name in ("rel_l1", "recall")}
        return {
            "processor": processor.to_dict(),
            "mean": {name: sum(row[name] for row in rows) / len(rows) for name in METRICS} if rows else {},
            "worst": None if worst is None else {"layer": worst["layer"], **worst["worst_head"]},
            "layers": rows,
            "heads": heads,
            "heat": heat | {"density": self._density_heat(tally, layers)},
            "densities": {
                "mask": sum(mask) / len(mask) if mask else None,
                "kernel": sum(kernel) / len(kernel) if kernel else None,
                "effective": tally.kept / tally.pairs if tally.pairs else None,
            },
            "flops": {"attention": tally.flops, "dense_attention": tally.dense_flops},
        }

    def _heat(self, tables: dict[tuple[int, int], Tensor], layers: list[int], metric: int) -> list[list[float | None]]:
        """[layer][step], the mean over heads; None where nothing sparse was measured."""

        def at(layer: int, step: int) -> float | None:
            table = tables.get((layer, step))
            return None if table is None else float(table[:, metric].mean())

        return [[at(layer, step) for step in range(self.total_steps)] for layer in layers]

    def _density_heat(self, tally: _Tally, layers: list[int]) -> list[list[float | None]]:
        def at(layer: int, step: int) -> float | None:
            values = tally.densities.get((layer, step))
            return sum(d for d, _ in values) / len(values) if values else None

        return [[at(layer, step) for step in range(self.total_steps)] for layer in layers]


def measure(
    pipe: Any,
    shots: list[Shot],
    processors: Mapping[str, Processor],
    *,
    rows: int = 64,
    steps: int | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> dict[str, Any]:
    """Errors of several processors over dense renders of ``shots``; see :meth:`Collector.result`.

    ``backend``: the tier of the dense run itself.
    """
    collector = Collector(processors, rows=rows, steps=steps, seed=seed)
    observe(pipe, shots, collector.observe, backend=backend)
    return collector.result()


def layer_errors(
    pipe: Any, shots: list[Shot], processor: Processor, *, rows: int = 64, steps: int | None = None
) -> list[float | None]:
    """Mean relative L1 error per layer, None for layers that never ran sparse."""
    found = measure(pipe, shots, {"it": processor}, rows=rows, steps=steps)["it"]["layers"]
    by_layer = {row["layer"]: row["rel_l1"] for row in found}
    return [by_layer.get(layer) for layer in range(max(by_layer, default=-1) + 1)]


if __name__ == "__main__":
    from ..cli import main

    sys.exit(main(["eval", "attention", *sys.argv[1:]]))
