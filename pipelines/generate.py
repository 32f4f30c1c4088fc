"""One pipeline call for one shot: raw frames, seconds by phase, what attention did."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import DitAccelError
from ..processors import Processor
from .attention import attach, counted
from .device_state import clocks, compiled, peak_memory, reset_memory
from .job import Shot
from .phases import Clock, timed


@dataclass
class Result:
    """``frames``: float32 (T, H, W, 3) in [0, 1], before any codec. ``seconds`` by phase. ``attention``: as counted.

    ``peak_memory``: bytes on the GPU, allocated and reserved. ``clocks``: of the GPU as the run ended. ``compiled``:
    whether ``torch.compile`` took part. ``cores``: CPU cores that this process had on average, for CPU runs.
    """

    frames: np.ndarray
    seconds: dict[str, float]
    attention: dict[str, Any] = field(default_factory=dict)
    peak_memory: dict[str, int] | None = None
    cores: float | None = None
    clocks: dict[str, int | None] | None = None
    compiled: bool = False


def generate(pipe: Any, shot: Shot, processor: Processor | None, *, steps: int | None = None) -> Result:
    """Render ``shot`` with ``processor`` (None: stock attention). ``steps`` overrides the shot's count, for warm-up.

    The initial noise comes from a CPU generator seeded by the shot, so that it is the same for every method and
    device. Raises ``DitAccelError`` when the frames hold NaN or Inf.
    """
    device = pipe._execution_device
    call = dict(shot.call, output_type="np")
    if steps is not None:
        call["num_inference_steps"] = steps
    if "image" in call:
        call["image"] = _load_image(call["image"], shot)
    attach(pipe, processor)
    clock = Clock(device)
    reset_memory(device)
    start, busy = time.perf_counter(), time.process_time()
    with timed(pipe, clock):
        output = pipe(**call, generator=torch.Generator("cpu").manual_seed(shot.seed))
    total = clock.now() - start
    state = clocks(device)
    seconds = {"total": total, **clock.seconds}
    cores = (time.process_time() - busy) / total if device.type == "cpu" else None
    peak = peak_memory(device)
    frames = _frames(output)
    if steps is None:
        _check_finite(frames, processor)
    attention = counted(pipe)
    for name, key in (("attention", "seconds"), ("planning", "planning_seconds")):
        value = attention.pop(key, None)
        if value is not None:
            seconds[name] = value
    return Result(frames, seconds, attention, peak, cores, state, compiled(pipe))


def _frames(output: Any) -> np.ndarray:
    """float32 (T, H, W, 3): video pipelines give (B, T, H, W, 3), image ones (B, H, W, 3)."""
    frames = getattr(output, "frames", None)
    if frames is None:
        frames = output.images
    frames = np.asarray(frames, dtype=np.float32)
    return frames[0] if frames.ndim == 5 else frames[:1]


def _check_finite(frames: np.ndarray, processor: Processor | None) -> None:
    bad = int((~np.isfinite(frames)).any(axis=(1, 2, 3)).sum())
    if bad:
        way = "--dtype float32" if processor is None else "--method dense, or --dtype float32"
        raise DitAccelError(f"{bad} of {len(frames)} frames hold NaN or Inf; nothing was written. Try {way}")


def _load_image(path: str, shot: Shot) -> Any:
    from diffusers.utils import load_image

    image = load_image(str(path))
    return image.resize((shot.width, shot.height)) if shot.width else image
