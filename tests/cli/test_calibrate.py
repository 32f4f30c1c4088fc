import json

import numpy as np
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


def test_calibrate_precision_writes_a_table_that_a_render_follows(tiny_wan, tmp_path, capsys):
    out = tmp_path / "precision.json"
    runs = ["--model", str(tiny_wan), "--size", "48x32", "--frames", "9", "--steps", "3"]
    argv = ["calibrate", "precision", "-o", str(out), *runs, "--bins", "2", "--frac-8bit", "0.4", "--json"]
    assert main(argv) == 0
    told = capsys.readouterr()
    document = json.loads(told.out)
    bits = document["bits"]
    assert (len(bits), len(bits[0])) == (2, 3)
    assert sum(document["share"].values()) == pytest.approx(1)
    assert document["share"]["4"] <= 0.6
    four, eight = (document["errors"][key]["rel_l1"] for key in ("4", "8"))
    assert (np.array(eight) < np.array(four)).all()
    assert np.array(four).shape == np.array(bits).shape
    assert json.loads(out.read_text())["record"]["errors"] == document["errors"]
    assert f"--quant {out}" in told.err
    assert main(argv) == 2
    assert "--overwrite" in capsys.readouterr().err

    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle\n")
    render = ["render", str(prompts), "-o", str(tmp_path / "videos"), *runs, "--method", "dense", "--quant", str(out)]
    assert main([*render, "--dense-steps", "0"]) == 0
    (sidecar,) = (tmp_path / "videos").rglob("*.json")
    assert "quant-reference" in sidecar.read_text()


@pytest.mark.parametrize(
    ("argv", "message"), [(["--frac-8bit", "2"], "frac_8bit lies in"), (["--bins", "0"], "bins and blocks"),
                          (["-o", "nowhere/p.json"], "there is no folder")],
)  # fmt: skip
def test_wrong_precision_values_are_usage_errors(tiny_wan, tmp_path, capsys, argv, message):
    out = ["-o", str(tmp_path / "p.json")]
    assert main(["calibrate", "precision", "--model", str(tiny_wan), *out, *argv]) == 2
    assert message in capsys.readouterr().err
