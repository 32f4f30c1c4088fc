import json

import pytest

from dit_accel.cli import main

SMALL = ["--size", "48x32", "--frames", "9", "--steps", "2", "--block-size", "4", "--bins", "1", "--backend", "gather"]


def test_calibrate_writes_a_plan_and_says_how_to_use_it(tiny_wan, tmp_path, capsys):
    out = tmp_path / "plan.safetensors"
    argv = ["calibrate", "paro", "--model", str(tiny_wan), "-o", str(out), *SMALL, "--density", "0.6", "--json"]
    assert main(argv) == 0
    told = capsys.readouterr()
    document = json.loads(told.out)
    assert (document["command"], document["ok"], document["file"]) == ("calibrate", True, str(out))
    assert document["bytes"] == out.stat().st_size
    assert [entry["layer"] for entry in document["layers"]] == [0, 1, 2]
    assert "dense run 2 of 2" in told.err
    assert f"--method paro --param plan_file={out}" in told.err
    assert main(argv) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--density", "0"], "kept fraction"),
        (["--metric", "best"], "choose one of mass, paper"),
        (["--prompts", "absent.txt"], "no prompt file at absent.txt"),
    ],
)
def test_wrong_values_are_usage_errors(tiny_wan, tmp_path, capsys, argv, message):
    assert main(["calibrate", "paro", "--model", str(tiny_wan), "-o", str(tmp_path / "p"), *argv]) == 2
    assert message in capsys.readouterr().err
