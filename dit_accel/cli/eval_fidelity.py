"""``dit-accel eval fidelity``: two folders of renders against each other."""

from __future__ import annotations

import argparse

from . import folders, record

HELP = "PSNR, SSIM and LPIPS of two folders of renders, paired by prompt and seed"
DESCRIPTION = (
    "Compare every clip of FAST with the clip of DENSE that has the same prompt and seed, frame by frame. Frames "
    "before the codec are taken where --frames-dir left them; video files cost several dB and are marked."
)
EXAMPLES = """examples:
  dit-accel render prompts.txt --method dense -o dense --frames-dir dense/frames
  dit-accel render prompts.txt --method radial -o radial --frames-dir radial/frames
  dit-accel eval fidelity dense radial --dense-frames dense/frames --fast-frames radial/frames -o fidelity.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    folders.add_arguments(parser)
    add = parser.add_argument
    add("--border", default="valid", help="SSIM's border: valid, reflect, zero (default: valid)")
    add(
        "--lpips",
        nargs="?",
        const="alex",
        metavar="NET",
        help="also LPIPS: alex, vgg, squeeze; needs pip install lpips",
    )


def run(args: argparse.Namespace) -> int:
    from ..eval.paired import compare_folders
    from .console import Console, table

    console = Console(json=args.json)
    found = compare_folders(
        args.dense, args.fast, dense_frames=args.dense_frames, fast_frames=args.fast_frames, border=args.border,
        lpips=args.lpips,
    )  # fmt: skip
    names = list(found["summary"])
    rows = [("prompt", "seed", *names)]
    for row in found["rows"]:
        rows.append((row["prompt"][:60], str(row["seed"]), *(_number(row[name]) for name in names)))
    for line in table(rows, right=frozenset(range(1, len(names) + 2))):
        console.say(line)
    for name, one in found["summary"].items():
        console.say(_summary(name, one))
    for name, text in found["conventions"].items():
        console.say(f"{name}: {text}")
    if not found["lossless"]:
        console.note("note: some frames were read from video files, whose codec lowers the figures")
    for side, prompts in found["unpaired"].items():
        if prompts:
            console.note(
                f"note: {len(prompts)} clips of {getattr(args, side)} have no partner: {', '.join(prompts[:3])}"
            )
    record.finish(args, "fidelity", found)
    return 0


def _summary(name: str, one: dict) -> str:
    if not one["clips"]:
        return f"{name}: not measured"
    spread = f" (95 % interval {one['low']:.4f} to {one['high']:.4f})" if "low" in one else ""
    return f"{name}: mean {one['mean']:.4f}{spread}, {one['clips']} clips, worst {one['worst']['value']:.4f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
