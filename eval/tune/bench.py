"""Measuring settings on a pipeline: renders in turn with dense ones, kept in a file and continued from it.

Every accelerated render is compared with the dense render of the same prompt from the same noise (PSNR), and its
denoising loop with the dense loops just before and after it, whatever their prompt: all have the same tokens.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UsageError
from ...pipelines.acceleration import DENSE
from ...pipelines.generate import Result, generate
from ...pipelines.job import Shot
from ...processors import Processor
from ...schedule import Schedule
from ..fidelity import fidelity
from ..speed import EMULATED

SCHEMA = 1
# Accelerated renders between two dense ones, at most.
EVERY = 6
# A render that had less than this share of the cores that others had was waiting for other work.
STARVED = 0.8


@dataclass(frozen=True)
class Trial:
    """One setting on one prompt. ``psnr``: dB against dense. ``speed``: dense loop over accelerated loop, None where
    only emulation ran."""

    psnr: float
    speed: float | None


class Store:
    """The rows of a measurement, in the order they were made, in a file that is whole at any time.

    ``about``: what all rows have in common; a file of another is refused with ``UsageError``. Rows: ``setting`` (name
    or ``"dense"``), ``prompt`` (index), ``steps``, ``session``, ``seconds``, ``psnr``, ``tiers`` and more.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]):
        self.path = path
        self.document: dict[str, Any] = {"schema": SCHEMA, "about": about, "rows": []}
        if path is not None and path.is_file():
            old = read(path)
            if old.get("about") != about:
                raise UsageError(f"{path} holds measurements of another job; give another file or remove it")
            self.document |= old
        self.session = 1 + max((row["session"] for row in self.rows), default=-1)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.document["rows"]

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        row = {**row, "session": self.session}
        self.rows.append(row)
        self.save()
        return row

    def save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".partial")
        part.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)

    def find(self, setting: str, prompt: int) -> int | None:
        """The index of the last row of a setting and prompt."""
        found = [i for i, r in enumerate(self.rows) if (r["setting"], r["prompt"]) == (setting, prompt)]
        return found[-1] if found else None

    def missing(self, setting: str, prompt: int) -> bool:
        """Whether a setting and prompt has no row, or was starved and should be measured again."""
        index = self.find(setting, prompt)
        return index is None or starved(self.rows[index], most_cores(self.rows))


def read(path: Path) -> dict[str, Any]:
    """The document at ``path``. Raises ``UsageError``."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None


def most_cores(rows: Sequence[dict[str, Any]]) -> float:
    """The most CPU cores that a render had; 0 where none tells, on GPUs."""
    return max((row.get("cores") or 0.0 for row in rows), default=0.0)


def starved(row: dict[str, Any], cores: float) -> bool:
    """Whether a render had so few of the ``cores`` that others had that its time says little."""
    return (row.get("cores") or cores) < STARVED * cores


def trial(rows: Sequence[dict[str, Any]], index: int) -> Trial:
    """What row ``index`` says, its loop set against the dense loops of its session and of as many steps that are
    nearest before and after; starved ones are passed over unless there are no others."""
    row, cores = rows[index], most_cores(rows)
    kind = DENSE, row["session"], row.get("steps")
    near: list[float] = []
    for useful in (lambda r: not starved(r, cores), lambda r: True):
        for side in (reversed(rows[:index]), rows[index + 1 :]):
            alike = (r for r in side if (r["setting"], r["session"], r.get("steps")) == kind)
            near += [r["seconds"]["loop"] for r in alike if useful(r)][:1]
        if near:
            break
    emulated = set(row["tiers"] or {}) & set(EMULATED)
    speed = None if emulated or not near else float(np.mean(near)) / row["seconds"]["loop"]
    return Trial(row["psnr"], speed)


class Bench:
    """Renders settings on shots and keeps what they gave in ``store``; a pair that is there is not rendered again.

    ``processors``: what a setting's name runs. ``tell`` hears every row.
    """

    def __init__(
        self,
        pipe: Any,
        shots: Sequence[Shot],
        processors: dict[str, Processor],
        store: Store,
        *,
        every: int = EVERY,
        tell: Callable[[dict[str, Any]], None] = lambda row: None,
    ):
        self.pipe, self.shots, self.processors, self.store = pipe, shots, processors, store
        self.every, self.tell = every, tell
        self._dense: dict[int, np.ndarray] = {}
        self._warm: set[str] = set()
        self._since = every

    def measure(self, name: str, prompt: int, *, again: bool = False) -> Trial:
        """The trial of one setting on one prompt, from the store or a render, with a dense one before it where the last
        is too long ago or the prompt has none yet. ``again``: render, whatever is stored."""
        index = self.store.find(name, prompt)
        if index is None or again:
            self._warm_up(name)
            if self._since >= self.every or prompt not in self._dense:
                self.dense(prompt)
            result = generate(self.pipe, self.shots[prompt], self.processors[name])
            self._since += 1
            psnr = fidelity(self._dense[prompt], result.frames).psnr
            self.tell(self.store.add(self._row(name, prompt, result) | {"psnr": round(psnr, 4)}))
            index = len(self.store.rows) - 1
        return trial(self.store.rows, index)

    def dense(self, prompt: int) -> None:
        """Render a prompt with dense attention, measured like every other side."""
        self._warm_up(DENSE)
        result = generate(self.pipe, self.shots[prompt], Processor(None))
        self._dense[prompt], self._since = result.frames, 0
        self.tell(self.store.add(self._row(DENSE, prompt, result)))

    def forget(self, prompt: int) -> None:
        """Let go of a prompt's dense frames: videos of a large model fill memory."""
        self._dense.pop(prompt, None)

    def _warm_up(self, name: str) -> None:
        """One step that no figure contains: compiling, and the first touch of memory."""
        if name in self._warm:
            return
        self._warm.add(name)
        processor = copy.copy(self.processors.get(name) or Processor(None))
        processor.schedule = Schedule.none()
        generate(self.pipe, self.shots[0], processor, steps=1)

    def _row(self, name: str, prompt: int, result: Result) -> dict[str, Any]:
        keep = ("loop", "attention", "planning", "total")
        seconds = {key: round(result.seconds[key], 4) for key in keep if key in result.seconds}
        row = {"setting": name, "prompt": prompt, "steps": self.shots[prompt].steps, "seconds": seconds}
        row["cores"] = result.cores and round(result.cores, 2)
        return row | {key: result.attention.get(key) for key in ("tiers", "effective_density", "fallbacks")}
