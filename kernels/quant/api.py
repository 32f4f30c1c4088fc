"""Quantised block-sparse attention: the same TilePlan in, the same out and LSE, with quantised products."""

from __future__ import annotations

from torch import Tensor

from ..block_sparse.api import check, check_lse
from ..block_sparse.order import in_plan_order, in_token_order
from ..tileplan import TilePlan
from . import capability, reference
from .operands import prepare
from .recipe import Recipe

TIERS = {
    "auto": None, "reference": "quant-reference", "gather": "quant-reference", "quant-reference": "quant-reference",
    "triton": "quant-triton", "quant-triton": "quant-triton",
}  # fmt: skip


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TilePlan,
    recipe: Recipe,
    *,
    scale: float,
    kv_valid: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention restricted to the plan's pairs, its products quantised by ``recipe``.

    Arguments, results and errors as :func:`~dit_accel.kernels.block_sparse.block_sparse_attention`. Tokens are
    quantised in plan order, so that groups hold tokens that the plan put together. The LSE is that of the keys as
    given, smoothed or not. Representatives, the first-order term and row factors are not quantised. Forward only: the
    output carries no gradient.
    """
    check(q, k, v, plan, kv_valid)
    if return_lse:
        check_lse(plan)
    tier, _ = choose(q, plan, recipe, backend=backend)
    q, k, v, alive = in_plan_order(*(x.detach() for x in (q, k, v)), plan, kv_valid)
    live_q, live_k = _filled(plan.order, plan.tokens_q), _filled(plan.kv_order, plan.tokens_k)
    if alive is not None:
        live_k = alive if live_k is None else alive & live_k
    how = {"scale": scale, "live_q": live_q, "live_k": live_k}
    if tier == "quant-triton":
        from . import triton, triton_quantisers

        operands = triton_quantisers.prepare(q, k, v, recipe, **how)
        found = triton.attention(q, operands, plan, recipe, scale=scale, live=live_k, return_lse=return_lse)
    else:
        operands = prepare(q, k, v, recipe, **how)
        found = reference.attention(q, operands, plan, recipe, scale=scale, alive=alive)
    out, lse = in_token_order(*found, plan)
    return out, lse if return_lse else None


def choose(q: Tensor, plan: TilePlan, recipe: Recipe, *, backend: str = "auto") -> tuple[str, str]:
    """The tier that will run and why: ``"quant-triton"`` or ``"quant-reference"``, the emulation in plain torch.

    Raises ``NotImplementedError`` for a recipe that the GPU has no instructions for, unless emulation is asked for by
    name (``"reference"``), and for a backend that cannot quantise.
    """
    if plan.first_order_each:
        raise NotImplementedError("a first-order matrix per representative cannot be quantised; use quant=None")
    if backend not in TIERS:
        raise NotImplementedError(f"backend {backend!r} cannot quantise; choose auto, triton or reference, or no quant")
    if TIERS[backend] == "quant-reference":
        return "quant-reference", "asked for"
    gpu = capability.of(q.device)
    why = capability.refusal(recipe, gpu)
    if why is not None:
        raise NotImplementedError(f"{recipe} cannot run on {q.device}: {why}; or emulate it with backend='reference'")
    # Emulation in the interpreter is for tests: asked for by name only.
    why = f"q is on {q.device}" if backend == "auto" and gpu is None else _refuses_triton(q, plan, recipe)
    if why is None:
        return "quant-triton", "first choice on this device"
    if TIERS[backend] == "quant-triton":
        raise NotImplementedError(f"backend {backend!r} cannot serve this call: {why}; use backend='auto'")
    return "quant-reference", f"quant-triton: {why}"


def _refuses_triton(q: Tensor, plan: TilePlan, recipe: Recipe) -> str | None:
    try:
        from . import triton
    except ImportError as error:
        return f"not importable ({error}); pip install triton"
    return triton.refuses(q, plan, recipe)


def _filled(order: Tensor | None, tokens: int | None) -> Tensor | None:
    """bool (1, 1 or H, n): which slots hold a token, or None where all do."""
    if tokens is None:
        return None
    return (order if order.ndim == 2 else order[None])[None] >= 0
