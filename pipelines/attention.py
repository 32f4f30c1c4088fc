"""Attach attention to a pipeline, measured, and read back what its engines counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..diffusers import engines, reset_attn_processor, set_attn_processor
from ..diffusers.by_step import series
from ..diffusers.stats import INTENDED, Stats, drift_over
from ..errors import UnsupportedError
from ..processors import Processor


def attach(pipe: Any, processor: Processor | None) -> None:
    """Give ``pipe`` the processor and start counting; ``None`` is stock attention, still measured where it can be."""
    reset_attn_processor(pipe)
    try:
        set_attn_processor(pipe, processor or Processor(None))
    except UnsupportedError:
        if processor is not None:
            raise
    for engine in engines(pipe):
        engine.stats.timing = True


def counted(pipe: Any) -> dict[str, Any]:
    """What ran since :func:`attach`, over all denoisers, as plain JSON values; empty when nothing was measured.

    ``tiers``: sparse calls by execution tier. ``density``: mean kept fraction of the sparse calls' layers.
    ``effective_density``: kept pairs over all pairs, dense steps and layers included. ``fallbacks``: calls that
    were meant to be sparse and ran dense, by reason. ``layers``: the same per layer; ``density_steps`` and, where the
    guard measured it, ``drift_steps`` hold a value per denoising step, dense calls counted, None where nothing ran.
    """
    found = [engine.stats for engine in engines(pipe)]
    if not found:
        return {}
    dense = sum((Counter(stats.dense) for stats in found), Counter())
    tiers = sum((Counter(stats.tiers) for stats in found), Counter())
    densities = [stats.density for stats in found if stats.density is not None]
    seconds = [stats.attention_seconds for stats in found]
    planning = [getattr(stats, "planning_seconds", None) for stats in found]
    steps = 1 + max((step for stats in found for layer in stats.layers for step in layer.steps), default=-1)
    return {
        "tier": tiers.most_common(1)[0][0] if tiers else "dense",
        "tiers": dict(tiers),
        "tier_reasons": sorted({layer.tier_reason for stats in found for layer in stats.layers if layer.tier_reason}),
        "sparse_calls": tiers.total(),
        "dense_calls": dict(dense),
        "fallbacks": {reason: n for reason, n in dense.items() if reason not in INTENDED},
        "guard_checks": sum(stats.checks for stats in found),
        "drift": drift_over(layer for stats in found for layer in stats.layers),
        "guard_events": [event for stats in found for event in stats.guard_events],
        "repeated_forwards": sum(stats.repeats for stats in found),
        "warnings": [text for stats in found for text in stats.warnings],
        "density": sum(densities) / len(densities) if densities else None,
        "effective_density": _effective(found),
        "seconds": None if None in seconds else sum(seconds),
        "planning_seconds": None if None in planning else sum(planning),
        "layers": [
            {
                "name": layer.name, "density": layer.density, "sparse": layer.sparse, "dense": dict(layer.dense),
                "checks": layer.checks, "drift": layer.drift,
                "density_steps": series(layer.steps, "density", steps),
                "drift_steps": series(layer.steps, "drift", steps) if layer.drift else None,
            }
            for stats in found
            for layer in stats.layers
        ],
    }  # fmt: skip


def _effective(found: list[Stats]) -> float | None:
    """Over several denoisers the mean, weighted by their forwards: they run on the same tokens."""
    parts = [(stats.effective_density, stats.forwards) for stats in found if stats.effective_density is not None]
    return sum(value * n for value, n in parts) / sum(n for _, n in parts) if parts else None
