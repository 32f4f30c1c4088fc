"""What the README tells people to type is what the program takes and what CI runs."""

import ast
import re
import shlex
from pathlib import Path

from dit_accel.cli.parser import parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def commands():
    for kind, block in BLOCKS:
        if kind in ("", "bash", "sh"):
            for line in block.splitlines():
                yield from (part.strip() for part in line.split("&&") if part.strip())


def test_every_command_parses():
    ours = [shlex.split(line, comments=True) for line in commands() if line.startswith("dit-accel ")]
    assert len(ours) >= 4
    for words in ours:
        assert parse(words[1:]).command == words[1]


def test_every_module_that_is_run_exists():
    named = re.findall(r"python -m dit_accel\.([\w.]+)", README)
    assert named
    for module in named:
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_ci_runs_the_test_command():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install, test = 'pip install -c constraints.txt -e ".[dev]"', "pytest -n 2 --dist loadfile"
    assert f"{install} && {test}" in README
    assert install.replace("pip install", "pip install -q") in ci
    assert re.search(rf"^(\w+=\w+ )?{test}\b", ci, flags=re.MULTILINE)


def test_python_snippets_name_what_the_package_has():
    import dit_accel

    for kind, block in BLOCKS:
        if kind != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "dit_accel":
                for alias in node.names:
                    assert getattr(dit_accel, alias.name) is not None


def test_pictures_and_files_exist():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
