"""PARO's block maps: every head keeps its smallest set of blocks that holds a share tau of its attention mass.

The published threshold rule is not known; this one is this library's own. One tau serves all heads that share a
budget, so that heads whose mass is spread out get more blocks than those whose mass is gathered.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .paro_statistics import OrderedBlocks

# Shares tried, denser towards 1, where a small step in mass takes many blocks. The last keeps blocks without any mass.
TAUS = torch.cat([1 - torch.linspace(1, 0, 1 << 14, dtype=torch.float64) ** 2, torch.tensor([2.0])])


def solve_tau(curves: Iterable[Tensor], density: float) -> float:
    """The largest of :data:`TAUS` whose maps have at most ``density`` in the mean over ``curves``; 0 where even the
    blocks that are kept in any case exceed it. ``curves``: of equal head counts, see :func:`density_curve`."""
    total, count = torch.zeros_like(TAUS), 0
    for curve in curves:
        total, count = total + curve, count + 1
    fits = torch.nonzero(total / count <= density + 1e-12).flatten()
    return float(TAUS[fits[-1]]) if len(fits) else 0.0


def density_curve(mass: Tensor, shape: OrderedBlocks) -> Tensor:
    """float64 (len(TAUS),): the density of :func:`threshold`'s map at every tau, for block masses (H, nb, nb)."""
    before, _ = _ranked(mass, shape)
    kept = torch.searchsorted(before, TAUS.expand(len(before), -1).contiguous()).double().mean(0)
    forced = forced_blocks(shape)
    # Blocks that are not full are forced, so all others count alike.
    return block_density(forced[None], shape) + kept * shape.block_size**2 / shape.layout.tokens**2


def threshold(mass: Tensor, shape: OrderedBlocks, tau: float) -> Tensor:
    """bool (H, nb, nb): the blocks kept, for block masses (H, nb, nb) of one bin.

    Of the blocks that are not kept in any case (:func:`forced_blocks`) each head keeps the heaviest, until they hold a
    share ``tau`` of what those blocks weigh together.
    """
    before, rank = _ranked(mass, shape)
    kept = torch.zeros(mass.shape, dtype=torch.bool).flatten(1)
    free = torch.nonzero(~forced_blocks(shape).flatten()).flatten()
    kept[:, free] = torch.zeros_like(before, dtype=torch.bool).scatter_(1, rank, before < tau)
    return kept.view(mass.shape) | forced_blocks(shape)


def forced_blocks(shape: OrderedBlocks) -> Tensor:
    """bool (nb, nb): kept by every map: the diagonal, so that no row is empty; rows and columns with tokens outside
    the video; the last row and column where they are not full (as released)."""
    keep = ~shape.free | torch.eye(shape.blocks.count, dtype=torch.bool)
    if int(shape.blocks.sizes[-1]) < shape.block_size:
        keep[-1] = keep[:, -1] = True
    return keep


def block_density(kept: Tensor, shape: OrderedBlocks) -> float:
    """Share of all token pairs in the kept blocks (H, nb, nb), the mean over heads."""
    sizes = shape.blocks.sizes.double()
    return float((kept.double() @ sizes @ sizes).mean() / sizes.sum() ** 2)


def _ranked(mass: Tensor, shape: OrderedBlocks) -> tuple[Tensor, Tensor]:
    """Of the free blocks, heaviest first: the share of their mass that comes before each (H, M), and which it is."""
    free = mass.flatten(1)[:, ~forced_blocks(shape).flatten()].double()
    ranked, rank = free.sort(dim=-1, descending=True, stable=True)
    total = ranked.cumsum(-1)
    return (total - ranked) / total[:, -1:].clamp_min(torch.finfo(torch.float64).tiny), rank
