"""The seam that traced code crosses: one redirect, two opaque operators.

Steps, schedules, masks and the choice per layer live behind the operators, so a compiled model is one graph that
never recompiles over steps. Eager calls reach the engine directly and keep autograd.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..autocast import as_autocast
from ..errors import UnsupportedError

# Engines by id. Weak: an engine lives on the hooks of its model.
ENGINES: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()

_TAGS = (torch.Tag.cudagraph_unsafe,)  # a captured graph would replay the warm-up's decisions for ever


def new_id() -> int:
    """A number for :data:`ENGINES` that no other engine of this process has."""
    return next(_numbers)


@dataclass
class Primitive:
    """One call of the attention primitive, exactly as the stock processor made it.

    ``form`` is the layout of query, key and value: ``"BSHD"`` or ``"BHSD"``. ``extra``: what only the dispatcher
    takes (``backend``, ``parallel_config``, ``attention_kwargs``). ``head_offset``: global index of the first head.
    """

    form: str
    function: Callable[..., Tensor]
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    head_offset: int = 0

    def dense(self) -> Tensor:
        """The stock result, by the stock function with the stock arguments."""
        return self.function(
            self.query, self.key, self.value, attn_mask=self.attn_mask, dropout_p=self.dropout_p,
            is_causal=self.is_causal, scale=self.scale, enable_gqa=self.enable_gqa, **self.extra,
        )  # fmt: skip

    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """query, key, value as (B, H, N, D)."""
        tensors = self.query, self.key, self.value
        return tensors if self.form == "BHSD" else tuple(x.transpose(1, 2) for x in tensors)

    def back(self, out: Tensor) -> Tensor:
        """(B, H, N, D) in the layout of the call."""
        return out if self.form == "BHSD" else out.transpose(1, 2)


def redirect(
    handle: Tensor,
    form: str,
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    **extra: Any,
) -> Tensor:
    """What derived processors call in the place of ``function``. ``handle``: int64 ``[engine, layer]``."""
    query, key, value = as_autocast(query, key, value)
    if attention_kwargs is not None:
        extra["attention_kwargs"] = attention_kwargs
    plain = attention_kwargs is None and (attn_mask is None or isinstance(attn_mask, Tensor))
    if torch.compiler.is_compiling() and plain:
        backend = extra.get("backend")
        backend = None if backend is None else str(backend.value)
        parallel = extra.get("parallel_config") is not None
        return attend(
            query, key, value, attn_mask, handle, form, dropout_p, is_causal, scale, enable_gqa, backend, parallel
        )  # fmt: skip
    call = Primitive(form, function, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, extra)
    if torch.compiler.is_compiling():
        return call.dense()
    return _run(handle, call)


def _run(handle: Tensor, call: Primitive) -> Tensor:
    number, layer = handle.tolist()
    engine = ENGINES.get(number)
    return call.dense() if engine is None else engine.attend(layer, call)


@torch.library.custom_op("dit_accel::attend", mutates_args=(), tags=_TAGS)
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    handle: Tensor,
    form: str,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
    parallel: bool = False,
) -> Tensor:
    function, extra = scaled_dot_product_attention, {}
    if form == "BSHD":
        from diffusers.models.attention_dispatch import dispatch_attention_fn as function

        extra = {"backend": backend}
    if parallel:
        number, layer = handle.tolist()
        extra["parallel_config"] = ENGINES[number].parallel_config(layer)
    call = Primitive(form, function, query, key, value, mask, dropout_p, is_causal, scale, enable_gqa, extra)
    out = _run(handle, call).contiguous()
    return out.clone() if out.data_ptr() in {x.data_ptr() for x in (query, key, value)} else out


@attend.register_fake
def _(query, key, value, mask, handle, form, dropout_p, is_causal, scale, enable_gqa, backend, parallel=False):
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _refuse_training(context: Any, grad: Tensor) -> None:
    raise UnsupportedError(
        "compiled training with an accelerated attention processor is not supported: the compiled operator has no "
        "backward. Train without torch.compile, or run inference under torch.no_grad()"
    )


attend.register_autograd(_refuse_training)


@torch.library.custom_op("dit_accel::begin_forward", mutates_args=(), tags=_TAGS)
def begin_forward(
    timestep: Tensor, handle: Tensor, form: str, tensors: Sequence[Tensor], numbers: Sequence[int]
) -> Tensor:
    """Tell the engine about a forward. Returns the timestep: every attention depends on it, so this runs first."""
    engine = ENGINES.get(handle.tolist()[0])
    if engine is not None:
        engine.begin(timestep, unpack(form, tensors, numbers))
    return timestep.clone()


@begin_forward.register_fake
def _(timestep, handle, form, tensors, numbers):
    return torch.empty_like(timestep)


def pack(value: Any) -> tuple[str, list[Tensor], list[int]]:
    """Nested lists and tuples of tensors, integers and None as arguments an operator can take."""
    if value is None:
        return "n", [], []
    if isinstance(value, Tensor):
        return "t", [value], []
    if isinstance(value, (list, tuple)):
        parts = [pack(item) for item in value]
        form = "".join(part[0] for part in parts)
        return f"({form})", [t for part in parts for t in part[1]], [i for part in parts for i in part[2]]
    return "i", [], [value]


def unpack(form: str, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Any:
    """The inverse of :func:`pack`; sequences come back as tuples."""
    take = {"t": iter(tensors), "i": iter(numbers)}
    stack: list[list[Any]] = [[]]
    for letter in form:
        if letter == "(":
            stack.append([])
        elif letter == ")":
            closed = tuple(stack.pop())
            stack[-1].append(closed)
        else:
            stack[-1].append(next(take[letter]) if letter in take else None)
    return stack[0][0]
