"""Parameters that hold one value for every axis, or one per axis."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..checks import plain
from ..errors import UsageError

PerAxis = int | tuple[int, ...]


def at(value: Any, axis: int) -> Any:
    """The value on axis -3, -2 or -1, which is W: values belong to the last axes."""
    return value[axis] if isinstance(value, tuple) else value


def rank(values: Iterable[Any]) -> int | None:
    """How many axes the tuples among ``values`` have, None without any. Raises ``UsageError`` where they differ."""
    ranks = {len(v) for v in values if isinstance(v, tuple)}
    if len(ranks) > 1:
        raise UsageError(
            "give one value, or one per axis with the same number of axes everywhere; got "
            + ", ".join(repr(v) for v in values if isinstance(v, tuple))
        )
    return ranks.pop() if ranks else None


def numbers(name: str, value: Any, whole: bool = False) -> PerAxis:
    """An int, or a tuple of one to three; positive, or -1 where ``whole`` (it stands for the whole axis).

    Raises ``UsageError`` naming the parameter.
    """
    many = tuple(plain(v) for v in value) if isinstance(value, Iterable) else None
    found = many if many is not None else (plain(value),)
    if not 1 <= len(found) <= 3 or not all(isinstance(n, int) and (n >= 1 or (whole and n == -1)) for n in found):
        also = " or -1 (the whole axis)" if whole else ""
        raise UsageError(
            f"{name} must be a positive integer{also}, or one to three of these; got {value!r}. "
            f"Example: {name}=(4, 8, 8)"
        )
    return found[0] if many is None else found


def flags(name: str, value: Any) -> bool | tuple[bool, ...]:
    """A bool, or a tuple of one to three. Raises ``UsageError`` naming the parameter."""
    one = not isinstance(value, Iterable) or isinstance(value, str)
    many = (value,) if one else tuple(value)
    if not 1 <= len(many) <= 3 or any(flag not in (0, 1) for flag in many):
        raise UsageError(
            f"{name} must be True or False, or one to three of these; got {value!r}. "
            f"Example: {name}=(True, False, False)"
        )
    return bool(many[0]) if one else tuple(bool(flag) for flag in many)
