"""CLEAR (arXiv 2412.16112): image tokens see the text and a disc of image tokens around them.

The published models were distilled to this mask. Without their weights it changes what a model draws, more so the
smaller the radius: experimental.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import plain
from ..errors import UnsupportedError, UsageError
from ..kernels import BlockList, Disc, Group, Predicate
from ..kernels.pooling import block_means
from ..layout import Layout
from ..plans import Blocks, Plan
from .base import Call, Method, check_density
from .tile_shapes import choose, counter
from .tiles import ALWAYS, Tiling, densities
from .windows import Axis


@dataclass(frozen=True)
class Clear(Method):
    """CLEAR: each image token sees the text and the image tokens less than ``radius`` away. Experimental.

    ``radius`` in tokens, strict: a token exactly ``radius`` away is hidden, and 1 leaves a token itself. At borders
    the disc is clipped. Text rows are dense. ``pool``: side of square cells whose mean key and value image rows see
    besides, as keys like any other (released: 4, with radius 8 and 16). The released cells are weighted means whose
    weights were learned; plain means are what that training started from.

    Default radius 16: the middle one of the released checkpoints (8, 16, 32).
    """

    name: ClassVar[str] = "clear"
    reads_values: ClassVar[bool] = True
    experimental: ClassVar[str] = (
        "Clear is experimental: the mask was published with weights distilled to it (arXiv 2412.16112), and stock "
        "weights lose quality under it. For a training-free image method use GNA"
    )

    radius: int = 16
    pool: int | None = None

    def __post_init__(self) -> None:
        radius, pool = plain(self.radius), plain(self.pool)
        if not isinstance(radius, int) or radius < 1:
            raise UsageError(
                f"Clear.radius is a number of tokens; allowed 1 and more (released: 8, 16, 32); got {self.radius!r}"
            )
        object.__setattr__(self, "radius", radius)
        if self.pool is not None:
            if not isinstance(pool, int) or pool < 2:
                raise UsageError(f"Clear.pool is the side of a cell in tokens, 2 or more, or None; got {self.pool!r}")
            object.__setattr__(self, "pool", pool)
            object.__setattr__(self, "static", False)  # pooled keys are made from k and v
        warnings.warn(self.experimental, UserWarning, stacklevel=3)

    def check(self, layout: Layout) -> None:
        _, height, width = layout.grid
        if self.pool and (height % self.pool or width % self.pool):
            raise UsageError(
                f"Clear.pool is {self.pool}, which must divide height and width; the grid is {height} x {width} tokens"
            )
        if layout.grid[0] > 1:
            raise UnsupportedError(
                f"Clear is for images; this layout has grid {layout.grid} with {layout.grid[0]} frames. "
                "For video use Radial or GNA"
            )

    def plan(self, q: Tensor | None, k: Tensor | None, v: Tensor | None, call: Call) -> Plan:
        layout = call.layout
        if call.kv_layout is not None and call.kv_layout != layout:
            raise UnsupportedError(f"Clear needs keys in the queries' layout; got {layout} and {call.kv_layout}")
        self.check(layout)
        if self.pool is None:
            return self._discs(layout)
        discs = call.state.plan((self, layout, call.device), lambda: _apart(self._discs(layout)).to(call.device))
        pooled, image = self._pooled(k, v, call, discs), math.prod(layout.grid)
        kept = discs.density + image * pooled.size / layout.tokens**2, discs.density_video + pooled.size / image
        return replace(discs, reps=(pooled,), _memo={"densities": kept})

    def _pooled(self, k: Tensor, v: Tensor, call: Call, discs: Plan) -> Group:
        """Mean keys and values of square cells, seen by the blocks of image rows."""
        layout, live = call.layout, None
        image = layout.main.stop - layout.main.start
        inside = discs.q_blocks.bounds[1:] <= image
        if call.kv_valid is not None:
            live = torch.arange(layout.tokens, device=k.device) < call.kv_valid.to(k.device)[:, None]
        bounds = torch.arange(0, image + 1, self.pool**2)

        def placed() -> tuple[Tensor, BlockList]:
            """Tokens cell by cell, and who sees the cells; on the device, sent there once."""
            (_, height, width), side = layout.grid, self.pool
            token = layout.main.start + torch.arange(image).view(height, width)
            cells = token.view(height // side, side, width // side, side).transpose(1, 2).flatten()
            seen = BlockList.from_mask(inside[None, None, :, None].expand(-1, -1, -1, len(bounds) - 1))
            return cells.to(call.device), seen.to(call.device)

        cells, seen = call.state.plan(("clear cells", self, layout, call.device), placed)
        (key, count), (value, _) = (block_means(x, bounds, live=live, order=cells) for x in (k, v))
        # Keys beside the exact ones, which stand for nobody: no weight of their number, and no pair seen through them.
        nobody = torch.zeros_like(bounds)
        return Group(key.to(k.dtype), value.to(v.dtype), (count > 0).int(), seen, nobody)

    def _discs(self, layout: Layout) -> Plan:
        axes = [Axis.clipped(length, self.radius - 1) for length in layout.grid]
        _, shapes = choose([counter(axis) for axis in axes], layout.grid)
        tiling = Tiling.make(layout, axes, shapes)
        near, far = 0, 0  # squared distance of the nearest and of the farthest pair of each two blocks
        for rank in tiling.ranks[1:]:
            first, last = tiling.lowest(rank), tiling.highest(rank)
            apart = torch.maximum(first[None, :] - last[:, None], first[:, None] - last[None, :])
            across = torch.maximum(last[None, :] - first[:, None], last[:, None] - first[None, :])
            near, far = near + apart.clamp_min(0) ** 2, far + across.clamp_min(0) ** 2
        r2 = torch.full((layout.tokens,), self.radius**2, dtype=torch.int32).masked_fill(tiling.outside, ALWAYS)
        always = tiling.outside if layout.tokens > math.prod(layout.grid) else None
        predicate = Predicate(disc=Disc(centre=tiling.ranks[1:], coord=tiling.ranks[1:], r2=r2), always=always)
        return tiling.plan(near < self.radius**2, far < self.radius**2, predicate, self._pairs(layout))

    def with_density(self, density: float, layout: Layout) -> tuple[Clear, float]:
        """Solve ``radius``: the whole number of tokens whose density is nearest."""
        check_density(density)
        self.check(layout)

        def made(radius: int) -> tuple[Clear, float]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                method = replace(self, radius=radius)
            return method, densities(layout, method._pairs(layout))[0]

        low, high = 1, layout.grid[1] + layout.grid[2]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if made(middle)[1] < density else (low, middle)
        method, reached = min((made(low), made(high)), key=lambda found: abs(found[1] - density))
        image = math.prod(layout.grid)
        return method, reached + (image * (image // self.pool**2) / layout.tokens**2 if self.pool else 0.0)

    def _pairs(self, layout: Layout) -> int:
        """Visible image pairs: for each row offset, pairs of rows that far apart times pairs of columns in reach."""
        _, height, width = layout.grid
        total = 0
        for dy in range(min(self.radius, height)):
            reach = min(math.isqrt(self.radius**2 - dy**2 - 1), width - 1)
            columns = width + 2 * reach * width - reach * (reach + 1)
            total += (height - dy) * columns * (2 if dy else 1)
        return total


def _apart(plan: Plan) -> Plan:
    """The plan with no query block that holds image and other tokens: only the former see pooled keys."""
    image, bounds = math.prod(plan.layout.grid), plan.q_blocks.bounds
    cut = Blocks(torch.cat([bounds, torch.tensor([image])]).unique())
    if cut.count == plan.q_blocks.count:
        return plan
    row = torch.searchsorted(bounds, cut.bounds[:-1], right=True) - 1

    def listed(entry: BlockList | None) -> BlockList | None:
        return None if entry is None else BlockList(entry.count[:, :, row], entry.index[:, :, row])

    return replace(plan, q_blocks=cut, full=listed(plan.full), partial=listed(plan.partial))
