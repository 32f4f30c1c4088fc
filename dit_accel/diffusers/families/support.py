"""The support table: what each row says, one entry per transformer class, for people and for JSON."""

from __future__ import annotations

import inspect
from typing import Any

from .registry import known_families
from .row import Family

COLUMNS = {
    "model": "model",
    "family": "family",
    "grid": "token grid from",
    "sites": "sites",
    "text": "text",
    "padding": "padded text",
    "stock": "stays stock",
    "notes": "notes",
}


def support() -> list[dict[str, Any]]:
    """Entries with :data:`COLUMNS` and more, video first, then by family and class.

    ``installed``: whether this diffusers has the class.
    """
    import diffusers

    have = set(dir(diffusers))
    entries = [_entry(family, model, model in have) for family in known_families() for model in family.models]
    return sorted(entries, key=lambda entry: (entry["kind"] == "image", entry["family"], entry["model"]))


def markdown(entries: list[dict[str, Any]]) -> str:
    """The entries as a Markdown table."""
    rows = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    rows += [[_cell(name, entry[name]) for name in COLUMNS] for entry in entries]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _entry(family: Family, model: str, installed: bool) -> dict[str, Any]:
    sites = (family.sites,) if isinstance(family.sites, str) else family.sites
    stock = [text for text in ("cross-attention" if family.cross_sites else "", family.stock) if text]
    return {
        "model": model,
        "family": family.name,
        "kind": "image" if family.image else "video",
        "grid": (inspect.getdoc(family.layout) or "").split("\n")[0].rstrip("."),
        "reads": list(family.reads),
        "sites": list(sites),
        "cross_sites": family.cross_sites or None,
        "text": family.text,
        "padding": _padding(family),
        "stock": ", ".join(stock),
        "notes": family.notes,
        "installed": installed,
    }


def _padding(family: Family) -> str:
    """What becomes of padded text at the sites; masks that hide nothing are dropped, others run dense everywhere."""
    if not family.joint:
        return ""
    if family.cuts_text and family.text == "first":
        return "cut by the model; texts of different lengths in one batch run dense"
    if not family.masks_text:
        return "cut by the model" if family.cuts_text else "attended to, as by the stock model"
    kept = "live keys per sample" + (", moved behind the grid" if family.text == "first" else "")
    return f"cut by the model, or {kept}" if family.cuts_text else kept


def _cell(name: str, value: Any) -> str:
    if name == "sites":
        return ", ".join(f"`{pattern}`" for pattern in value).replace("|", "\\|")
    if name == "model":
        return f"`{value}`"
    return value
