"""The same shot twice, dense and accelerated, from the same noise: measured in turn, warm-up apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..processors import Processor
from ..schedule import Schedule
from .generate import Result, generate
from .job import Shot


@dataclass
class Pair:
    """Timed runs of both sides. ``warmup``: seconds before measuring, compilation included, part of no other number."""

    shot: Shot
    dense: list[Result] = field(default_factory=list)
    fast: list[Result] = field(default_factory=list)
    warmup: dict[str, float] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


def compare(
    pipe: Any, shot: Shot, *, repeats: int = 1, swap: bool = False, tell: Callable[[str, dict], None] | None = None
) -> Pair:
    """Run both sides ``repeats`` times, alternating; ``swap`` starts with the accelerated one.

    Before that each side runs one step, the accelerated one without dense steps so that its kernels compile.
    """
    pair, fast = Pair(shot), shot.choice.processor
    warm = Processor(fast.method, quant=fast.quant, schedule=Schedule.none(), guard=fast.guard, backend=fast.backend)
    for name, processor in (("dense", Processor(None)), ("accelerated", warm)):
        if tell:
            tell("warm-up", {"side": name})
        _label(pipe, shot, f"warm-up {name}")
        started = time.perf_counter()
        generate(pipe, shot, processor, steps=1)
        pair.warmup[name] = time.perf_counter() - started
    for turn in range(repeats):
        sides = [("dense", Processor(None), pair.dense), ("accelerated", fast, pair.fast)]
        for name, processor, results in reversed(sides) if swap ^ bool(turn % 2) else sides:
            if tell:
                tell("side", {"side": name, "turn": turn + 1})
            _label(pipe, shot, name)
            if results:
                # Only the last run's frames are used, and a video can be large.
                results[-1].frames = results[-1].frames[:0]
            results.append(generate(pipe, shot, processor))
            pair.order.append(name)
    return pair


def _label(pipe: Any, shot: Shot, side: str) -> None:
    """Say on the progress bar which side is running."""
    config = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**config, "desc": f"{shot.stem[:4]} {side}"})
