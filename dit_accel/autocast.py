"""Autocast: attention as torch's own behaves there, cast as a whole instead of product by product."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def _is_on(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The inputs of an attention in autocast's precision where that is on, as ``scaled_dot_product_attention`` casts.

    Norms and rotary embedding leave query and key in float32 there, the linear layer of the value does not. float64
    and what is no floating-point tensor stay.
    """
    kind = tensors[0].device.type
    if not _is_on(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def no_autocast(kind: str) -> AbstractContextManager:
    """Autocast off on devices of type ``kind``: plans and kernels choose their own precisions."""
    return torch.autocast(kind, enabled=False) if _is_on(kind) else nullcontext()


def cast_as_whole(function: Callable[P, R]) -> Callable[P, R]:
    """``function(q, k, v, ...)`` that gets its inputs as autocast would have them and runs with autocast off."""

    @wraps(function)
    def whole(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        kind = next((x.device.type for x in (q, k, v) if isinstance(x, Tensor)), None)
        if kind is None or not _is_on(kind):
            return function(q, k, v, *args, **kwargs)
        q, k, v = (as_autocast(x)[0] if isinstance(x, Tensor) else x for x in (q, k, v))
        with no_autocast(kind):
            return function(q, k, v, *args, **kwargs)

    return whole
