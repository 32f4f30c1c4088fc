"""Methods whose plans outlive many steps: their calls are timed as they are between two searches of a run."""

from __future__ import annotations

from dataclasses import dataclass

from ...methods import Method
from ...step import Step

# What AdaSpa's authors sample with, and the default of the video pipelines.
STEPS = 50


@dataclass(frozen=True)
class Run:
    """A run of ``steps``, the layer dense on all but ``sparse`` of them. ``search``: the step of its first search, one
    of ``searches``; ``between``: a step that uses what was found."""

    search: Step
    between: Step
    searches: int
    sparse: int
    steps: int = STEPS

    def spread(self, seconds: float) -> float:
        """Seconds of one search, as its share of every sparse call of the run."""
        return seconds * self.searches / self.sparse

    def to_dict(self) -> dict[str, int]:
        return {"steps": self.steps, "searches": self.searches, "sparse": self.sparse}


def run_of(method: Method) -> Run | None:
    """The run of a method that searches on some steps and keeps what it found, None for others."""
    searches = method.planning_steps(STEPS)
    if not searches:
        return None
    dense = set(method.dense_steps(STEPS))
    between = [step for step in range(searches[0] + 1, STEPS) if step not in dense and step not in searches]
    if not between:
        return None
    return Run(Step(searches[0], STEPS), Step(between[0], STEPS), len(searches), STEPS - len(dense))
