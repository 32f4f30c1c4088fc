"""Published GNA configurations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One configuration: the token grid it was published for, and the schedule it was published with.

    The first ``dense_steps`` of ``steps`` ran dense. ``share``: attention's part of the dense run's time on a B200
    (GNA paper, table 1), or None.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...] | int = 1
    dense_steps: int = 0
    steps: int | None = None
    share: float | None = None


_COSMOS, _HUNYUAN, _PREDICT2 = (16, 44, 80), (30, 48, 80), (-1, 44, 80)

# GNA paper (arXiv 2504.16922) 4.2, 4.3, tables 2 to 6. Cosmos-Predict2: the public per-layer configuration of its
# sparse Video2World checkpoints, which were fine-tuned with these patterns and have no dense steps.
PRESETS = {
    "cosmos": Preset(_COSMOS, (16, 32, 48), (1, 8, 16), dense_steps=12, steps=35, share=0.587),
    "cosmos-fast": Preset(_COSMOS, (16, 24, 16), (1, 8, 16), dense_steps=12, steps=35, share=0.587),
    "hunyuan": Preset(_HUNYUAN, (18, 24, 24), (16, 8, 8), dense_steps=15, steps=50, share=0.607),
    "hunyuan-58": Preset(_HUNYUAN, (30, 40, 40), (1, 32, 8), dense_steps=0, steps=50, share=0.607),
    "flux-4k": Preset((256, 256), (80, 80), (16, 16), dense_steps=9, steps=28, share=0.518),
    "cosmos-predict2-a": Preset(_PREDICT2, (-1, 4, 16), (1, 1, 1), (1, 11, 5), steps=35),
    "cosmos-predict2-b": Preset(_PREDICT2, (-1, 12, 16), (1, 4, 1), (1, 1, 5), steps=35),
    "cosmos-predict2-c": Preset(_PREDICT2, (-1, 12, 24), (1, 4, 8), steps=35),
    "cosmos-predict2-d": Preset(_PREDICT2, (-1, 20, 40), (1, 4, 8), steps=35),
    "cosmos-predict2-e": Preset(_PREDICT2, (-1, 28, 56), (1, 4, 8), steps=35),
}
DEFAULT = PRESETS["hunyuan"]
