"""What a sparse plan can gain, before running it: tiles visited, operation bound, end-to-end bound.

The analytic model of the GNA paper's simulator (arXiv 2504.16922, appendix B.1): a kernel's time is the number of
key tiles that its query tiles visit. It knows nothing of partial tiles' extra cost or of reordering the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UsageError
from .layout import Grid
from .lowering import lower
from .methods.gna import GNA
from .methods.windows import Window
from .plans import Plan


@dataclass(frozen=True)
class TileCost:
    """Key tiles that query tiles visit.

    ``total``: key tiles there are. ``worst``, ``mean``: visited by the busiest query tile, and on average.
    ``whole``: of the mean, tiles visited without a test. ``density``: visible share of all pairs.
    """

    total: int
    worst: int
    mean: float
    whole: float
    density: float

    @property
    def op_bound(self) -> float:
        """Speed-up of the operation over dense if every query tile took as long as the busiest, as published."""
        return self.total / self.worst

    @property
    def op_mean(self) -> float:
        """The same for the average query tile: the better predictor where windows differ."""
        return self.total / self.mean

    @property
    def flop_bound(self) -> float:
        """What skipping every invisible pair would give; ``op_bound`` reaches it only without partial tiles."""
        return 1 / self.density

    @property
    def partial(self) -> float:
        """Share of the visited tiles that need a test per pair."""
        return 1 - self.whole / self.mean


def tile_cost(method: GNA, grid: Grid, tile_q: Sequence[int], tile_k: Sequence[int], dynamic: bool = False) -> TileCost:
    """Cost of a GNA window on a (T, H, W) grid, text aside, for query and key tiles given in tokens per axis.

    ``dynamic``: key tiles start at the window instead of lying on a fixed lattice. Raises ``UsageError`` where the
    window does not fit the grid or a tile is not three positive integers.
    """
    for name, tile in (("tile_q", tile_q), ("tile_k", tile_k)):
        if len(tile) != 3 or min(tile) < 1:
            raise UsageError(f"{name} must be three positive integers (T, H, W); got {tile}. Example: (4, 8, 8)")
    windows = method.windows(grid)
    counts = [_visits(*axis, dynamic) for axis in zip(windows, tile_q, tile_k, strict=True)]
    return TileCost(
        total=math.prod(-(-length // size) for length, size in zip(grid, tile_k, strict=True)),
        worst=math.prod(int(seen.max()) for seen, _ in counts),
        mean=math.prod(seen.double().mean().item() for seen, _ in counts),
        whole=math.prod(whole.double().mean().item() for _, whole in counts),
        density=math.prod(w.axis().pairs / w.length**2 for w in windows),
    )


def plan_cost(plan: Plan, tile: tuple[int, int] | None = None) -> TileCost:
    """The same, counted from a plan's own lists, text included; ``tile`` as in :func:`~dit_accel.plans.lower`."""
    tiles = lower(plan, tile)
    whole = tiles.full.count.double()
    seen = whole if tiles.partial is None else whole + tiles.partial.count
    return TileCost(tiles.tiles_k, int(seen.max()), seen.mean().item(), whole.mean().item(), plan.density)


def end_to_end(op: float, share: float, steps: int = 1, dense_steps: int = 0) -> float:
    """Speed-up of a whole run whose attention, ``share`` of the dense run's time, gets ``op`` times faster.

    ``dense_steps`` of ``steps`` stay dense. Raises ``UsageError`` for values that cannot be.
    """
    if not 0 <= share <= 1 or not op > 0 or not 0 <= dense_steps <= steps or steps < 1:
        raise UsageError(
            f"end_to_end needs op > 0, share in [0, 1] and 0 <= dense_steps <= steps; "
            f"got op={op}, share={share}, steps={steps}, dense_steps={dense_steps}"
        )
    share = share * (steps - dense_steps) / steps
    return 1 / (1 - share + share / op)


def _visits(window: Window, tile_q: int, tile_k: int, dynamic: bool) -> tuple[Tensor, Tensor]:
    """Key tiles along one axis that each query tile sees at all, and sees whole; dilation groups one after another."""
    seen, whole = [], []
    for group in window.groups().tolist():
        start, end = window.interval(torch.arange(group), torch.tensor(group))
        starts, ends = start.split(tile_q), end.split(tile_q)
        first, last = (torch.stack([x.amin() for x in part]) for part in (starts, ends))
        latest, final = (torch.stack([x.amax() for x in part]) for part in (starts, ends))
        origin = first if dynamic else torch.zeros_like(first)
        ragged = last == group  # the last tile of a fixed lattice ends with its group
        inner = torch.where(ragged & (origin == 0), -(-last // tile_k), (last - origin) // tile_k)
        seen.append(-(-(final - origin) // tile_k) - (first - origin) // tile_k)
        whole.append((inner - -(-(latest - origin) // tile_k)).clamp_min(0))
    return torch.cat(seen), torch.cat(whole)
