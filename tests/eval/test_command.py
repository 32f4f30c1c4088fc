"""Measurement modules as a user starts them: bad input is one line and exit code 2, never a traceback."""

import argparse
import importlib
import subprocess
import sys

import pytest

from dit_accel import cli
from dit_accel.errors import DitAccelError, UnsupportedError, UsageError
from dit_accel.eval.command import FAILURE, INTERRUPTED, USAGE, positive, run


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError("u"), 2), (UnsupportedError("n"), 2), (DitAccelError("d"), 1), (KeyboardInterrupt(), 130)],
)
def test_errors_become_exit_codes(error, code, capsys):
    def fails():
        raise error

    assert run(fails) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip() == ("interrupted" if code == 130 else f"error: {error}")


def test_the_codes_are_those_of_the_command_line():
    assert (FAILURE, USAGE, INTERRUPTED) == (cli.FAILURE, cli.USAGE, cli.INTERRUPTED)


def test_what_a_main_returns_is_kept_and_a_bug_is_not_hidden():
    assert [run(lambda: None), run(lambda: 0), run(lambda: 3)] == [0, 0, 3]
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_a_missing_replay_is_one_line(tmp_path):
    command = [sys.executable, "-m", "dit_accel.eval.sweep", "--replay", str(tmp_path / "missing.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert "missing.json" in done.stderr
    assert "--replay" in done.stderr


WRITING = (
    "attention_maps", "blocks", "compiled", "kernels.__main__", "memory", "methods", "paro", "stream_memory",
    "stream_policies", "sweep",
)  # fmt: skip


@pytest.mark.parametrize("module", WRITING)
@pytest.mark.parametrize(("name", "told"), [("folder", "is a folder"), ("file/x.json", "cannot be written")])
def test_a_result_that_cannot_be_written_is_said_before_the_work(module, name, told, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("a file")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"dit_accel.eval.{module}").main(["-o", str(tmp_path / name)])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("module", ["memory", "planning", "planning_share"])
@pytest.mark.parametrize("grid", ["", "8", "4x0x8", "4x-1x8", "axbxc", "4x4x4x4"])
def test_a_grid_that_is_none(module, grid, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"dit_accel.eval.{module}").main([f"--grid={grid}"])
    assert ended.value.code == 2
    assert "like 21x30x52" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "nan"])
def test_a_count_is_at_least_one(text):
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
        positive(text)
    assert positive("12") == 12
