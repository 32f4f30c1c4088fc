"""Methods and tensors of a case."""

from __future__ import annotations

import functools
from dataclasses import fields, replace

import torch
from torch import Tensor

from ...layout import Layout
from ...methods import GNA, Clear, Method, Radial, RandomBlocks, find
from ..atlas import synthetic_tensors
from ..method_spec import PARAMETERS
from .cases import Shape


def method_of(name: str, density: float, layout: Layout) -> Method:
    """The method solved for ``density``. ``radial-rule``: Radial at its defaults; ``gna-ragged``: windows centred on
    every token, so that most tiles they touch are partial. Raises ``UsageError`` for a name that is none."""
    if name == RandomBlocks.name:
        return RandomBlocks(density=density, block_size=128)
    if name == "radial-rule":
        return Radial()
    if name == "gna-ragged":
        share = density ** (1 / sum(n > 1 for n in layout.grid))
        return GNA(tuple(max(1, round(n * share)) for n in layout.grid), stride=1)
    if name == Clear.name:
        # A disc over every frame: its area is the share of an image.
        return Clear(radius=max(1, round((density * layout.grid[1] * layout.grid[2] / torch.pi) ** 0.5)))
    made = find(name)(**PARAMETERS.get(name, {}))
    if any(f.name == "density" for f in fields(made)):
        return replace(made, density=density)
    return made.with_density(density, layout)[0]


@functools.lru_cache(maxsize=1)
def tensors(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, H, N, D) with local structure, a seed per head; heads side by side in memory, as projections leave
    them. bfloat16 on a GPU, float32 on the CPU. Kept while the shape stays the same."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = (1, shape.layout.tokens, shape.heads, shape.dim)
    made = tuple(torch.empty(size, dtype=dtype, device=device).transpose(1, 2) for _ in range(3))
    for head in range(shape.heads):
        for x, own in zip(made, synthetic_tensors(shape.layout, head, dim=shape.dim, device=device), strict=True):
            x[:, head] = own[:, 0]
    return made
