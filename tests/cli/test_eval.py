"""``dit-accel eval``: every judge from the command line, on tiny models and made-up results."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dit_accel.cli import main
from dit_accel.eval.registry import METRICS
from dit_accel.eval.shapes.suite import Suite
from dit_accel.eval.vbench import DIMENSIONS
from dit_accel.pipelines.acceleration import Choice
from dit_accel.pipelines.video import write_frames

SMALL = ["--size", "48x32", "--frames", "9", "--steps", "2", "--backend", "gather"]


def run(capsys, *argv):
    code = main([str(word) for word in ("eval", *argv)])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_metrics_are_listed_with_reasons(capsys):
    code, out, _ = run(capsys, "metrics")
    assert code == 0
    assert [m.name for m in METRICS if m.name not in out] == []
    code, out, _ = run(capsys, "metrics", "--json")
    found = {one["name"]: one for one in json.loads(out)["metrics"]}
    assert {name for name, one in found.items() if one["is_vbench"]} == {f"vbench.{name}" for name in DIMENSIONS}
    assert not found["vbench_formula.temporal_flickering"]["is_vbench"]
    assert "environment of its own" in found["vbench.scene"]["why_not"]
    assert all(one["available"] == (one["why_not"] is None) for one in found.values())


def test_attention(capsys, tiny_wan, tmp_path):
    argv = ["attention", "--method", "all-blocks:block_size=4", "random-blocks:block_size=4", "--model", tiny_wan,
            *SMALL, "-o", tmp_path / "a.json"]  # fmt: skip
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "random-blocks:block_size=4   mean" in out
    document = json.loads((tmp_path / "a.json").read_text())
    assert (document["schema"], document["kind"], document["steps"]) == (1, "attention", 2)
    assert document["environment"]["versions"]["torch"]
    assert "dit-accel" in document["command_line"]
    heat = document["methods"]["random-blocks:block_size=4"]["heat"]["rel_l1"]
    assert len(heat) == 3
    assert len(heat[0]) == 2


def test_attention_under_quantised_products(capsys, tiny_wan):
    """Head size 12 and 36 tokens: INT8 loses a little, and keeps every pair."""
    small = [*SMALL[:-2], "--model", tiny_wan, "--backend", "reference", "--method", "dense", "--quant", "sage1"]
    code, out, _ = run(capsys, "attention", *small, "--json")
    assert code == 0
    found = json.loads(out)["methods"]["dense"]
    assert 1e-5 < found["mean"]["rel_l1"] < 0.1
    assert found["densities"]["effective"] == 1
    assert found["mean"]["recall"] == 1


def test_speed(capsys, tiny_wan, tmp_path):
    argv = ["speed", "--method", "random-blocks", "--param", "block_size=4", "--dense-steps", "0", "--repeats", "2",
            "--model", tiny_wan, *SMALL, "-o", tmp_path / "s.json"]  # fmt: skip
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "can gain at most" in out
    (row,) = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert len(row["compare"]["loop_runs"]["dense"]) == 2
    assert row["compare"]["order"] == ["dense", "accelerated", "accelerated", "dense"]
    assert row["compare"]["bound"] > 1
    assert set(row["compare"]["warmup_seconds"]) == {"dense", "accelerated"}


def clips(folder, amount):
    for number in range(2):
        stem = f"{number:04d}-x-s1"
        frames = np.random.default_rng(number).integers(20, 200, (2, 16, 16, 3)).astype(np.uint8) + np.uint8(amount)
        write_frames(folder / "frames" / stem, frames)
        (folder / f"{stem}.mp4").touch()
        (folder / f"{stem}.json").write_text(json.dumps({"schema": 1, "settings": {"prompt": stem, "seed": 1}}))
    return folder


def test_fidelity(capsys, tmp_path):
    dense, fast = clips(tmp_path / "a", 0), clips(tmp_path / "b", 10)
    argv = ["fidelity", dense, fast, "--dense-frames", dense / "frames", "--fast-frames", fast / "frames"]
    code, out, err = run(capsys, *argv, "--border", "zero", "-o", tmp_path / "f.json")
    assert (code, err) == (0, "")
    assert "psnr: mean 28.1308, 2 clips" in out
    assert "zero border" in out
    document = json.loads((tmp_path / "f.json").read_text())
    assert document["kind"] == "fidelity"
    assert [row["prompt"] for row in document["rows"]] == ["0000-x-s1", "0001-x-s1"]
    code, out, _ = run(capsys, *argv, "--json")
    assert json.loads(out)["summary"]["psnr"]["mean"] == pytest.approx(28.1308, abs=1e-4)


def test_vbench_totals_and_partial_results(capsys, tmp_path):
    for name, d in DIMENSIONS.items():
        rows = [{"video_path": str(i)} for i in range(d.expected)]
        (tmp_path / f"{name}_eval_results.json").write_text(json.dumps({name: [d.high, rows]}))
    code, out, _ = run(capsys, "vbench", "totals", tmp_path)
    assert code == 0
    assert "quality 100.00 %, semantic 100.00 %, total 100.00 %" in out
    (tmp_path / "scene_eval_results.json").unlink()
    code, out, err = run(capsys, "vbench", "totals", tmp_path, "--json")
    assert "totals" not in json.loads(out)
    assert "partial, so there are no totals: scene: not scored" in err


def test_vbench_doctor_missing_and_flicker(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    code, out, _ = run(capsys, "vbench", "doctor", "--python", sys.executable, "--cache", tmp_path)
    assert code == 0
    assert "module vbench" in out
    (tmp_path / "info.json").write_text(json.dumps([{"prompt_en": "a cat", "dimension": ["scene"]}]))
    (tmp_path / "a cat-0.mp4").touch()
    code, out, _ = run(capsys, "vbench", "missing", tmp_path, "--info", tmp_path / "info.json")
    assert "4 of 5 videos are missing" in out
    np.save(tmp_path / "v.npy", np.stack([np.full((4, 4, 3), v, np.uint8) for v in (0, 10, 0)]))
    code, out, _ = run(capsys, "vbench", "flicker", tmp_path / "v.npy")
    assert out.startswith("vbench_formula.temporal_flickering 0.960784 (no VBench score")


@pytest.mark.parametrize(("argv", "message"), [
    (["vbench", "totals"], "needs a path"),
    (["vbench", "doctor"], "--python names the interpreter"),
    (["vbench", "missing", "."], "--info names"),
    (["attention", "--method", "radail"], "did you mean 'radial'"),
    (["attention", "--method", "radial", "radial"], "the same method twice"),
    (["attention", "--method", "radial", "--method", "radail"], "did you mean 'radial'"),
    (["attention", "--method", "radail", "--method", "radial"], "did you mean 'radial'"),
    (["attention", "--method", "dense"], "dense attention has no error to measure"),
    (["attention", "--limit", "0"], "--limit must be at least 1"),
    (["fidelity", "absent", "absent"], "there is no folder absent"),
    (["speed", "--method", "dense"], "sets a method against dense attention"),
])  # fmt: skip
def test_usage_errors(capsys, argv, message):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("kind", ["", "shape"])
def test_what_to_measure_is_asked_for(capsys, kind):
    with pytest.raises(SystemExit) as stop:
        main(["eval", *([kind] if kind else [])])
    assert stop.value.code == 2
    assert "shapes" in capsys.readouterr().err or not kind


@pytest.mark.parametrize("name", ["vbench", *(pytest.param(name, marks=pytest.mark.slow)
                                              for name in ("fidelity", "attention", "speed", "shapes"))])  # fmt: skip
def test_each_judge_is_a_module(name):
    done = subprocess.run([sys.executable, "-m", f"dit_accel.eval.{name}", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: dit-accel eval {name}")


def test_shapes_says_that_a_density_was_missed(monkeypatch, capsys):
    from dit_accel.eval.shapes import job

    def evaluate(*_, **__):
        row = {"prompt": "p", "seed": 0, "side": "radial", "scores": {"color": 1.0}, "density": 0.75}
        choice = Choice(None, asked=0.5)
        return job.document(Suite(("p",), dimensions=("color",)), {}, [row], choice)

    monkeypatch.setattr(job, "evaluate", evaluate)
    assert main(["eval", "shapes", "--method", "radial", "--density", "0.5", "--json"]) == 0
    captured = capsys.readouterr()
    assert "density 0.5 was asked for and radial had 0.750" in captured.err
    assert json.loads(captured.out)["density_missed"] == {"asked": 0.5, "had": [0.75]}
