"""One job over several processes: each renders a part of the prompts with a model of its own.

Started by ``accelerate launch -m dit_accel render ...`` (or torchrun). Nothing is exchanged while rendering, and every
file appears whole or not at all, so a process that is killed loses the output it was at; the same command with
``--resume`` renders what is missing and nothing twice.
"""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta
from typing import Any

from .job import Job
from .render import Outcome, Plan

# Processes end their parts at different times, and the first one waits for the last.
_PATIENCE = timedelta(days=7)


def launched() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class Share:
    """This process among those of one launch, by accelerate's own state. ``cpu``: no accelerator is to be used."""

    def __init__(self, *, cpu: bool = False):
        from accelerate import PartialState

        self._state = PartialState(cpu=cpu, timeout=_PATIENCE)

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that reports."""
        return self._state.is_main_process

    def place(self, job: Job) -> Job:
        """The job on this process's own device, where none is named."""
        return dataclasses.replace(job, device=str(self._state.device)) if job.device == "auto" else job

    def split(self, plan: Plan) -> list[Outcome]:
        """The pending outputs of this process: consecutive ones, as many as any other process has, give or take one.

        Waits until every process has planned: an output that one has finished already would change another's plan.
        """
        self._state.wait_for_everyone()
        with self._state.split_between_processes(plan.todo) as own:
            return list(own)

    def collect(self, plan: Plan, own: list[Outcome]) -> None:
        """Put what became of every process's outputs into ``plan``, on every process. Waits for all of them."""
        from accelerate.utils import gather_object

        mine = [(o.shot.number, o.status, o.detail, o.record) for o in own]
        found: dict[int, tuple[Any, ...]] = {number: rest for number, *rest in gather_object(mine)}
        for outcome in plan.outcomes:
            if outcome.shot.number in found:
                outcome.status, outcome.detail, outcome.record = found[outcome.shot.number]
