"""Self-Forcing's few denoising steps (arXiv 2506.08009, algorithm 2) and where their noise comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
        times = self.times
        if not times or any(not 0 < t <= 1000 for t in times) or list(times) != sorted(set(times), reverse=True):
            raise UsageError(f"denoising times fall from 1000 to above 0, like (1000, 750, 500, 250); got {times}")
        if not self.shift > 0 or not 0 <= self.context_time < 1000:
            raise UsageError(
                f"shift is positive and context_time in [0, 1000); got shift={self.shift}, "
                f"context_time={self.context_time}"
            )
        if self.renoise not in RENOISE:
            raise UsageError(f"renoise is one of {', '.join(RENOISE)}; got {self.renoise!r}")

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
