"""A tiny random-weight model of every transformer class with a row, built offline, and what its attention must see."""

from __future__ import annotations

import tiny_image
import tiny_video
import torch
from tiny_case import CASES, Case

__all__ = ["CASES", "Case", "tiny", "tiny_image", "tiny_video"]


def tiny(name: str, batch: int = 2, seed: int = 0) -> Case:
    """The case ``name``, its model in eval mode with every weight random: zeroed gates would hide the attention."""
    torch.manual_seed(seed)
    found = CASES[name](batch)
    with torch.no_grad():
        for parameter in found.model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    found.model.eval()
    return found
