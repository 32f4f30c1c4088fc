"""Two folders of renders, compared clip by clip: the arguments of every command that takes them."""

from __future__ import annotations

import argparse

from . import record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dense", metavar="DENSE", help="folder that render -o wrote with --method dense")
    add("fast", metavar="FAST", help="folder of the same prompts and seeds under a method")
    add("--dense-frames", metavar="DIR", help="its --frames-dir")
    add("--fast-frames", metavar="DIR", help="its --frames-dir")
    record.add_arguments(parser, "every row")
