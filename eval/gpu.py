"""Everything that needs a GPU, in order, in pieces: ``python -m dit_accel.eval.gpu -o eval/results --minutes 9``

The tests by head dim, the kernels under compute-sanitizer where that is installed, block sizes, every section of the
kernel benchmark and whole blocks, each a command of its own (``--list`` prints them). The same command goes on where it
ended; ``gpu.json`` in the folder holds what is done, ``gpu-logs`` what each command said.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..pipelines.outputs import read_json

DIMS = (64, 128, 72, 96, 256, 16)
# Where a call goes wrong, allocations side by side would hide it.
_CHECKED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_TAIL = 12

Run = Callable[["Step", float], "int | None"]


@dataclass(frozen=True)
class Step:
    """One command. ``timed``: it takes ``--minutes``, exits with 1 where they end and goes on when run again.

    ``keeps``: the file that holds what it has done so far, where it goes on by itself; else it starts anew.
    """

    name: str
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    keeps: Path | None = None
    timed: bool = False

    def line(self) -> str:
        """What to type."""
        return " ".join([*(f"{name}={value}" for name, value in self.env.items()), shlex.join(self.command)])

    def progress(self) -> int | None:
        return self.keeps.stat().st_mtime_ns if self.keeps is not None and self.keeps.exists() else None


def steps(out: Path, *, tests: bool, sanitizer: bool) -> list[Step]:
    """All of them, results going to ``out``. ``tests``: this is a checkout with tests."""
    from ..kernels import autotune
    from .blocks import MODELS
    from .kernels.cases import SECTIONS

    pytest = ("python", "-m", "pytest", "-m", "gpu", "-q", "tests/kernels", "-k")
    checked = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "86", *pytest)
    found = []
    if tests:
        found += [Step(f"tests-d{dim}", (*pytest, f"d{dim}")) for dim in DIMS]
        found.append(Step("tests-rest", (*pytest, " and ".join(f"not d{dim}" for dim in DIMS))))
    if tests and sanitizer:
        found.append(Step("memcheck", (*checked, "guard_bands or beside_a_buffer or dead_keys or largest"), _CHECKED))
    tune = ("python", "-m", "dit_accel.kernels.autotune", "--missing")
    found.append(Step("autotune", tune, keeps=autotune.path()))
    for section in SECTIONS:
        if section != "cpu":
            file = out / f"kernels-{section}.json"
            command = ("python", "-m", "dit_accel.eval.kernels", "--section", section, "-o", str(file))
            found.append(Step(f"kernels-{section}", command, keeps=file, timed=True))
    for model in MODELS:
        for method in ("radial", "rectified"):
            name = f"blocks-{model}-{method}"
            command = ("python", "-m", "dit_accel.eval.blocks", "--models", model, "--methods", method)
            found.append(Step(name, (*command, "-o", str(out / f"{name}.json"))))
    return found


def go_on(
    todo: Sequence[Step], done: dict[str, Any], minutes: float, run: Run, save: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
) -> bool:  # fmt: skip
    """Run what is missing, what failed before last, until the time ends: False. ``done``: name -> its last end.

    ``run(step, seconds)``: exit code, or None where it was ended after ``seconds``. A step that is ended starts anew
    next time, or goes on where it can; one that had all the time and got nowhere has failed.
    """
    end, first = clock() + 60 * minutes, True
    for step in sorted(todo, key=lambda step: step.name in done):
        if done.get(step.name, {}).get("code") == 0:
            continue
        left = end - clock()
        if left <= 0:
            return False
        before, began = step.progress(), clock()
        print(f"[{todo.index(step) + 1}/{len(todo)}] {step.line()}", flush=True)
        code = run(step, left)
        late = code is None or (step.timed and code == 1 and clock() >= end - _margin(left) - 1)
        stuck = code is None and first and step.progress() == before
        if late and not stuck:
            print(f"{step.name}: the time ended", flush=True)
            return False
        done[step.name] = {"code": code, "seconds": round(clock() - began, 1), "command": step.line()}
        said = {0: "done", None: f"ended after {minutes:g} minutes, all of them its own"}
        print(f"{step.name}: {said.get(code, f'exit code {code}')}", flush=True)
        save()
        first = False
    return True


def _margin(seconds: float) -> float:
    """What a timed command leaves of its time for its last case, seconds."""
    return min(60.0, seconds / 4)


def child(step: Step, seconds: float, logs: Path) -> int | None:
    """Run a step, what it says going to a file of ``logs`` and its end to the screen. None where the time ended it."""
    command = [sys.executable if word == "python" else word for word in step.command]
    if step.timed:
        command += ["--minutes", f"{(seconds - _margin(seconds)) / 60:.2f}"]
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{step.name}.txt"
    with log.open("w", encoding="utf-8") as file:
        made = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **step.env},
            start_new_session=os.name == "posix",
        )  # fmt: skip
        try:
            code = made.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(made)
    print("".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-_TAIL:]), flush=True)
    return code


def _end(made: subprocess.Popen) -> None:
    """End a child that still runs, compilers it started included."""
    if made.poll() is None:
        if os.name == "posix":
            os.killpg(made.pid, signal.SIGKILL)
        else:
            made.kill()
        made.wait()


def opened(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The record at ``path`` to go on with, or a new one. Raises ``UsageError`` where it is another machine's."""
    if not path.exists():
        return {"machine": machine, "done": {}}
    found = read_json(path)
    if found.get("machine") != machine:
        raise UsageError(f"{path} is of another GPU or other versions; name another folder with -o")
    return found


def main(argv: list[str] | None = None) -> int:
    """0 all done, 1 where the time ended first or a step failed, 2 without a GPU or for a usage error."""
    parser = argparse.ArgumentParser(prog="python -m dit_accel.eval.gpu", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("-o", "--output", type=Path, default=Path("eval/results"), help="folder of the results")
    add("--minutes", type=float, default=9, help="for this call; run it again to go on")
    add("--list", action="store_true", help="print the commands and run none")
    args = parser.parse_args(argv)
    todo = steps(
        args.output, tests=Path("tests/kernels").is_dir(), sanitizer=shutil.which("compute-sanitizer") is not None
    )
    if args.list:
        print("\n".join(step.line() for step in todo))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("eval.gpu needs a CUDA device; --list prints its commands", file=sys.stderr)
        return 2
    from .environment import gpus, versions
    from .kernels.document import write

    path = args.output / "gpu.json"
    try:
        record = opened(path, {"versions": versions(), "gpus": gpus()})
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    if not any(step.name.startswith("tests") for step in todo):
        print("tests/kernels is not here, so the tests are left out; run this in a checkout's root to have them")
    logs = args.output / "gpu-logs"
    ended = go_on(
        todo, record["done"], args.minutes, lambda step, left: child(step, left, logs), lambda: write(record, path)
    )
    codes = {step.name: record["done"].get(step.name, {}).get("code", "missing") for step in todo}
    failed = [name for name, code in codes.items() if code not in (0, "missing")]
    print(f"done: {sum(code == 0 for code in codes.values())} of {len(todo)}; failed: {', '.join(failed) or 'none'}")
    if not ended:
        print("the time ended first; the same command goes on")
    elif failed:
        print(f"what they said is in {logs}; the same command tries them again")
    return 0 if ended and not failed else 1


if __name__ == "__main__":
    from .command import run as finish

    sys.exit(finish(main))
