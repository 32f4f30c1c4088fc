"""Published configurations of PSA."""

from __future__ import annotations

from typing import Any

from ..schedule import Schedule

# Parameters of the method, and what ran dense.
Preset = tuple[dict[str, Any], Schedule]

# 15 of 50 steps, and for Wan 2.2 A14B 12 of 40.
WARM = Schedule(first=0.3)


def _threshold(block_k: int, bounds: tuple[float, ...], similarity: tuple[float, ...] | None = None) -> Preset:
    return {"mode": "threshold", "block_k": block_k, "bounds": bounds, "similarity": similarity}, WARM


def _topk(block_k: int, bounds: tuple[float, ...], curve: str | None, schedule: Schedule = WARM) -> Preset:
    return {"mode": "topk", "block_k": block_k, "bounds": bounds, "curve": curve}, schedule


# The configurations of the authors' release, by model. The last one is its attention for any model, which reorders
# nothing and keeps no step dense; "cogvideox-5b-tdm" is for weights distilled to four steps (TDM).
PRESETS: dict[str, Preset] = {
    "wan2.1-14b": _threshold(128, (0.4, 0.5, 0.6, 0.8)),
    "wan2.1-1.3b": _threshold(128, (0.5, 0.6, 0.7, 0.8), (0.7, 0.65, 0.6)),
    "wan2.1-1.3b-topk": _topk(32, (0.05, 0.1, 0.15, 0.25), "gilbert"),
    "wan2.2-a14b": _threshold(32, (0.5, 0.6, 0.6, 0.8)),
    "wan2.2-5b": _threshold(32, (0.6, 0.7, 0.7, 0.8)),
    "cogvideox1.5-5b": _topk(32, (0.1, 0.15, 0.15, 0.35), "gilbert"),
    "cogvideox-5b": _topk(128, (0.1, 0.15, 0.15, 0.35), None),
    "cogvideox-5b-tdm": _topk(128, (0.05, 0.15, 0.25, 0.5), None, Schedule.none()),
    "plug-and-play": _topk(64, (0.1, 0.15, 0.15, 0.35), None, Schedule.none()),
}
