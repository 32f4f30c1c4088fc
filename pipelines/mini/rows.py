"""Training data and attention of the causal student: chunks as rows, each seeing the rows that a stream would remember.

A clip's chunks are put into the batch dimension of a stock transformer. Clean rows are what a stream remembers, noisy
rows what it is making; attention alone connects them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from ..streaming.rotation import Rotary, rotate
from .attention import TrainingAttention, attention
from .data import encode_shard
from .world import FRAMES, Scene, draw

#: Latent frames of a chunk, chunks of the start and of the later moment of every clip, and of the window.
CHUNK, START, LATER, WINDOW = 3, 4, 4, 4
#: Latent frames before the later moment that only warm up the causal encoder.
WARM = 5


@dataclass(frozen=True)
class Row:
    """One chunk in a training batch. ``chunk``: of the clip, those of the later moment after those of the start.

    ``seen``: the rows before it in its window, oldest first. ``noisy``: it is being made, and nobody sees it.
    """

    chunk: int
    seen: tuple[int, ...]
    noisy: bool


def rows_of(chunks: tuple[int, ...], sinks: int = 0, first: int = 0) -> tuple[Row, ...]:
    """Rows of a stream of ``chunks`` whose first ``sinks`` stay for ever, as its memory and as it makes them.

    Every chunk sees the sinks and the latest of the others, :data:`WINDOW` with itself. Those from index ``first`` on
    are also noisy rows.
    """

    def window(at: int) -> tuple[int, ...]:
        return tuple(range(min(sinks, at))) + tuple(range(max(at - (WINDOW - 1 - sinks), min(sinks, at)), at))

    clean = [Row(chunk, window(at), False) for at, chunk in enumerate(chunks[:-1])]
    return (*clean, *(Row(chunk, window(at), True) for at, chunk in enumerate(chunks) if at >= first))


_LATER = tuple(range(START, START + LATER))
#: What a stream remembers, by name: nothing at its first chunk, then the start of a clip; later the window without
#: sinks, with one chunk of them and with two.
MEMORIES: dict[str, tuple[Row, ...]] = {
    "first": rows_of((0,)),
    "start": rows_of(tuple(range(START))),
    "window": rows_of(_LATER, first=1),
    "sink": rows_of((0, *_LATER), sinks=1, first=2),
    "deep_sink": rows_of((0, 1, *_LATER), sinks=2, first=3),
}


class RowAttention(TrainingAttention):
    """Self-attention of rows: (batch x rows, tokens, C), every row to its window, whose places in time are 0, 1, ..

    as :class:`~dit_accel.pipelines.streaming.cache.StreamCache` has them. Cross-attention is the stock one.
    """

    def __init__(self, rotary: Rotary, grid: tuple[int, int]):
        self.rows: tuple[Row, ...] = ()
        cells = torch.arange(grid[0] * grid[1])
        frames = torch.arange(WINDOW * CHUNK).repeat_interleave(len(cells))
        cells = cells.repeat(WINDOW * CHUNK)
        self._tables = rotary.tables(frames, cells // grid[1], cells % grid[1], torch.float32)

    def to_itself(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Unrotated (batch x rows, tokens, H, D) to the result in that shape."""
        query, key, value = (x.unflatten(0, (-1, len(self.rows))) for x in (query, key, value))
        tokens = query.shape[2]
        tables = tuple(table.to(query.device) for table in self._tables)
        out = []
        for at, row in enumerate(self.rows):
            window = [*row.seen, at]
            end = len(window) * tokens
            part = lambda start, stop: tuple(table[start:stop] for table in tables)  # noqa: E731
            q = rotate(query[:, at], part(end - tokens, end))
            k = rotate(key[:, window].flatten(1, 2), part(0, end))
            v = value[:, window].flatten(1, 2)
            out.append(attention(q, k, v))
        return torch.stack(out, 1).flatten(0, 1)


def later_moment(scene: Scene) -> int:
    """First frame, even and within the first 30 seconds, of the later moment that ``scene`` is shown at."""
    return 2 * int(np.random.default_rng((scene.seed, 2)).integers(START * CHUNK, 240))


def _show(scene: Scene, latents: int, later: bool) -> np.ndarray:
    first = later_moment(scene) - 2 * WARM if later else 0
    return draw(scene, times=(first + np.arange(2 * latents - 1)) / (FRAMES - 1))


def encode_moments(vae: AutoencoderKLWan, scenes: list[Scene], mapper: Callable = map, batch: int = 8) -> Tensor:
    """Normalised latents of the start and of a later moment of every scene, float16 (N, C, 24, H/8, W/8)."""
    # Wan's encoder takes 1 + 4 n frames, 1 + 2 n latent ones here, and leaves out what is over.
    start = encode_shard(vae, scenes, mapper, batch, partial(_show, latents=START * CHUNK + 1, later=False))
    later = encode_shard(vae, scenes, mapper, batch, partial(_show, latents=WARM + LATER * CHUNK, later=True))
    return torch.cat([start[:, :, :-1], later[:, :, WARM:]], 2)
