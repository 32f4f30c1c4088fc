"""Latents to pixels as they come, equal to decoding the whole clip at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError


class StreamingDecoder:
    """Decodes one clip's latents in any portions; its result is bit-equal to ``AutoencoderKLWan.decode`` of them all.

    Wan's decoder is causal in time: every convolution keeps its last frames. They are kept here, not in the model, so
    that any number of clips can be decoded in turns. Memory is constant in the clip's length. Raises
    ``UnsupportedError`` for another autoencoder or one that is set to work in tiles.
    """

    def __init__(self, vae: Any):
        from diffusers import AutoencoderKLWan

        if not isinstance(vae, AutoencoderKLWan):
            raise UnsupportedError(f"streaming decode needs an AutoencoderKLWan; got {type(vae).__name__}")
        if vae.use_tiling:
            raise UnsupportedError("streaming decode works on whole frames; call vae.disable_tiling() first")
        self.vae = vae
        self.frames = 0
        self._kept: list[Any] = [None] * vae._cached_conv_counts["decoder"]

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1] of normalised latents (B, C, F, h, w).

        The clip's first latent frame gives one frame, every other ``scale_factor_temporal``.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        vae, config = self.vae, self.vae.config
        mean, std = (
            torch.tensor(values, dtype=vae.dtype, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        # Dividing by the reciprocal, as WanPipeline does: multiplying rounds otherwise.
        z = vae.post_quant_conv(latents.to(vae.dtype) / (1.0 / std) + mean)
        parts = []
        for frame in z.split(1, 2):
            first = {"first_chunk": True} if not self.frames else {}
            parts.append(vae.decoder(frame, feat_cache=self._kept, feat_idx=[0], **first))
            self.frames += 1
        out = torch.cat(parts, 2)
        if config.patch_size is not None:
            out = unpatchify(out, patch_size=config.patch_size)
        return out.clamp(-1.0, 1.0)
