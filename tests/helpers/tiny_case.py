"""Case: one way to call one tiny model, and what its attention must see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_accel.layout import Layout


@dataclass
class Case:
    """One way to call one model class.

    ``call``: keyword arguments of forward. ``layout``: of the tokens at a site. ``axes``: what the axes of the latents
    are, ``"bcthw"`` and so on, ``n`` for tokens; ``latents``: their argument. ``words``: the argument with the text.
    ``calls``: attention calls per site; ``layouts``: those of single sites, by name, where they differ; ``turn``:
    tokens of padded text in front that go behind the grid, see ``masks.py``.
    """

    model: torch.nn.Module
    call: dict[str, Any]
    layout: Layout
    axes: str = "bcthw"
    latents: str = "hidden_states"
    words: str = "encoder_hidden_states"
    calls: int = 1
    layouts: dict[str, Layout] = field(default_factory=dict)
    turn: int = 0
    out: Callable[[Any], torch.Tensor] = lambda output: output.sample


CASES: dict[str, Callable[[int], Case]] = {}


def case(build: Callable[[int], Case]) -> Callable[[int], Case]:
    CASES[build.__name__.strip("_").replace("_", "-")] = build
    return build


def at(batch: int, value: float = 500.0) -> torch.Tensor:
    return torch.full((batch,), value)
