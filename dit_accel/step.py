"""Step: where in the denoising run a forward stands."""

from __future__ import annotations

from dataclasses import dataclass

from . import checks


@dataclass(frozen=True)
class Step:
    """One denoising step, counted over all denoisers of a run (Wan 2.2 has two).

    ``index`` is 0-based, ``total`` the number of steps of the run (``None`` when the scheduler does not say),
    ``sigma`` the noise level, ``branch`` the guidance branch (``"cond"``, ``"uncond"``, ``""`` when batched or
    unguided), ``run`` a counter that distinguishes one pipeline call from the next.
    """

    index: int = 0
    total: int | None = 1
    sigma: float | None = None
    branch: str = ""
    run: int = 0

    def __post_init__(self) -> None:
        checks.whole("Step: index", self.index, "the number of a step, counted from 0", 0)
        if self.total is not None:
            checks.whole("Step: total", self.total, "the number of steps of a run, or None where it is unknown")
