"""A result file: what was measured where and how, continued case by case."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...kernels.faults import DeviceLost, check_device
from ...pipelines.outputs import read_json, write_json
from .cases import Case

SCHEMA = 1
# Of the environment, what must be the same for rows to stand in one file.
_SAME = ("versions", "cpu", "gpus")


def opened(
    path: Path | None, section: str, environment: dict[str, Any], arguments: Sequence[str], *, cold: bool = False
) -> dict[str, Any]:
    """The document at ``path`` to go on with, or a new one. Raises ``UsageError`` where it holds another run.

    ``cold``: whether the L2 cache is overwritten before every timed call.
    """
    command = shlex.join(["python", "-m", "dit_accel.eval.kernels", *arguments])
    new = {
        "schema": SCHEMA, "section": section, "command": command, "environment": environment, "cold": cold, "rows": {},
    }  # fmt: skip
    if path is None or not path.exists():
        return new
    found = read_json(path)
    same = {name: found.get("environment", {}).get(name) == environment[name] for name in _SAME}
    same |= {name: found.get(name) == new[name] for name in ("schema", "section")}
    same["choice of --cold"] = found.get("cold", False) == cold
    if not all(same.values()):
        other = ", ".join(name for name, equal in same.items() if not equal)
        raise UsageError(f"{path} was measured with another {other}; name another file with -o")
    return found


def fill(
    document: dict[str, Any], todo: Sequence[Case], minutes: float, one: Callable[[Case], dict[str, Any]],
    save: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic,
) -> bool:  # fmt: skip
    """Measure what is missing, saving after each case. False where the time ended first.

    A case that cannot run leaves a row with its ``failure``, which the next run tries again, after all that were never
    tried. Where it breaks the GPU's context, the row is kept and ``DeviceLost`` raised.
    """
    end, rows = clock() + 60 * minutes, document["rows"]
    for case in sorted(todo, key=lambda case: case.key in rows):
        if "failure" not in rows.get(case.key, {"failure": ""}):
            continue
        if clock() >= end:
            return False
        try:
            rows[case.key] = one(case)
        except Exception as error:
            rows[case.key] = {**case.to_dict(), "failure": f"{type(error).__name__}: {error}"[:400]}
            try:
                check_device(error)
            except DeviceLost:
                save()
                raise
        save()
    return True


def write(document: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    write_json(path, document)
