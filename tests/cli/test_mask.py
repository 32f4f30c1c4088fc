"""``dit-accel mask``: pictures and numbers from the command line."""

import json

import pytest

from dit_accel import Layout, Radial, plan
from dit_accel.cli import main


def run(capsys, *argv):
    code = main(["mask", *argv])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_a_picture_and_a_table(capsys, tmp_path):
    path = tmp_path / "mask.png"
    code, out, err = run(
        capsys, "--method", "radial", "radial:rule=paper", "--grid", "3x5x7", "--set", "block_size=16", "-o", str(path)
    )
    assert (code, err) == (0, "")
    assert path.read_bytes().startswith(b"\x89PNG")
    lines = out.splitlines()
    assert lines[0] == "main 3x5x7, 105 tokens"
    assert [line.split()[0] for line in lines[2:4]] == ["radial", "radial"]
    assert lines[-1] == f"wrote {path}"


def test_json_gives_the_plan_s_numbers_and_draws_only_when_asked(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "--grid", "3x5x7", "--text", "4", "--block-size", "16", "--query", "0,4,6", "--json")
    found = json.loads(out)["panels"][0]
    made = plan(None, None, None, Radial(block_size=16), layout=Layout(grid=(3, 5, 7), text=4))
    assert code == 0
    assert found["density"] == made.density
    assert found["density_video"] == made.density_video
    assert found["query"] == {"at": [0, 4, 6], "sees": int(made.row(34)[:105].sum()), "sees_text": 4}
    assert found["blocks"]["full"] == int(made.full.count.sum())
    assert not list(tmp_path.iterdir())


def test_the_family_and_the_default_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "--model-family", "mini", "--density", "0.2")
    assert code == 0
    assert "2,640 tokens" in out
    assert (tmp_path / "mask.png").stat().st_size > 10_000


def test_a_density_out_of_reach_is_said(capsys):
    code, _, err = run(capsys, "--method", "radial", "--grid", "3x5x7", "--density", "0.01", "--json")
    assert code == 0
    assert "radial reaches density" in err
    assert "0.01 was asked for" in err


@pytest.mark.parametrize(("argv", "message"), [
    (["--grid", "3x5"], "--grid is three whole numbers like 21x30x52; got '3x5'"),
    (["--grid", "3x5x7", "--query", "1"], "--query is three whole numbers like 21,30,52; got '1'"),
    ([], "give a grid like 21x30x52"),
    (["--model-family", "wam"], "unknown model family 'wam'"),
    (["--method", "radail", "--grid", "3x5x7"], "did you mean 'radial'"),
    (["--grid", "1x5x7"], "an image has one frame. For images use GNA or Pisa"),
    (["--grid", "3x5x7", "--set", "widow=3"], "no parameter 'widow'"),
    (["--grid", "3x5x7", "-o", "x.doc"], "must end in .png, .svg or .pdf"),
])  # fmt: skip
def test_usage_errors(capsys, argv, message):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert message in err
