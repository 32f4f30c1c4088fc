"""Published configurations of Rectified SpaAttn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..schedule import Schedule


@dataclass(frozen=True)
class Preset:
    """Parameters of the method, and the steps and layers that ran dense. ``steps``: of the published runs."""

    parameters: dict[str, Any]
    schedule: Schedule
    steps: int


def _wan(density: float, first: int, steps: int) -> Preset:
    parameters = {"density": density, "top_p": 0.3, "first_frame_blocks": True}
    return Preset(parameters, Schedule(first=first, layers=2), steps)


def _other(density: float, schedule: Schedule) -> Preset:
    return Preset({"density": density, "top_p": 0.3}, schedule, 50)


# The scripts of the authors' release (github.com/BienLuky/Rectified-SpaAttn): 720p, 81 frames for Wan (121 for TI2V-5B)
# and CogVideoX 1.5, 128 for HunyuanVideo; FLUX at 4096 x 4096. CogVideoX by its README. The two experts of Wan 2.2 T2V
# keep their first two layers dense; the release also keeps the first step of the second expert, whose index follows
# from the sampler: add it to Schedule.steps. FLUX runs its last 20 of 57 layers dense.
PRESETS = {
    "hunyuan-video": _other(0.2, Schedule.none()),
    "wan2.1-t2v": _wan(0.25, first=5, steps=50),
    "wan2.1-i2v": _wan(0.25, first=0, steps=50),
    "wan2.2-t2v": _wan(0.15, first=3, steps=40),
    "wan2.2-i2v": _wan(0.15, first=0, steps=40),
    "wan2.2-ti2v": _wan(0.25, first=5, steps=50),
    "cogvideox1.5-t2v": _other(0.15, Schedule(first=5)),
    "cogvideox1.5-i2v": _other(0.25, Schedule(first=5)),
    "flux-4k": _other(0.1, Schedule(first=0, layers=frozenset(range(37, 57)))),
}
