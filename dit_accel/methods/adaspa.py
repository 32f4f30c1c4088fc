"""AdaSpa (arXiv 2502.21079): block masks searched for while the video is made, then kept over many steps.

Which blocks matter depends on layer, head, prompt and seed, but hardly on the step. So the first steps run dense; the
last of them also measures the attention mass of every block, per layer and head. Until the next search step every row
of blocks keeps its heaviest ones. Heads whose mass is concentrated keep fewer, as many others keep more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import flag, plain, several, whole
from ..errors import UsageError
from ..kernels import BlockList
from ..layout import Layout
from ..plans import Blocks, Plan
from ..schedule import Schedule
from .adaspa_search import block_mass, kept, levels, main_blocks, select, tokens_of
from .base import Call, Method, check_density

_LISTABLE = torch.iinfo(torch.int16).max

# All with blocks of 64 and 50 steps. HunyuanVideo 720p and CogVideoX1.5-5B 720p: sparsity 0.8, searches at the 10th and
# the 30th step. "scaling": the study of longer videos, sparsity 0.9, which searches from the first step.
PRESETS: dict[str, dict[str, Any]] = {
    "hunyuan-video": {"density": 0.2, "block_size": 64, "search_steps": (0.2, 0.6)},
    "cogvideox": {"density": 0.2, "block_size": 64, "search_steps": (0.2, 0.6)},
    "scaling": {"density": 0.1, "block_size": 64, "search_steps": (0, 0.6)},
}


@dataclass(eq=False)
class Maps:
    """What AdaSpa keeps of one layer and guidance branch.

    ``index``: int16 or int32 (B, H, rows, width), key blocks by falling mass per row of main query blocks; the first
    ``count``, int32 (B, H), are kept. ``lse``: (B, H, tokens) of the main query blocks, found at step ``found``, or
    None after the last search. ``searches``: how many search steps had come when the maps were made. ``step``: of the
    last call. ``setting``: what must not change in between.
    """

    index: Tensor
    count: Tensor
    lse: Tensor | None
    found: int
    searches: int
    step: int
    setting: tuple[Any, ...]

    def bytes(self) -> int:
        return self.index.nbytes + self.count.nbytes + (0 if self.lse is None else self.lse.nbytes)


@dataclass(frozen=True)
class AdaSpa(Method):
    """AdaSpa with the published parameters.

    ``density``: kept fraction of the main segment's blocks, the mean over heads. ``search_steps``: when to search, as
    0-based step indices (int) or fractions of the run (float): fraction f is the step number round(f x steps), counted
    from 1, so the default is steps 9 and 29 of 50. Steps up to and with the first one run dense. ``block_size``: tokens
    per block. ``head_adaptive``: budgets of d/2, d and 3d/2 by the recall of a head (3.3), else d for all.

    Text and other tokens beside the main segment see and are seen by everything, as do blocks that hold some of them;
    the budget does not count them. A run of one step, and so a call without a step, has no later step to search for:
    it searches and runs sparse. A layer that missed its search searches when it is called next and runs sparse.
    Guidance branches run apart have maps apart where the pipeline names them; unnamed ones share those found last.

    Raises ``UsageError`` for values that cannot be, and where a run is over before the first search.
    """

    name: ClassVar[str] = "adaspa"
    static: ClassVar[bool] = False

    density: float = 0.2
    search_steps: tuple[int | float, ...] = (0.2, 0.6)
    block_size: int = 64
    head_adaptive: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", check_density(self.density))
        what = (
            "at least one 0-based step (int >= 0) or fraction of the run (float in [0, 1)), for example (9, 29) or "
            "(0.2, 0.6)"
        )
        steps = tuple(plain(step) for step in several("AdaSpa.search_steps", self.search_steps, what))
        if not steps or not all(_is_step(step) for step in steps):
            raise UsageError(f"AdaSpa.search_steps holds {what}; got {self.search_steps}")
        object.__setattr__(self, "search_steps", steps)
        object.__setattr__(self, "block_size", whole("AdaSpa.block_size", self.block_size, "a number of tokens"))
        object.__setattr__(self, "head_adaptive", flag("AdaSpa.head_adaptive", self.head_adaptive))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> AdaSpa:
        """A published configuration by name, with single parameters replaced by ``changes``.

        Source: the paper's comparison (``hunyuan-video``, ``cogvideox``) and its study of longer videos (``scaling``).
        """
        if name not in PRESETS:
            raise UsageError(f"unknown AdaSpa preset {name!r}; choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def searches(self, total: int | None) -> tuple[int, ...]:
        """The 0-based search steps of a run of ``total`` steps; where that is not known a fraction counts as step 0."""
        steps = (s if isinstance(s, int) else max(round(s * (total or 0)) - 1, 0) for s in self.search_steps)
        return tuple(sorted(set(steps)))

    def default_schedule(self) -> Schedule:
        """Nothing beside the method's own dense steps."""
        return Schedule.none()

    def dense_steps(self, total: int) -> list[int]:
        return list(range(self.searches(total)[0] + 1)) if total > 1 else []

    def planning_steps(self, total: int) -> list[int]:
        return [step for step in self.searches(total) if step < total]

    @property
    def needs_total(self) -> bool:
        return any(isinstance(s, float) and s for s in self.search_steps)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, call: Call) -> Plan | None:
        """The plan of one call, or None on dense steps. q (B, H, Nq, D), k (B, Hk, Nk, D)."""
        step, searches = call.step, self.searches(call.step.total)
        if step.total is not None and searches[0] >= step.total:
            raise UsageError(
                f"AdaSpa's first search is at step {searches[0]} and the run has {step.total} steps, so nothing would "
                f"run sparse; give search_steps below {step.total}, or fractions of the run"
            )
        due = sum(index <= step.index for index in searches)
        if not due:
            return None
        maps = self._maps(q, k, call, searches, due)
        if step.index == searches[0] and step.total != 1:
            return None
        return self._plan(maps, call)

    def with_density(self, density: float, layout: Layout) -> tuple[AdaSpa, float]:
        """Solve ``density`` so that the whole plan, text included, has the one asked for.

        The figure returned is that of heads at the usual budget; which heads keep more or fewer, the tensors decide.
        """
        n, blocks = layout.tokens, main_blocks(layout, self.block_size)
        if not blocks:
            return self, 1.0
        inside = tokens_of(blocks, self.block_size, layout)
        main = inside.stop - inside.start

        def reached(count: int) -> float:
            return (n * (n - main) + main * (n - main + min(count * self.block_size, main))) / n**2

        counts = range(1, len(blocks) + 1)
        best = min(counts, key=lambda count: abs(reached(count) - check_density(density)))
        return replace(self, density=best / len(blocks)), reached(best)

    def state_bytes(self, layout: Layout, *, layers: int, heads: int, batch: int = 1) -> int:
        """Block lists and, between the searches, the LSE. Every run begins with none."""
        rows = main_blocks(layout, self.block_size)
        inside = tokens_of(rows, self.block_size, layout)
        width = self._counts(len(rows))[-1]
        listed = len(rows) * width * _index_type(-(-layout.tokens // self.block_size)).itemsize
        lse = 4 * (inside.stop - inside.start) if len(self.search_steps) > 1 else 0
        return layers * batch * heads * (listed + lse + 4)

    def _maps(self, q: Tensor, k: Tensor, call: Call, searches: tuple[int, ...], due: int) -> Maps:
        """The maps that hold now, searched for where a search has come since they were made."""
        step, slot = call.step, call.state.slot(call.step, call.layer)
        key = (self, call.head_offset, q.shape[1])
        setting = (call.layout, call.kv_layout, step.total, q.shape[0], q.device)
        maps = slot.get(key)
        if maps is not None and (maps.setting != setting or step.index < maps.step):
            maps = None
        if maps is None or maps.searches != due or step.index in searches:
            # An LSE of this very step belongs to a forward that is being repeated, perhaps because it went wrong.
            old = maps if maps is not None and maps.lse is not None and maps.found < step.index else None
            lse, found = (None, step.index) if old is None else (old.lse, old.found)
            index, count, lse = self._search(q, k, call, lse)
            maps = Maps(index, count, lse if due < len(searches) else None, found, due, step.index, setting)
            slot[key] = maps
        maps.step = step.index
        return maps

    def _search(self, q: Tensor, k: Tensor, call: Call, lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        layout, size = call.layout, self.block_size
        keys = main_blocks(call.kv_layout or layout, size)
        scale = call.scale if call.scale is not None else q.shape[-1] ** -0.5
        rows = q[:, :, tokens_of(main_blocks(layout, size), size, layout)]
        mass, lse = block_mass(rows, k, size, scale=scale, lse=lse, kv_valid=call.kv_valid)
        index, count = select(mass, keys, self._counts(len(keys)))
        return index.to(_index_type(mass.shape[-1])), count, lse

    def _counts(self, blocks: int) -> tuple[int, int, int]:
        """Blocks that a row keeps of ``blocks`` main ones, in heads of high, usual and low recall."""
        each = levels(self.density) if self.head_adaptive else (self.density,) * 3
        return tuple(kept(density, blocks) for density in each)

    def _plan(self, maps: Maps, call: Call) -> Plan:
        size, kv_layout = self.block_size, call.kv_layout or call.layout
        q_blocks, k_blocks = Blocks.uniform(call.layout.tokens, size), Blocks.uniform(kv_layout.tokens, size)
        rows, keys = main_blocks(call.layout, size), main_blocks(kv_layout, size)
        beside = torch.arange(k_blocks.count, dtype=torch.int32, device=call.device)
        beside = torch.cat([beside[: keys.start], beside[keys.stop :]])
        index = torch.cat([beside.expand(*maps.index.shape[:3], -1), maps.index.int()], -1)
        count = (maps.count + len(beside))[..., None].expand(-1, -1, len(rows))
        if len(rows) < q_blocks.count:
            index, count = _between_dense_rows(index, count, rows, q_blocks.count, k_blocks.count)
        return Plan(call.layout, q_blocks, k_blocks, BlockList(count, index), kv_layout=call.kv_layout)


def _between_dense_rows(index: Tensor, count: Tensor, rows: range, nq: int, nk: int) -> tuple[Tensor, Tensor]:
    """Index lists and counts of ``rows`` among ``nq`` rows of which the others list all ``nk`` blocks."""
    shape = (*index.shape[:2], nq)
    everything = torch.arange(nk, dtype=index.dtype, device=index.device).repeat(*shape, 1)
    everything[:, :, rows.start : rows.stop, : index.shape[-1]] = index
    counts = torch.full(shape, nk, dtype=count.dtype, device=count.device)
    counts[:, :, rows.start : rows.stop] = count
    return everything, counts


def _index_type(blocks: int) -> torch.dtype:
    return torch.int16 if blocks <= _LISTABLE else torch.int32


def _is_step(value: int | float | None) -> bool:
    return value is not None and (0 <= value < 1 if isinstance(value, float) else value >= 0)
