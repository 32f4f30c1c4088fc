import json
import subprocess
import sys

import pytest

from dit_accel import __version__
from dit_accel.cli import main
from dit_accel.cli.parser import COMMANDS, parse

HEAVY = ("torch", "diffusers", "transformers", "numpy", "imageio")


def stops(*argv):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return stop.value.code


@pytest.mark.parametrize("argv", [["--help"], ["render", "--help"], ["--version"], ["methods", "--help"], ["nonsense"]])
def test_nothing_heavy_is_imported_before_a_command_runs(argv):
    code = (
        "import sys\nfrom dit_accel.cli import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_missing_prompt_file_is_told_before_torch_is_loaded():
    code = "import sys\nfrom dit_accel.cli import main\nprint(main(['render', 'absent.txt']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert "no prompt file at absent.txt" in done.stderr


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "dit_accel", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"dit-accel {__version__}"


def test_help_lists_commands_examples_and_exit_codes(capsys):
    assert stops("--help") == 0
    text = capsys.readouterr().out
    for word in (*COMMANDS, "examples:", "130 interrupted"):
        assert word in text


def test_no_command_shows_the_help_and_is_a_usage_error(capsys):
    assert stops() == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "suggestion"), [("rendr", "render"), ("docter", "doctor"), ("method", "methods")])
def test_an_unknown_command_gets_a_suggestion(capsys, word, suggestion):
    assert stops(word) == 2
    assert f"unknown command '{word}'; did you mean '{suggestion}'?" in capsys.readouterr().err


def test_an_unknown_flag_is_a_usage_error(capsys):
    assert stops("render", "p.txt", "--densty", "0.5") == 2
    assert "--densty" in capsys.readouterr().err


def test_flags_may_have_underscores_and_values_keep_theirs():
    args = parse(["render", "my_file.txt", "--dense_steps=3", "--negative_prompt", "a_b", "--param", "block_size=64"])
    assert (args.prompts, args.dense_steps, args.negative_prompt) == ("my_file.txt", "3", "a_b")
    assert args.param == ["block_size=64"]


def test_words_after_the_end_of_options_are_left_alone():
    assert parse(["render", "--quiet", "--", "--odd_name.txt"]).prompts == "--odd_name.txt"


def test_an_interruption_before_anything_ran(monkeypatch, capsys):
    from dit_accel.cli import methods

    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "run", stop)
    assert main(["methods"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_an_unexpected_error_is_one_line_and_says_how_to_see_more(monkeypatch, capsys):
    from dit_accel.cli import methods

    def fail(args):
        raise RuntimeError("boom")

    monkeypatch.setattr(methods, "run", fail)
    monkeypatch.delenv("DIT_ACCEL_DEBUG", raising=False)
    assert main(["methods", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "dit-accel: error: RuntimeError: boom (set DIT_ACCEL_DEBUG=1 to see where)\n"
    document = json.loads(captured.out)
    assert document["schema"] == 1
    assert document["error"]["kind"] == "failure"
    monkeypatch.setenv("DIT_ACCEL_DEBUG", "1")
    with pytest.raises(RuntimeError, match="boom"):
        main(["methods"])


def test_a_warning_is_one_line_without_its_place_in_the_source():
    words = ["mask", "--method", "clear", "--grid", "1x8x8", "--json"]
    done = subprocess.run([sys.executable, "-m", "dit_accel", *words], capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["ok"]
    assert done.stderr.startswith("dit-accel: warning: Clear is experimental")
    assert ".py:" not in done.stderr
