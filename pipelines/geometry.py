"""Which sizes and frame counts a pipeline takes, and the token grid they give, from configuration files alone."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass

from ..errors import UsageError
from ..layout import Layout
from .model import ModelInfo

# Tokens that an int32 can count, as kernels do.
MOST = 2**31 - 1


@dataclass(frozen=True)
class Geometry:
    """``spatial``, ``temporal``: pixels and frames per latent position. ``patch``: latents per token (T, H, W).

    ``multiple``: what height and width must be multiples of. ``None`` stands for "the configuration does not say";
    the pipeline's own checks then decide.
    """

    spatial: int | None
    temporal: int | None
    patch: tuple[int, int, int] | None
    multiple: int = 1

    def check_size(self, width: int, height: int, what: str = "--size") -> None:
        """Raise ``UsageError`` naming the nearest size the model takes."""
        step = math.lcm(self.multiple, 2)
        if width > 0 and height > 0 and width % step == 0 and height % step == 0:
            return
        near = "x".join(str(max(step, round(side / step) * step)) for side in (width, height))
        why = f"this model takes multiples of {step}" if self.multiple > 1 else "H.264 video needs even sides"
        raise UsageError(f"{what} {width}x{height} (WxH) does not fit: {why}; the nearest allowed size is {near}")

    def check_frames(self, frames: int, what: str = "--frames") -> None:
        """Raise ``UsageError`` naming the nearest frame counts the VAE takes: 1 plus a multiple of its factor."""
        if frames < 1:
            raise UsageError(f"{what} must be at least 1; got {frames}")
        factor = self.temporal or 1
        if (frames - 1) % factor == 0:
            return
        below = (frames - 1) // factor * factor + 1
        raise UsageError(
            f"{what} {frames} does not fit: this model's VAE takes 1 plus a multiple of {factor}; "
            f"the nearest allowed counts are {below} and {below + factor}"
        )

    def layout(self, width: int, height: int, frames: int, text: int = 0) -> Layout | None:
        """The tokens of one forward, ``text`` of them text; None where the configuration does not say.

        Raises ``UsageError`` for more than an int32 can count, which no plan can list.
        """
        if self.spatial is None or self.patch is None:
            return None
        t, h, w = self.patch
        latent = (frames - 1) // (self.temporal or 1) + 1
        grid = (math.ceil(latent / t), height // self.spatial // h, width // self.spatial // w)
        tokens = math.prod(grid) + text
        if tokens > MOST:
            raise UsageError(
                f"{frames} frames of {width}x{height} (WxH) are {tokens:,} tokens, and attention counts to {MOST:,} at "
                "most; give a smaller --size or fewer --frames"
            )
        return Layout(grid=grid, text=text)


def geometry(info: ModelInfo) -> Geometry:
    """The geometry of a model as its VAE and transformer configurations and its pipeline's input check tell it."""
    vae = info.vae
    spatial = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio") or vae.get("downsampling_ratio")
    temporal = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio")
    if "temperal_downsample" in vae:
        spatial = spatial or 2 ** len(vae["temperal_downsample"])
        temporal = temporal or 2 ** sum(vae["temperal_downsample"])
    if "spatio_temporal_scaling" in vae:
        folds = 2 ** sum(vae["spatio_temporal_scaling"])
        spatial, temporal = spatial or folds * vae.get("patch_size", 1), temporal or folds * vae.get("patch_size_t", 1)
    if spatial is None and "block_out_channels" in vae:
        spatial = 2 ** (len(vae["block_out_channels"]) - 1)
    patch = _patch(info)
    multiple = math.lcm(*_stated_multiples(info, spatial), (spatial or 1) * (patch[1] if patch else 1))
    return Geometry(spatial, temporal if info.is_video else None, patch, multiple)


def _patch(info: ModelInfo) -> tuple[int, int, int] | None:
    size, size_t = info.transformer.get("patch_size"), info.transformer.get("patch_size_t")
    if isinstance(size, (list, tuple)):
        return (1, *size)[-3:] if len(size) in (2, 3) else None
    if not isinstance(size, int):
        return None
    # Pipelines that pack 2x2 latents before the transformer leave its own patch size at 1.
    packed = 2 if hasattr(info.pipeline_class, "_pack_latents") and size == 1 and not info.is_video else 1
    return (size_t or 1, size * packed, size * packed)


def _stated_multiples(info: ModelInfo, spatial: int | None) -> list[int]:
    """Divisors named by the pipeline's own input check, which stops a run only after the weights are loaded."""
    check = getattr(info.pipeline_class, "check_inputs", None)
    try:
        source = inspect.getsource(check)
    except (TypeError, OSError):
        return [1]
    stated = [int(n) for n in re.findall(r"height % (\d+)", source)]
    if spatial:
        stated += [spatial * int(n) for n in re.findall(r"height % \(self\.vae_scale_factor \* (\d+)\)", source)]
    return stated or [1]
