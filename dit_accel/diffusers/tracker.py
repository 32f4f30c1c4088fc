"""StepTracker: where in the denoising run a forward stands, without any effort of the user.

Three sources, the best one present wins: what the pipeline says through ``cache_context``, the pipeline's
scheduler (polled, never hooked), the timestep value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..step import Step
from .seen import Seen

# Upstream's name for both guidance halves in one batch; a Step calls that no branch.
_BATCHED = "cond_uncond"


class StepTracker:
    """Polled once per transformer forward.

    What a scheduler holds is read once per run. The timestep is read where neither the pipeline's context nor a
    scheduler that counts tells the step, so too before a scheduler's first step where no one told it where it begins;
    where it lies on a GPU, such a forward waits for it once per tensor.

    ``scheduler``: returns the pipeline's current scheduler or None. ``offset + scale * timestep`` is one of the
    scheduler's timesteps, where ``timestep`` is the transformer's argument.
    """

    def __init__(self, scheduler: Callable[[], Any] = lambda: None, scale: float = 1.0, offset: float = 0.0):
        self._scheduler = scheduler
        self._scale = scale
        self._offset = offset
        self._context: dict[str, Any] = {}
        self._timesteps: Any = None
        self._values: list[float] = []
        self._sigmas: Any = None
        self._levels: list[float] = []
        self._seen: list[float] = []
        self._read = Seen()
        self._last: Step | None = None

    @contextlib.contextmanager
    def context(self, **fields: Any) -> Iterator[None]:
        """What ``cache_context`` said, for the forwards inside."""
        before, self._context = self._context, fields
        try:
            yield
        finally:
            self._context = before

    def poll(self, timestep: Any) -> Step:
        """The step of the forward that begins now. ``timestep``: its argument, a tensor or a number."""
        scheduler = self._scheduler()
        fresh = self._renewed(scheduler)
        found = self._from_context() or self._from_scheduler(scheduler, timestep) or self._counted(timestep)
        index, total, sigma = found
        run = self._last.run if self._last else 0
        if self._last and (fresh or index < self._last.index):
            run += 1
        branch = self._context.get("name", "")
        self._last = Step(index, total, sigma, "" if branch == _BATCHED else branch, run)
        return self._last

    def _renewed(self, scheduler: Any) -> bool:
        """Whether the scheduler's timesteps were set since the last forward. ``set_timesteps`` makes a new tensor."""
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or timesteps is self._timesteps:
            return False
        first = self._timesteps is None
        self._timesteps = timesteps
        self._values = torch.as_tensor(timesteps).flatten().tolist()
        return not first

    def _from_context(self) -> tuple[int, int | None, float | None] | None:
        index = self._context.get("step_index")
        if index is None:
            return None
        return int(index), self._context.get("num_inference_steps") or self._total(), self._context.get("sigma")

    def _from_scheduler(self, scheduler: Any, timestep: Any) -> tuple[int, int | None, float | None] | None:
        if not self._values:
            return None
        if hasattr(scheduler, "step_index"):
            index = scheduler.step_index
            if index is None:
                index = getattr(scheduler, "begin_index", None)
            if index is None:
                index = self._first(timestep)
            elif index >= len(self._values):  # at its end: this run goes by another scheduler
                index = None
        else:
            value = self._scheduled(timestep)
            index = min(range(len(self._values)), key=lambda i: abs(self._values[i] - value))
        return None if index is None else (int(index), self._total(), self._sigma(scheduler, index))

    def _first(self, timestep: Any) -> int | None:
        """The index of a scheduler that has not stepped: runs may begin midway, or step copies of it only.

        None where its timesteps are not those of this run. A timestep that is none of them is only believed to be the
        first one, since some models are told another number than the scheduler's.
        """
        value = self._scheduled(timestep)
        eps = 1e-6
        if isinstance(timestep, torch.Tensor) and timestep.is_floating_point():
            eps = max(eps, torch.finfo(timestep.dtype).eps)
        room = eps * max(abs(self._offset), abs(value))
        near = [i for i, known in enumerate(self._values) if abs(known - value) <= room]
        counted, _, _ = self._counted(timestep)
        if near:
            return 0 if near[0] == 0 else min(near, key=lambda i: abs(self._values[i] - value))
        return None if counted else 0

    def _scheduled(self, timestep: Any) -> float:
        """The transformer's timestep as the scheduler counts it."""
        return self._offset + self._scale * self._number(timestep)

    def _sigma(self, scheduler: Any, index: int) -> float | None:
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not self._sigmas:
            self._sigmas = sigmas
            self._levels = [] if sigmas is None else torch.as_tensor(sigmas).flatten().tolist()
        return float(self._levels[index]) if index < len(self._levels) else None

    def _counted(self, timestep: Any) -> tuple[int, None, None]:
        """Distinct timestep values so far; a turn of their direction or the first value again begins a new run."""
        value, seen = self._number(timestep), self._seen
        if not seen or value != seen[-1]:
            turned = len(seen) > 1 and (value - seen[-1]) * (seen[1] - seen[0]) < 0
            self._seen = [value] if turned or value in seen else [*seen, value]
        return len(self._seen) - 1, None, None

    def _total(self) -> int | None:
        return len(self._values) or None

    def _number(self, timestep: Any) -> float:
        """The noisiest of a batch or of a token-wise timestep."""
        if not isinstance(timestep, torch.Tensor):
            return float(timestep)
        return self._read.read(timestep, lambda: float(timestep.max()))
