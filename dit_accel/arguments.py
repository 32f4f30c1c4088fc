"""What ``attend`` and ``plan`` are given, checked before anything is computed, dense or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .errors import UsageError
from .kernels.block_sparse import BACKENDS
from .kernels.block_sparse.api import check_tensors
from .kernels.quant.api import TIERS
from .layout import Layout
from .methods.base import REGISTRY, Method
from .plans import Plan
from .state import State
from .step import Step


def check_settings(
    method: Any, plan: Any, layout: Any, kv_layout: Any, step: Any, state: Any, scale: Any, backend: Any = "auto",
    quantised: bool = False,
) -> None:  # fmt: skip
    """Raise ``UsageError`` for a setting of another kind than the contract's."""
    if method is not None and not isinstance(method, Method):
        raise UsageError(f"method is a method or None for dense attention; got {shown(method)}. {advice(method)}")
    if plan is not None:
        checks.instance("plan", plan, Plan, "what dit_accel.plan(...) returned")
        if method is not None:
            raise UsageError(
                f"method={type(method).__name__} and plan= were both given, and a plan is all that a method makes; "
                "leave one of them out"
            )
    example = "a dit_accel.Layout, for example Layout(grid=(21, 30, 52), text=77)"
    checks.instance("layout", layout, Layout, example)
    if kv_layout is not None:
        checks.instance("kv_layout", kv_layout, Layout, f"None for the queries' or {example}")
    if step is not None:
        checks.instance("step", step, Step, "None or a dit_accel.Step, for example Step(index=3, total=50)")
    if state is not None:
        checks.instance("state", state, State, "None or a dit_accel.State()")
    if scale is not None:
        checks.number("scale", scale, "None for the method's own or a finite number")
    if backend not in BACKENDS and not (quantised and backend in TIERS):
        raise UsageError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")


def check_inputs(q: Any, k: Any, v: Any, layout: Layout, kv_layout: Layout | None, kv_valid: Any) -> None:
    """Raise ``UsageError`` for tensors that fit neither one another nor the layout."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.instance(name, x, Tensor, "a tensor (B, H, N, D)")
    if kv_valid is not None:
        checks.instance("kv_valid", kv_valid, Tensor, "an int32 tensor (B,), one length per sample")
        if kv_valid.dtype not in (torch.int32, torch.int64):
            raise UsageError(f"kv_valid is an int32 tensor (B,), one length per sample; got {kv_valid.dtype}")
    for name, x, shape in (("q", q, layout), ("k", k, kv_layout or layout)):
        if x.ndim == 4 and x.shape[2] != shape.tokens:
            raise UsageError(f"{name} has {x.shape[2]} tokens but its layout ({shape}) has {shape.tokens}")
    try:
        check_tensors(q, k, v, kv_valid)
    except ValueError as error:
        raise UsageError(str(error)) from None


def shown(value: Any) -> str:
    """A value as messages show it: a class is named as one, and nothing is longer than a line."""
    text = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"


def advice(value: Any) -> str:
    """What to type in the place of a value that is no method."""
    if isinstance(value, str) and value in REGISTRY:
        return f"The method of that name is {REGISTRY[value].__name__}()"
    if isinstance(value, type) and issubclass(value, Method):
        return f"Did you forget the brackets? {value.__name__}()"
    if isinstance(getattr(value, "method", None), Method):
        return "A processor's method is its attribute: processor.method"
    return f"Methods: {', '.join(sorted(cls.__name__ for cls in REGISTRY.values()))}"
