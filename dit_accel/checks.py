"""Checks of values that users pass: each gives the plain Python value, or raises ``UsageError`` in one form.

Numbers of NumPy, and whole ones of torch, are taken for what they are. A bool is no number, nor is a string of digits.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

from .errors import UsageError


def plain(value: Any) -> int | float | None:
    """``value`` as an int or a float, None where it is no number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    try:
        return operator.index(value)
    except TypeError:
        return None


def whole(name: str, value: Any, what: str, least: int | None = 1) -> int:
    """A whole number of ``least`` or more, any for None. ``what`` it is: ``"a number of tokens"``."""
    found = plain(value)
    if not isinstance(found, int) or (least is not None and found < least):
        bound = "" if least is None else f", at least {least}"
        raise UsageError(f"{name} is {what}{bound}; got {_shown(value)}")
    return found


def number(
    name: str, value: Any, what: str, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> int | float:
    """A finite number from ``low`` to ``high``; ``above``: greater than ``low``. ``what`` says the range in words."""
    found = plain(value)
    if found is None or not math.isfinite(found) or not low <= found <= high or (above and found == low):
        raise UsageError(f"{name} is {what}; got {_shown(value)}")
    return found


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> Any:
    """One of some names."""
    if not isinstance(value, str) or value not in allowed:
        raise UsageError(f"{name} is {_shown(value)}; choose one of {', '.join(allowed)}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False; 0 and 1 will do."""
    if value not in (0, 1):
        raise UsageError(f"{name} is True or False; got {_shown(value)}")
    return bool(value)


def several(name: str, value: Any, what: str) -> tuple[Any, ...]:
    """Some values in order. ``what`` they are, with an example."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise UsageError(f"{name} holds {what}; got {_shown(value)}")
    return tuple(value)


def instance(name: str, value: Any, kind: type, what: str) -> Any:
    """A ``kind``, not the class itself. ``what`` is allowed, with an example."""
    if not isinstance(value, kind):
        raise UsageError(f"{name} is {what}; got {_shown(value)}")
    return value


def known_fields(name: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuse names that are no field."""
    allowed = list(allowed)
    unknown = sorted(str(key) for key in set(given) - set(allowed))
    if unknown:
        raise UsageError(f"{name} has no field {', '.join(unknown)}; it has {', '.join(allowed) or 'none'}")


def _shown(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else repr(value)
