"""Videos drawn and encoded once: shards of cached latents, and the batches of chosen frames that training takes from
them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from .captions import caption
from .loop import save_atomic
from .model import choose_frames
from .vae import to_tensor
from .world import Scene, draw, random_scene

#: Videos per shard file.
SHARD = 64


def shard_path(folder: Path, index: int) -> Path:
    """File of shard ``index``."""
    return folder / f"shard_{index:05d}.pt"


def shard_scenes(seed: int, index: int, count: int = SHARD) -> list[Scene]:
    """The scenes of one shard; they depend on (seed, index) only."""
    rng = np.random.default_rng((seed, index))
    return [random_scene(rng) for _ in range(count)]


@torch.no_grad()
def encode_shard(
    vae: AutoencoderKLWan,
    scenes: list[Scene],
    mapper: Callable = map,
    batch: int = 8,
    show: Callable[[Scene], np.ndarray] = draw,
) -> torch.Tensor:
    """Normalised latents, float16 (N, C, T', H/8, W/8), of the clips that ``show`` draws of ``scenes`` (default: the
    full ones), through ``mapper``."""
    device = next(vae.parameters()).device
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    result = []
    clips = list(mapper(show, scenes))
    for start in range(0, len(scenes), batch):
        z = vae.encode(to_tensor(np.stack(clips[start : start + batch])).to(device)).latent_dist.mode().float().cpu()
        result.append(((z - mean) / std).half())
    return torch.cat(result)


def encode_shards(
    vae: AutoencoderKLWan,
    folder: Path,
    shards: int,
    seed: int,
    deadline: float | None = None,
    size: int = SHARD,
    workers: int = 0,
    batch: int = 8,
    encode: Callable[..., torch.Tensor] = encode_shard,
) -> bool:
    """Writes the missing shards in order; returns whether all exist. ``deadline`` is in ``time.monotonic`` seconds,
    ``workers`` processes draw (0: this one), ``batch`` clips are encoded at once by ``encode``."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers else nullcontext()
    with pool as executor:
        for index in range(shards):
            path = shard_path(folder, index)
            if path.exists():
                continue
            if deadline is not None and time.monotonic() > deadline:
                return False
            scenes = shard_scenes(seed, index, size)
            latents = encode(vae, scenes, executor.map if executor else map, batch)
            save_atomic({"latents": latents, "scenes": [asdict(s) for s in scenes]}, path)
    return True


class Latents:
    """Cached shards in memory. The shards that a step may use depend on the step only, never on how many happen to
    exist."""

    def __init__(self, folder: Path, shards: int, first: int, grow: int, patience: float = 1800.0) -> None:
        """``first`` shards are used at step 0 and one more every ``grow`` steps; a missing one is waited for."""
        self.folder, self.shards, self.first, self.grow, self.patience = folder, shards, first, grow, patience
        self._loaded: list[tuple[torch.Tensor, list[Scene]]] = []

    def _ensure(self, count: int) -> None:
        while len(self._loaded) < count:
            path = shard_path(self.folder, len(self._loaded))
            waited = 0.0
            while not path.exists():
                if waited > self.patience:
                    raise TimeoutError(
                        f"{path} did not appear within {self.patience:.0f} s; run the same command with "
                        "`--stage encode`, beside this one or before it"
                    )
                time.sleep(1.0)
                waited += 1.0
            state = torch.load(path, weights_only=True)
            scenes = [Scene(**{**s, "second": tuple(s["second"]) if s["second"] else None}) for s in state["scenes"]]
            self._loaded.append((state["latents"], scenes))

    def batch(
        self, step: int, batch: int, frames: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Latents (B, C, F, h, w) float32, their frame indices (B, F) and captions in random phrasings."""
        count = min(self.first + step // max(self.grow, 1), self.shards)
        self._ensure(count)
        total = self._loaded[0][0].shape[2]
        chosen = choose_frames(batch, total, frames, generator)
        size = len(self._loaded[0][1])
        picks = torch.randint(count * size, (batch,), generator=generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        clips, texts = [], []
        for pick, index in zip(picks.tolist(), chosen, strict=True):
            latents, scenes = self._loaded[pick // size]
            clips.append(latents[pick % size][:, index].float())
            texts.append(caption(scenes[pick % size], rng))
        return torch.stack(clips), chosen, texts
