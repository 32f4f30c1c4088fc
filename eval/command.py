"""How the measurement modules end: one line for an error on purpose, and the exit codes of ``dit-accel``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import DitAccelError, UnsupportedError, UsageError

FAILURE, USAGE, INTERRUPTED = 1, 2, 130  # those of ``dit_accel.cli``, which nothing here may import


def output_file(text: str) -> Path:
    """The type of an argument that names a file to write: that it can be written is proven before any work."""
    from ..pipelines.outputs import check_file

    try:
        check_file(text, "the file")
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def token_grid(text: str) -> tuple[int, int, int]:
    """The type of an argument that gives a token grid."""
    sides = text.lower().split("x")
    if len(sides) != 3 or not all(side.strip().isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"a grid is FRAMESxHEIGHTxWIDTH in tokens, like 21x30x52; got {text!r}")
    return int(sides[0]), int(sides[1]), int(sides[2])


def positive(text: str) -> int:
    """The type of an argument that counts something of which there must be one."""
    if not text.strip().isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed; got {text!r}")
    return int(text)


def run(main: Callable[[], int | None]) -> int:
    """Call ``main``; its exit code, 0 for None. An error that the library raised is printed, any other passes."""
    try:
        return main() or 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except DitAccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE if isinstance(error, (UsageError, UnsupportedError)) else FAILURE
