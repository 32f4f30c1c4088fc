"""``dit-accel methods``: the methods, what each does, its parameters and their defaults."""

from __future__ import annotations

import argparse

HELP = "list the attention methods and their parameters"
DESCRIPTION = "List the attention methods, their parameters and defaults."
EXAMPLES = """examples:
  dit-accel methods
  dit-accel methods radial
  dit-accel render prompts.txt --method radial --param block_size=64 --param rule=safe
"""

FOR_TESTS = ("all-blocks", "random-blocks")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show one method only")
    parser.add_argument("--json", action="store_true", help="JSON to stdout")


def run(args: argparse.Namespace) -> int:
    from .console import Console, emit

    found = [describe(cls) for cls in _classes(args.name)]
    if args.json:
        emit("methods", {"methods": found})
        return 0
    console = Console()
    for entry in found:
        console.say(f"{entry['name']:<15}{entry['summary']}" + ("  [for tests]" if entry["for_tests"] else ""))
        for name, default in entry["parameters"].items():
            console.say(f"    {name} = {default!r}")
        if args.name:
            console.say("\n" + entry["doc"])
    if not args.name:
        console.say(f"{'dense':<15}Stock attention: nothing is skipped.")
    return 0


def describe(cls: type) -> dict:
    """Name, first docstring line, parameters with defaults."""
    import inspect
    from dataclasses import MISSING, fields

    doc = inspect.getdoc(cls) or ""
    about = inspect.getdoc(inspect.getmodule(cls)) if cls.name not in FOR_TESTS else doc
    parameters = {}
    for f in fields(cls):
        parameters[f.name] = None if f.default is MISSING else f.default
    return {
        "name": cls.name,
        "class": cls.__name__,
        "summary": (about or doc).split("\n\n")[0].replace("\n", " "),
        "doc": doc,
        "parameters": parameters,
        "static": cls.static,
        "for_tests": cls.name in FOR_TESTS,
    }


def _classes(name: str | None) -> list[type]:
    from ..methods import REGISTRY, find

    if name is not None:
        return [find(name)]
    return [REGISTRY[key] for key in sorted(REGISTRY, key=lambda key: (key in FOR_TESTS, key))]
