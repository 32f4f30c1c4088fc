"""The parser: one sub-command per file, flags in kebab case or with underscores."""

from __future__ import annotations

import argparse
import difflib
import sys

from .. import __version__
from . import calibrate, doctor, mask, methods, models, plan, render, report, stream, tune
from . import eval as eval_command

COMMANDS = {
    "render": render,
    "stream": stream,
    "plan": plan,
    "tune": tune,
    "report": report,
    "eval": eval_command,
    "mask": mask,
    "calibrate": calibrate,
    "doctor": doctor,
    "methods": methods,
    "models": models,
}

_EXAMPLES = """examples:
  dit-accel render prompts.txt
  dit-accel render prompts.txt --compare --density 0.25
  dit-accel render prompts.txt --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 832x480 --frames 81 -o out
  dit-accel stream prompts.txt --seconds 30 --policy deep_sink
  dit-accel plan --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 832x480 --frames 81
  dit-accel tune --budget "psnr>=28" -o preset.json
  dit-accel mask --method radial --model-family wan -o mask.png
  dit-accel calibrate paro -o plan.safetensors
  dit-accel methods
  dit-accel models
  dit-accel doctor

exit codes: 0 done, 1 run-time failure, 2 usage, 3 budget missed, 130 interrupted
"""

_WRITTEN = {"-o": "out", "--frames-dir": "frames_dir", "--sheet": "sheet"}


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, with ``run`` set to the command's function. Help and errors end the process, as in argparse."""
    parser = _build()
    argv = _kebab(argv)
    command = next((a for a in argv if not a.startswith("-")), None)
    if command is not None and command not in COMMANDS and argv[0] == command:
        parser.error(f"unknown command {command!r}{suggest(command, COMMANDS)}")
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    for flag, name in _WRITTEN.items():
        # An unset variable of the shell; a path made of nothing would be the current folder.
        if getattr(args, name, None) == "":
            parser.error(f"{flag} is empty; give a path, or drop {flag}")
    return args


def suggest(word: str, known) -> str:
    """``"; did you mean 'x'?"`` and the known words."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(known)})"


def _build() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dit-accel",
        description="Sparse attention for diffusers diffusion transformers, without training.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dit-accel {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, module in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def _kebab(argv: list[str]) -> list[str]:
    """``--dense_steps=2`` as ``--dense-steps=2``: people type both. Values are left alone."""
    changed, flags = [], True
    for word in argv:
        flags = flags and word != "--"
        if flags and word.startswith("--"):
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        changed.append(word)
    return changed
