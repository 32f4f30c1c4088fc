"""The mask atlas: what a method's plan looks like on a grid, as numbers and arrays. No model and no GPU needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UnsupportedError, UsageError
from ..functional import plan as make_plan
from ..layout import Grid, Layout
from ..methods import Method
from ..plans import Plan
from ..step import Step
from .method_spec import describe

SKIPPED, PARTIAL, FULL = 0, 1, 2
HEAD_DIM = 64
# Counting the pairs of partial blocks beyond this many would take longer than a picture is worth.
COUNT_LIMIT = 500_000_000
SAMPLED_QUERIES = 512


@dataclass(frozen=True)
class Geometry:
    """The tokens of a model family: the grid of its native size and the text in its sequence."""

    grid: Grid
    text: int = 0
    text_first: bool = False
    size: str = ""


# Native sizes and text lengths as in the default arguments of the diffusers 0.42 pipelines; text that has a
# cross-attention of its own is no part of the sequence.
GEOMETRY = {
    "wan": Geometry((21, 30, 52), size="480x832, 81 frames"),
    "ltx": Geometry((21, 16, 22), size="512x704, 161 frames"),
    "hunyuan": Geometry((33, 45, 80), text=256, size="720x1280, 129 frames"),
    "cogvideox": Geometry((13, 30, 45), text=226, text_first=True, size="480x720, 49 frames"),
    "flux": Geometry((1, 64, 64), text=512, text_first=True, size="1024x1024"),
    "mini": Geometry((33, 8, 10), size="64x80, 65 frames"),
}


@dataclass(frozen=True, eq=False)
class Panel:
    """One method on one layout.

    ``blocks``: uint8 (nq, nk) in plan order: SKIPPED, PARTIAL or FULL. ``query``: (t, h, w), a token of query block
    ``query_block``. ``seen``: bool (T, H, W), the main tokens that it sees. ``seen_outside``: how many of the
    ``outside`` tokens (text) it sees. ``synthetic``: the plan looked at q and k, which were made up. ``estimated``: the
    densities are those of 512 evenly spaced queries. ``target``: the density asked for, if any.
    """

    method: Method
    layout: Layout
    blocks: np.ndarray
    block_size: tuple[int, int]
    query: Grid
    query_block: int
    seen: np.ndarray
    seen_outside: int
    density: float
    density_video: float
    synthetic: bool = False
    reordered: bool = False
    estimated: bool = False
    target: float | None = None
    _counts: dict[str, int] = field(default_factory=dict)

    @property
    def outside(self) -> int:
        """Tokens outside the main segment."""
        return self.layout.tokens - self.seen.size

    @property
    def counts(self) -> dict[str, int]:
        """Blocks by class."""
        if not self._counts:
            found = np.bincount(self.blocks.ravel(), minlength=3)
            self._counts.update(skipped=int(found[SKIPPED]), partial=int(found[PARTIAL]), full=int(found[FULL]))
        return self._counts

    def to_dict(self) -> dict[str, Any]:
        """The numbers, as plain JSON values."""
        return {
            "method": self.method.to_dict(),
            "parameters": describe(self.method),
            "layout": str(self.layout),
            "tokens": self.layout.tokens,
            "density": self.density,
            "density_video": self.density_video,
            "density_estimated": self.estimated,
            "density_asked": self.target,
            "block_size": list(self.block_size),
            "blocks": {"rows": self.blocks.shape[0], "columns": self.blocks.shape[1], **self.counts},
            "query": {"at": list(self.query), "sees": int(self.seen.sum()), "sees_text": self.seen_outside},
            "reordered": self.reordered,
            "synthetic_tensors": self.synthetic,
        }


def layout_for(family: str | None = None, grid: Sequence[int] | None = None, text: int | None = None) -> Layout:
    """The layout of a model family, or of ``grid`` alone. ``grid`` and ``text`` replace the family's.

    Raises ``UsageError`` for an unknown family, or when neither family nor grid is given.
    """
    if family is not None and family not in GEOMETRY:
        raise UsageError(f"unknown model family {family!r}; known: {', '.join(GEOMETRY)}. Or give the grid alone")
    if family is None and grid is None:
        raise UsageError(f"give a grid like 21x30x52 (T x H x W tokens), or a model family: {', '.join(GEOMETRY)}")
    known = GEOMETRY[family] if family else Geometry(tuple(grid))
    words = known.text if text is None else text
    return Layout(known.grid if grid is None else grid, text=words, text_first=known.text_first)


def panel(
    method: Method,
    layout: Layout,
    *,
    query: Sequence[int] | None = None,
    density: float | None = None,
    head: int = 0,
    seed: int = 0,
) -> Panel:
    """Plan ``method`` on ``layout`` and look at it.

    ``query``: (t, h, w), the centre when None. ``density`` first solves the method's own knobs. A method that looks at
    q and k gets :func:`synthetic_tensors`. Raises ``UsageError`` for a query outside the grid and whatever the method
    raises for this layout.
    """
    at = _query(query, layout.grid)
    if density is not None:
        method = _with_density(method, density, layout)
    tensors = (None, None, None) if method.static else synthetic_tensors(layout, seed)
    # The end of a run: methods whose first steps are dense are past them, and search since they have not before.
    plan = make_plan(*tensors, method, layout=layout, step=Step(index=49, total=50))
    t, h, w = at
    _, height, width = layout.grid
    token = layout.main.start + (t * height + h) * width + w
    seen = plan.row(token, head).cpu()
    inside = seen[layout.main]
    estimated = not plan.density_known and _partial_pairs(plan) > COUNT_LIMIT
    densities = _estimate(plan, head) if estimated else (plan.density, plan.density_video)
    return Panel(
        method, layout, _classes(plan, head), _block_size(plan), at, _block_of(plan, token, head),
        inside.view(layout.grid).numpy(), int(seen.sum() - inside.sum()), *map(float, densities),
        synthetic=not method.static, reordered=plan.order is not None, estimated=estimated, target=density,
    )  # fmt: skip


def synthetic_tensors(
    layout: Layout, seed: int = 0, *, dim: int = HEAD_DIM, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Made-up q, k, v, each (1, 1, N, dim), with the structure that video attention shows.

    Tokens near one another in space and time resemble one another, a few patches recur in every frame, and every
    third of the frame has a content of its own. The same for the same layout, seed and device.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    axes = torch.meshgrid(*(torch.linspace(0, 1, n) if n > 1 else torch.zeros(1) for n in layout.grid), indexing="ij")
    place = torch.stack([axis.flatten() for axis in axes], 1).to(device)
    # Random Fourier features of the place: dot products fall off smoothly with distance, slower in time than in space.
    waves = torch.cat([place @ (noise(3, dim // 2) * torch.tensor([[3.0], [7.0], [9.0]], device=device))], 1)
    features = torch.cat([waves.cos(), waves.sin()], 1)
    content = noise(9, dim)[((place[:, 1] * 2.99).long() * 3 + (place[:, 2] * 2.99).long())]
    main = 1.6 * features + 0.5 * content
    n = layout.tokens
    q, k = (0.6 * noise(n, dim) for _ in range(2))
    q[layout.main] += main
    k[layout.main] += main
    return q[None, None], k[None, None], noise(1, 1, n, dim)


def _with_density(method: Method, density: float, layout: Layout) -> Method:
    try:
        return method.with_density(density, layout)[0]
    except UnsupportedError:
        if not any(f.name == "density" for f in fields(method)):
            raise
        return replace(method, density=density)


def _query(query: Sequence[int] | None, grid: Grid) -> Grid:
    if query is None:
        return tuple(n // 2 for n in grid)
    at = tuple(int(x) for x in query)
    if len(at) != 3 or not all(0 <= x < n for x, n in zip(at, grid, strict=True)):
        limits = ",".join(f"0..{n - 1}" for n in grid)
        raise UsageError(f"the query is t,h,w inside the grid; got {','.join(map(str, at))}, allowed {limits}")
    return at


def _classes(plan: Plan, head: int) -> np.ndarray:
    blocks = plan.k_blocks.count
    out = None
    for entry, kind in ((plan.full, FULL), (plan.partial, PARTIAL)):
        if entry is not None:
            mask = entry.mask(blocks)[0].cpu().numpy()
            one = mask[min(head, len(mask) - 1)].astype(np.uint8) * kind
            out = one if out is None else np.maximum(out, one)
    return out


def _block_size(plan: Plan) -> tuple[int, int]:
    """Tokens of a query and of a key block; the mean, rounded, where blocks differ."""
    q, k = (b.size or math.ceil(b.n / b.count) for b in (plan.q_blocks, plan.k_blocks))
    return q, k


def _block_of(plan: Plan, token: int, head: int) -> int:
    order = plan.order if plan.order is None or plan.order.ndim == 1 else plan.order[min(head, len(plan.order) - 1)]
    slot = token if order is None else int((order == token).nonzero()[0, 0])
    return int(torch.searchsorted(plan.q_blocks.bounds, slot, right=True)) - 1


def _partial_pairs(plan: Plan) -> int:
    """Token pairs of the blocks seen in part, which counting would have to look at."""
    q, k = _block_size(plan)
    return int(plan.partial.count.sum()) * q * k


def _estimate(plan: Plan, head: int) -> tuple[float, float]:
    """Density and video density of evenly spaced queries."""
    main, n = plan.layout.main, plan.q_blocks.n
    tokens = torch.linspace(0, n - 1, min(SAMPLED_QUERIES, n)).round().long().tolist()
    rows = [(main.start <= token < main.stop, plan.row(token, head)) for token in tokens]
    every = [float(row.float().mean()) for _, row in rows]
    video = [float(row[plan.keys.main].float().mean()) for inside, row in rows if inside]
    return sum(every) / len(every), sum(video) / max(len(video), 1)
