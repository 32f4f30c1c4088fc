"""Which of diffusers' own video models can stream on these caches, and why the others that go by chunks cannot."""

from __future__ import annotations

from typing import Any

#: Transformers with Wan's blocks, whose keys and values of clean frames depend on nothing that comes later.
HOSTS = ("WanTransformer3DModel", "SkyReelsV2Transformer3DModel")

#: Pipelines that stream, with the settings of their published examples where those are not Self-Forcing's. SkyReels-V2
#: (arXiv 2504.13074) was trained with a noise level per frame, so clean frames before noisy ones are nothing new to it;
#: it was not distilled and takes many steps and guidance.
PIPELINES: dict[str, dict[str, Any]] = {
    "WanPipeline": {},
    "SkyReelsV2DiffusionForcingPipeline": {
        "steps": 30, "shift": 8.0, "renoise": "predicted", "guidance_scale": 6.0,
    },
}  # fmt: skip

# By the start of a pipeline's or transformer's name: what it does instead of keeping the keys of a window.
_OTHERS = {
    "AnyFlowFAR": (
        "it re-encodes all earlier chunks at every chunk into a cache that grows with the clip, part of it in larger "
        "patches, so no policy can bound it; its own pipeline streams with use_kv_cache=True"
    ),
    "AnyFlow": "it makes a clip at once; AnyFlow's causal model has a pipeline of its own, AnyFlowFARPipeline",
    "SanaWM": (
        "its refiner has a bounded cache of its own with a sink that follows the window (sink_size, kv_max_frames), "
        "and it refines a given video instead of making one; call its pipeline"
    ),
    "Helios": (
        "it remembers downsampled latents of earlier chunks and its first frame as input tokens, not keys, so there is "
        "nothing to cache between its steps; its memory is constant already, call its pipeline"
    ),
    "HunyuanVideoFramepack": (
        "it remembers compressed latents of earlier sections as input tokens, not keys, and attends both ways; its "
        "memory is constant already, call its pipeline"
    ),
    "SkyReelsV2": (
        "only SkyReelsV2DiffusionForcingPipeline's weights know frames of different noise; a video or an image to "
        "start from goes to that one's stream"
    ),
    "Wan": "streams start from text, and from an image or a video as their first frames; use a text-to-video model",
}


def refusal(name: str) -> str:
    """Why the pipeline or transformer class ``name`` cannot stream, and what to use."""
    known = f"streams run on {' or '.join(PIPELINES)} (Self-Forcing, LongLive, Reward Forcing: Wan 2.1 with --weights)"
    reason = next((why for start, why in _OTHERS.items() if name.startswith(start)), None)
    return f"{name} cannot stream: {reason}; {known}" if reason else f"{name} makes no video by chunks; {known}"
