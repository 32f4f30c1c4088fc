"""Snapshots of diffusers' cache hooks, so that a repeated forward starts from what the first attempt found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that puts the state of every cache hook under ``model`` back as it is now.

    Without it a cache keeps the residuals of a faulty forward and hands them to the repeat. Tensors are held, not
    copied: hooks replace them.
    """
    saved = [(holder, _fields(holder)) for holder in _holders(model)]

    def restore() -> None:
        for holder, fields in saved:
            vars(holder).clear()
            vars(holder).update(fields)

    return restore


def _holders(model: nn.Module) -> Iterator[Any]:
    """The state objects of every hook, in both of upstream's forms: a state manager, or a state of the hook's own."""
    root = vars(model).get("_diffusers_hook")
    if root is None:
        return
    for registry in (root, *root._get_child_registries()):
        for hook in registry.hooks.values():
            for value in vars(hook).values():
                kind = type(value)
                if kind.__module__.startswith("diffusers.hooks") and kind.__name__.endswith(("State", "StateManager")):
                    yield value
                    yield from getattr(value, "_state_cache", {}).values()


def _fields(holder: Any) -> dict[str, Any]:
    return {name: value.copy() if isinstance(value, (dict, list)) else value for name, value in vars(holder).items()}
