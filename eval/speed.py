"""Speed: measuring in turn, and the limits that a measurement is set against."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# Tiers that emulate: their timings say nothing about the method.
EMULATED = ("reference", "quant-reference", "interpreter")


def amdahl(share: float, density: float) -> float:
    """The most a loop can gain: attention is ``share`` of its time and falls to ``density`` of its own.

    Both in [0, 1]; ``density`` is the effective one, dense steps and layers counted.
    """
    return 1 / (1 - share + share * density)


def effective_density(density: float, dense_steps: int, steps: int) -> float:
    """Density over a run of ``steps`` steps of which ``dense_steps`` are dense on every layer."""
    return (dense_steps + (steps - dense_steps) * density) / steps


def summary(seconds: Sequence[float]) -> dict[str, float | int]:
    """``median``, ``min``, ``iqr`` in the unit given, and ``runs``. The IQR of fewer than four runs is their range."""
    ordered = sorted(seconds)
    if len(ordered) < 4:
        spread = ordered[-1] - ordered[0]
    else:
        low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
        spread = high - low
    return {"median": statistics.median(ordered), "min": ordered[0], "iqr": spread, "runs": len(ordered)}


def conditions(compare: Mapping[str, Any]) -> list[str]:
    """Memory, GPU clocks and compilation of a comparison's sides, in words; nothing of what a record does not hold."""
    told = []
    for side, peak in (compare.get("memory") or {}).items():
        allocated, reserved = (f"{peak[kind] / 2**30:.2f} GiB" for kind in ("allocated", "reserved"))
        told.append(f"peak memory {side}: {allocated} allocated, {reserved} reserved")
    for side, runs in (compare.get("clocks") or {}).items():
        values = [
            f"{name} {', '.join('-' if run[key] is None else str(run[key]) for run in runs)}{unit}"
            for key, name, unit in (("sm_mhz", "SM clock", " MHz"), ("power_state", "power state P", ""))
            if any(run[key] is not None for run in runs)
        ]
        told.append(
            f"GPU as each {side} run ended: {'; '.join(values) or 'clocks not told (pip install nvidia-ml-py)'}"
        )
    if "compiled" in compare:
        on = [side for side, compiled in compare["compiled"].items() if compiled]
        told.append(f"torch.compile: {'both sides' if len(on) == 2 else on[0] + ' side only' if on else 'off'}")
    return told


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, float | int]]:
    """Time callables in turn, A B A B, after ``warmup`` untimed calls each; :func:`summary` of seconds per name.

    Taking turns keeps a slow drift of the clock from favouring one of them. CUDA work is waited for.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    for call in candidates.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: summary(values) for name, values in seconds.items()}


if __name__ == "__main__":
    from ..cli import main

    sys.exit(main(["eval", "speed", *sys.argv[1:]]))
