"""One feature of diffusers beside an accelerated processor: run stock, run accelerated, compare."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dit_accel import AllBlocksProcessor, Schedule
from dit_accel.diffusers import engines, family_of
from tiny_models import tiny_transformer

SPARSE = {"backend": "gather", "schedule": Schedule.none(), "block_size": 16}
STEPS = 6


class Clock:
    """The timestep that a pipeline tells the caches."""

    now = 0.0


@dataclass
class Trial:
    """``plain`` and ``featured``: stock outputs without and with the feature; ``calls`` and ``featured_calls``: their
    calls of the attention primitive over the whole sequence. ``model``: accelerated once, now stock with the feature.
    """

    plain: torch.Tensor
    featured: torch.Tensor
    calls: int
    featured_calls: int
    model: Any
    difference: float

    def told(self) -> str:
        return f"equal, {self.featured_calls} of {self.calls} calls, all sparse"


def trial(family: str, enable: Callable[[Any, Clock], Any], *, enable_first: bool, atol: float = 1e-4) -> Trial:
    """A denoising loop of ``family`` with the feature that ``enable`` switches on, stock and accelerated.

    Asserts that accelerated equals stock with the feature, that every attention call that stock makes ran sparse,
    and that after a reset the stock output with the feature is back, bit for bit.
    """
    clock = Clock()
    model, call, layout = tiny_transformer(family)
    plain, calls = counted(model, call, clock, layout.tokens)
    enable(model, clock)
    featured, featured_calls = counted(model, call, clock, layout.tokens)
    model, call, layout = tiny_transformer(family)
    if enable_first:
        enable(model, clock)
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    if not enable_first:
        enable(model, clock)
    (engine,) = engines(model)
    out = denoise(model, call, clock)
    difference = (out - featured).abs().max().item()
    assert difference < atol
    assert engine.stats.sparse == featured_calls > 0
    assert not engine.stats.fallback
    model.reset_attn_processor()
    assert torch.equal(denoise(model, call, clock), featured)
    return Trial(plain, featured, calls, featured_calls, model, difference)


def denoise(model: Any, call: dict[str, Any], clock: Clock, steps: int = STEPS) -> torch.Tensor:
    """The last output of a loop as pipelines run it: contexts that tell the step, latents that move, caches reset."""
    scale, x = family_of(model).timestep_scale, call["hidden_states"]
    for i in range(steps):
        clock.now = 900.0 - 800 * i / steps
        told = {"step_index": i, "num_inference_steps": steps, "sigma": torch.tensor(clock.now / 1000)}
        arguments = {name: dict(value) if isinstance(value, dict) else value for name, value in call.items()}
        arguments |= {"hidden_states": x, "timestep": torch.full(call["timestep"].shape, clock.now / scale)}
        with model.cache_context("cond", **told):
            out = model(**arguments).sample
        x = x - 0.1 * out if out.shape == x.shape else 0.9 * x
    model._reset_stateful_cache()
    return out


def counted(model: Any, call: dict[str, Any], clock: Clock, tokens: int) -> tuple[torch.Tensor, int]:
    """:func:`denoise`, and the stock primitive's calls over ``tokens`` queries and keys."""
    with primitive_calls(model, tokens) as calls:
        return denoise(model, call, clock), len(calls)


@contextmanager
def primitive_calls(model: Any, tokens: int) -> Iterator[list[int]]:
    """Grows by one whenever ``model`` calls the stock primitive over ``tokens`` queries and keys."""
    module, calls = sys.modules[type(model).__module__], []
    dispatches = hasattr(module, "dispatch_attention_fn")
    owner = module if dispatches else torch.nn.functional
    name = "dispatch_attention_fn" if dispatches else "scaled_dot_product_attention"
    stock = getattr(owner, name)

    def primitive(query, key, *args, **kwargs):
        if query.shape[-3 if dispatches else -2] == key.shape[-3 if dispatches else -2] == tokens:
            calls.append(1)
        return stock(query, key, *args, **kwargs)

    setattr(owner, name, primitive)
    try:
        yield calls
    finally:
        setattr(owner, name, stock)
