"""Where text goes: results to stdout, or with ``--json`` one JSON document to stdout and all text to stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

SCHEMA = 1


class Console:
    """``say`` prints results, ``note`` what the user should not miss; ``quiet`` leaves out the former."""

    def __init__(self, *, json: bool = False, quiet: bool = False):
        self.json, self.quiet = json, quiet

    def say(self, text: str = "") -> None:
        if not self.quiet:
            print(text, file=sys.stderr if self.json else sys.stdout, flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    @property
    def progress(self) -> bool:
        return not self.quiet and not self.json and sys.stderr.isatty()


def emit(command: str, data: dict[str, Any]) -> None:
    """Print the one JSON document of a command."""
    document = {"schema": SCHEMA, "command": command, **data}
    print(json.dumps(document, indent=2, ensure_ascii=False), flush=True)


def table(rows: list[tuple[str, ...]], *, right: frozenset[int] = frozenset()) -> list[str]:
    """Rows as aligned lines; the columns in ``right`` are flushed right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def calm_libraries() -> None:
    """Loading bars and advice of the libraries would bury the tool's own lines."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
