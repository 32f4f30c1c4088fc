"""What matrix units of each GPU multiply, and which recipe suits them."""

from __future__ import annotations

import torch

from .recipe import Recipe

# Compute capability from which a format has matrix instructions that Triton compiles to. From compiling each for every
# architecture; what runs at which speed is in SageAttention2++ (2505.21136), table 1.
INT8_FROM = (8, 0)
FP8_FROM = (8, 9)

# What `auto` is, by the preset's name: FP8 with FP16 sums is the faster of the two on consumer parts alone.
AUTO = {(8, 0): "sage1", (8, 6): "sage1", (8, 7): "sage1", (8, 9): "sage2pp", (9, 0): "sage2", (12, 0): "sage2pp"}
AUTO_NEWER = "sage2"


def of(device: torch.device) -> tuple[int, int] | None:
    """The CUDA compute capability of ``device``, or None where there is none: quantised attention is emulated there."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else None


def refusal(recipe: Recipe, capability: tuple[int, int] | None) -> str | None:
    """Why a GPU cannot serve ``recipe``, or None. ``capability`` None is no CUDA GPU: all is emulated."""
    if capability is None:
        return None
    name = f"compute capability {capability[0]}.{capability[1]}"
    if capability < INT8_FROM:
        return f"{name} has no INT8 matrix instruction that Triton compiles to; that takes 8.0 (A100) or newer"
    if recipe.pv == "fp8" and capability < FP8_FROM:
        return f"{name} has no FP8 matrix instruction; that takes 8.9 (RTX 4090) or newer. Use pv='fp16' or 'int8'"
    return None


def preset_for(capability: tuple[int, int] | None) -> str | None:
    """The preset that ``"auto"`` takes on a GPU, or None where no format pays. All else emulates ``"sage2"``."""
    if capability is None:
        return AUTO_NEWER
    if capability < INT8_FROM:
        return None
    major, minor = capability
    return AUTO.get((major, minor)) or AUTO.get((major, 0) if major == 12 else (0, 0), AUTO_NEWER)
