"""The calibration job of adaptive precision: render a few prompts densely, measure 4 and 8 bits, write the table."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..precision import Measured, Precision, check_share
from ..quant import AUTO, parse_quant
from .calibrate import DenseRuns, Listener, check_out, observe, prepare


@dataclass(frozen=True)
class PrecisionJob(DenseRuns):
    """A precision file to calibrate.

    ``quant``: the recipe, a preset of INT4 logits. ``bins``: parts of a run with bits of their own. ``frac_8bit``: the
    least share of (bin, layer, head) at 8 bits or more. ``blocks``: blocks of queries that each call is measured on.
    """

    quant: str = "sage2-int4"
    bins: int = 4
    frac_8bit: float = 0.5
    blocks: int = 1


@dataclass(frozen=True)
class PrecisionOutcome:
    """What was written. ``record``: errors and settings, as the file holds them. ``seconds``: of the dense runs."""

    path: Path
    table: Precision
    record: dict[str, Any] = field(repr=False)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": str(self.path),
            "bits": self.table.bits,
            "share": {str(bits): share for bits, share in self.table.share.items()},
            "seconds": self.seconds,
            **self.record,
        }


def calibrate_precision(
    job: PrecisionJob, *, listen: Listener | None = None, progress: bool = True
) -> PrecisionOutcome:
    """Run ``job`` and write its table. Everything that can be checked is, before weights are loaded.

    ``listen`` hears ``("loading" | "start", {...})``. Raises ``UsageError`` or ``UnsupportedError`` for what cannot
    work.
    """
    tell = listen or (lambda event, data: None)
    recipe = parse_quant(job.quant)
    if recipe is None or recipe == AUTO or recipe.qk != "int4":
        raise UsageError(f"quant {job.quant!r} has no 4-bit logits to assign; choose sage2-int4")
    check_share(job.frac_8bit)
    check_out(job)
    measured = Measured(recipe, bins=job.bins, blocks=job.blocks)
    pipe, info, shots = prepare(job, tell)
    started = time.perf_counter()
    observe(pipe, shots, measured.observe, backend=job.backend, tell=tell, progress=progress)
    seconds = time.perf_counter() - started
    table = measured.assign(job.frac_8bit)
    record = {
        "model": info.name, "weights": info.revision or info.fingerprint(), "steps": shots[0].steps,
        "prompts": [shot.prompt for shot in shots], "seed": job.seed, "frac_8bit": job.frac_8bit, "quant": job.quant,
        "errors": measured.record(),
    }  # fmt: skip
    table.write(job.out, record)
    return PrecisionOutcome(job.out, table, record, seconds)
