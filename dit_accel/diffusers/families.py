"""Families: one declarative row per transformer architecture. The only file that knows how models differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError, UsageError
from ..layout import Grid, Layout, Segment


@dataclass(frozen=True)
class Family:
    """How to accelerate one transformer architecture.

    ``models``: class names. ``sites``: regular expression over module names, the self and joint attention modules;
    their order in the model is the global layer index and must be the forward's order. ``reads``: the arguments of
    ``forward`` that ``layout`` wants. ``layout(config, *read)``: the layout of the tokens at those sites, or None when
    the arguments do not tell. ``by_value``: it reads tensor values, so it is kept while the same tensors are passed.
    ``joint``: text tokens are part of the sequence. ``timestep``: the argument with the timestep;
    ``timestep_scale`` times it is a value of the scheduler's timesteps. ``image``: never more than one frame.
    ``cross_sites``: regular expression over module names, the cross-attention to text where it is a module of its own;
    processors leave it stock, whole jobs such as FreeSwim may want it.
    """

    name: str
    models: tuple[str, ...]
    sites: str
    reads: tuple[str, ...]
    layout: Callable[..., Layout | None]
    by_value: bool = False
    joint: bool = False
    timestep: str = "timestep"
    timestep_scale: float = 1.0
    image: bool = False
    cross_sites: str = ""

    def find_sites(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """(name, module) of every site, in forward order."""
        return _matching(model, self.sites)

    def find_cross_sites(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """(name, module) of every cross-attention site, in forward order; empty for families without."""
        return _matching(model, self.cross_sites)


def _matching(model: nn.Module, sites: str) -> list[tuple[str, nn.Module]]:
    pattern = re.compile(sites)
    return [(name, module) for name, module in model.named_modules() if name and pattern.fullmatch(name)]


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make ``family`` known for its model classes. Raises ``UsageError`` when another row already claims one."""
    for model in family.models:
        known = _FAMILIES.get(model)
        if known is not None and known.name != family.name:
            raise UsageError(f"{model} belongs to family {known.name!r}; register {family.name!r} for other classes")
    _FAMILIES.update(dict.fromkeys(family.models, family))


def known_families() -> list[Family]:
    """Every known family, by name."""
    return sorted(set(_FAMILIES.values()), key=lambda family: family.name)


def is_known(model: Any) -> bool:
    """Whether a row exists for the class of ``model`` or one it derives from."""
    return any(cls.__name__ in _FAMILIES for cls in type(model).__mro__)


def family_of(model: nn.Module) -> Family:
    """The row for ``model``. Raises ``UnsupportedError`` that says which row to write."""
    for cls in type(model).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
    name = type(model).__name__
    known = ", ".join(f"{family.name} ({', '.join(family.models)})" for family in known_families())
    raise UnsupportedError(
        f"{name} is not a known transformer. Known: {known}. Write its row and set the processor again:\n"
        "    from dit_accel import Layout\n"
        "    from dit_accel.diffusers import Family, register_family\n"
        f"    register_family(Family(name={name.lower()!r}, models=({name!r},),\n"
        f"        sites={_guess_sites(model)!r},\n"
        "        reads=('hidden_states',),  # the arguments of forward from which the layout follows\n"
        "        layout=lambda config, hidden: Layout(grid=(...))))  # (T, H, W) in tokens, text=, text_first="
    )


def _guess_sites(model: nn.Module) -> str:
    """The most frequent kind of attention module, with its block number as a wildcard."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if hasattr(module, "processor"):
            pattern = re.sub(r"\b\d+\b", r"\\d+", name.replace(".", r"\."))
            found[pattern] = found.get(pattern, 0) + 1
    return max(found, key=found.get, default=r"blocks\.\d+\.attn")


def _wan(config: Any, hidden: Any) -> Layout:
    """hidden: (B, C, T, H, W) latents; text has a cross-attention of its own."""
    return Layout(grid=_patches(hidden.shape[2:], config.patch_size))


def _hunyuan_video(config: Any, hidden: Any, text: Any) -> Layout:
    """hidden: (B, C, T, H, W) latents; text (B, N, D) follows the video."""
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    return Layout(grid=_patches(hidden.shape[2:], patch), text=text.shape[1])


def _cogvideox(config: Any, hidden: Any, text: Any) -> Layout:
    """hidden: (B, T, C, H, W) latents; text (B, N, D) comes first."""
    frames, _, height, width = hidden.shape[1:]
    patch = (config.patch_size_t or 1, config.patch_size, config.patch_size)
    # An incomplete last temporal patch is padded by the model, so frames round up.
    frames = -(-frames // patch[0]) * patch[0]
    return Layout(grid=_patches((frames, height, width), patch), text=text.shape[1], text_first=True)


def _ltx(config: Any, frames: int | None, height: int | None, width: int | None) -> Layout | None:
    """The latents arrive as tokens; their grid is told beside them, unless coordinates replace it."""
    if frames is None or height is None or width is None:
        return None
    return Layout(grid=(frames, height, width))


def _flux(config: Any, image_ids: Any, text_ids: Any) -> Layout:
    """Ids (N, 3) or (B, N, 3): a row (image, y, x) per token; later images are references, text comes first."""
    ids = (image_ids[0] if image_ids.ndim == 3 else image_ids).cpu().long()
    sizes = torch.unique_consecutive(ids[:, 0], return_counts=True)[1]
    segments = [Segment("text", text_ids.shape[-2])] if text_ids.shape[-2] else []
    for number, rows in enumerate(ids.split(sizes.tolist())):
        columns = int(rows[:, 2].max() - rows[:, 2].min()) + 1
        grid = (1, max(len(rows) // columns, 1), columns)
        segments.append(Segment("reference" if number else "main", grid))
    return Layout(segments=segments)


def _qwen_image(config: Any, shapes: Any, text: Any) -> Layout:
    """shapes: per sample the grids of its images, the first one generated, the others references; text comes first."""
    grids = shapes[0]
    grids = [grids] if isinstance(grids[0], int) else grids
    segments = [Segment("reference" if number else "main", tuple(grid)) for number, grid in enumerate(grids)]
    return Layout(segments=[Segment("text", text.shape[1]), *segments])


def _patches(sizes: Sequence[int], patch: Sequence[int]) -> Grid:
    return tuple(size // step for size, step in zip(sizes, patch, strict=True))


for _family in (
    Family(
        name="wan",
        models=("WanTransformer3DModel",),
        sites=r"blocks\.\d+\.attn1",
        cross_sites=r"blocks\.\d+\.attn2",
        reads=("hidden_states",),
        layout=_wan,
    ),
    Family(
        name="hunyuan-video",
        models=("HunyuanVideoTransformer3DModel",),
        sites=r"(single_)?transformer_blocks\.\d+\.attn",
        reads=("hidden_states", "encoder_hidden_states"),
        layout=_hunyuan_video,
        joint=True,
    ),
    Family(
        name="cogvideox",
        models=("CogVideoXTransformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        reads=("hidden_states", "encoder_hidden_states"),
        layout=_cogvideox,
        joint=True,
    ),
    Family(
        name="ltx",
        models=("LTXVideoTransformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        cross_sites=r"transformer_blocks\.\d+\.attn2",
        reads=("num_frames", "height", "width"),
        layout=_ltx,
    ),
    Family(
        name="flux",
        models=("FluxTransformer2DModel",),
        sites=r"(single_)?transformer_blocks\.\d+\.attn",
        reads=("img_ids", "txt_ids"),
        layout=_flux,
        by_value=True,
        joint=True,
        timestep_scale=1000.0,
        image=True,
    ),
    Family(
        name="qwen-image",
        models=("QwenImageTransformer2DModel",),
        sites=r"transformer_blocks\.\d+\.attn",
        reads=("img_shapes", "encoder_hidden_states"),
        layout=_qwen_image,
        joint=True,
        timestep_scale=1000.0,
        image=True,
    ),
):
    register_family(_family)
