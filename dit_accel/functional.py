"""The functional contract: ``attend`` and ``plan``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .arguments import check_inputs, check_settings
from .autocast import cast_as_whole
from .errors import UnsupportedError, UsageError
from .kernels.block_sparse import block_sparse_attention
from .kernels.block_sparse.api import choose
from .kernels.dense import choose_dense
from .kernels.live import without_dead
from .kernels.quant.api import choose as choose_quantized
from .kernels.quant.api import quantized_attention
from .kernels.tileplan import TilePlan
from .layout import Layout
from .lowering import lower
from .methods.base import Call, Method
from .methods.testing import AllBlocks
from .plans import Plan
from .precision import adapted
from .quant import AUTO, Quant, resolve_quant
from .state import State
from .step import Step

# What quantised attention without a method runs: every pair.
WHOLE = AllBlocks(block_size=128)
# The tiers that a gradient passes.
BACKWARD = ("gather", "reference")


@cast_as_whole
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Method | None = None,
    *,
    layout: Layout,
    plan: Plan | None = None,
    kv_layout: Layout | None = None,
    kv_valid: Tensor | None = None,
    layer: int = 0,
    step: Step | None = None,
    state: State | None = None,
    head_offset: int = 0,
    quant: Quant | str | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention under a method, as ``scaled_dot_product_attention`` takes it.

    q: (B, H, Nq, D); k, v: (B, Hk, Nk, D), H a multiple of Hk. ``layout`` describes the queries (and the keys,
    unless ``kv_layout`` is given). ``method=None`` without a ``plan`` is dense. ``kv_valid``: int32 (B,), keys
    from that index on are dead and may hold anything. ``scale=None`` takes the method's own, else D**-0.5.
    ``state`` lets a method keep what it found between calls and caches static plans; without it a stateful method
    searches afresh. ``backend``: ``"reference"``, ``"gather"``, ``"flash"``, ``"flex"``, ``"triton"`` or ``"auto"``.
    ``quant``: a :class:`~dit_accel.Quant`, a preset's name or ``"auto"``, with any method or none; forward only.
    Where an input wants a gradient, ``"auto"`` takes a tier that has a backward: gather, or the reference.

    Under autocast the inputs are cast as ``scaled_dot_product_attention`` casts them.

    Returns out (B, H, Nq, D) in q's dtype, with ``return_lse`` also the natural-log LSE (B, H, Nq).
    Raises ``UsageError`` for tensors that do not fit one another or the layout and for ``method`` beside ``plan``,
    ``UnsupportedError`` for what is not served.
    """
    check_settings(method, plan, layout, kv_layout, step, state, scale, backend, quantised=quant is not None)
    check_inputs(q, k, v, layout, kv_layout, kv_valid)
    asked, quant = quant, resolve_quant(quant, q.device)
    if quant is not None:
        quant = adapted(quant, layer, step or Step(), slice(head_offset, head_offset + q.shape[1]))
    if method is None and plan is None:
        if quant is None:
            return _dense(q, k, v, kv_valid, scale, backend, return_lse)
        if asked == AUTO and backend == "auto" and kv_valid is None and not return_lse:
            kernel, _ = choose_dense(q, v, exact=False)
            if not kernel.exact:
                return kernel.run(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
        method = WHOLE
    if plan is None:
        call = _call(q, layout, kv_layout, kv_valid, layer, step, state, head_offset, scale)
        plan = make_plan(q, k, v, method, call)
        if plan is None:
            return _dense(q, k, v, kv_valid, scale, backend, return_lse)
    backend = with_backward(backend, plan, quant, q, k, v)
    scale = plan.softmax_scale(q.shape[-1], scale)
    tiles, tier, _ = served(plan, q, backend=backend, return_lse=return_lse, quant=quant)
    how = {"scale": scale, "kv_valid": kv_valid, "backend": tier, "return_lse": return_lse}
    try:
        if quant is None:
            out, lse = block_sparse_attention(q, k, v, tiles, **how)
        else:
            out, lse = quantized_attention(q, k, v, tiles, quant, **how)
    except NotImplementedError as error:
        raise UnsupportedError(str(error)) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    return (out, lse) if return_lse else out


@cast_as_whole
def plan(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    method: Method,
    *,
    layout: Layout,
    kv_layout: Layout | None = None,
    kv_valid: Tensor | None = None,
    layer: int = 0,
    step: Step | None = None,
    state: State | None = None,
    head_offset: int = 0,
    scale: float | None = None,
) -> Plan | None:
    """The plan that :func:`attend` would execute, or None where the method runs this step dense.

    Methods whose plan is static take None for q, k and v.
    """
    if method is None:
        raise UsageError("method is None, and dense attention has no plan; give a method")
    check_settings(method, None, layout, kv_layout, step, state, scale)
    wanted = {"q": q, "k": k, **({"v": v} if method.reads_values else {})}
    if not method.static and any(x is None for x in wanted.values()):
        raise UsageError(f"{type(method).__name__} looks at {', '.join(wanted)}; pass them")
    if q is not None and k is not None:
        check_inputs(q, k, k if v is None else v, layout, kv_layout, kv_valid)
    call = _call(q, layout, kv_layout, kv_valid, layer, step, state, head_offset, scale)
    return make_plan(q, k, v, method, call)


def _call(q, layout, kv_layout, kv_valid, layer, step, state, head_offset, scale) -> Call:
    device = torch.device("cpu") if q is None else q.device
    state = State() if state is None else state
    return Call(layout, kv_layout, kv_valid, layer, step or Step(), state, head_offset, scale, device)


def make_plan(q: Tensor | None, k: Tensor | None, v: Tensor | None, method: Method, call: Call) -> Plan | None:
    """A method's plan on the call's device, or None for a dense call; a static one comes from the state's cache."""
    if not method.static:
        return method.plan(q, k, v, call)
    key = (method, call.layout, call.kv_layout, call.device)
    return call.state.plan(key, lambda: _static(method, call))


def _static(method: Method, call: Call) -> Plan:
    method.check(call.layout)
    return method.plan(None, None, None, call).to(call.device)


def served(
    plan: Plan, q: Tensor, *, backend: str = "auto", return_lse: bool = False, quant: Quant | None = None
) -> tuple[TilePlan, str, str]:
    """The TilePlan for the tier that will serve ``q``, that tier and why it was chosen; kept with the plan."""
    key = "served", q.device, q.dtype, q.shape[-1], backend, return_lse, quant
    if key not in plan._memo:
        own = lower(plan)
        tier, why = tier_of(own, q, backend=backend, return_lse=return_lse, quant=quant)
        if tier in ("triton", "quant-triton"):  # the only tier with tile sizes of its own
            from .kernels.block_sparse.triton import tile_for

            own = lower(plan, tile_for(own, q))
        plan._memo[key] = own, tier, why
    return plan._memo[key]


def tiled(
    plan: Plan, q: Tensor, *, backend: str = "auto", return_lse: bool = False, quant: Quant | None = None
) -> TilePlan:
    """The TilePlan for the tier that will serve ``q``."""
    return served(plan, q, backend=backend, return_lse=return_lse, quant=quant)[0]


def tier_of(
    tiles: TilePlan, q: Tensor, *, backend: str = "auto", return_lse: bool = False, quant: Quant | None = None
) -> tuple[str, str]:
    """The tier that will serve ``q``, and why it was chosen."""
    try:
        if quant is not None:
            return choose_quantized(q, tiles, quant, backend=backend)
        return choose(q, tiles, backend=backend, return_lse=return_lse)
    except NotImplementedError as error:
        raise UnsupportedError(str(error)) from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def with_backward(backend: str, plan: Plan, quant: Quant | None, *inputs: Tensor) -> str:
    """The backend for a call, where one of ``inputs`` wants a gradient one that has a backward.

    Raises ``UnsupportedError`` where what was asked for has none: its output would be cut from the graph in silence.
    """
    if quant is not None or not wants_gradient(*inputs):  # quantised products are forward only, as attend says
        return backend
    if backend == "auto":
        # The reference alone serves a matrix for each representative, and auto knows.
        each = plan.first_order is not None and plan.first_order.ndim == 5
        return "reference" if each else "gather"
    if backend not in BACKWARD:
        raise UnsupportedError(
            f"backend {backend!r} has no backward and an input requires a gradient; use backend='auto' or "
            f"{' or '.join(map(repr, BACKWARD))}, or run under torch.no_grad()"
        )
    return backend


def wants_gradient(*inputs: Tensor) -> bool:
    """Whether a gradient of one of ``inputs`` will be asked for."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _dense(q, k, v, kv_valid, scale, backend, return_lse):
    if not return_lse and backend != "reference":
        mask = None
        if kv_valid is None and backend == "auto":
            kernel, _ = choose_dense(q, v)
            return kernel.run(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
        if kv_valid is not None:
            k, v = without_dead(k, v, kv_valid)
            mask = (torch.arange(k.shape[2], device=k.device) < kv_valid.to(k.device)[:, None])[:, None, None, :]
        gqa = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    layout, kv_layout = (Layout(grid=(1, 1, x.shape[2])) for x in (q, k))
    tier = backend if backend in ("reference", "triton") else "gather"
    return attend(
        q, k, v, WHOLE, layout=layout, kv_layout=kv_layout, kv_valid=kv_valid, scale=scale,
        backend=tier, return_lse=return_lse,
    )  # fmt: skip
