"""The stream job: every prompt to a growing video file, under one cache policy or several to compare."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UnsupportedError, UsageError
from .. import sidecar
from ..geometry import geometry
from ..load import load, pick_device, pick_dtype
from ..model import ModelInfo, inspect_model
from ..outputs import explain, prepare_folder
from ..prompts import Prompt, slug
from .config import CacheConfig, preset
from .movie import MovieWriter
from .native import PIPELINES, refusal
from .pipeline import Stream, StreamingPipeline
from .reuse import FlashBlock
from .steps import Steps
from .weights import load_checkpoint

# Takes frames (T, H, W, 3) as they come, and in the end tells numbers.
Judge = Callable[[str], Any]
Listener = Callable[[str, dict[str, Any]], None]

# For models that were not distilled to few steps: more of them, without new noise in between.
UNDISTILLED = {"steps": 8, "renoise": "predicted"}
# Where neither job nor model says.
POLICY = "deep_sink"


@dataclass(frozen=True)
class StreamJob:
    """What to stream. ``None`` takes the model's own default; a prompt's own seed and size win over the job's.

    ``policies``: cache policies or presets by name, each with ``changes`` to its settings; several are compared. A
    policy's own name means the settings that the model was trained for, where it tells, else the published ones.
    ``weights``, ``lora``: a released causal checkpoint in the place of the model's own transformer. ``prompts_at``:
    prompts that take over, by second. ``steps``: their number, or times of 1000. ``reuse``: FlashBlock.
    """

    prompts: tuple[Prompt, ...]
    out: Path
    seconds: float = 30.0
    policies: tuple[str, ...] | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    weights: Path | None = None
    lora: Path | None = None
    lora_scale: float = 1.0
    prompts_at: Mapping[float, str] = field(default_factory=dict)
    image: str | None = None
    steps: int | tuple[float, ...] | None = None
    shift: float | None = None
    guidance: float | None = None
    seed: int = 42
    size: tuple[int, int] | None = None
    fps: int | None = None
    reuse: bool = False
    overwrite: bool = False
    device: str = "auto"
    dtype: str = "auto"


@dataclass
class Clip:
    """One file of a job and what became of it. ``judged``: what the judge told, empty without one."""

    prompt: Prompt
    policy: str
    config: CacheConfig
    file: Path
    size: tuple[int, int]
    stats: dict[str, Any] = field(default_factory=dict)
    judged: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt.text, "seed": self.prompt.seed, "policy": self.policy,
            "cache": self.config.to_dict(), "file": str(self.file),
            "width": self.size[0], "height": self.size[1], "interrupted": self.interrupted, **self.stats,
            **({"judged": self.judged} if self.judged else {}),
        }  # fmt: skip


@dataclass
class StreamPlan:
    """A checked job. ``causal``: the model or the weights were trained for streaming, as far as can be told.

    ``transformer``: folder of the model's transformer for streams, in the place of its own.
    """

    job: StreamJob
    info: ModelInfo
    steps: Steps
    guidance: float
    fps: int
    causal: bool
    clips: list[Clip]
    transformer: str | None = None


def plan_stream(job: StreamJob) -> StreamPlan:
    """Check everything that can be checked before weights are loaded. Raises ``UsageError``, ``UnsupportedError``."""
    _check(job)
    pick_dtype(job.dtype, pick_device(job.device))
    info = inspect_model(job.model)
    kind = info.pipeline_class.__name__
    if kind not in PIPELINES:
        raise UnsupportedError(f"{info.name}: {refusal(kind)}")
    if job.weights is not None and not job.weights.is_file():
        raise UsageError(f"no checkpoint at {job.weights}; give a .pt, .pth or .safetensors file")
    if job.lora is not None and job.weights is None:
        raise UsageError("--lora belongs to a checkpoint; give that with --weights")
    own = {} if job.weights else dict(info.defaults.get("stream", {}))
    configs = _configs(job, own)
    undistilled = job.weights is None and bool(info.defaults) and not own
    settings = {**PIPELINES[kind], **(UNDISTILLED if undistilled else {}), **own}
    steps = (settings.get("steps") or Steps().times) if job.steps is None else job.steps
    shift = settings.get("shift", 5.0) if job.shift is None else job.shift
    how = {"shift": shift, "renoise": settings.get("renoise", "fresh")}
    steps = Steps.even(steps, **how) if isinstance(steps, int) else Steps(tuple(steps), **how)
    guidance = settings.get("guidance_scale", info.defaults["guidance_scale"] if undistilled else 1.0)
    fps = job.fps or info.fps
    if round(job.seconds * fps) < 1:
        raise UsageError(f"{job.seconds:g} seconds are less than a frame at {fps} fps; give more --seconds")
    clips = []
    for number, prompt in enumerate(job.prompts, 1):
        default = (info.defaults.get("width", 832), info.defaults.get("height", 480))
        size, seed = prompt.size or job.size or default, job.seed if prompt.seed is None else prompt.seed
        geometry(info).check_size(*size, f"line {prompt.line}: size" if prompt.size else "--size")
        _check_seed(seed)
        for name, config in configs.items():
            stem = f"{number:04d}-{slug(prompt.text)}-s{seed}-{slug(name)}"
            clips.append(Clip(replace(prompt, seed=seed), name, config, job.out / f"{stem}.mp4", size))
    prepare_folder(job.out)
    taken = [clip.file.name for clip in clips if clip.file.exists()]
    if taken and not job.overwrite:
        raise UsageError(f"{taken[0]} is already in {job.out}; use --overwrite, or another -o")
    return StreamPlan(
        job, info, steps, guidance if job.guidance is None else job.guidance, fps, not undistilled,
        clips, own.get("transformer"),
    )  # fmt: skip


def _check(job: StreamJob) -> None:
    """Values that no model could make anything of."""
    if not 0 < job.seconds < math.inf:
        raise UsageError(f"a stream lasts more than 0 seconds; got {job.seconds:g}; give a finite number above 0")
    if job.fps is not None and not 1 <= job.fps <= 240:
        raise UsageError(f"--fps must lie in 1 ... 240; got {job.fps}")
    if job.guidance is not None and not math.isfinite(job.guidance):
        raise UsageError(f"--guidance must be a finite number; got {job.guidance}")
    late = [at for at in job.prompts_at if not 0 <= at < job.seconds]
    if late:
        raise UsageError(
            f"a prompt that takes over at {late[0]:g} s has no part in a stream of {job.seconds:g} s; give --then a "
            "second within it, or more --seconds"
        )
    for image in filter(None, (job.image, *(prompt.image for prompt in job.prompts))):
        if "://" not in image and not Path(image).is_file():
            raise UsageError(f"--image: no file at {image}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UsageError(f"a seed must lie in 0 ... 2^63 - 1; got {seed}")


def _configs(job: StreamJob, own: Mapping[str, Any]) -> dict[str, CacheConfig]:
    """The cache of each policy: the job's changes over the model's ``own`` settings over the published ones."""
    trained = own.get("policies", {})
    names = job.policies or (own.get("policy", POLICY),)
    return {name: preset(name, **{**trained.get(name, {}), **job.changes}) for name in names}


def run_stream(plan: StreamPlan, *, judge: Judge | None = None, listen: Listener | None = None) -> None:
    """Stream every clip of the plan to its file; clips are updated in place, also when this ends by an exception.

    ``judge``: makes, from a prompt, what takes the frames and tells numbers. ``listen`` hears ``("loading" | "weights"
    | "start" | "chunk" | "end", {...})``. An interruption leaves a whole file of what was made, and its record.
    """
    job, tell = plan.job, listen or (lambda event, data: None)
    tell("loading", {"model": plan.info.name})
    pipe = load(plan.info, dtype=job.dtype, device=job.device, transformer=plan.transformer)
    if job.weights is not None:
        report = load_checkpoint(pipe.transformer, job.weights, lora=job.lora, lora_scale=job.lora_scale)
        tell("weights", {"report": str(report)})
    for clip in plan.clips:
        tell("start", {"clip": clip})
        try:
            _one(pipe, plan, clip, judge(clip.prompt.text) if judge else None, tell)
        except OSError as error:
            raise explain(error, clip.file) from error
        tell("end", {"clip": clip})


def _one(pipe: Any, plan: StreamPlan, clip: Clip, judging: Any, tell: Listener) -> None:
    job, prompt = plan.job, clip.prompt
    streaming = StreamingPipeline(
        pipe, clip.config, steps=plan.steps, guidance_scale=plan.guidance, fps=plan.fps,
        attention=FlashBlock() if job.reuse else None,
    )  # fmt: skip
    stream = streaming.stream(
        prompt.text, seconds=job.seconds, width=clip.size[0], height=clip.size[1],
        negative_prompt=prompt.negative or "", changes=job.prompts_at, image=_image(prompt.image or job.image),
        generator=prompt.seed,
        max_sequence_length=plan.info.defaults.get("max_sequence_length", 512),
    )  # fmt: skip
    try:
        with MovieWriter(clip.file, clip.size, plan.fps) as movie:
            for frames in stream:
                movie.write(frames)
                if judging is not None:
                    judging.add((frames * 255).round().astype(np.uint8))
                clip.stats = _told(stream)
                tell("chunk", {"clip": clip, "stats": stream.stats})
    except BaseException:
        clip.interrupted = True
        raise
    finally:
        if judging is not None and stream.stats.frames:
            clip.judged = judging.verdict()
        with contextlib.suppress(OSError):
            sidecar.write(sidecar.sidecar_path(job.out, clip.file.stem), _record(plan, clip))


def _told(stream: Stream) -> dict[str, Any]:
    return {**asdict(stream.stats), "fps_made": stream.stats.fps}


def _record(plan: StreamPlan, clip: Clip) -> dict[str, Any]:
    record = {"schema": sidecar.SCHEMA, "model": plan.info.name, "steps": asdict(plan.steps), "fps": plan.fps}
    record |= {"guidance": plan.guidance, "weights": str(plan.job.weights) if plan.job.weights else None}
    record |= {"causal": plan.causal}
    return record | clip.to_dict() | {"versions": sidecar.versions()}


def _image(path: str | None) -> Any:
    if path is None:
        return None
    from diffusers.utils import load_image

    return load_image(path)
