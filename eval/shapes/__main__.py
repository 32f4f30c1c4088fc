"""``python -m dit_accel.eval.shapes``: renders a prompt list with the bundled model (or another folder) and grades
it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from .grade import DIMENSIONS
from .suite import prompts, run, table


def pipeline_renderer(model: Path | None = None, steps: int | None = None, guidance: float | None = None):
    """A renderer over the dense bundled pipeline, or the one in ``model``; it holds the pipeline as ``.pipeline``."""
    import torch
    from diffusers import WanPipeline
    from dit_accel.pipelines import mini

    settings = mini.defaults()
    settings.pop("fps")
    if steps is not None:
        settings["num_inference_steps"] = steps
    if guidance is not None:
        settings["guidance_scale"] = guidance
    pipeline = WanPipeline.from_pretrained(model or mini.path(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def render(prompt: str, seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        frames = pipeline(prompt, generator=generator, output_type="np", **settings).frames[0]
        return (np.asarray(frames) * 255 + 0.5).astype(np.uint8)

    render.pipeline = pipeline
    return render


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dit_accel.eval.shapes", description=__doc__)
    parser.add_argument("--prompts", default="shapes-120", help="mini-12, shapes-120 or a text file")
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--model", type=Path, help="a WanPipeline folder (default: the bundled one)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the bundled model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the bundled model's)")
    parser.add_argument("--dimensions", nargs="+", choices=DIMENSIONS, default=list(DIMENSIONS))
    parser.add_argument("--out", type=Path, help="JSON with all rows; an existing one is continued")
    parser.add_argument("--sheet", type=Path, help="PNG with nine frames of every video")
    args = parser.parse_args(argv)
    texts = prompts(args.prompts)[: args.limit]
    render = pipeline_renderer(args.model, args.steps, args.guidance)
    rows = []

    def seen(prompt: str, seed: int) -> np.ndarray:
        video = render(prompt, seed)
        rows.append(video[:: max(len(video) // 8, 1)][:9])
        return video

    began = time.monotonic()
    result = run(seen, texts, args.seeds, args.dimensions, args.out)
    for row in result["rows"]:
        scores = " ".join(f"{k}={v:.2f}" for k, v in row["scores"].items() if v is not None)
        print(f"{row['prompt']} (seed {row['seed']}): {scores}")
    print(table(result["summary"]))
    print(f"colour and motion both passed: {result['summary']['color_and_motion']} of {len(result['rows'])}")
    print(f"{time.monotonic() - began:.0f} s")
    if args.sheet and rows:
        from dit_accel.pipelines.mini.sheets import save_rows

        save_rows(rows, args.sheet)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
