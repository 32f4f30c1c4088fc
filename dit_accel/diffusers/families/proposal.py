"""The proposal: what a transformer class without a row tells about itself, as the row to write."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Sequence

from torch import nn

from ...errors import UnsupportedError
from .row import Family


def proposal(model: nn.Module, known: Sequence[Family]) -> str:
    """The message for a class without a row: what is known, and the row to write, as far as the model tells it."""
    name = type(model).__name__
    sites, cross, refused = _attention(model)
    not_sites = [f"Not a site: {pattern} ({why})" for pattern, why in refused.items()]
    if not sites:
        return "\n".join([f"{name} is not a known transformer, and none of its attention can run sparse.", *not_sites])
    listed = ", ".join(f"{family.name} ({', '.join(family.models)})" for family in known)
    arguments = list(inspect.signature(type(model).forward).parameters)[1:]
    timestep = next((a for a in arguments if a in ("timestep", "timesteps", "t")), None)
    lines = [
        f"{name} is not a known transformer. Known: {listed}. Let its row be found from one forward of a tiny "
        "configuration, dit_accel.diffusers.probe_family(model, {<argument of forward>: <value>, ...}), or write it, "
        "and set the processor again:",
        "    from dit_accel import Layout",
        "    from dit_accel.diffusers import Family, register_family",
        f"    register_family(Family(name={name.lower()!r}, models=({name!r},),",
        f"        sites={sites!r},",
    ]
    if cross:
        lines.append(f"        cross_sites={cross!r},")
    if timestep not in (None, "timestep"):
        lines.append(f"        timestep={timestep!r},")
    read, layout = _layout(model, arguments)
    lines += [
        f"        reads=({read!r},),  # the arguments of forward from which the layout follows",
        f"        layout=lambda config, hidden: {layout}))",
        "    # Layout: the grid (T, H, W) in tokens, here for latents (B, C, T, H, W) or (B, C, H, W); where text is",
        "    # part of the sequence also its tokens (text=, text_first=) and in the row text='first' or 'last'.",
    ]
    if timestep is None:
        lines.append("    # timestep: the argument of forward with the timestep.")
    return "\n".join([*lines, *not_sites])


def _attention(model: nn.Module) -> tuple[str, str, dict[str, str]]:
    """Patterns of the most frequent attention modules that can be derived and of their cross-attention; the refused.

    The first is empty where all are refused, a guess where there are none.
    """
    from ..derive import derive, stock_of

    found: Counter[str] = Counter()
    cross: set[str] = set()
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if processor is None:
            continue
        pattern = re.sub(r"\b\d+\b", r"\\d+", name.replace(".", r"\."))
        try:
            if callable(processor):
                derive(type(stock_of(processor)))
        except UnsupportedError as error:
            refused[pattern] = str(error).split(";")[0]
            continue
        found[pattern] += 1
        if getattr(module, "is_cross_attention", False) or re.search(r"attn2$|cross", name):
            cross.add(pattern)
    own = [pattern for pattern in found if pattern not in cross]
    sites = max(own, key=found.__getitem__, default="" if refused else r"blocks\.\d+\.attn")
    return sites, max(cross, key=found.__getitem__, default=""), refused


def _layout(model: nn.Module, arguments: Sequence[str]) -> tuple[str, str]:
    """The argument with the latents, and how the grid follows from it where the patch size is told."""
    read = next((a for a in arguments if a in ("hidden_states", "x", "sample")), arguments[0] if arguments else "...")
    patch = dict(getattr(model, "config", {})).get("patch_size")
    if isinstance(patch, (tuple, list)) and len(patch) == 3:
        t, h, w = (f"hidden.shape[{axis}] // {size}" for axis, size in zip((2, 3, 4), patch, strict=True))
        return read, f"Layout(grid=({t}, {h}, {w}))"
    if isinstance(patch, int) and "2D" in type(model).__name__:
        return read, f"Layout(grid=(1, hidden.shape[2] // {patch}, hidden.shape[3] // {patch}))"
    return read, "Layout(grid=(...))"
