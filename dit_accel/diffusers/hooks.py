"""Hooks: how an engine learns that its transformer begins and ends a forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import ops
from .caches import snapshot

try:
    from torch._dynamo.eval_frame import skip_code
except ImportError:  # private to torch; without it compiled models work too, with a small graph per hook

    def skip_code(code: Any) -> None:
        pass


if TYPE_CHECKING:
    from .engine import Engine


class Detached:
    """What a copied or unpickled model has in the place of an engine's hook. Does nothing."""

    def __call__(self, *_: Any) -> None:
        return None


class _Hook:
    def __init__(self, seat: Seat):
        self.seat = seat

    def __reduce__(self) -> tuple:
        return Detached, ()


class Before(_Hook):
    """Forward pre-hook: tells the engine the arguments that matter."""

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        seat = self.seat
        if not torch.compiler.is_compiling():
            seat.begin(model, args, kwargs)
            return None
        timestep, read = seat.read(args, kwargs)
        timestep = ops.begin_forward(timestep, seat.handle, *ops.pack(read))
        return seat.replaced(timestep, args, kwargs)


class After(_Hook):
    """Forward hook: lets the guard look at the flags and repeat the forward.

    Inside a graph nothing can be repeated; the engine then finds the flags when the next forward begins.
    """

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        if output is None:  # called although the forward ended in an error
            self.seat.abandon()
            return None
        return self.seat.finish()


for _hook in (Before, After):
    # A compiled module runs its hooks outside its graph. They stay plain Python there instead of becoming graphs of
    # their own; a function that calls the model and is compiled as a whole still traces through them.
    skip_code(_hook.__call__.__code__)


class Seat:
    """The two hooks of one engine on its model, and where ``forward`` takes the arguments they read."""

    def __init__(self, engine: Engine, model: nn.Module):
        self.engine = engine
        self.handle = torch.tensor([engine.id, -1])
        self.timestep = engine.family.timestep
        self.reads = engine.family.reads
        self.positions = {name: i for i, name in enumerate(list(inspect.signature(type(model).forward).parameters)[1:])}
        self._again: Callable[[], Any] | None = None
        self._removers = [
            model.register_forward_pre_hook(Before(self), with_kwargs=True),
            model.register_forward_hook(After(self), with_kwargs=True, always_call=True),
        ]

    @torch.compiler.disable
    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Tell the engine, and keep what a repeat would need: caches and argument dictionaries change on the way."""
        self.abandon()  # where the last forward was interrupted, no hook was called
        self.engine.begin(*self.read(args, kwargs))
        restore = snapshot(model)
        kwargs = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}

        def again() -> Any:
            restore()
            return model.forward(*args, **kwargs)

        self._again = again

    @torch.compiler.disable
    def abandon(self) -> None:
        """Let go of a forward that did not end, if there is one."""
        if self._again is not None:
            self._again = None
            self.engine.abandon()

    @torch.compiler.disable
    def finish(self) -> Any:
        """The output of the repeated forward, or None where none was needed."""
        again, self._again = self._again, None
        return self.engine.finish(again)

    def read(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
        """The timestep and what the family's layout wants."""
        return self.argument(self.timestep, args, kwargs), tuple([self.argument(n, args, kwargs) for n in self.reads])

    def argument(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The value of forward's argument ``name``; None where the caller left it out."""
        if name in kwargs:
            return kwargs[name]
        position = self.positions.get(name, len(args))
        return args[position] if position < len(args) else None

    def replaced(self, timestep: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments with another timestep."""
        if self.timestep in kwargs:
            return args, {**kwargs, self.timestep: timestep}
        position = self.positions[self.timestep]
        return (*args[:position], timestep, *args[position + 1 :]), kwargs

    def remove(self) -> None:
        for remover in self._removers:
            remover.remove()


def engine_of(model: Any) -> Engine | None:
    """The engine attached to ``model``, or None."""
    hooks = getattr(model, "_forward_pre_hooks", {}).values()
    return next((hook.seat.engine for hook in hooks if isinstance(hook, Before)), None)
