"""Writes the trained parts as a stock WanPipeline folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from ..model import STREAM as STREAM_FILE
from .text import MAX_LENGTH

#: How the bundled model wants to be called; every key but ``fps`` is an argument of ``WanPipeline.__call__``.
DEFAULTS = {
    "height": 64,
    "width": 80,
    "num_frames": 65,
    "num_inference_steps": 30,
    "guidance_scale": 4.0,
    "negative_prompt": "",
    "max_sequence_length": MAX_LENGTH,
    "fps": 16,
}
#: How the bundled model wants to stream. Sizes are in latent frames; the published ones are for a window of 21.
STREAM = {
    "steps": [1000, 750, 500, 250],
    "shift": 5.0,
    "renoise": "predicted",
    "policy": "deep_sink",
    "policies": {
        "window": {"window_frames": 12},
        "sink": {"window_frames": 12, "sink_frames": 3, "positions": "window"},
        "deep_sink": {"window_frames": 12, "sink_frames": 6},
        "deep_sink+pc": {"window_frames": 12, "sink_frames": 3, "pc_budget": 9, "pc_recent": 4},
        "ema_sink": {"window_frames": 12, "sink_frames": 3},
    },
}


def build_scheduler(shift: float = 3.0) -> UniPCMultistepScheduler:
    """UniPC on flow sigmas for a model that predicts clean latents."""
    return UniPCMultistepScheduler(
        prediction_type="sample", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000, solver_order=2
    )


def build_pipeline(
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: UMT5EncoderModel,
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    shift: float = 3.0,
) -> WanPipeline:
    """A WanPipeline of the given parts."""
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=build_scheduler(shift),
        transformer=transformer,
    )


def save_causal(transformer: WanTransformer3DModel, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Saves a transformer for streams, which is cast to ``dtype``, and its settings: ``causal/`` of a pipeline."""
    transformer.to(dtype).save_pretrained(folder, safe_serialization=True)
    _forget_origin(folder / "config.json")
    (folder / STREAM_FILE).write_text(json.dumps(STREAM, indent=2) + "\n")


def _forget_origin(config: Path) -> None:
    # The folder a part was loaded from says nothing to whoever gets it.
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n")


def save(pipeline: WanPipeline, folder: Path, defaults: dict | None = None, dtype: torch.dtype = torch.float16) -> None:
    """Saves ``pipeline`` to ``folder`` in ``dtype`` together with ``mini.json``, the default render settings."""
    parts = {name: getattr(pipeline, name) for name in ("text_encoder", "transformer", "vae")}
    before = {name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in parts.items()}
    for part in parts.values():
        part.to(dtype)
    try:
        pipeline.save_pretrained(folder, safe_serialization=True)
    finally:
        for name, part in parts.items():
            part.to(torch.float32)
            part.load_state_dict(before[name])
    for config in folder.rglob("config.json"):
        _forget_origin(config)
    (folder / "mini.json").write_text(json.dumps(DEFAULTS | (defaults or {}), indent=2) + "\n")
