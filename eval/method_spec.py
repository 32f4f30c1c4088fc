"""Methods as text: ``radial``, ``radial:rule=paper``, ``gna:preset=hunyuan:stride=1``; the fields type the values."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import UsageError
from ..methods import Method, find

# What a method needs to be worth its name in a measurement: selection per token skips no block.
PARAMETERS: dict[str, dict[str, Any]] = {"vmoba": {"granularity": "block"}}

PRESET = "preset"
_WORDS = {"none": None, "true": True, "false": False}


def build(specs: Sequence[str], settings: Iterable[str] = ()) -> list[Method]:
    """The methods that ``specs`` name.

    A spec is ``NAME`` or ``NAME:PARAMETER=VALUE:...``. ``settings`` are ``PARAMETER=VALUE`` for every method that has
    the parameter, or ``NAME.PARAMETER=VALUE`` for one; a spec's own values win. Values: numbers, words, ``true``,
    ``none``, and comma-separated tuples. ``preset=NAME`` starts from a published configuration where a method has some.
    Raises ``UsageError`` that names what is allowed.
    """
    parsed = [_spec(text) for text in specs]
    shared = [_setting(text, [cls for cls, _ in parsed]) for text in settings]
    made = []
    for cls, own in parsed:
        values = {name: value for only, name, value in shared if only in (None, cls.name) and name in allowed(cls)}
        made.append(_make(cls, {**values, **own}))
    return made


def allowed(cls: type[Method]) -> list[str]:
    """The parameters that a spec of ``cls`` may set."""
    return [*(f.name for f in dataclasses.fields(cls)), *([PRESET] if hasattr(cls, PRESET) else [])]


def describe(method: Method) -> str:
    """The parameters that differ from the defaults, as a spec writes them; ``"defaults"`` without any."""
    parts = []
    for f in dataclasses.fields(method):
        value = getattr(method, f.name)
        # One value per axis, all of them the default, is the default.
        alike = isinstance(value, tuple) and not isinstance(f.default, tuple) and set(value) == {f.default}
        if value != f.default and not alike:
            parts.append(f"{f.name}={_text(value)}")
    return ", ".join(parts) or "defaults"


def _spec(text: str) -> tuple[type[Method], dict[str, str]]:
    name, *parts = text.split(":")
    cls, own = find(name.strip()), {}
    for part in parts:
        key, value = _pair(part, f"{name}:PARAMETER=VALUE, like {name}:{allowed(cls)[0]}=...")
        own[_known(key, [cls])] = value
    return cls, own


def _setting(text: str, classes: Sequence[type[Method]]) -> tuple[str | None, str, str]:
    key, value = _pair(text, "PARAMETER=VALUE or METHOD.PARAMETER=VALUE")
    if "." not in key:
        return None, _known(key, classes), value
    name, _, key = key.partition(".")
    chosen = [cls for cls in classes if cls is find(name)]
    if not chosen:
        names = ", ".join(cls.name for cls in classes)
        raise UsageError(f"{text!r} sets a method that is not asked for; the methods here: {names}")
    return chosen[0].name, _known(key, chosen), value


def _pair(text: str, form: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (equals and key.strip() and value.strip()):
        raise UsageError(f"a method parameter is written {form}; got {text!r}")
    return key.strip(), value.strip()


def _known(key: str, classes: Sequence[type[Method]]) -> str:
    key = key.replace("-", "_")
    if any(key in allowed(cls) for cls in classes):
        return key
    each = "; ".join(f"{cls.name}: {', '.join(allowed(cls)) or 'none'}" for cls in dict.fromkeys(classes))
    raise UsageError(f"no parameter {key!r}; allowed are {each}")


def _make(cls: type[Method], texts: dict[str, str]) -> Method:
    hints = get_type_hints(cls)
    values = {name: _typed(f"{cls.name}.{name}", text, hints.get(name, str)) for name, text in texts.items()}
    make = getattr(cls, PRESET) if PRESET in values else cls
    start = (values.pop(PRESET),) if PRESET in values else ()
    try:
        return make(*start, **values)
    except TypeError as error:
        raise UsageError(f"method {cls.name!r} cannot be made from {texts or 'its defaults'}: {error}") from None


def _typed(name: str, text: str, hint: Any) -> Any:
    value = tuple(_scalar(part) for part in text.split(",") if part.strip()) if "," in text else _scalar(text)
    # A word such as "none" may also be the value of a text parameter; a lone value may stand for a tuple of one.
    for candidate in (value, text, (value,)):
        if _fits(candidate, hint):
            return candidate
    raise UsageError(f"{name} takes {_name(hint)}; got {text!r}")


def _scalar(text: str) -> Any:
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in args)
    if origin in (tuple, frozenset):
        if not isinstance(value, tuple):
            return False
        if args and args[-1] is Ellipsis:
            return all(_fits(item, args[0]) for item in value)
        return not args or (len(args) == len(value) and all(map(_fits, value, args)))
    if origin is not None:
        return True
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint in (None, type(None)) else isinstance(value, hint)


def _name(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(option) for option in args)
    if origin is tuple:
        inner = _name(args[0]) if args else "values"
        return f"{inner},{inner},..." if args and args[-1] is Ellipsis else ",".join(_name(a) for a in args)
    return {type(None): "none", bool: "true or false"}.get(hint, getattr(hint, "__name__", str(hint)))


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, value[:1] if len(set(value)) == 1 else value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
