"""PAROAttention (arXiv 2506.16054): tokens reordered per head so that attention gathers in blocks, static block maps.

Everything is decided by a calibration run and kept in a plan file (``dit-accel calibrate paro``): one of six axis
orders per layer and head, and per timestep bin, layer and head which blocks are kept. At run time nothing is searched:
a layer's map is read when its bin begins, and the reordering is part of the gather that attention does anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedError, UsageError
from ..kernels import BlockList
from ..layout import Layout
from ..plans import Blocks, Plan
from ..schedule import Schedule
from .base import Call, Method, ModelFacts
from .orders import token_order
from .paro_file import Header, PlanFile
from .paro_statistics import bin_of

_CALIBRATE = "calibrate with `dit-accel calibrate paro --model ... -o plan.safetensors`"


@dataclass(frozen=True)
class Paro(Method):
    """PAROAttention under a calibrated plan.

    ``plan_file``: path of the file that ``dit-accel calibrate paro`` wrote. ``digest``: of that file, its first 16
    digits; filled in when empty, and otherwise required to match, so that a saved configuration never runs another
    plan.

    Raises ``UsageError`` where the file is missing, damaged, of another version or has another digest;
    ``UnsupportedError`` for a model, layout, layer or head count that the plan was not made for.
    """

    name: ClassVar[str] = "paro"
    static: ClassVar[bool] = False

    plan_file: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        if not self.plan_file:
            raise UsageError(f"Paro needs the plan of a calibration: Paro('plan.safetensors'); {_CALIBRATE}")
        object.__setattr__(self, "plan_file", str(self.plan_file))
        object.__setattr__(self, "digest", self._open().digest[:16])

    def default_schedule(self) -> Schedule:
        """No dense step: the maps of the first steps were calibrated like all others (as published)."""
        return Schedule.none()

    def known_density(self, layout: Layout) -> float | None:
        """What the calibration reached, the mean over layers and bins."""
        return self._open().header.reached

    def check_model(self, model: ModelFacts) -> None:
        header = self._open().header
        config = {key: (header.config[key], model.config[key]) for key in header.config.keys() & model.config.keys()}
        other = {key: pair for key, pair in sorted(config.items()) if pair[0] != pair[1]}
        if model.name != header.model:
            other = {"class": (header.model, model.name)}
        if other:
            told = ", ".join(
                f"{key} {planned!r} in the plan and {here!r} here" for key, (planned, here) in other.items()
            )
            raise UnsupportedError(f"{self.plan_file} was calibrated on another model: {told}; {_CALIBRATE}")

    def check(self, layout: Layout) -> None:
        planned = self._open().header.layout
        if layout.grid != planned.grid:
            raise UnsupportedError(self._misfit("grid", planned.grid, layout.grid))
        # Who asks before a model runs may know the video tokens only.
        if len(layout.segments) > 1 and layout != planned:
            raise UnsupportedError(self._misfit("layout", planned, layout))

    def plan(self, q: Tensor, k: Tensor | None, v: Tensor | None, call: Call) -> Plan:
        file = call.state.plan((self, "file"), self._open)
        heads = slice(call.head_offset, call.head_offset + q.shape[1])
        self._check_call(file.header, heads, call)
        where = bin_of(call.step, file.header.bins, file.header.steps)
        # The index lists of all bins of a large model would not fit on a GPU; steps pass through the bins in order.
        latest = call.state.plan((self, call.layout, call.layer, heads.start, heads.stop, call.device), dict)
        if where not in latest:
            latest.clear()
            latest[where] = _build(file, call, heads, where)
        return latest[where]

    def with_density(self, density: float, layout: Layout) -> tuple[Paro, float]:
        """This method and the density of its plan: another one takes another calibration."""
        return self, self._open().header.reached

    def _open(self) -> PlanFile:
        file = PlanFile.open(self.plan_file)
        if not file.digest.startswith(self.digest):
            raise UsageError(
                f"{self.plan_file} is not the plan this configuration names: its digest is {file.digest[:16]}, "
                f"expected {self.digest[:16]}; give the original file, or leave digest out to accept this one"
            )
        return file

    def _check_call(self, header: Header, heads: slice, call: Call) -> None:
        if call.layout != header.layout:
            raise UnsupportedError(self._misfit("layout", header.layout, call.layout))
        if call.kv_layout is not None and call.kv_layout != call.layout:
            raise UnsupportedError(f"PARO needs keys in the queries' layout; got {call.layout} and {call.kv_layout}")
        count = heads.stop - heads.start
        if heads.stop > header.heads or header.heads % count or heads.start % count:
            raise UnsupportedError(self._misfit("head count", header.heads, f"heads {heads.start}..{heads.stop - 1}"))
        if call.layer not in header.layers:
            raise UnsupportedError(self._misfit("layers", _ranges(header.layers), f"layer {call.layer}"))

    def _misfit(self, what: str, planned: object, found: object) -> str:
        told = f"{self.plan_file} was calibrated for {what} {planned}; this call has {found}"
        return f"{told}. Maps do not transfer to it: {_CALIBRATE}"


def _build(file: PlanFile, call: Call, heads: slice, where: int) -> Plan:
    ids = file.orders[file.header.layers.index(call.layer), heads].tolist()
    mask = file.map(call.layer, where, heads, call.device)
    blocks = Blocks.uniform(call.layout.tokens, file.header.block_size)
    order = _order(call.layout, ids, call.device)
    return Plan(call.layout, blocks, blocks, BlockList.from_mask(mask[None]), order=order, kept=True)


def _order(layout: Layout, ids: list[int], device: torch.device) -> Tensor | None:
    """int64 slot -> token, (H, N), or (N,) where the heads agree; None for the caller's own order."""
    if not any(ids):
        return None
    tables = {i: token_order(layout, i).to(device) for i in set(ids)}
    return tables[ids[0]] if len(tables) == 1 else torch.stack([tables[i] for i in ids])


def _ranges(layers: tuple[int, ...]) -> str:
    whole = layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}..{layers[-1]}" if whole else ", ".join(map(str, layers))
