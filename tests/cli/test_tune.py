"""``dit-accel tune`` and ``render --preset`` on a tiny pipeline."""

import json

import pytest

from dit_accel.cli import main
from dit_accel.eval.tune import bench


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red ball\na blue cat\na green tree\n")
    return path


@pytest.fixture
def tune(tiny_wan, tmp_path, prompts, monkeypatch):
    """Runs the command; accelerated loops count as half of dense ones, since a clock says nothing here."""
    monkeypatch.setattr(bench, "trial", lambda rows, index: bench.Trial(rows[index]["psnr"], 2.0))

    def run(budget, *extra):
        small = ["--size", "32x48", "--frames", "9", "--steps", "2", "--short-steps", "1", "--methods", "vmoba"]
        few = ["--calibration", "2", "--held-back", "1", "--renders", "4", "--rounds", "1"]
        words = ["tune", prompts, "--model", tiny_wan, "--budget", budget, "-o", tmp_path / "preset.json"]
        return main([str(word) for word in (*words, *small, *few, *extra)])

    return run


def test_a_preset_is_found_and_rendered_with(tune, tiny_wan, tmp_path, prompts, capsys):
    assert tune("psnr>=5") == 0
    out = capsys.readouterr()
    assert "this takes about" in out.out
    assert out.out.index("this takes about") < out.out.index("loop")
    assert "in full, 2 steps, 1 held-back prompt:" in out.out
    assert "quantised products are left out" in out.err
    preset = tmp_path / "preset.json"
    setting = json.loads(preset.read_text())["provenance"]["setting"]
    words = ["render", prompts, "--model", tiny_wan, "--size", "32x48", "--frames", "9", "--preset", preset]
    assert main([str(w) for w in (*words, "--steps", "3", "-o", tmp_path / "out", "--json")]) == 0
    out = capsys.readouterr()
    videos = json.loads(out.out)["videos"]
    assert {video["settings"]["attention"]["method"]["method"] for video in videos} == {setting["method"]}
    assert "steps 2 there and 3 here" in out.err
    assert "weights" not in out.err
    assert main([str(w) for w in (*words, "--density", "0.5", "--dry-run")]) == 2
    assert "sets all of attention; leave out --density" in capsys.readouterr().err
    assert tune("psnr>=5") == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_budget_that_nothing_meets(tune, tmp_path, capsys):
    assert tune("speed>=3", "--json") == 3
    out = capsys.readouterr()
    document = json.loads(out.out)
    assert document["ok"] is False
    assert document["nearest"]["setting"].startswith("vmoba@")
    assert "no setting met speed>=3; the nearest is vmoba@" in out.err
    assert not (tmp_path / "preset.json").exists()


def test_a_dry_run_says_how_long_and_measures_nothing(tune, tmp_path, capsys):
    assert tune("psnr>=5", "--dry-run") == 0
    assert "this takes about" in capsys.readouterr().out
    assert not (tmp_path / "preset.tune").exists()


def test_a_budget_that_is_none(tune, capsys):
    assert tune("psnr=28") == 2
    assert "allowed are psnr>=DB and speed>=FACTOR" in capsys.readouterr().err
