"""The registry: which row serves which transformer class, ours and those that installed packages add."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from ...errors import UnsupportedError, UsageError
from . import image, video
from .proposal import proposal
from .row import Family

logger = logging.getLogger("dit_accel")

# Packages that bring rows of their own name, in this entry-point group, a Family or a sequence of them.
ENTRY_POINTS = "dit_accel.families"

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
    _load_plugins()
    return sorted(set(_FAMILIES.values()), key=lambda family: family.name)


def is_known(model: Any) -> bool:
    """Whether a row exists for the class of ``model`` or one it derives from."""
    return _row(type(model)) is not None


def family_of(model: nn.Module) -> Family:
    """The row for ``model``. Raises ``UnsupportedError`` that says which row to write."""
    family = _row(type(model))
    if family is None:
        raise UnsupportedError(proposal(model, known_families()))
    return family


def _row(cls: type) -> Family | None:
    _load_plugins()
    return next((_FAMILIES[base.__name__] for base in cls.__mro__ if base.__name__ in _FAMILIES), None)


@functools.cache
def _load_plugins() -> None:
    """Register what installed packages bring. One that cannot is named and left out: it must not stop the rest."""
    for point in entry_points(group=ENTRY_POINTS):
        try:
            for family in _rows(point):
                register_family(family)
        except Exception as error:
            logger.warning(
                "the families of entry point %s = %s are left out: %s: %s",
                point.name, point.value, type(error).__name__, error,
            )  # fmt: skip


def _rows(point: EntryPoint) -> Iterable[Family]:
    loaded = point.load()
    rows = [loaded] if isinstance(loaded, Family) else list(loaded)
    strange = next((row for row in rows if not isinstance(row, Family)), None)
    if strange is not None:
        raise UsageError(f"expected a Family or a sequence of them, found {type(strange).__name__}")
    return rows


for _family in (*video.FAMILIES, *image.FAMILIES):
    register_family(_family)
