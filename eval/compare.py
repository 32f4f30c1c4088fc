"""Judge a pair of renders: speed-ups of equal scope, the bound, fidelity."""

from __future__ import annotations

from typing import Any

from ..pipelines.compare import Pair
from ..pipelines.generate import Result
from .fidelity import fidelity
from .speed import EMULATED, amdahl, effective_density, summary


def judge(pair: Pair) -> dict[str, Any]:
    """Numbers of one comparison, as plain JSON values.

    ``seconds``: medians by side and phase. ``speedup``: dense over accelerated, same phase. ``attention_share``:
    attention's part of the dense loop. ``bound``: what that share and the effective density allow. ``fidelity``:
    PSNR and SSIM of the raw frames. ``speedup`` is None, with ``refused`` saying why, where only emulation ran.
    """
    dense, fast = _medians(pair.dense), _medians(pair.fast)
    attention = pair.fast[-1].attention
    effective = attention.get("effective_density")
    if effective is None and pair.shot.choice.density is not None:
        dense_steps = len(pair.shot.choice.processor.schedule.dense_steps(pair.shot.steps))
        effective = effective_density(pair.shot.choice.density, dense_steps, pair.shot.steps)
    share = min(dense["attention"] / dense["loop"], 1.0) if dense.get("loop") and dense.get("attention") else None
    refused = _refused(attention)
    result: dict[str, Any] = {
        "seconds": {"dense": dense, "accelerated": fast},
        "loop_runs": {
            "dense": [r.seconds.get("loop") for r in pair.dense],
            "accelerated": [r.seconds.get("loop") for r in pair.fast],
        },
        "order": pair.order,
        "warmup_seconds": pair.warmup,
        "speedup": None if refused else _speedups(dense, fast),
        "attention_share": share,
        "effective_density": effective,
        "bound": None if share is None or effective is None else amdahl(share, effective),
        "fidelity": fidelity(pair.dense[-1].frames, pair.fast[-1].frames).to_dict(),
    }
    return result | ({"refused": refused} if refused else {})


def _medians(results: list[Result]) -> dict[str, float]:
    phases = set.intersection(*(set(r.seconds) for r in results))
    return {phase: float(summary([r.seconds[phase] for r in results])["median"]) for phase in sorted(phases)}


def _speedups(dense: dict[str, float], fast: dict[str, float]) -> dict[str, float]:
    names = {"loop": "loop", "attention": "attention", "end_to_end": "total"}
    return {name: dense[key] / fast[key] for name, key in names.items() if dense.get(key) and fast.get(key)}


def _refused(attention: dict[str, Any]) -> str | None:
    """Why the timings say nothing about the method, or None."""
    tiers = attention.get("tiers") or {}
    emulated = sorted(set(tiers) & set(EMULATED))
    if emulated:
        return f"{', '.join(emulated)} ran, which emulates the kernel; a speed-up would say nothing"
    if tiers == {} and attention:
        return "no call was accelerated"
    return None
