"""How the measurement modules end: one line for an error on purpose, and the exit codes of ``dit-accel``."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ..errors import DitAccelError, UnsupportedError, UsageError

FAILURE, USAGE, INTERRUPTED = 1, 2, 130  # those of ``dit_accel.cli``, which nothing here may import


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
