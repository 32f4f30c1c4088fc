"""A render job as the user states it, and the shots it resolves to: one per prompt, every setting decided."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError, UsageError
from .acceleration import Acceleration, Choice, choose
from .geometry import Geometry, geometry
from .model import ModelInfo
from .options import LoadOptions
from .prompts import Prompt, slug

DEFAULT_SEED = 42


@dataclass(frozen=True)
class Job:
    """What to render. ``None`` takes the model's own default; a prompt's own settings win over the job's.

    ``size``: (width, height) in pixels. ``dtype``: ``"auto"`` is bfloat16 on a GPU and float32 on a CPU.
    ``repeats``: timed runs per side of a comparison. ``frames_dir``: folder for PNG frames besides the video.
    """

    prompts: tuple[Prompt, ...]
    out: Path
    model: str | None = None
    accel: Acceleration = field(default_factory=Acceleration)
    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    image: str | None = None
    seed: int = DEFAULT_SEED
    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: int | None = None
    gif: bool = False
    frames_dir: Path | None = None
    compare: bool = False
    repeats: int = 1
    resume: bool = False
    overwrite: bool = False
    device: str = "auto"
    dtype: str = "auto"
    load: LoadOptions = field(default_factory=LoadOptions)


@dataclass(frozen=True)
class Shot:
    """One output: file ``stem``, the arguments of the pipeline call, and how attention runs."""

    number: int
    stem: str
    prompt: str
    seed: int
    width: int | None
    height: int | None
    frames: int
    steps: int
    fps: int
    image: str | None
    call: dict[str, Any]
    choice: Choice

    @property
    def is_video(self) -> bool:
        return self.frames > 1

    @property
    def suffix(self) -> str:
        return ".mp4" if self.is_video else ".png"

    def settings(self, job: Job, info: ModelInfo, *, weights: str, device: str, dtype: str) -> dict[str, Any]:
        """Everything that decides the files of this shot, as plain JSON values; the digest is over these."""
        return {
            "model": info.name,
            "weights": weights,
            "pipeline": info.pipeline_class.__name__,
            "prompt": self.prompt,
            "seed": self.seed,
            "width": self.width,
            "height": self.height,
            "frames": self.frames,
            "steps": self.steps,
            "fps": self.fps,
            **{key: value for key, value in sorted(self.call.items()) if key not in _NAMED},
            "image": _file_digest(self.image) if self.image else None,
            "attention": self.choice.processor.to_dict() if self.choice.processor else None,
            "device": device,
            "dtype": dtype,
            "compare": job.compare,
            "gif": job.gif and self.is_video,
            "frames_dir": job.frames_dir is not None,
            **job.load.settings(),
        }


_NAMED = {"prompt", "width", "height", "num_frames", "num_inference_steps", "image"}


def digest(settings: dict[str, Any]) -> str:
    """A short, stable digest of a settings record."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def resolve(job: Job, info: ModelInfo) -> list[Shot]:
    """Decide every setting of every prompt and check all of them. No weight is read.

    Raises ``UsageError`` or ``UnsupportedError`` for the first value that cannot work, naming the line of a
    prompt that set it.
    """
    geo = geometry(info)
    _check_job(job, info)
    return [_shot(job, info, geo, number, prompt) for number, prompt in enumerate(job.prompts, 1)]


def _shot(job: Job, info: ModelInfo, geo: Geometry, number: int, prompt: Prompt) -> Shot:
    def flag(name: str, own: Any) -> str:
        return f"line {prompt.line}: {name}" if own is not None else f"--{name}"

    size = _first(prompt.size, job.size)
    width, height = size or _default_size(info, geo)
    if size:
        geo.check_size(width, height, flag("size", prompt.size))
    frames = _first(prompt.frames, job.frames)
    if frames is not None:
        if info.is_video:
            geo.check_frames(frames, flag("frames", prompt.frames))
        elif frames != 1:
            raise UsageError(
                f"{flag('frames', prompt.frames)} {frames}: {info.name} is an image model and makes 1 frame"
            )
    frames = _first(frames, _default(info, "num_frames") if info.is_video else 1, 1)
    steps = _first(prompt.steps, job.steps, _default(info, "num_inference_steps"), 50)
    if steps < 1:
        raise UsageError(f"{flag('steps', prompt.steps)} must be at least 1; got {steps}")
    seed = _first(prompt.seed, job.seed)
    if not 0 <= seed < 2**63:
        raise UsageError(f"{flag('seed', prompt.seed)} must lie in 0 ... 2^63 - 1; got {seed}")
    image = _first(prompt.image, job.image)
    if image is not None and not Path(image).is_file():
        raise UsageError(f"{flag('image', prompt.image)}: no file at {image}")
    wanted = {
        "prompt": prompt.text,
        "negative_prompt": _first(prompt.negative, job.negative, _default(info, "negative_prompt")),
        "width": width,
        "height": height,
        "num_frames": frames if info.is_video else None,
        "num_inference_steps": steps,
        "guidance_scale": _first(prompt.guidance, job.guidance, _default(info, "guidance_scale")),
        "max_sequence_length": info.defaults.get("max_sequence_length"),
        "image": image,
    }
    stated = {"negative_prompt": (prompt.negative, job.negative), "guidance_scale": (prompt.guidance, job.guidance)}
    _check_accepted(info, {name: _first(*values) for name, values in stated.items()})
    words = _default(info, "max_sequence_length") if info.family and info.family.joint else 0
    layout = geo.layout(width, height, frames, words or 0) if width else None
    try:
        choice = choose(job.accel, info, layout=layout, frames=frames, steps=steps)
    except UnsupportedError as error:
        told = f"{width}x{height} pixels, " if width else ""
        raise UnsupportedError(f"{error} (for {told}{frames} frame{'s' * (frames > 1)} of {info.name})") from None
    if job.compare and choice.processor is None:
        raise UsageError(
            f"--compare sets a method against dense attention, and line {prompt.line} runs dense"
            + "".join(f" ({note})" for note in choice.notes)
        )
    return Shot(
        number=number,
        stem=f"{number:04d}-{slug(prompt.text)}-s{seed}",
        prompt=prompt.text,
        seed=seed,
        width=width,
        height=height,
        frames=frames,
        steps=steps,
        fps=_first(job.fps, info.fps),
        image=image,
        call={k: v for k, v in wanted.items() if v is not None and k in info.call_arguments},
        choice=choice,
    )


def _check_job(job: Job, info: ModelInfo) -> None:
    if job.fps is not None and not 1 <= job.fps <= 240:
        raise UsageError(f"--fps must lie in 1 ... 240; got {job.fps}")
    if job.guidance is not None and not math.isfinite(job.guidance):
        raise UsageError(f"--guidance must be a finite number; got {job.guidance}")
    if job.repeats < 1:
        raise UsageError(f"--repeats must be at least 1; got {job.repeats}")


def _check_accepted(info: ModelInfo, given: dict[str, Any]) -> None:
    """An argument that the pipeline would never see must not be dropped in silence."""
    for name, value in given.items():
        if value is not None and name not in info.call_arguments:
            raise UsageError(f"{info.pipeline_class.__name__} takes no {name}; leave it out (got {value!r})")


def _default(info: ModelInfo, name: str) -> Any:
    if name in info.defaults:
        return info.defaults[name]
    value = info.call_arguments.get(name)
    return None if value is inspect.Parameter.empty else value


def _default_size(info: ModelInfo, geo: Geometry) -> tuple[int | None, int | None]:
    """(width, height) of the model's own default, or (None, None): the pipeline then decides."""
    width, height = _default(info, "width"), _default(info, "height")
    if width and height:
        return width, height
    side = info.transformer.get("sample_size")
    if isinstance(side, int) and geo.spatial and not info.is_video:
        return side * geo.spatial, side * geo.spatial
    return None, None


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
