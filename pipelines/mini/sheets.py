"""Pictures that show how training goes: reconstructions, samples, and the loss curve (the last needs matplotlib)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from ..streaming.config import preset
from ..streaming.steps import Steps
from .export import DEFAULTS, STREAM
from .vae import clip_batch, to_video

PROMPTS = (
    "a red circle moves left on a white background",
    "a large blue square moves up on a gray background",
    "two small yellow stars move right on a black background",
    "a green triangle stays still near the top on a striped cream background",
    "a purple cross moves diagonally to the lower right on a navy background",
    "an orange ring moves in a circle on a checkered gray background",
    "a cyan star rotates on a gradient black background",
    "a pink circle above a blue square moves right on a white background",
)


def save_rows(rows: list[np.ndarray], path: Path, scale: int = 2) -> None:
    """Writes rows of frames, each uint8 (T, H, W, 3), as one PNG with the frames of a row side by side."""
    import imageio.v3 as imageio

    image = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    imageio.imwrite(path, image.repeat(scale, 0).repeat(scale, 1))


@torch.no_grad()
def vae_sheet(vae: AutoencoderKLWan, path: Path) -> None:
    """Three drawn frames and their reconstructions per row."""
    video = clip_batch(np.random.default_rng(7), 8, 13).to(next(vae.parameters()).device)
    drawn, made = to_video(video), to_video(vae.decode(vae.encode(video).latent_dist.mode()).sample)
    save_rows([np.concatenate([a[::6], b[::6]]) for a, b in zip(drawn, made, strict=True)], path)


def render(pipeline: WanPipeline, prompts: list[str], seed: int = 0, **settings) -> np.ndarray:
    """uint8 (N, T, H, W, 3) of ``prompts``, each with its own generator seeded by ``seed`` and its place."""
    call = {k: v for k, v in (DEFAULTS | settings).items() if k != "fps"}
    call["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    frames = pipeline(list(prompts), generator=generators, output_type="np", **call).frames
    return (np.asarray(frames) * 255 + 0.5).astype(np.uint8)


def sample_sheet(pipeline: WanPipeline, path: Path, prompts: tuple[str, ...] = PROMPTS, steps: int = 10) -> None:
    """One row of nine frames per prompt, from the pipeline as users call it but with few steps."""
    pipeline.set_progress_bar_config(disable=True)
    videos = render(pipeline, list(prompts), num_inference_steps=steps)
    save_rows([video[::8] for video in videos], path)


def stream_sheet(pipeline: WanPipeline, path: Path, prompts: tuple[str, ...], seconds: float = 6.0) -> None:
    """One row of frames per prompt, evenly from the whole length, streamed as the bundled model is."""
    from ..streaming.pipeline import StreamingPipeline

    config = preset(STREAM["policy"], **STREAM["policies"][STREAM["policy"]])
    steps = Steps(tuple(STREAM["steps"]), STREAM["shift"], renoise=STREAM["renoise"])
    streaming = StreamingPipeline(pipeline, config, steps=steps, fps=DEFAULTS["fps"])
    size = {key: DEFAULTS[key] for key in ("height", "width", "max_sequence_length")}
    rows = []
    for seed, prompt in enumerate(prompts):
        frames = np.concatenate(list(streaming.stream(prompt, seconds=seconds, generator=seed, **size)))
        rows.append((frames[:: max(len(frames) // 12, 1)][:12] * 255 + 0.5).astype(np.uint8))
    save_rows(rows, path)


def loss_curve(folder: Path) -> None:
    """Writes ``loss.png`` from ``log.jsonl``; without matplotlib it does nothing, the log has the numbers."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    figure, axes = pyplot.subplots(1, len(stages), figsize=(5 * len(stages), 3.2), squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        points = [(line["step"], line["loss"]) for line in lines if line["stage"] == stage]
        steps, losses = np.array(points).T
        window = max(len(losses) // 50, 1)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axis.plot(steps, losses, alpha=0.25)
        axis.plot(steps[window - 1 :], smooth)
        axis.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=90)
    pyplot.close(figure)
