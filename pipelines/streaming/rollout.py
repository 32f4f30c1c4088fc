"""Latents without an end: Self-Forcing's rollout (arXiv 2506.08009, algorithm 2) over caches of constant size."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import UsageError
from .attention import Pass
from .cache import StreamCache
from .config import CacheConfig
from .host import Host
from .steps import Steps, noise_of


class Rollout:
    """One stream of latents, a chunk at a time.

    ``embeds``: text (B, L, D) by guidance branch, ``{"cond": ...}`` and with guidance ``"uncond"``; every branch has a
    cache of its own. ``size``: (channels, height, width) of the latents. ``predicts``: what the model's output is,
    ``"flow"`` (noise - clean) or ``"clean"``. A chunk that fails midway leaves the stream as it was before it.
    """

    def __init__(
        self,
        host: Host,
        config: CacheConfig,
        steps: Steps,
        embeds: Mapping[str, Tensor],
        *,
        size: tuple[int, int, int],
        seed: int = 0,
        guidance_scale: float = 1.0,
        predicts: str = "flow",
    ):
        self.host, self.config, self.steps = host, config, steps
        self.size, self.seed, self.guidance_scale, self.predicts = size, seed, guidance_scale, predicts
        self.embeds = dict(embeds)
        shape, first = host.shape, self.embeds["cond"]
        rows, columns = (side // patch for side, patch in zip(size[1:], shape.patch, strict=True))
        self.batch, self.device = first.shape[0], first.device
        self.caches = {
            branch: StreamCache(
                config, layers=shape.layers, heads=shape.heads, head_dim=shape.head_dim, grid=(rows, columns),
                rotary=shape.rotary, batch=self.batch, dtype=host.model.dtype, device=self.device,
            )
            for branch in self.embeds
        }  # fmt: skip
        self.chunks = 0
        self._recent: deque[tuple[int, Tensor]] = deque()

    @property
    def frames(self) -> int:
        """Latent frames made and absorbed so far."""
        return self.caches["cond"].end

    def bytes(self) -> int:
        """Bytes of all caches; the same at every length."""
        return sum(cache.bytes() for cache in self.caches.values())

    @torch.no_grad()
    def next(self) -> Tensor:
        """Make the next chunk: clean latents float32 (B, C, chunk_frames, h, w)."""
        shape = (self.batch, self.size[0], self.config.chunk_frames, *self.size[1:])
        sigmas = self.steps.sigmas
        self._begin(self.config.chunk_frames)
        try:
            x = self._noise(0, shape)
            for step, sigma in enumerate(sigmas):
                clean = self._clean(x, sigma, step)
                if step + 1 < len(sigmas):
                    x = self._renoised(x, clean, sigma, sigmas[step + 1], step + 1)
            self._remember(clean)
        except BaseException:
            self._abort()
            raise
        self.chunks += 1
        return clean

    @torch.no_grad()
    def absorb(self, latents: Tensor) -> None:
        """Remember given clean latents (B, C, F, h, w) as if they had been made, chunk by chunk.

        A remainder of F by the chunk size comes first, as a first frame of its own does in image-to-video models.
        """
        if latents.shape[:2] + latents.shape[3:] != (self.batch, *self.size):
            raise UsageError(
                f"the stream's latents are (batch, channels, frames, height, width) with {self.batch}, "
                f"{self.size[0]}, any, {self.size[1]}, {self.size[2]}; got {tuple(latents.shape)}"
            )
        frames, size = latents.shape[2], self.config.chunk_frames
        head = [frames % size] if frames % size else []
        for chunk in latents.split([*head, *[size] * (frames // size)], 2):
            self._begin(chunk.shape[2])
            try:
                self._remember(chunk.to(self.device, torch.float32))
            except BaseException:
                self._abort()
                raise

    def switch(self, embeds: Mapping[str, Tensor], *, recache: bool = True, keep_sinks: bool = True) -> None:
        """Go on with another text.

        ``recache`` runs the frames still in the window through the model with the new text (LongLive, 2509.22622,
        section 3.1), ``keep_sinks=False`` the sinks with them; otherwise the old text lives on until they leave.
        """
        if {b: tuple(e.shape) for b, e in embeds.items()} != {b: tuple(e.shape) for b, e in self.embeds.items()}:
            raise UsageError("the new text must come in the branches and shapes of the old one")
        self.embeds = dict(embeds)
        self.host.attention.forget()
        if not recache or not self._recent:
            return
        wanted = self.caches["cond"].tail_start
        again = [entry for entry in self._recent if entry[0] + entry[1].shape[2] > wanted]
        if not again and keep_sinks:
            return
        again = again or [self._recent[-1]]
        for cache in self.caches.values():
            cache.rewind(again[0][0], keep_sinks=keep_sinks)
        self._recent.clear()
        for _, latents in again:
            self.absorb(latents)

    def _begin(self, frames: int) -> None:
        try:
            for cache in self.caches.values():
                cache.begin(frames)
        except BaseException:
            self._abort()
            raise

    def _abort(self) -> None:
        self.host.attention.forget()
        for cache in self.caches.values():
            cache.abort()

    def _clean(self, x: Tensor, sigma: float, step: int) -> Tensor:
        """The clean prediction, float32, computed in float64 as the reference does."""
        out = {branch: self._forward(branch, x, sigma, step).double() for branch in self.caches}
        found = out["cond"]
        if "uncond" in out:
            found = out["uncond"] + self.guidance_scale * (found - out["uncond"])
        if self.predicts == "flow":
            found = x.double() - sigma * found
        return found.float()

    def _renoised(self, x: Tensor, clean: Tensor, sigma: float, target: float, step: int) -> Tensor:
        if self.steps.renoise == "fresh":
            noise = self._noise(step, tuple(x.shape))
        else:
            noise = (x - (1 - sigma) * clean) / sigma
        return (1 - target) * clean + target * noise

    def _remember(self, clean: Tensor) -> None:
        """The context pass: overwrite the chunk's keys and values by those of its clean latents, and commit."""
        start = self.frames
        for branch in self.caches:
            self._forward(branch, clean, self.steps.context_time / 1000, len(self.steps.times), context=True)
        for cache in self.caches.values():
            cache.commit()
        self._recent.append((start, clean))
        tail = self.caches["cond"].tail_start
        while len(self._recent) > 1 and self._recent[0][0] + self._recent[0][1].shape[2] <= tail:
            self._recent.popleft()

    def _forward(self, branch: str, x: Tensor, sigma: float, step: int, *, context: bool = False) -> Tensor:
        now = Pass(self.caches[branch], branch, self.chunks, step, len(self.steps.times), sigma, context)
        return self.host.forward(x, 1000 * sigma, self.embeds[branch], now)

    def _noise(self, step: int, shape: tuple[int, ...]) -> Tensor:
        return noise_of(self.seed, self.chunks, step, shape).to(self.device)
