"""The one place that knows diffusers. Names resolve on first use: importing this package is cheap."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "set_attn_processor": "api",
    "reset_attn_processor": "api",
    "describe": "api",
    "engines": "api",
    "denoisers": "api",
    "install": "api",
    "Description": "report",
    "Engine": "engine",
    "Family": "families",
    "known_families": "families",
    "family_of": "families",
    "register_family": "families",
    "Probed": "probe",
    "probe_family": "probe",
    "Stats": "stats",
}

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


if TYPE_CHECKING:
    from .api import denoisers, describe, engines, install, reset_attn_processor, set_attn_processor
    from .engine import Engine
    from .families import Family, family_of, known_families, register_family
    from .probe import Probed, probe_family
    from .report import Description
    from .stats import Stats
