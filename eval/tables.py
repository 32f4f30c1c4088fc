"""Result files as README tables: ``python -m dit_accel.eval.tables eval/results/kernels-cpu.json``

Each table comes with the machine and the command that made it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UsageError


def renderer(document: dict[str, Any]) -> Callable[[dict[str, Any]], str]:
    """The ``markdown`` that a document's own benchmark has. Raises ``UsageError`` for a document of none."""
    keys = document.keys()
    if {"section", "rows"} <= keys:
        from .kernels.table import markdown
    elif {"candidates", "table"} <= keys:
        from .methods import markdown
    elif isinstance(document.get("rows"), list) and all("loop" in row for row in document["rows"]):
        from .blocks import markdown
    else:
        raise UsageError(
            f"a document with {', '.join(sorted(keys))} is no result of eval.kernels, eval.blocks or eval.methods"
        )
    return markdown


def machine(environment: dict[str, Any] | None) -> str:
    """One line: GPUs or the CPU, torch, and Triton where it is installed. Empty for no environment."""
    if environment is None:
        return ""
    gpus = [name for key, name in environment["gpus"].items() if key.startswith("cuda:")]
    cpu = environment["cpu"]
    parts = gpus or [f"{cpu['name']}, {cpu['threads']} threads"]
    parts.append(f"torch {environment['versions']['torch']}")
    triton = environment["optional_packages"].get("triton")
    return ", ".join(parts + ([f"Triton {triton}"] if gpus and triton else []))


def section(path: Path) -> str:
    """One file's table under its command and machine, where it has them."""
    document = json.loads(path.read_text(encoding="utf-8"))
    made = renderer(document)(document)
    # A file without times has no machine.
    parts = [f"`{document['command']}`" if "command" in document else "", machine(document.get("environment"))]
    return f"{' on '.join(filter(None, parts))} ({path.name}):\n\n{made}".lstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_accel.eval.tables", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args(argv)
    try:
        print("\n\n".join(section(path) for path in args.files))
    except (OSError, UsageError, json.JSONDecodeError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    from .command import run as finish

    sys.exit(finish(main))
