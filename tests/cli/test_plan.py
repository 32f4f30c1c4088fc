"""``dit-accel plan`` from the command line."""

import json
import re
import subprocess
import sys

import pytest

from dit_accel.cli import main


def run(capsys, *argv):
    code = main(["plan", *argv])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_the_bundled_model_by_default(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert "method      paro (plan_file" in out
    assert "from the plan file" in out
    code, out, err = run(capsys, "--method", "radial")
    assert (code, err) == (0, "")
    words = ("2,640; grid 33x8x10", "radial", "bound", "padding", "plan tables", "flash on cpu", "sm90", "verdict")
    assert [word for word in words if word not in out] == []
    assert "not measured" in out


def test_json_holds_what_the_text_says(capsys):
    code, out, _ = run(capsys, "--density", "0.3", "--dense-layers", "2", "--json")
    found = json.loads(out)
    assert (code, found["schema"], found["command"], found["ok"]) == (0, 1, "plan", True)
    code, text, _ = run(capsys, "--density", "0.3", "--dense-layers", "2")
    assert f"density     {found['density']['plan']:.4f}" in text
    assert f"{found['bound']['operations']:.2f}x for the denoising loop" in text
    assert "by layer  0..1 1.000, 2..5" in text
    assert found["verdict"]["text"] in text


def memory(capsys, *argv):
    """The line on memory, and what ``--json`` says of the same plan."""
    code, text, _ = run(capsys, *argv)
    assert code == 0
    (line,) = (line for line in text.splitlines() if line.startswith("memory "))
    code, out, _ = run(capsys, *argv, "--json")
    return line, json.loads(out)


def bytes_in(line, what):
    """The number of bytes that ``line`` names behind ``what``."""
    number, prefix = re.search(rf"{what} ([\d.]+) ([kMGTP]?)B", line).groups()
    return float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}[prefix]


def test_memory_of_a_method_that_holds_state(capsys):
    line, found = memory(capsys, "--method", "adaspa")
    held = found["memory"]
    assert held["plan_tables"] is None
    assert "plan tables are made for every call" in line
    assert "no method state" not in line
    # Shown to four digits.
    assert bytes_in(line, "method state") == pytest.approx(held["state"], rel=5e-4)
    # 42 blocks of 64 in 2,640 tokens. A row lists at most 3/2 of the density 0.2, 13 blocks, in two bytes each; a token
    # has its LSE, a head its count.
    sites = found["operations"]["layers"] * found["operations"]["heads"] * found["run"]["forwards_per_step"]
    assert held["state"] == sites * (42 * 13 * 2 + 4 * 2640 + 4)


def test_the_state_named_is_that_of_the_size_asked_for(capsys):
    small, _ = memory(capsys, "--method", "adaspa", "--frames", "33")
    line, found = memory(capsys, "--method", "adaspa")
    assert bytes_in(small, "method state") < 0.6 * bytes_in(line, "method state")
    assert bytes_in(line, "method state") == pytest.approx(found["memory"]["state"], rel=5e-4)


def test_memory_of_a_method_without_state(capsys):
    line, found = memory(capsys, "--method", "radial")
    assert found["memory"]["state"] == 0
    assert line.endswith("; no method state")
    assert found["memory"]["plan_tables"] > 0
    assert bytes_in(line, "plan tables") == pytest.approx(found["memory"]["plan_tables"], rel=5e-4)


def test_other_sizes_and_dense(capsys):
    code, out, _ = run(capsys, "--size", "32x16", "--frames", "9", "--steps", "4", "--method", "dense")
    assert code == 0
    assert "32x16, 9 frames, 4 steps" in out
    assert "nothing is accelerated" in out


@pytest.mark.parametrize(("argv", "message"), [
    (["--size", "big"], "a size is WIDTHxHEIGHT"),
    (["--size", "33x17"], "multiples of 16"),
    (["--frames", "8"], "1 plus a multiple of"),
    (["--method", "radail"], "did you mean 'radial'"),
    (["--density", "2"], "lies in (0, 1]"),
    (["--model", "./absent"], "no model folder at"),
    (["--backend", "flash", "--method", "gna"], "cannot serve this call"),
])  # fmt: skip
def test_usage_errors(capsys, argv, message):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert message in err


def test_no_weight_is_read():
    """Opening any weight file would be an error."""
    code = (
        "import builtins, io, safetensors\n"
        "def refuse(*a, **k): raise SystemExit('weights were opened')\n"
        "safetensors.safe_open = refuse\n"
        "import safetensors.torch; safetensors.torch.load_file = refuse\n"
        "from dit_accel.cli import main\nraise SystemExit(main(['plan', '--method', 'radial', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
