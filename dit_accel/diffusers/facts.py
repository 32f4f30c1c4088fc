"""Facts: what a method is told about the model it is set on."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from ..methods import ModelFacts
from .families import Family


def facts_of(model: nn.Module, family: Family) -> ModelFacts:
    """Class, public configuration as plain JSON values, attention sites, and whether it makes single images only."""
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if not key.startswith("_")}
    return ModelFacts(type(model).__name__, _plain(config), len(family.find_sites(model)), family.image)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(config, sort_keys=True, default=str))
