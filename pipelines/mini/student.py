"""The causal student: the bundled transformer taught to make a chunk of frames from those that a stream remembers."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from ..streaming.host import Shape, Unrotated
from .rows import CHUNK, MEMORIES, Row, RowAttention


class Student(nn.Module):
    """``transformer`` over rows of chunks; as a module it has the stock transformer's weights and no others.

    ``grid``: latent rows and columns.
    """

    def __init__(self, transformer: WanTransformer3DModel, grid: tuple[int, int]):
        super().__init__()
        self.transformer, self.grid = transformer, grid
        self.attention = RowAttention(Shape.of(transformer).rotary, grid)
        transformer.rope = Unrotated()
        transformer.set_attn_processor(self.attention)

    def forward(self, latents: Tensor, sigma: Tensor, embeds: Tensor, rows: tuple[Row, ...]) -> Tensor:
        """Clean latents predicted for ``latents`` (B, rows, C, F, h, w) at noise levels ``sigma`` (B, rows) in 0..1.

        ``embeds``: text (B, L, D).
        """
        self.attention.rows = rows
        text = embeds.repeat_interleave(len(rows), 0)
        out = self.transformer(latents.flatten(0, 1), sigma.flatten() * 1000, text, return_dict=False)[0]
        return out.unflatten(0, sigma.shape)


def chunks_of(latents: Tensor, rows: tuple[Row, ...]) -> Tensor:
    """Latents (B, C, F, h, w) of a clip as the chunks of ``rows``: (B, rows, C, CHUNK, h, w)."""
    chunks = latents.unflatten(2, (-1, CHUNK)).transpose(1, 2)
    return chunks[:, [row.chunk for row in rows]]


def pick_memory(shares: dict[str, float], generator: torch.Generator) -> tuple[Row, ...]:
    """Rows of one of :data:`~.rows.MEMORIES`, drawn with probabilities in the ratio of ``shares``."""
    names = list(shares)
    at = torch.multinomial(torch.tensor([shares[name] for name in names]), 1, generator=generator)
    return MEMORIES[names[int(at)]]


def noise_levels(shape: tuple[int, ...], least: float, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels in (0, 1]: evenly drawn from ``least`` to 1, then moved towards noise by ``shift``.

    Chunks are made in few steps from pure noise, so the ends of a stream's steps lie far up.
    """
    u = least + (1 - least) * torch.rand(shape, generator=generator)
    return shift * u / (1 + (shift - 1) * u)


def forcing_loss(
    student: Student,
    clean: Tensor,
    embeds: Tensor,
    rows: tuple[Row, ...],
    generator: torch.Generator,
    *,
    shift: float,
    least: float,
    blur: float,
    own: float,
) -> tuple[Tensor, dict[str, float]]:
    """Teacher forcing: the weighted error of noisy rows that see clean ones; (loss, numbers to log).

    ``clean``: latents (B, C, F, h, w) of :func:`~.rows.encode_moments`. Against the errors that a stream makes and
    then sees, what is remembered gets noise of up to ``blur``, and with probability ``own`` the student's own
    predictions in the place of the truth.
    """
    device = clean.device
    target = chunks_of(clean, rows)
    noisy = torch.tensor([row.noisy for row in rows], device=device)
    level = noise_levels(target.shape[:2], least, shift, generator).to(device)
    noise = torch.randn(target.shape, generator=generator).to(device)
    memory = target + noise * (blur * torch.rand(target.shape[:1], generator=generator).to(device))[(..., *[None] * 5)]
    sigma = torch.where(noisy, level, 0.0)
    wide = sigma[..., None, None, None, None]
    made = (1 - wide) * target + wide * noise
    inputs = torch.where(noisy[:, None, None, None, None], made, memory)
    if float(torch.rand((), generator=generator)) < own:
        with torch.no_grad():
            inputs = _with_own(inputs, student(inputs, sigma, embeds, rows).float(), rows)
    predicted = student(inputs, sigma, embeds, rows).float()
    error = (predicted - target)[:, noisy].square().mean((2, 3, 4, 5))
    used = sigma[:, noisy]
    loss = (error / used.clamp(min=0.25).square()).mean()
    first = torch.tensor([not row.seen for row in rows if row.noisy], device=device)
    numbers = {"error": error.mean().item()}
    if first.any():
        numbers["first"] = error[:, first].mean().item()
    if not first.all():
        numbers["next"] = error[:, ~first].mean().item()
    return loss, numbers


def _with_own(inputs: Tensor, predicted: Tensor, rows: tuple[Row, ...]) -> Tensor:
    """``inputs`` with the clean rows of chunks that were also made replaced by what was ``predicted`` for them."""
    made = {row.chunk: at for at, row in enumerate(rows) if row.noisy}
    source = [made.get(row.chunk, at) if not row.noisy else at for at, row in enumerate(rows)]
    swapped = torch.tensor([at != own for at, own in enumerate(source)], device=inputs.device)
    return torch.where(swapped[:, None, None, None, None], predicted[:, source], inputs)
