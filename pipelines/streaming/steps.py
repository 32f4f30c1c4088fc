"""Self-Forcing's few denoising steps (arXiv 2506.08009, algorithm 2) and where their noise comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...checks import choice, number, several
from ...errors import UsageError

RENOISE = ("fresh", "predicted")


@dataclass(frozen=True)
class Steps:
    """Noise levels of one chunk: ``times`` of 1000, falling, moved towards noise by ``shift`` as the model was trained.

    After every step but the last the clean prediction gets noise of the next level: drawn anew (``renoise="fresh"``,
    what distilled models learned) or the noise just predicted (``"predicted"``, an Euler step, for models that were
    not distilled). ``context_time``: the time at which a finished chunk is run once more to be remembered.
    """

    times: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    context_time: float = 0.0
    renoise: str = "fresh"

    def __post_init__(self) -> None:
        what = "denoising times that fall from 1000 to above 0, like (1000, 750, 500, 250)"
        times = tuple(number("times", t, f"a tuple of {what}, each") for t in several("times", self.times, what))
        if not times or any(not 0 < t <= 1000 for t in times) or list(times) != sorted(set(times), reverse=True):
            raise UsageError(f"denoising times fall from 1000 to above 0, like (1000, 750, 500, 250); got {times}")
        object.__setattr__(self, "times", times)
        shift = number("shift", self.shift, "a positive factor", 0, above=True)
        context = number("context_time", self.context_time, "a time, 0 to below 1000", 0, math.nextafter(1000, 0))
        object.__setattr__(self, "shift", shift)
        object.__setattr__(self, "context_time", context)
        choice("renoise", self.renoise, RENOISE)

    @classmethod
    def even(cls, count: int, **settings: float | str) -> Steps:
        """``count`` evenly spaced times from 1000 down."""
        if count < 1:
            raise UsageError(f"a chunk takes 1 step or more; got {count}")
        return cls(tuple(1000 * (count - i) / count for i in range(count)), **settings)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels in (0, 1]; the model is told 1000 times as much."""
        return tuple(self.shift * u / (1 + (self.shift - 1) * u) for u in (t / 1000 for t in self.times))

    @property
    def forwards(self) -> int:
        """Forwards per chunk and guidance branch, the context pass included."""
        return len(self.times) + 1


def noise_of(seed: int, chunk: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """float32 normal noise on the CPU that depends on its arguments alone.

    A chunk made again gets the same noise, and no chunk's noise depends on how many came before it were drawn.
    """
    state = np.random.SeedSequence((seed % 2**64, chunk, step)).generate_state(1, np.uint64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(state[0])))
