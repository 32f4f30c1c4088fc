"""``dit-accel models``: the transformer classes we accelerate, and what is known about each."""

from __future__ import annotations

import argparse

HELP = "list the transformers that can be accelerated"
DESCRIPTION = "List the transformer classes with a row: where their token grid comes from and what runs under a method."
EXAMPLES = """examples:
  dit-accel models
  dit-accel models WanTransformer3DModel
  dit-accel models flux --json
  dit-accel models --markdown
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show one class or one family only")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="JSON to stdout")
    form.add_argument("--markdown", action="store_true", help="the table in Markdown")


def run(args: argparse.Namespace) -> int:
    from ..diffusers.families.support import markdown, support
    from .console import Console, emit, table

    found = _named(support(), args.name)
    if args.json:
        emit("models", {"models": found})
        return 0
    console = Console()
    if args.markdown:
        console.say(markdown(found))
        return 0
    if args.name:
        for entry in found:
            console.say("\n".join(_lines(entry)) + "\n")
        return 0
    rows = [("model", "family", "kind", "text", "stays stock")]
    rows += [
        (e["model"] + ("" if e["installed"] else " *"), *(e[c] for c in ("family", "kind", "text", "stock")))
        for e in found
    ]
    for line in table(rows):
        console.say(line)
    if not all(entry["installed"] for entry in found):
        console.say("* not in the installed diffusers")
    console.say(f"{len(found)} classes. Everything about one: dit-accel models NAME")
    return 0


def _named(entries: list[dict], name: str | None) -> list[dict]:
    from ..errors import UsageError
    from .parser import suggest

    if name is None:
        return entries
    found = [entry for entry in entries if name.lower() in (entry["model"].lower(), entry["family"])]
    if not found:
        known = sorted({entry["family"] for entry in entries} | {entry["model"] for entry in entries})
        raise UsageError(f"no row for {name!r}{suggest(name, known)}")
    return found


def _lines(entry: dict) -> list[str]:
    from ..diffusers.families.support import COLUMNS

    told = {COLUMNS.get(key, key.replace("_", " ")): value for key, value in entry.items()}
    told = {key: ", ".join(value) if isinstance(value, list) else value for key, value in told.items()}
    return [f"{key:<18}{_word(value)}" for key, value in told.items()]


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value or "-")
