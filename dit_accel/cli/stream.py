"""``dit-accel stream``: prompts to long videos, written as they are made."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

HELP = "stream every prompt of a file to a video of any length"
DESCRIPTION = """Stream every prompt of a file to an mp4 of any length on a cache of constant size. The file can be
watched while it is being written, and what was made before an interruption stays."""
EXAMPLES = """policies: window, sink, deep_sink, deep_sink+pc, ema_sink; presets: self_forcing, longlive, deep_forcing,
reward_forcing, anti_drift

examples:
  dit-accel stream prompt.txt --seconds 30 --policy deep_sink
  dit-accel stream prompt.txt --seconds 30 --compare-policies
  dit-accel stream prompt.txt --seconds 60 --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --weights self_forcing_dmd.pt
  dit-accel stream prompt.txt --seconds 60 --then "30:the dog jumps into the water"
"""

ALL = "window,sink,deep_sink,deep_sink+pc,ema_sink"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompts", metavar="PROMPTS", help="text or JSONL file with the prompts, as for render")
    add("--seconds", type=float, default=30.0, metavar="N", help="length of every video (default: 30)")
    add("-o", "--out", metavar="DIR", default="out", help="folder for the results (default: out)")

    add = parser.add_argument_group("cache, in latent frames (default: the model's, else as published)").add_argument
    add("--policy", metavar="NAME", help="cache policy or preset (default: the model's, else deep_sink)")
    add("--compare-policies", nargs="?", const=ALL, metavar="A,B",
        help=f"stream under several policies and compare them (default: {ALL})")  # fmt: skip
    add("--window", type=int, metavar="N", help="frames that are seen, sinks and the chunk included")
    add("--sinks", type=int, metavar="N", help="first frames that are kept for ever")
    add("--chunk", type=int, metavar="N", help="frames made at a time (default: 3)")

    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="DIR|ID", help="WanPipeline folder or hub id (default: the bundled model)")
    add("--weights", metavar="FILE", help="causal checkpoint for its transformer (.pt, .safetensors)")
    add("--lora", metavar="FILE", help="adapter of the checkpoint")
    add("--lora-scale", type=float, default=1.0, metavar="S", help="alpha / rank of the adapter (default: 1)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: bfloat16 on a GPU, else float32)")
    add("--reuse", action="store_true", help="reuse attention to the history within a chunk (FlashBlock), all heads")

    add = parser.add_argument_group("sampling (default: the model's own)").add_argument
    add(
        "--steps", metavar="N|T,T", help="denoising steps per chunk, or their times of 1000 (default: 1000,750,500,250)"
    )
    add("--shift", type=float, metavar="S", help="shift of the times towards noise (default: 5)")
    add("--guidance", type=float, metavar="G", help="guidance scale; 1 is none, as distilled models want")
    add("--then", action="append", default=[], metavar="SECOND:TEXT", help="a prompt that takes over; repeatable")
    add("--image", metavar="FILE", help="first frame")
    add("--seed", type=int, default=42, metavar="N", help="seed of the noise (default: 42)")
    add("--size", metavar="WxH", help="width x height in pixels")

    add = parser.add_argument_group("output").add_argument
    add("--fps", type=int, metavar="N", help="frames per second of the file (default: the model family's)")
    add("--overwrite", action="store_true", help="stream again what exists")
    add("--json", action="store_true", help="JSON to stdout, text to stderr")
    add("--quiet", action="store_true", help="no text but errors and notes, no progress line")


def run(args: argparse.Namespace) -> int:
    from .console import Console, calm_libraries, emit, table

    console = Console(json=args.json, quiet=args.quiet)
    job = _job(args)
    from ..pipelines.streaming.job import plan_stream, run_stream

    calm_libraries()
    plan = plan_stream(job)
    if not plan.causal:
        console.note(
            "note: this model was not trained to make frames causally; give a causal checkpoint with --weights for "
            "quality"
        )
    interrupted = False
    try:
        run_stream(plan, judge=_judge(plan.fps) if args.compare_policies else None, listen=_show(console))
    except KeyboardInterrupt:
        interrupted = True
        console.note("\ninterrupted; what was made can be played")
    if args.compare_policies:
        for line in table(_rows(plan.clips), right=frozenset(range(1, 10))):
            console.say(line)
    if args.json:
        clips = [clip.to_dict() for clip in plan.clips if clip.stats]
        emit("stream", {"ok": not interrupted, "interrupted": interrupted, "clips": clips})
    return 130 if interrupted else 0


def _job(args: argparse.Namespace) -> Any:
    from ..pipelines.prompts import parse_size, read_prompts

    # Reading the prompts first reports a wrong path before torch has been loaded.
    prompts = tuple(read_prompts(args.prompts))
    changes = {"window_frames": args.window, "sink_frames": args.sinks, "chunk_frames": args.chunk}
    policies = args.compare_policies or args.policy or ""
    from ..pipelines.streaming.job import StreamJob

    return StreamJob(
        prompts=prompts,
        out=Path(args.out),
        seconds=args.seconds,
        policies=tuple(name.strip() for name in policies.split(",") if name.strip()) or None,
        changes={name: value for name, value in changes.items() if value is not None},
        model=args.model,
        weights=Path(args.weights) if args.weights else None,
        lora=Path(args.lora) if args.lora else None,
        lora_scale=args.lora_scale,
        prompts_at=dict(_then(text) for text in args.then),
        image=args.image,
        steps=_steps(args.steps),
        shift=args.shift,
        guidance=args.guidance,
        seed=args.seed,
        size=parse_size(args.size) if args.size else None,
        fps=args.fps,
        reuse=args.reuse,
        overwrite=args.overwrite,
        device=args.device,
        dtype=args.dtype,
    )


def _steps(text: str | None) -> int | tuple[float, ...] | None:
    from ..errors import UsageError

    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(",")) if "," in text else int(text)
    except ValueError:
        raise UsageError(f"--steps is a number (4) or times of 1000 (1000,750,500,250); got {text!r}") from None


def _then(text: str) -> tuple[float, str]:
    from ..errors import UsageError

    second, colon, prompt = text.partition(":")
    try:
        at = float(second)
    except ValueError:
        at = -1.0
    if not colon or at < 0 or not prompt.strip():
        raise UsageError(f'--then is SECOND:TEXT, like --then "30:the dog jumps"; got {text!r}')
    return at, prompt.strip()


def _judge(fps: float) -> Any:
    from ..eval.streaming import StreamJudge

    return lambda prompt: StreamJudge(prompt, fps)


def _show(console: Any) -> Any:
    """A listener that prints one line per clip, and on a terminal a line that counts while it grows."""

    def told(event: str, data: dict[str, Any]) -> None:
        if event == "weights":
            console.say(f"weights: {data['report']}")
        elif event == "chunk" and console.progress:
            print(f"\r{_line(data['clip'])}", end="\x1b[K", file=sys.stderr, flush=True)
        elif event == "end":
            if console.progress:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            first = data["clip"].stats["first_frame_seconds"]
            console.say(f"{data['clip'].file}  {_line(data['clip'])}, first frames after {first:.2f} s")

    return told


def _line(clip: Any) -> str:
    stats = clip.stats
    return (
        f"{clip.policy}: {stats['frames']} frames, {stats['latent_frames']} latent, "
        f"made at {stats['fps_made']:.1f} fps, cache {stats['cache_bytes'] / 2**20:.1f} MiB"
    )


def _rows(clips: list[Any]) -> list[tuple[str, ...]]:
    rows = [("policy", "window", "sinks", "drift", "dynamic", "objects", "objects late", "colour", "fps", "cache MiB")]
    for clip in clips:
        if not clip.judged:
            continue
        judged, stats = clip.judged, clip.stats
        names = ("persistence", "persistence_late", "colour")
        shares = ["-" if judged[name] is None else f"{judged[name]:.2f}" for name in names]
        rows.append((
            clip.policy, str(clip.config.window_frames), str(clip.config.sink_frames), f"{judged['drift']:.1f}",
            f"{judged['dynamic']:.2f}", *shares, f"{stats['fps_made']:.1f}", f"{stats['cache_bytes'] / 2**20:.1f}",
        ))  # fmt: skip
    return rows
