"""The command line: parsing and printing. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence

OK, FAILURE, USAGE, BUDGET_MISSED, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``dit-accel`` with ``argv`` (default: the process's own) and return the exit code."""
    from .parser import parse

    args = parse(list(sys.argv[1:] if argv is None else argv))
    try:
        with _plain_warnings():
            return args.run(args)
    except KeyboardInterrupt:
        print("\ndit-accel: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has gone; closing it here keeps the interpreter from complaining at exit.
        sys.stderr.close()
        return FAILURE
    except Exception as error:
        return _report(error, args)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line of text, without the place in the source that they come from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"dit-accel: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _report(error: Exception, args) -> int:
    import os

    from ..errors import DitAccelError, UnsupportedError, UsageError

    if os.environ.get("DIT_ACCEL_DEBUG"):
        raise error
    usage = isinstance(error, (UsageError, UnsupportedError))
    if isinstance(error, DitAccelError):
        message = str(error)
    else:
        message = f"{type(error).__name__}: {error} (set DIT_ACCEL_DEBUG=1 to see where)"
    print(f"dit-accel: error: {message}", file=sys.stderr)
    if getattr(args, "json", False):
        from .console import emit

        emit(args.command, {"ok": False, "error": {"kind": "usage" if usage else "failure", "message": message}})
    return USAGE if usage else FAILURE
