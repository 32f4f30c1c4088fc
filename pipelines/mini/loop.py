"""A resumable training loop: one optimiser, weight averaging, JSONL log, progress bar, checkpoints that continue
exactly.

All randomness of a step comes from a generator seeded by (seed, stage, step), so a run that is killed and restarted
sees the same batches as one that was not, and the same seed on the same device gives the same loss curve.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .muon import Muon


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage learns: ``steps``, peak ``lr``, linear ``warmup``, then cosine to ``floor`` x lr.

    ``curve`` holds (step, share of lr) points joined by straight lines and replaces warm-up and cosine: where the last
    steps are the dearest, they need more than the tail of a cosine.
    """

    steps: int
    lr: float
    warmup: int = 50
    floor: float = 0.02
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    curve: tuple[tuple[int, float], ...] = ()

    def lr_at(self, step: int) -> float:
        """Learning rate of 0-based ``step``."""
        if self.curve:
            steps, shares = zip(*self.curve, strict=True)
            return self.lr * float(np.interp(step, steps, shares))
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def schedule_of(part: dict[str, Any]) -> Schedule:
    """The schedule in a stage's part of a config; its other keys are not looked at."""
    names = {field.name for field in fields(Schedule)}
    return Schedule(**{key: value for key, value in part.items() if key in names})


def is_table(key: str) -> bool:
    """Whether a parameter is a table of vectors (embeddings, modulation), whose rows must not be made orthogonal."""
    return any(word in key for word in ("table", "shared", "embed_tokens", "relative_attention_bias", "gamma"))


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """The CPU generator of one training step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(stage.encode())) * 10_000_019 + step)


def save_atomic(value: object, path: Path) -> None:
    """Writes next to the target and renames, so that a kill never leaves half a checkpoint."""
    part = path.with_suffix(path.suffix + ".part")
    torch.save(value, part)
    os.replace(part, path)


class Stage:
    """One training stage over ``module``; ``loss`` maps (step, generator) to a scalar loss and a dict of numbers to
    log."""

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        loss: Callable[[int, torch.Generator], tuple[torch.Tensor, dict[str, float]]],
        schedule: Schedule,
        out: Path,
        *,
        seed: int = 0,
        autocast: bool = False,
        every: int = 500,
        report: Callable[[torch.nn.Module, int], None] | None = None,
        checkpoint_seconds: float = 60.0,
    ) -> None:
        self.name, self.module, self.loss, self.schedule = name, module, loss, schedule
        self.out, self.seed, self.autocast, self.every, self.report = out, seed, autocast, every, report
        self.checkpoint_seconds = checkpoint_seconds
        matrices, rest = [], []
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim > 1 and min(parameter.shape[0], parameter[0].numel()) > 1 and not is_table(key)
                (matrices if matrix else rest).append(parameter)
        self.optimizer = Muon(
            [{"params": matrices, "muon": True, "weight_decay": schedule.weight_decay}, {"params": rest}],
            lr=schedule.lr,
        )
        self.average = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.step = 0
        out.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._load()

    @property
    def path(self) -> Path:
        return self.out / f"{self.name}.pt"

    @property
    def finished(self) -> bool:
        return self.step >= self.schedule.steps

    def _load(self) -> None:
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        for key, value in self.average.items():
            value.copy_(state["average"][key])
        log = self.out / "log.jsonl"
        if log.exists():
            # Lines after the checkpoint will be written again.
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            kept = [line for line in lines if line["stage"] != self.name or line["step"] < self.step]
            log.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def save(self) -> None:
        """Writes the checkpoint that :class:`Stage` continues from."""
        save_atomic(
            {
                "module": self.module.state_dict(),
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
            },
            self.path,
        )

    def averaged(self) -> torch.nn.Module:
        """``module`` with the averaged weights copied in; call :meth:`restore` with the returned state to undo."""
        self._live = {k: v.detach().clone() for k, v in self.module.state_dict().items()}
        self.module.load_state_dict(self.average)
        return self.module

    def restore(self) -> None:
        """Puts the live weights back after :meth:`averaged`."""
        self.module.load_state_dict(self._live)

    def _update_average(self) -> None:
        # Early on the average must forget the random start quickly.
        keep = min(self.schedule.ema, (1 + self.step) / (10 + self.step))
        live = self.module.state_dict()
        for key, value in self.average.items():
            if value.is_floating_point():
                value.lerp_(live[key].to(value.dtype), 1 - keep)
            else:
                value.copy_(live[key])

    def run(self, deadline: float | None = None) -> bool:
        """Trains until the schedule ends or ``deadline`` (``time.monotonic`` seconds); returns whether the stage is
        finished."""
        device = next(self.module.parameters()).device
        saved = time.monotonic()
        began = time.monotonic()
        bar = tqdm(total=self.schedule.steps, initial=self.step, desc=self.name, mininterval=2.0)
        with (self.out / "log.jsonl").open("a") as log:
            while not self.finished:
                rate = self.schedule.lr_at(self.step)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                self.module.train()
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.autocast):
                    loss, numbers = self.loss(self.step, step_generator(self.seed, self.name, self.step))
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.schedule.clip)
                self.optimizer.step()
                self._update_average()
                if self.step % 10 == 0 or self.step == self.schedule.steps - 1:
                    value = loss.item()
                    if not math.isfinite(value):
                        raise RuntimeError(
                            f"stage {self.name!r} reached loss {value} at step {self.step}; the last checkpoint is "
                            f"{self.path}. Lower `lr` in the config, or set `autocast` to false, and start the same "
                            "command again"
                        )
                    line = {
                        "stage": self.name,
                        "step": self.step,
                        "loss": round(value, 6),
                        "lr": rate,
                        "norm": norm.item(),
                    }
                    line |= {k: round(float(v), 6) for k, v in numbers.items()}
                    line["seconds"] = round(time.monotonic() - began, 2)
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    bar.set_postfix(loss=f"{value:.4f}")
                self.step += 1
                bar.update()
                if self.report and (self.step % self.every == 0 or self.finished):
                    self._report()
                if time.monotonic() - saved > self.checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
                if deadline is not None and time.monotonic() > deadline:
                    break
        bar.close()
        self.save()
        return self.finished

    def _report(self) -> None:
        self.averaged().eval()
        try:
            with torch.no_grad():
                self.report(self.module, self.step)
        finally:
            self.restore()
