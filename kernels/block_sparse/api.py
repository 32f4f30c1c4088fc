"""Block-sparse attention over a TilePlan: checks, tier choice, plan order in and out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..live import without_dead
from ..tileplan import TilePlan
from . import flash, flex, gather, reference
from .order import in_plan_order, in_token_order

BACKENDS = ("auto", "reference", "gather", "flex", "triton", "flash")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TilePlan,
    *,
    scale: float,
    kv_valid: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention restricted to the plan's pairs.

    q: (B, H, Nq, D); k: (B, Hk, Nk, D); v: (B, Hk, Nk, Dv) with H a multiple of Hk, float16, bfloat16, float32
    or (reference, gather, flash) float64. ``kv_valid``: int32 (B,), keys from that token index on are dead
    and may hold anything. ``backend``: a tier's name as resolved by :func:`choose`, or ``"auto"``.
    Returns out (B, H, Nq, Dv) in q's dtype and the natural-log LSE (B, H, Nq), or None where not asked for. Raises
    ``ValueError`` for tensors and tables that do not fit, ``NotImplementedError`` for an LSE of a plan whose output is
    no plain softmax.
    """
    check(q, k, v, plan, kv_valid)
    if return_lse:
        check_lse(plan)
    tier, _ = choose(q, plan, backend=backend, return_lse=return_lse)
    if tier == "triton":
        from . import triton as tier_triton

        return tier_triton.attention(q, k, v, plan, scale=scale, kv_valid=kv_valid, return_lse=return_lse)
    k, v = without_dead(k, v, kv_valid)
    if tier == "flash":
        out, lse = flash.attention(q, k, v, plan, scale=scale, kv_valid=kv_valid)
    else:
        run = {"reference": reference, "gather": gather, "flex": flex}[tier].attention
        query, keys, values, alive = in_plan_order(q, k, v, plan, kv_valid)
        out, lse = in_token_order(*run(query, keys, values, plan, scale=scale, alive=alive), plan)
    return out, lse if return_lse else None


def choose(q: Tensor, plan: TilePlan, *, backend: str = "auto", return_lse: bool = False) -> tuple[str, str]:
    """The tier that will run and why. A tier asked for by name that cannot serve raises ``NotImplementedError``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if plan.first_order_each:
        why = "it has a first-order matrix per representative, which the reference tier alone serves"
        if backend not in ("auto", "reference"):
            raise NotImplementedError(f"backend {backend!r} cannot serve this plan: {why}; use backend='reference'")
        return "reference", why
    reasons = []
    refusals = {
        "triton": lambda: _refuses_triton(q, plan),
        "flash": lambda: flash.refuses(q, plan),
        "flex": lambda: flex.refuses(q, plan, return_lse=return_lse),
    }
    for tier, refusal in refusals.items():
        if backend in (tier, "auto"):
            # Emulation is for tests: asked for by name only.
            emulated = tier == "triton" and backend == "auto" and q.device.type != "cuda"
            why = f"q is on {q.device}" if emulated else refusal()
            if why is None:
                return tier, "; ".join(reasons) or "first choice on this device"
            reasons.append(f"{tier}: {why}")
            if backend == tier:
                raise NotImplementedError(f"backend {tier!r} cannot serve this call: {why}; use backend='auto'")
    return (backend if backend != "auto" else "gather"), "; ".join(reasons) or "asked for"


def _refuses_triton(q: Tensor, plan: TilePlan) -> str | None:
    try:
        from . import triton as tier_triton
    except ImportError as error:
        return f"not importable ({error}); pip install triton"
    return tier_triton.refuses(q, plan)


def check(q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, kv_valid: Tensor | None = None) -> None:
    """Raise ``ValueError`` where shapes, dtypes, devices and plan do not fit."""
    check_tensors(q, k, v, kv_valid)
    if (q.shape[2], k.shape[2]) != (plan.queries, plan.keys):
        raise ValueError(
            f"the plan is for {plan.queries} queries and {plan.keys} keys; got {q.shape[2]} and {k.shape[2]}"
        )
    if q.device != plan.device:
        raise ValueError(f"q, k and v are on {q.device}, the plan on {plan.device}")
    check_plan(plan, q.shape[0], q.shape[1])


def check_tensors(q: Tensor, k: Tensor, v: Tensor, kv_valid: Tensor | None = None) -> None:
    """Raise ``ValueError`` where shapes, dtypes and devices do not fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be (B, H, N, D); got shape {tuple(x.shape)}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.numel():
            raise ValueError(f"{name} holds nothing: shape {tuple(x.shape)}; every dimension is 1 or more")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype} and v {v.dtype}; cast them to one dtype")
    if q.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"q, k and v are {q.dtype}; attention takes {allowed}")
    if len({q.device, k.device, v.device}) > 1:
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}; move them to one device")
    if kv_valid is not None and kv_valid.shape != q.shape[:1]:
        raise ValueError(f"kv_valid must be ({q.shape[0]},), one length per sample; got {tuple(kv_valid.shape)}")


def check_plan(plan: TilePlan, b: int, h: int) -> None:
    """Raise ``ValueError`` where the plan's tables are not for ``b`` samples and ``h`` heads."""
    tables = [("full", plan.full.count)]
    if plan.partial is not None:
        tables.append(("partial", plan.partial.count))
    if plan.gate is not None:
        tables.append(("gate", plan.gate.table))
    for group in plan.reps:
        tables += [("representatives' list", group.seen.count), ("representatives' count", group.count)]
    tables += [(name, getattr(plan, name)) for name in ("row_scale", "row_add") if getattr(plan, name) is not None]
    for name, table in tables:
        if not (table.shape[0] in (1, b) and table.shape[1] in (1, h)):
            raise ValueError(
                f"the plan's {name} table is for {table.shape[0]} samples and {table.shape[1]} heads; "
                f"got {b} and {h}, and only 1 broadcasts"
            )
    for name, order, n in (("order", plan.order, plan.n_q), ("kv_order", plan.kv_order, plan.n_k)):
        if order is not None and tuple(order.shape) not in ((n,), (h, n)):
            raise ValueError(f"the plan's {name} is {tuple(order.shape)}; allowed are ({n},) and ({h}, {n})")
    if plan.partial is not None and plan.predicate is None and plan.gate is None:
        raise ValueError("the plan has partial tiles but neither a predicate nor a gate to test their pairs")


def check_lse(plan: TilePlan) -> None:
    """Raise ``NotImplementedError`` where the plan's output is no plain softmax."""
    if plan.first_order is not None or plan.row_scale is not None:
        raise NotImplementedError(
            "an LSE was asked of a plan with a first-order term or row factors; its output is no softmax, so parts "
            "cannot be merged by LSE. Ask for the output alone"
        )
