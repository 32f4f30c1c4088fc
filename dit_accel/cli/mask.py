"""``dit-accel mask``: the mask atlas, a picture of which tokens a method lets attend to which."""

from __future__ import annotations

import argparse

HELP = "draw what a method keeps, as a picture"
DESCRIPTION = (
    "Draw the plan of one or more methods on a token grid: the block map, and what one query sees in every frame. "
    "Needs no model and no GPU."
)
EXAMPLES = """methods are written NAME or NAME:PARAMETER=VALUE:..., see `dit-accel methods`

examples:
  dit-accel mask --method radial --model-family wan -o radial.png
  dit-accel mask --method gna --grid 21x30x52 --window 11,15,25 --query 0,0,0 -o gna.png
  dit-accel mask --method radial radial:rule=upstream radial:rule=paper --grid 33x8x10 --set block_size=64
  dit-accel mask --method radial gna random-blocks --model-family hunyuan --density 0.25 --json
"""

# Shorthand flags for what most methods call by the same name.
SHORTHAND = ("block_size", "window", "stride", "dilation", "decay", "radius")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--method", nargs="+", action="extend", metavar="SPEC", help="methods, drawn side by side (default: radial)")
    add("-o", "--out", metavar="FILE", default=None, help="picture to write: png, svg or pdf (default: mask.png)")
    add("--json", action="store_true", help="the numbers as JSON to stdout; draws only with -o")

    add = parser.add_argument_group("tokens").add_argument
    add("--grid", metavar="TxHxW", help="token grid (default: the model family's native one)")
    add("--model-family", metavar="NAME", help="wan, ltx, hunyuan, cogvideox, flux, mini: its grid and text")
    add("--text", type=int, metavar="N", help="text tokens in the sequence (default: the model family's, else 0)")
    add("--query", metavar="T,H,W", help="whose view to draw (default: the centre)")

    add = parser.add_argument_group("parameters").add_argument
    add("--density", type=float, metavar="D", help="kept fraction in (0, 1]; each method solves its own parameters")
    add("--set", action="append", default=[], metavar="[METHOD.]NAME=VALUE", help="a parameter; repeatable")
    for name in SHORTHAND:
        flag = name.replace("_", "-")
        add(f"--{flag}", metavar="VALUE", help=f"short for --set {name}=VALUE")
    add("--head", type=int, default=0, metavar="N", help="head to draw where plans differ by head (default: 0)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the made-up q and k (default: 0)")
    add("--title", metavar="TEXT", help="heading of the picture")


def run(args: argparse.Namespace) -> int:
    from ..eval.atlas import layout_for, panel
    from ..eval.method_spec import build
    from ..pipelines.outputs import check_file
    from .console import Console, emit

    if args.out:
        check_file(args.out)
    console = Console(json=args.json)
    settings = [*args.set, *(f"{name}={getattr(args, name)}" for name in SHORTHAND if getattr(args, name) is not None)]
    methods = build(args.method or ["radial"], settings)
    layout = layout_for(args.model_family, _numbers("--grid", args.grid, "x"), args.text)
    query = _numbers("--query", args.query, ",")
    panels = [panel(m, layout, query=query, density=args.density, head=args.head, seed=args.seed) for m in methods]
    path = args.out if args.out or args.json else "mask.png"
    if path is not None:
        from ..eval.atlas_figure import save

        path = str(save(panels, path, title=args.title))
    if args.json:
        emit("mask", {"ok": True, "picture": path, "panels": [p.to_dict() for p in panels]})
    for line in _lines(panels):
        console.say(line)
    for p in panels:
        if p.target is not None and abs(p.density - p.target) > 0.2 * p.target:
            console.note(f"{p.method.name} reaches density {p.density:.3f} at best here; {p.target:g} was asked for")
    if path is not None:
        console.say(f"wrote {path}")
    return 0


def _lines(panels) -> list[str]:
    from ..eval.method_spec import describe
    from .console import table

    rows = [("method", "density", "video", "whole", "in part", "skipped", "parameters")]
    for p in panels:
        blocks = (f"{p.counts[key]:,}" for key in ("full", "partial", "skipped"))
        rows.append((p.method.name, f"{p.density:.4f}", f"{p.density_video:.4f}", *blocks, describe(p.method)))
    return [f"{panels[0].layout}, {panels[0].layout.tokens:,} tokens", *table(rows, right=frozenset(range(1, 6)))]


def _numbers(flag: str, text: str | None, separator: str) -> tuple[int, ...] | None:
    from ..errors import UsageError

    if text is None:
        return None
    parts = text.lower().split(separator)
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        example = separator.join(("21", "30", "52"))
        raise UsageError(f"{flag} is three whole numbers like {example}; got {text!r}")
    return tuple(int(part) for part in parts)
