"""The denoiser: a stock WanTransformer3DModel with a text encoder, and the loss that trains both on chosen latent
frames.

A training step shows the model a few of the clip's latent frames at their true places in time, which is what makes
training on a CPU affordable. Rotary positions are relative and nothing else tells a token where it is, so the first
and the last frame are always among the chosen ones: they are the borders from which the model reads absolute time.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed
from transformers import UMT5EncoderModel

from .attention import TrainingAttention
from .locality import PositionProbe, start_local


class ChosenFramesRope(WanRotaryPosEmbed):
    """Rotary embedding whose frame positions are ``frames`` (B, F) instead of 0..F-1; ``frames = None`` is the stock
    one."""

    frames: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, (1 or B, tokens, 1, head_dim), for latents (B, C, F, H, W)."""
        if self.frames is None:
            return super().forward(hidden_states)
        batch, _, frames, height, width = hidden_states.shape
        if self.frames.shape != (batch, frames):
            raise ValueError(
                f"frames has shape {tuple(self.frames.shape)}, the latents have (batch, frames) = {(batch, frames)}; "
                "give one position per sample and latent frame"
            )
        height, width = height // self.patch_size[1], width // self.patch_size[2]
        sizes = [self.t_dim, self.h_dim, self.w_dim]
        result = []
        for table in (self.freqs_cos, self.freqs_sin):
            t, h, w = table.split(sizes, dim=1)
            grid = (batch, frames, height, width, -1)
            parts = (
                t[self.frames][:, :, None, None].expand(grid),
                h[:height][None, None, :, None].expand(grid),
                w[:width][None, None, None].expand(grid),
            )
            result.append(torch.cat(parts, dim=-1).reshape(batch, -1, 1, sum(sizes)))
        return result[0], result[1]


def build_transformer(
    width: int = 128, head_dim: int = 32, layers: int = 6, channels: int = 16, text_dim: int = 96
) -> WanTransformer3DModel:
    """A small Wan transformer over single latent positions (patch 1 x 1 x 1), initialised for quick learning."""
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=width // head_dim,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=channels,
        text_dim=text_dim,
        freq_dim=128,
        ffn_dim=4 * width,
        num_layers=layers,
        rope_max_seq_len=128,
    )
    with torch.no_grad():
        model.condition_embedder.time_proj.weight.mul_(0.1)
        model.condition_embedder.time_proj.bias.zero_()
        for block in model.blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, (2, 5)] = 0.5
        model.scale_shift_table.zero_()
        model.proj_out.weight.mul_(0.1)
    start_local(model)
    return model


class Denoiser(torch.nn.Module):
    """Text encoder and transformer as one trainable module that predicts clean latents."""

    def __init__(self, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer
        config = transformer.config
        rope = ChosenFramesRope(config.attention_head_dim, tuple(config.patch_size), config.rope_max_seq_len)
        # Registered buffers are not persistent, so exported weights are the stock model's.
        transformer.rope = rope.to(transformer.device)
        transformer.set_attn_processor(TrainingAttention())
        self.probe = PositionProbe(transformer, len(transformer.blocks) // 2 - 1 if len(transformer.blocks) > 1 else 0)

    @contextmanager
    def stock(self):
        """While inside, the transformer runs diffusers' own attention processors."""
        mine = self.transformer.attn_processors
        self.transformer.set_attn_processor(WanAttnProcessor())
        try:
            yield self.transformer
        finally:
            self.transformer.set_attn_processor(mine)

    def embed(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask (B, L) to embeddings (B, L, D), zero where padded, exactly as WanPipeline does."""
        return self.text_encoder(ids, mask).last_hidden_state * mask[..., None]

    def forward(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
        frames: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predicted clean latents for ``noisy`` (B, C, F, H, W) at noise levels ``sigma`` (B,) in 0..1."""
        self.transformer.rope.frames = frames
        try:
            return self.transformer(noisy, sigma * 1000, self.embed(ids, mask), return_dict=False)[0]
        finally:
            self.transformer.rope.frames = None


def sample_sigma(batch: int, generator: torch.Generator, shift: float, spread: float = 1.0) -> torch.Tensor:
    """Noise levels (B,): logit-normal, then moved towards noise by ``shift`` as the sampler's ``flow_shift`` does."""
    u = torch.sigmoid(torch.randn(batch, generator=generator) * spread)
    return shift * u / (1 + (shift - 1) * u)


def choose_frames(batch: int, total: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Sorted frame indices (B, count) that always hold the first and the last of ``total`` frames."""
    if count >= total:
        return torch.arange(total).expand(batch, total)
    inner = torch.rand(batch, total - 2, generator=generator).argsort(1)[:, : count - 2] + 1
    ends = torch.tensor([[0, total - 1]]).expand(batch, 2)
    return torch.cat([ends, inner], 1).sort(1).values


def denoising_loss(
    model: Denoiser,
    clean: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    frames: torch.Tensor,
    generator: torch.Generator,
    shift: float,
    total: int = 33,
    probe: float = 0.2,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Velocity-weighted error of the predicted clean latents for ``clean`` (B, C, F, H, W), whose frames are the
    indices ``frames`` (B, F) of a clip of ``total``; ``probe`` weighs the helper task of :class:`PositionProbe`."""
    sigma = sample_sigma(clean.shape[0], generator, shift).to(clean.device)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    level = sigma[:, None, None, None, None]
    predicted = model((1 - level) * clean + level * noise, sigma, ids, mask, frames).float()
    error = (predicted - clean).square().mean((1, 2, 3, 4))
    # 1 / sigma^2 is the weight of the velocity loss; unbounded it would spend everything on nearly clean inputs.
    loss = (error / sigma.clamp(min=0.25).square()).mean()
    place = model.probe.loss(frames, total, *clean.shape[3:])
    return loss + probe * place, {"error": error.mean().item(), "denoise": loss.item(), "place": place.item()}
