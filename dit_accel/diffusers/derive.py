"""Derived processors: the installed stock processor with one change, the call of the attention primitive.

``derive(cls)`` compiles the source of ``cls.__call__`` again after turning every call of
``dispatch_attention_fn`` or ``scaled_dot_product_attention`` into ``self._attend_...(that function, ...)``.
Projections, norms, rotary embedding, text joining and signature stay upstream's, whatever version is installed.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch

from ..errors import UnsupportedError
from . import ops

# Name of the primitive -> the method that takes its place; the suffix is the tensor layout at the call.
PRIMITIVES = {"dispatch_attention_fn": "_attend_bshd", "scaled_dot_product_attention": "_attend_bhsd"}


class LayerMixin:
    """What a derived processor adds: whose layer it is, and the redirected primitive.

    ``_handle``: int64 CPU tensor ``[engine, layer]``. A tensor is neither a compile guard nor a host sync, where
    a Python int would recompile once per layer. ``_stock``: the processor found on the module; both share one
    ``__dict__``, so that a backend set meanwhile reaches the dense path and survives the reset.
    """

    __slots__ = ("_handle", "_stock")

    def _attend_bshd(self, primitive: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        return ops.redirect(self._handle, "BSHD", primitive, *args, **kwargs)

    def _attend_bhsd(self, primitive: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        return ops.redirect(self._handle, "BHSD", primitive, *args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> Any:
        # A copied or pickled model comes back stock: an engine is run-time state of one live model.
        return copy.copy, (self._stock,)


def adopt(stock: Any, handle: torch.Tensor) -> Any:
    """A derived processor in the place of ``stock``, sharing its attributes.

    Raises ``UnsupportedError`` when the class cannot be derived (see :func:`derive`).
    """
    derived = object.__new__(derive(type(stock)))
    derived.__dict__ = stock.__dict__
    # Past any __setattr__ of the class: an adapter's processor is a module and would register the two as its children.
    object.__setattr__(derived, "_handle", handle)
    object.__setattr__(derived, "_stock", stock)
    return derived


def stock_of(processor: Any) -> Any:
    """The stock processor in whose place ``processor`` stands; ``processor`` itself where it is not ours."""
    return processor._stock if isinstance(processor, LayerMixin) else processor


@functools.cache
def derive(cls: type) -> type:
    """The subclass of a stock processor class whose attention primitive goes to the engine.

    Raises ``UnsupportedError`` when the source is not available or no primitive is called in it.
    """
    function = inspect.unwrap(cls.__call__)
    try:
        lines, start = inspect.getsourcelines(function)
    except (OSError, TypeError) as error:
        raise UnsupportedError(
            f"the source of {cls.__module__}.{cls.__name__}.__call__ is not available ({error}), so it cannot be "
            "derived; set the model's default processor first: model.set_attn_processor('default')"
        ) from error
    tree = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(tree, start - 1)
    definition = tree.body[0]
    redirect = _Redirect(definition.args.args[0].arg)
    redirect.visit(definition)
    if not redirect.sites:
        raise UnsupportedError(
            f"{cls.__name__}.__call__ calls neither of {', '.join(PRIMITIVES)}; nothing in it can run sparse "
            "(linear attention has no softmax). Leave its modules out of the family's sites."
        )
    call = _compile(definition, function)
    call.__qualname__ = function.__qualname__
    body = {"__slots__": (), "__call__": call, "__module__": cls.__module__, "__new__": _plain(cls)}
    derived = type(f"Accelerated{cls.__name__}", (LayerMixin, cls), body)
    _register(cls, derived)
    return derived


class _Redirect(ast.NodeTransformer):
    """``primitive(...)`` -> ``self._attend_x(primitive, ...)``, counting the sites."""

    def __init__(self, owner: str):
        self.owner = owner
        self.sites = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if name not in PRIMITIVES:
            return node
        self.sites += 1
        method = ast.Attribute(ast.Name(self.owner, ast.Load()), PRIMITIVES[name], ast.Load())
        call = ast.Call(method, [node.func, *node.args], node.keywords)
        return ast.fix_missing_locations(ast.copy_location(call, node))


def _compile(definition: ast.FunctionDef, function: Callable) -> Callable:
    """``definition`` with the globals, defaults and closure of ``function``."""
    free = function.__code__.co_freevars
    maker = ast.parse(f"def make({', '.join(free)}):\n    return {definition.name}")
    maker.body[0].body.insert(0, definition)
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    code = compile(maker, inspect.getsourcefile(function), "exec", flags=flags, dont_inherit=True)
    scope: dict[str, Any] = {}
    # The stock module's own globals, not a copy: what others patch there later must reach this code too.
    exec(code, function.__globals__, scope)
    return scope["make"](*(cell.cell_contents for cell in function.__closure__ or ()))


def _plain(cls: type) -> Callable:
    def __new__(_, *args: Any, **kwargs: Any) -> Any:
        """A stock instance: upstream code rebuilds processors as ``type(processor)()`` when it unloads adapters."""
        return cls(*args, **kwargs)

    return __new__


def _register(cls: type, derived: type) -> None:
    """Upstream's layer-skipping hooks look up the exact class."""
    try:
        from diffusers.hooks._helpers import AttentionProcessorRegistry
    except ImportError:
        return
    AttentionProcessorRegistry._register()
    if cls in AttentionProcessorRegistry._registry:
        AttentionProcessorRegistry.register(derived, AttentionProcessorRegistry._registry[cls])
