"""The user's calls: set, reset and describe on pipelines and transformers."""

from __future__ import annotations

import contextlib
import functools
import importlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..errors import UnsupportedError, UsageError
from ..processors import Processor
from . import stock
from .engine import Engine
from .families import family_of, is_known, known_families
from .hooks import engine_of
from .report import Description


def set_attn_processor(target: Any, processor: Any) -> None:
    """Run attention of ``target`` under ``processor``.

    ``target``: a diffusers pipeline (all its denoisers), or one transformer. ``processor``: one of this library's
    processors replaces whatever ours was set before and leaves cross-attention stock; a stock processor, a dict
    of them, or ``"default"`` removes every trace of ours first, and ``"default"`` also what is no processor and was
    put there past this library; a dict of ``model.attn_processors`` as they are under ours puts them back. Raises
    ``UsageError`` for what is no processor, ``UnsupportedError`` for a transformer that is not known or a method that
    has no meaning on it; the target is then as it was.
    """
    models = denoisers(target)
    stock.check(processor, models)
    if isinstance(processor, Processor):
        scheduler = _scheduler_of(target)
        prepared = [Engine(model, family_of(model), processor, scheduler) for model in models]
        for engine in prepared:
            _remove(engine.model)
            engine.attach()
        return
    for model in models:
        if stock.is_default(processor):
            _restore(model)
        else:
            model.set_attn_processor(processor)


def reset_attn_processor(target: Any) -> None:
    """Put the stock processors back, the same objects, on a pipeline's denoisers or on one transformer.

    What is no processor and was put there past this library gives way to what a new model has there.
    """
    for model in denoisers(target):
        _restore(model)


def engines(target: Any) -> list[Engine]:
    """The engines attached to a pipeline (one per denoiser) or to a transformer; empty when it is stock."""
    found = (engine_of(model) for model in denoisers(target))
    return [engine for engine in found if engine is not None]


def describe(target: Any) -> Description:
    """What runs layer by layer on a pipeline or transformer: print it, or take ``to_dict()``."""
    return Description.of(engines(target))


def denoisers(target: Any) -> list[nn.Module]:
    """The transformers of a pipeline, or ``target`` itself, no compile wrappers. Raises ``UsageError`` for neither."""
    if isinstance(target, nn.Module):
        return [_unwrap(target)]
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        raise UsageError(
            f"expected a diffusers pipeline or a transformer; got {type(target).__name__}. "
            "Use set_attn_processor(pipe, processor) or pipe.transformer.set_attn_processor(processor)"
        )
    modules = {name: _unwrap(value) for name, value in components.items() if isinstance(value, nn.Module)}
    found = [module for name, module in modules.items() if is_known(module) or name.startswith("transformer")]
    if not found:
        raise UnsupportedError(
            f"{type(target).__name__} has no transformer to accelerate; its models: {', '.join(modules) or 'none'}. "
            f"Known families: {', '.join(family.name for family in known_families())}"
        )
    return list(dict.fromkeys(found))  # one transformer may have two names


def _unwrap(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _remove(model: nn.Module) -> None:
    engine = engine_of(model)
    if engine is not None:
        engine.detach()


def _restore(model: nn.Module) -> None:
    _remove(model)
    stock.repair(model)


def _scheduler_of(target: Any) -> Callable[[], Any]:
    """Reads the pipeline's scheduler late: users swap it after the processor is set.

    Once the pipeline is gone, the last one read: another pipeline made of its components goes on with it.
    """
    if isinstance(target, nn.Module):
        return lambda: None
    pipe, last = weakref.ref(target), _reference(getattr(target, "scheduler", None))

    def scheduler() -> Any:
        nonlocal last
        owner = pipe()
        if owner is None:
            return last()
        current = getattr(owner, "scheduler", None)
        if last() is not current:
            last = _reference(current)
        return current

    return scheduler


def _reference(scheduler: Any) -> Callable[[], Any]:
    return (lambda: None) if scheduler is None else weakref.ref(scheduler)


def install() -> None:
    """Give diffusers pipelines and models the two methods, once per process; what this diffusers lacks is skipped."""
    for name in ("DiffusionPipeline", "ModularPipeline"):
        pipeline = _piece("diffusers", name)
        for method in (set_attn_processor, reset_attn_processor):
            if pipeline is not None and not hasattr(pipeline, method.__name__):
                setattr(pipeline, method.__name__, method)
    model = _piece("diffusers", "ModelMixin")
    if model is not None and not hasattr(model, "reset_attn_processor"):
        # ModelMixin precedes AttentionMixin in every model's bases, so one method serves models with and without it.
        model.set_attn_processor = _model_set_attn_processor(model)
        model.reset_attn_processor = reset_attn_processor
        caching = _piece("diffusers.models.cache_utils", "CacheMixin")
        if caching is not None:
            caching.cache_context = _told(caching.cache_context)


def _piece(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError):  # diffusers turns failed lazy imports into RuntimeError
        return None


def _model_set_attn_processor(mixin: type) -> Callable:
    def set_attn_processor_(self: Any, processor: Any) -> None:
        if isinstance(processor, Processor):
            set_attn_processor(self, processor)
            return
        stock.check(processor, [self])
        if stock.is_default(processor):
            _restore(self)
            return
        theirs = getattr(super(mixin, self), "set_attn_processor", None)
        if theirs is None:
            raise UnsupportedError(
                f"diffusers gives {type(self).__name__} no set_attn_processor, so only this library's processors and "
                f"'default' can be set on it; got {type(processor).__name__}"
            )
        engine = engine_of(self)
        if engine is not None and engine.is_in(processor):
            # Upstream's perturbed-attention guidance reads all processors, replaces some and sets what it read.
            theirs(dict(processor))
            return
        _remove(self)
        theirs(stock.unwrapped(processor))

    set_attn_processor_.__name__ = set_attn_processor_.__qualname__ = "set_attn_processor"
    set_attn_processor_.__doc__ = set_attn_processor.__doc__
    return set_attn_processor_


def _told(theirs: Callable) -> Callable:
    """``cache_context`` that also tells the model's engine what the pipeline said."""

    @functools.wraps(theirs)
    @contextlib.contextmanager
    def cache_context(self: Any, name: str, **fields: Any) -> Iterator[None]:
        engine = engine_of(self)
        told = engine.tracker.context(name=name, **fields) if engine else contextlib.nullcontext()
        with theirs(self, name, **fields), told:
            yield

    return cache_context
