"""Family: the row that says how one transformer architecture attends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import UsageError
from ...layout import Grid, Layout

TEXT = ("none", "first", "last")


@dataclass(frozen=True)
class Family:
    """How to accelerate one transformer architecture.

    ``models``: class names. ``sites``: regular expression over module names, the self and joint attention modules;
    several when modules are not declared in the forward's order, which is the global layer index. ``reads``: the
    arguments of ``forward`` that ``layout`` wants. ``layout(config, *read)``: the layout of the tokens at those sites,
    several when sites see different tokens (their numbers must differ, a call's own number chooses), or None when the
    arguments do not tell; the first line of its docstring is the support table's word on the grid. ``by_value``: it
    reads tensor values, so it is kept while the same tensors are passed.

    ``text``: ``"none"``, ``"first"`` or ``"last"``: where text tokens are part of the sequence. ``cuts_text``: the
    model drops padded text before it attends, so the text of a call is what its tokens exceed the other segments by.
    ``masks_text``: it masks padded text; elsewhere padding is attended to, by the stock model as by us. ``same_mask``:
    every site of a forward gets the same mask, though as a new tensor; it is then looked into once.

    ``timestep``: the argument with the timestep; ``timestep_offset + timestep_scale * timestep`` is a value of the
    scheduler's timesteps. ``image``: never more than one frame. ``cross_sites``: regular expression over module names,
    the cross-attention to text where it is a module of its own; processors leave it stock, whole jobs such as FreeSwim
    may want it. ``stock``: attention that stays stock beside cross-attention, and ``notes``: limits; for people.
    """

    name: str
    models: tuple[str, ...]
    sites: str | tuple[str, ...]
    reads: tuple[str, ...]
    layout: Callable[..., Layout | tuple[Layout, ...] | None]
    by_value: bool = False
    text: str = "none"
    cuts_text: bool = False
    masks_text: bool = False
    same_mask: bool = False
    timestep: str = "timestep"
    timestep_scale: float = 1.0
    timestep_offset: float = 0.0
    image: bool = False
    cross_sites: str = ""
    stock: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        if self.text not in TEXT:
            raise UsageError(f"family {self.name!r}: text={self.text!r}; allowed: {', '.join(map(repr, TEXT))}")

    @property
    def joint(self) -> bool:
        """Whether text tokens are part of the sequence."""
        return self.text != "none"

    def find_sites(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """(name, module) of every site, in forward order."""
        patterns = (self.sites,) if isinstance(self.sites, str) else self.sites
        return [found for pattern in patterns for found in _matching(model, pattern)]

    def find_cross_sites(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """(name, module) of every cross-attention site, in forward order; empty for families without."""
        return _matching(model, self.cross_sites)

    def layouts(self, config: Any, read: Sequence[Any]) -> tuple[Layout, ...]:
        """What ``layout`` says, as a tuple; empty where it cannot tell."""
        found = self.layout(config, *read)
        if found is None:
            return ()
        return (found,) if isinstance(found, Layout) else tuple(found)


def patches(sizes: Sequence[int], patch: Sequence[int]) -> Grid:
    """Sizes in tokens of latents cut into patches."""
    return tuple(size // step for size, step in zip(sizes, patch, strict=True))


def _matching(model: nn.Module, sites: str) -> list[tuple[str, nn.Module]]:
    pattern = re.compile(sites)
    return [(name, module) for name, module in model.named_modules() if name and pattern.fullmatch(name)]
