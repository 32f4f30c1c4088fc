"""Families: one declarative row per transformer architecture. The only file that knows how models differ."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UnsupportedError, UsageError
from ..layout import Layout


@dataclass(frozen=True)
class Family:
    """How to accelerate one transformer architecture.

    ``models``: class names. ``sites``: regular expression over module names, the self and joint attention modules;
    their order in the model is the global layer index and must be the forward's order. ``reads``: the arguments of
    ``forward`` that ``layout`` wants. ``layout(config, *read)``: the layout of the tokens at those sites.
    ``joint``: text tokens are part of the sequence. ``timestep``: the argument with the timestep;
    ``timestep_scale`` times it is a value of the scheduler's timesteps. ``image``: never more than one frame.
    """

    name: str
    models: tuple[str, ...]
    sites: str
    reads: tuple[str, ...]
    layout: Callable[..., Layout]
    joint: bool = False
    timestep: str = "timestep"
    timestep_scale: float = 1.0
    image: bool = False

    def find_sites(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """(name, module) of every site, in forward order."""
        pattern = re.compile(self.sites)
        return [(name, module) for name, module in model.named_modules() if pattern.fullmatch(name)]


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make ``family`` known for its model classes. Raises ``UsageError`` when another row already claims one."""
    for model in family.models:
        known = _FAMILIES.get(model)
        if known is not None and known.name != family.name:
            raise UsageError(f"{model} belongs to family {known.name!r}; register {family.name!r} for other classes")
    _FAMILIES.update(dict.fromkeys(family.models, family))


def known_families() -> list[Family]:
    """Every known family, by name."""
    return sorted(set(_FAMILIES.values()), key=lambda family: family.name)


def is_known(model: Any) -> bool:
    """Whether a row exists for the class of ``model`` or one it derives from."""
    return any(cls.__name__ in _FAMILIES for cls in type(model).__mro__)


def family_of(model: nn.Module) -> Family:
    """The row for ``model``. Raises ``UnsupportedError`` that says which row to write."""
    for cls in type(model).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
    name = type(model).__name__
    known = ", ".join(f"{family.name} ({', '.join(family.models)})" for family in known_families())
    raise UnsupportedError(
        f"{name} is not a known transformer. Known: {known}. Write its row and set the processor again:\n"
        "    from dit_accel import Layout\n"
        "    from dit_accel.diffusers import Family, register_family\n"
        f"    register_family(Family(name={name.lower()!r}, models=({name!r},),\n"
        f"        sites={_guess_sites(model)!r},\n"
        "        reads=('hidden_states',),  # the arguments of forward from which the layout follows\n"
        "        layout=lambda config, hidden: Layout(grid=(...))))  # (T, H, W) in tokens, text=, text_first="
    )


def _guess_sites(model: nn.Module) -> str:
    """The most frequent kind of attention module, with its block number as a wildcard."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if hasattr(module, "processor"):
            pattern = re.sub(r"\b\d+\b", r"\\d+", name.replace(".", r"\."))
            found[pattern] = found.get(pattern, 0) + 1
    return max(found, key=found.get, default=r"blocks\.\d+\.attn")


def _wan(config: Any, hidden: Any) -> Layout:
    """hidden: (B, C, T, H, W) latents."""
    return Layout(grid=tuple(size // patch for size, patch in zip(hidden.shape[2:], config.patch_size, strict=True)))


register_family(
    Family(
        name="wan",
        models=("WanTransformer3DModel",),
        sites=r"blocks\.\d+\.attn1",
        reads=("hidden_states",),
        layout=_wan,
    )
)
