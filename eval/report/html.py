"""HTML that cannot be broken by its content: every text is escaped where an element is made."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

_VOID = {"meta", "input", "br", "img", "source"}


class Markup(str):
    """Text that is HTML already. Made by this module only."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """``<name attributes>children</name>``. Children that are no :class:`Markup` are escaped; lists are flattened,
    None is left out. An attribute's underscores become dashes, a trailing one is dropped (``class_``); True stands
    alone, None and False are left out."""
    parts = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(f" {key}")
        elif value is not None and value is not False:
            parts.append(f' {key}="{html.escape(str(value))}"')
    head = f"<{name}{''.join(parts)}>"
    return Markup(head if name in _VOID else f"{head}{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Markup:
    """Children one after another, escaped where they are no markup."""
    parts = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, (list, tuple)):
            parts.append(join(child))
        elif child is not None:
            parts.append(html.escape(str(child)))
    return Markup("".join(parts))


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]], **attributes: Any) -> Markup:
    """A table; cells that are numbers, or start with one, are flushed right, and the head of a column of such cells."""
    rows = [list(row) for row in rows]
    body = [tag("tr", [tag("td", cell, class_="number" if _is_number(cell) else None) for cell in row]) for row in rows]
    right = [bool(rows) and all(_is_number(cell) for cell in column) for column in zip(*rows, strict=False)]
    head = list(head)
    right += [False] * len(head)
    first = [tag("th", cell, class_="number" if flush else None) for cell, flush in zip(head, right, strict=False)]
    return tag("div", tag("table", tag("thead", tag("tr", first)), tag("tbody", body), **attributes), class_="wide")


def _is_number(cell: Any) -> bool:
    text = str(cell).strip()
    return text == "-" or text[:1].isdigit() or (text[:1] in "+-" and text[1:2].isdigit())
