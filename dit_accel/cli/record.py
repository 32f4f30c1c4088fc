"""The JSON files that measurements leave: what was measured, by which command, with which versions, where."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from .console import SCHEMA


def command_line() -> str:
    """The command that runs, to be typed again."""
    return shlex.join(["dit-accel", *sys.argv[1:]])


def record(kind: str, data: dict[str, Any]) -> dict[str, Any]:
    """``data`` with all that is needed to make and to judge it again."""
    from ..eval.environment import cpu, gpus, versions

    return {
        "schema": SCHEMA,
        "kind": kind,
        "command_line": command_line(),
        "environment": {"versions": versions(), "cpu": cpu(), "gpus": gpus()},
        **data,
    }


def save(path: str | Path, document: dict[str, Any]) -> None:
    """Write a document, whole or not at all. Raises ``UsageError`` where the file cannot be written."""
    from ..errors import UsageError

    path = Path(path)
    part = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; give another -o") from None


def add_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Where :func:`finish` puts the document, which holds ``what``."""
    parser.add_argument("-o", "--out", metavar="FILE", help=f"JSON with {what}")
    parser.add_argument("--json", action="store_true", help="JSON to stdout, text to stderr")


def finish(args: argparse.Namespace, kind: str, data: dict[str, Any]) -> None:
    """Write the document to ``-o`` and, with ``--json``, to stdout."""
    from .console import emit

    if args.out:
        save(args.out, record(kind, data))
    if args.json:
        emit("eval", {"ok": True, "kind": kind, **data})
