"""Endless video from a Wan pipeline, as an iterator of frames."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UnsupportedError, UsageError
from .attention import WindowAttention
from .config import CacheConfig, preset
from .decode import StreamingDecoder
from .host import Host
from .rollout import Rollout
from .steps import Steps


@dataclass
class StreamStats:
    """``first_frame_seconds``: from the call to the first frames, text included. ``seconds``: spent making frames, the
    caller's own time between them left out. ``cache_bytes``: of all guidance branches."""

    frames: int = 0
    latent_frames: int = 0
    chunks: int = 0
    forwards: int = 0
    seconds: float = 0.0
    first_frame_seconds: float | None = None
    cache_bytes: int = 0

    @property
    def fps(self) -> float | None:
        """Frames per second of work."""
        return self.frames / self.seconds if self.seconds else None


class Stream(Iterator[np.ndarray]):
    """A clip under way: every ``next`` makes one chunk and gives its frames, float32 (T, H, W, 3) in [0, 1].

    :meth:`switch` changes the prompt from the next chunk on. ``stats`` tells what has been made.
    """

    def __init__(
        self,
        owner: StreamingPipeline,
        rollout: Rollout,
        decoder: StreamingDecoder,
        *,
        prefix: Tensor | None,
        limit: int | None,
        changes: Mapping[float, str],
        encode: Any,
        started: float,
    ):
        self.rollout, self.decoder = rollout, decoder
        self.stats = StreamStats(cache_bytes=rollout.bytes())
        self._owner, self._prefix, self._limit, self._encode, self._started = owner, prefix, limit, encode, started
        self._changes = sorted((round(at * owner.fps), text) for at, text in changes.items())

    def __next__(self) -> np.ndarray:
        if self._limit is not None and self.stats.frames >= self._limit:
            raise StopIteration
        begun, before = time.perf_counter(), self._owner.host.forwards
        while self._changes and self._changes[0][0] <= self.stats.frames:
            self.switch(self._changes.pop(0)[1])
        with self._owner.host.attached():
            if self._prefix is not None:
                self.rollout.absorb(self._prefix)
                latents, self._prefix = self._prefix, None
            else:
                latents = self.rollout.next()
        pixels = self.decoder(latents)
        frames = (pixels[0].float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).cpu().numpy()
        if self._limit is not None:
            frames = frames[: self._limit - self.stats.frames]
        stats, now = self.stats, time.perf_counter()
        stats.frames += len(frames)
        stats.chunks, stats.latent_frames = self.rollout.chunks, self.rollout.frames
        stats.forwards += self._owner.host.forwards - before
        stats.seconds += now - begun
        stats.cache_bytes = self.rollout.bytes()
        if stats.first_frame_seconds is None:
            stats.first_frame_seconds = now - self._started
        return frames

    def switch(self, prompt: str, *, recache: bool = True, keep_sinks: bool = True) -> None:
        """Go on with another prompt; see :meth:`Rollout.switch`."""
        with self._owner.host.attached():
            self.rollout.switch(self._encode(prompt), recache=recache, keep_sinks=keep_sinks)


class StreamingPipeline:
    """Streams video from a ``WanPipeline`` whose transformer makes frames causally, chunk by chunk, or one of
    SkyReels-V2's diffusion forcing.

        for frames in StreamingPipeline(pipe, "deep_sink").stream("a red ball rolls", seconds=60):
            ...

    ``cache``: a :class:`CacheConfig`, or the name of a policy or preset. ``steps``: noise levels of a chunk
    (default: Self-Forcing's four). ``guidance_scale`` above 1 runs a second branch with a cache of its own; distilled
    models need none. ``attention``: how a window is attended to (default: densely). ``fps``: of the clip, to count
    seconds in. Memory is constant in the clip's length. Between two chunks the pipeline is as it was, and several
    streams can take turns on it. Raises ``UnsupportedError`` for a pipeline that cannot stream.
    """

    def __init__(
        self,
        pipe: Any,
        cache: CacheConfig | str = "deep_sink",
        *,
        steps: Steps | None = None,
        guidance_scale: float = 1.0,
        attention: WindowAttention | None = None,
        fps: float = 16,
    ):
        if getattr(pipe, "transformer_2", None) is not None:
            raise UnsupportedError("a stream runs one transformer, and this pipeline has two; set transformer_2=None")
        self.host = Host(pipe.transformer, attention, fps)
        channels, latent = pipe.transformer.config.in_channels, pipe.vae.config.z_dim
        if channels != latent:
            raise UnsupportedError(
                f"this transformer takes {channels} channels and the latents have {latent}: it expects an image beside "
                "them. Streams start from text, and from an image as their first frame"
            )
        StreamingDecoder(pipe.vae)
        self.pipe, self.steps, self.guidance_scale, self.fps = pipe, steps or Steps(), guidance_scale, fps
        self.config = preset(cache) if isinstance(cache, str) else cache
        kind = pipe.scheduler.config.get("prediction_type", "flow_prediction")
        known = {"flow_prediction": "flow", "sample": "clean"}
        if kind not in known:
            raise UnsupportedError(f"a stream needs a model that predicts flow or clean latents; this one: {kind!r}")
        self.predicts = known[kind]

    def stream(
        self,
        prompt: str,
        *,
        seconds: float | None = None,
        frames: int | None = None,
        height: int = 480,
        width: int = 832,
        negative_prompt: str = "",
        changes: Mapping[float, str] | None = None,
        image: Any = None,
        video: Any = None,
        generator: torch.Generator | int = 0,
        max_sequence_length: int = 512,
    ) -> Stream:
        """Frames of ``prompt``, chunk by chunk, ``seconds`` long or ``frames`` (default: until the caller stops).

        ``changes``: prompts that take over at a time in seconds. ``image`` (anything diffusers takes as one) or
        ``video`` (frames in a list or array, 1 + n times the autoencoder's temporal factor) start the clip and are its
        first frames. ``generator``: a seed, or a generator of which the seed is taken; noise depends on it, the number
        of the chunk and the step alone. Nothing runs before the first frames are asked for, except the text encoder.
        """
        started = time.perf_counter()
        if (seconds is not None) and (frames is not None):
            raise UsageError("give seconds or frames, not both")
        limit = frames if seconds is None else round(seconds * self.fps)
        if limit is not None and limit < 1:
            raise UsageError(f"a stream has at least one frame; got {limit}")
        pipe, patch = self.pipe, self.host.shape.patch
        unit = [pipe.vae_scale_factor_spatial * side for side in patch]
        if height % unit[0] or width % unit[1]:
            raise UsageError(f"height and width are multiples of {unit[0]} and {unit[1]}; got {height}x{width}")
        size = (pipe.vae.config.z_dim, height // pipe.vae_scale_factor_spatial, width // pipe.vae_scale_factor_spatial)

        def encode(text: str) -> dict[str, Tensor]:
            return self._encode(text, negative_prompt, max_sequence_length)

        seed = generator.initial_seed() if isinstance(generator, torch.Generator) else int(generator)
        rollout = Rollout(
            self.host, self.config, self.steps, encode(prompt), size=size, seed=seed,
            guidance_scale=self.guidance_scale, predicts=self.predicts,
        )  # fmt: skip
        return Stream(
            self, rollout, StreamingDecoder(pipe.vae), prefix=self._prefix(image, video, height, width), limit=limit,
            changes=changes or {}, encode=encode, started=started,
        )  # fmt: skip

    @torch.no_grad()
    def _encode(self, prompt: str, negative: str, length: int) -> dict[str, Tensor]:
        guided = self.guidance_scale > 1
        cond, uncond = self.pipe.encode_prompt(
            prompt, negative, do_classifier_free_guidance=guided, max_sequence_length=length,
            device=self.pipe._execution_device,
        )  # fmt: skip
        return {"cond": cond, "uncond": uncond} if guided else {"cond": cond}

    @torch.no_grad()
    def _prefix(self, image: Any, video: Any, height: int, width: int) -> Tensor | None:
        """Normalised latents (1, C, F, h, w) of the frames that start the clip."""
        if image is None and video is None:
            return None
        if image is not None and video is not None:
            raise UsageError("give image or video, not both")
        pipe, vae = self.pipe, self.pipe.vae
        if image is not None:
            pixels = pipe.video_processor.preprocess(image, height=height, width=width)[:, :, None]
        else:
            pixels = pipe.video_processor.preprocess_video(video, height=height, width=width)
        factor = vae.config.scale_factor_temporal
        if (pixels.shape[2] - 1) % factor:
            raise UsageError(f"a video that starts a stream has 1 + {factor} n frames; got {pixels.shape[2]}")
        z = vae.encode(pixels.to(pipe._execution_device, vae.dtype)).latent_dist.mode()
        mean, std = (
            torch.tensor(v, dtype=z.dtype, device=z.device).view(1, -1, 1, 1, 1)
            for v in (vae.config.latents_mean, vae.config.latents_std)
        )
        return ((z - mean) * (1.0 / std)).float()
