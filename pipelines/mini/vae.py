"""The video autoencoder: a small AutoencoderKLWan, 8x in space and 2x in time, and the loss that trains it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from .world import HEIGHT, WIDTH, draw, random_scene

SPATIAL, TEMPORAL = 8, 2


def build_vae(base_dim: int = 48, z_dim: int = 16) -> AutoencoderKLWan:
    """A stock Wan autoencoder that folds 4 x 4 pixels into channels first, so that its convolutions run on few
    positions."""
    vae = AutoencoderKLWan(
        base_dim=base_dim,
        z_dim=z_dim,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        in_channels=3 * 16,
        out_channels=3 * 16,
        patch_size=4,
        is_residual=True,
        scale_factor_temporal=TEMPORAL,
        scale_factor_spatial=SPATIAL,
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
    )
    _initialise(vae)
    return vae


@torch.no_grad()
def _initialise(vae: AutoencoderKLWan) -> None:
    """Starts the trunk as an orthogonal linear map with quiet residual branches.

    With the default weights biases drown the signal after a few normalised layers, and posteriors as wide as the
    signal hide what is left: hundreds of steps pass before the first shape appears.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)) or "to_qkv" in name:
            continue
        module.bias.zero_()
        if name.endswith("conv1"):
            continue
        if name.endswith("conv2") or "resample" in name or "time_conv" in name or ".proj" in name:
            module.weight.mul_(0.3)
            continue
        # The last tap in time and the middle in space: what a causal kernel sees of the position itself.
        module.weight.mul_(0.1)
        middle = [size // 2 for size in module.weight.shape[2:]]
        if module.weight.ndim == 5:
            middle[0] = module.weight.shape[2] - 1
        core = torch.nn.init.orthogonal_(torch.empty(module.weight.shape[:2]))
        module.weight[(slice(None), slice(None), *middle)] += core
    # The norms that end each half remove the length of a vector; a constant part keeps brightness readable as a
    # direction.
    for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
        conv.bias.normal_(0, 0.5)
    vae.quant_conv.weight[vae.config.z_dim :] *= 0.1
    vae.quant_conv.bias[vae.config.z_dim :] = -6.0


def to_tensor(video: np.ndarray) -> torch.Tensor:
    """uint8 (..., T, H, W, 3) to float32 (..., 3, T, H, W) in -1..1."""
    return torch.from_numpy(np.moveaxis(video, -1, -4).astype(np.float32) / 127.5 - 1)


def to_video(x: torch.Tensor) -> np.ndarray:
    """float (..., 3, T, H, W) in -1..1 to uint8 (..., T, H, W, 3)."""
    return np.moveaxis(((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy(), -4, -1)


def clip_batch(rng: np.random.Generator, batch: int, frames: int) -> torch.Tensor:
    """Short clips of random scenes at random moments: float32 (B, 3, T, 64, 80) in -1..1."""
    clips = []
    for _ in range(batch):
        scene = random_scene(rng)
        start = rng.integers(0, 65 - frames + 1)
        clips.append(draw(scene, height=HEIGHT, width=WIDTH, times=(start + np.arange(frames)) / 64))
    return to_tensor(np.stack(clips))


def vae_loss(vae: AutoencoderKLWan, video: torch.Tensor, generator: torch.Generator, kl_weight: float):
    """Reconstruction plus KL for ``video`` (B, 3, T, H, W); returns the loss and the numbers to log."""
    posterior = vae.encode(video).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    out = vae.decode(mean + noise * (0.5 * logvar).exp()).sample.float()
    # Where pixels differ from their neighbourhood there is a shape's edge; plain averages would let the big background
    # win.
    edge = (video - F.avg_pool3d(video, (1, 5, 5), 1, (0, 2, 2), count_include_pad=False)).abs().amax(1, keepdim=True)
    weight = 1 + 4 * edge
    error = (out - video).abs()
    l1 = (error * weight).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = l1 + kl_weight * kl
    return loss, {"l1": error.mean().item(), "kl": kl.item(), "psnr": -10 * (error.square().mean() / 4).log10().item()}


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKLWan, rng: np.random.Generator, videos: int = 48
) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of latents over random scenes."""
    device = next(vae.parameters()).device
    z = torch.cat(
        [vae.encode(clip_batch(rng, 4, 13).to(device)).latent_dist.mode() for _ in range(max(videos // 4, 1))]
    )
    z = z.float().transpose(0, 1).flatten(1)
    return z.mean(1).tolist(), z.std(1).tolist()
