"""FreeSwim (arXiv 2511.14712): video far above a model's native resolution, without training.

Every self-attention sees the model's native field of view (the inward window of ``GNA.inward``), which keeps detail; a
second, full-attention copy of the sample lends its cross-attention to it, which keeps the scene one. The copy never
has latents of its own: it starts every step from the windowed ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from ..diffusers import denoisers, family_of
from ..diffusers.hooks import engine_of
from ..errors import UnsupportedError, UsageError
from ..methods import GNA
from ..processors import Processor
from ..schedule import Schedule
from .freeswim_engine import Clock, Counts, DualEngine

# The released softmax scale of both paths is this many times the model's own, whatever the sizes: the root of the
# logarithm of 3120 tokens per frame to the base of 1560, the frame of 480 x 832 pixels.
SCALE_FACTOR = math.sqrt(math.log(3120, 1560))


@dataclass(frozen=True)
class _Traits:
    """``spatial``: the pipeline's attribute with the autoencoder's compression. ``batched``: guidance in one batch."""

    spatial: str
    batched: bool


_TRAITS = {"wan": _Traits("vae_scale_factor_spatial", False), "ltx": _Traits("vae_spatial_compression_ratio", True)}

# (height, width) in pixels by family and number of heads. Wan 2.1 1.3B and 14B as released with FreeSwim; the 5B model
# of Wan 2.2 and LTX, whose settings in the paper could not be found, take their own default sizes.
_NATIVE = {("wan", 12): (480, 832), ("wan", 40): (720, 1280), ("wan", 24): (704, 1280), ("ltx", 32): (512, 704)}


def native_size_of(model: nn.Module) -> tuple[int, int]:
    """(height, width) in pixels that a released model was trained for. Raises ``UsageError`` for any other."""
    heads = model.config.num_attention_heads
    known = _NATIVE.get((family_of(model).name, heads))
    if known is None:
        raise UsageError(
            f"the native size of this {type(model).__name__} with {heads} heads is not known; give "
            "native_size=(height, width) in pixels"
        )
    return known


class FreeSwimPipeline:
    """A pipeline that renders beyond its native size: call it like the pipeline it wraps.

        large = FreeSwimPipeline(pipe)(prompt=prompt, height=1088, width=1920).frames

    ``pipe``: a Wan or LTX pipeline of any task whose latents are the plain grid. ``cache_steps``: the full path runs
    on every n-th step, conditional pass only, and its cross-attention is reused in between (released default 2, their
    script suggests 5); None runs it in both passes of every step, which costs more than dense attention.
    ``native_size``: (height, width) in pixels that the model was trained for; None where it is known from the model.
    ``scale_factor``: softmax scale of both self-attentions over the model's own. ``cache_device``: where the cached
    outputs wait (``"cpu"`` spares layers x tokens x width of GPU memory). ``backend``: execution tier of the windows.

    Batches of any size are served. While a call runs the pipeline has no other accelerated attention; afterwards it
    is as it was. ``counts`` tells what the last call ran.
    """

    def __init__(
        self,
        pipe: Any,
        cache_steps: int | None = 2,
        *,
        native_size: tuple[int, int] | None = None,
        scale_factor: float = SCALE_FACTOR,
        cache_device: str | torch.device | None = None,
        backend: str = "auto",
    ):
        whole = isinstance(cache_steps, int) and not isinstance(cache_steps, bool)
        if cache_steps is not None and not (whole and cache_steps >= 1):
            raise UsageError(
                f"cache_steps is the number of steps that share one full path, 1 or more, or None for a full path in "
                f"both passes of every step; got {cache_steps!r}"
            )
        if not scale_factor > 0:
            raise UsageError(f"scale_factor must be positive (1.0 is the model's own scale); got {scale_factor}")
        self.pipe = pipe
        self.cache_steps = cache_steps
        self.native_size = native_size
        self.scale_factor = scale_factor
        self.cache_device = cache_device
        self.backend = backend
        self.counts = Counts()
        for model in denoisers(pipe):
            self.method(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped pipeline's call, its arguments and its result."""
        with self.attached() as engines:
            try:
                return self.pipe(*args, **kwargs)
            finally:
                self.counts = sum((engine.counts for engine in engines), Counts())

    def method(self, model: nn.Module) -> GNA:
        """The window of one denoiser, with its softmax scale."""
        family = family_of(model)
        traits = _TRAITS.get(family.name)
        if traits is None:
            raise UnsupportedError(
                f"FreeSwim serves models with separate self- and cross-attention, {' and '.join(_TRAITS)}; "
                f"{type(model).__name__} is of family {family.name!r}"
            )
        patch, native = model.config.patch_size, self.native_size or native_size_of(model)
        patch = patch if isinstance(patch, int) else patch[-1]
        window = GNA.inward(native, patch=getattr(self.pipe, traits.spatial) * patch)
        return replace(window, scale=self.scale_factor * model.config.attention_head_dim**-0.5)

    @contextmanager
    def attached(self) -> Iterator[list[DualEngine]]:
        """Both paths on the pipeline's denoisers while the context lasts, one :class:`DualEngine` each."""
        pipe, clock = self.pipe, Clock()
        models = denoisers(pipe)
        engines = [self._engine(model, clock) for model in models]
        before = [engine for engine in map(engine_of, models) if engine is not None]
        for engine in before:
            engine.detach()
        started = []
        try:
            for engine in engines:
                engine.attach()
                started.append(engine)
            yield engines
        finally:
            for engine in started:
                engine.detach()
            for engine in before:
                engine.attach()

    def report(self) -> dict[str, int]:
        """The counts of the last call."""
        return asdict(self.counts)

    def _engine(self, model: nn.Module, clock: Clock) -> DualEngine:
        pipe, family = self.pipe, family_of(model)
        processor = Processor(
            self.method(model), schedule=Schedule.none(), backend=self.backend, on_unsupported="error"
        )  # fmt: skip
        return DualEngine(
            model, family, processor, lambda: pipe.scheduler, clock=clock, cache_steps=self.cache_steps,
            guided=lambda: bool(getattr(pipe, "do_classifier_free_guidance", False)),
            batched=_TRAITS[family.name].batched, device=self.cache_device,
        )  # fmt: skip


def render_large(
    pipe: Any,
    prompt: str | list[str],
    *,
    size: tuple[int, int] = (1088, 1920),
    native_size: tuple[int, int] | None = None,
    strength: float = 0.7,
    flow_shift: float = 9.0,
    cache_steps: int | None = 2,
    backend: str = "auto",
    output_type: str = "np",
    **settings: Any,
) -> Any:
    """FreeSwim's whole recipe for Wan: render at the native size, enlarge the frames, and refine them at ``size``.

    ``pipe``: a ``WanPipeline``. ``size``, ``native_size``: (height, width) in pixels. The refinement is the stock
    video-to-video pipeline over the same parts, from noise level ``strength`` on, with its own ``flow_shift``. All
    further ``settings`` (steps, guidance, number of frames, generator, ...) go to both. Defaults as released.
    Returns the frames in ``output_type``. Raises ``UnsupportedError`` for another pipeline or one with two denoisers.
    """
    from diffusers import WanPipeline, WanVideoToVideoPipeline

    if not isinstance(pipe, WanPipeline) or getattr(pipe, "transformer_2", None) is not None:
        raise UnsupportedError(
            "render_large refines with diffusers' WanVideoToVideoPipeline, which exists for a WanPipeline with one "
            f"transformer; got {type(pipe).__name__}. For others call FreeSwimPipeline(pipe)(height=..., width=...)"
        )
    config = pipe.scheduler.config
    shift = {"flow_shift" if "flow_shift" in config else "shift": flow_shift}
    refine = WanVideoToVideoPipeline(
        tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, transformer=pipe.transformer, vae=pipe.vae,
        scheduler=type(pipe.scheduler).from_config(config, **shift),
    )  # fmt: skip
    for name in ("vae_scale_factor_spatial", "vae_scale_factor_temporal", "video_processor"):
        # diffusers 0.42 derives these from the number of downsamplings here, which patchifying autoencoders exceed.
        setattr(refine, name, getattr(pipe, name))
    refine.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    large = FreeSwimPipeline(refine, cache_steps, native_size=native_size, backend=backend)
    height, width = native_size or native_size_of(pipe.transformer)
    frames = pipe(prompt=prompt, height=height, width=width, output_type="pt", **settings).frames
    video = torch.nn.functional.interpolate(frames.flatten(0, 1).float(), size=size, mode="bilinear")
    settings.pop("num_frames", None)
    return large(
        prompt=prompt, video=video.unflatten(0, frames.shape[:2]), height=size[0], width=size[1], strength=strength,
        output_type=output_type, **settings,
    ).frames  # fmt: skip
