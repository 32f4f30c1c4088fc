"""PARO's plans at several densities from one dense run: the statistics serve every density."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...methods.paro_calibration import calibrate
from ...methods.paro_file import write
from ...methods.paro_statistics import Statistics
from ...pipelines.calibrate import CalibrationJob, describe_run, observe
from ...pipelines.job import Shot
from ...pipelines.model import ModelInfo


def plan_path(folder: Path, density: float) -> Path:
    """Where the plan of a density lies."""
    return folder / f"paro-{density:g}.safetensors"


def write_plans(pipe: Any, info: ModelInfo, shots: Sequence[Shot], densities: Sequence[float], folder: Path) -> None:
    """Calibrate on ``shots`` and write a plan per density into ``folder``; nothing where all are there."""
    missing = [density for density in densities if not plan_path(folder, density).is_file()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    job = CalibrationJob(folder / "-")
    statistics = Statistics(bins=job.bins, block_size=job.block_size)
    observe(pipe, list(shots), statistics.observe)
    for density in missing:
        made = CalibrationJob(plan_path(folder, density), density=density)
        header = describe_run(pipe, info, list(shots), statistics, made)
        write(made.out, header, calibrate(statistics, density=density, metric=made.metric, budget=made.budget))
