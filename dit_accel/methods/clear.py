"""CLEAR (arXiv 2412.16112): image tokens see the text and a disc of image tokens around them.

The published models were distilled to this mask. Without their weights it changes what a model draws, more so the
smaller the radius: experimental.
"""

from __future__ import annotations

import math
import operator
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedError, UsageError
from ..kernels import Disc, Predicate
from ..layout import Layout
from ..plans import Plan
from .base import Call, Method, check_density
from .tile_shapes import choose, counter
from .tiles import ALWAYS, Tiling, densities
from .windows import Axis


@dataclass(frozen=True)
class Clear(Method):
    """CLEAR: each image token sees the text and the image tokens less than ``radius`` away. Experimental.

    ``radius`` in tokens, strict: a token exactly ``radius`` away is hidden, and 1 leaves a token itself. At borders
    the disc is clipped. Text rows are dense. ``pool``: side of the cells whose pooled keys image rows see besides,
    a variant that needs representatives and is not part of this version.

    Default radius 16: the middle one of the released checkpoints (8, 16, 32).
    """

    name: ClassVar[str] = "clear"
    experimental: ClassVar[str] = (
        "Clear is experimental: the mask was published with weights distilled to it (arXiv 2412.16112), and stock "
        "weights lose quality under it. For a training-free image method use GNA"
    )

    radius: int = 16
    pool: int | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "radius", operator.index(self.radius))
        except TypeError:
            raise UsageError(f"Clear.radius is a number of tokens, 1 or more; got {self.radius!r}") from None
        if self.radius < 1:
            raise UsageError(f"Clear.radius is {self.radius}; allowed 1 and more (released: 8, 16, 32)")
        if self.pool:
            raise UnsupportedError(
                f"Clear.pool is {self.pool}: pooled keys are not part of this version, and their weights are learned; "
                "use pool=None"
            )
        warnings.warn(self.experimental, UserWarning, stacklevel=3)

    def check(self, layout: Layout) -> None:
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
        return min((made(low), made(high)), key=lambda found: abs(found[1] - density))

    def _pairs(self, layout: Layout) -> int:
        """Visible image pairs: for each row offset, pairs of rows that far apart times pairs of columns in reach."""
        _, height, width = layout.grid
        total = 0
        for dy in range(min(self.radius, height)):
            reach = min(math.isqrt(self.radius**2 - dy**2 - 1), width - 1)
            columns = width + 2 * reach * width - reach * (reach + 1)
            total += (height - dy) * columns * (2 if dy else 1)
        return total
