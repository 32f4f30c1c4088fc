"""The suite's job, with rendering replaced by the drawn world."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("cv2", reason="grading needs OpenCV")

from pathlib import Path

from dit_accel.errors import UsageError
from dit_accel.eval.shapes import job as module
from dit_accel.eval.shapes.suite import Suite, prompts, table
from dit_accel.pipelines.acceleration import Acceleration
from dit_accel.pipelines.job import Job
from dit_accel.pipelines.mini.captions import parse
from dit_accel.pipelines.mini.world import draw

TEXTS = tuple(prompts("mini-12")[:3])
DIMENSIONS = ("color", "motion")


@pytest.fixture
def calls(monkeypatch):
    """Dense draws the caption; the accelerated side draws the first frame only, so that nothing moves."""
    made = []

    def generate(pipe, shot, processor):
        made.append((shot.prompt, shot.seed, processor is not None))
        video = draw(parse(shot.prompt), 17)
        frames = (np.repeat(video[:1], 17, 0) if processor else video).astype(np.float32) / 255
        return SimpleNamespace(frames=frames, attention={"tier": "gather", "density": 0.2})

    monkeypatch.setattr(module, "generate", generate)
    monkeypatch.setattr(module, "load", lambda *a, **k: SimpleNamespace(set_progress_bar_config=lambda **k: None))
    return made


def job(**kwargs):
    return Job(prompts=(), out=Path("."), accel=Acceleration(**kwargs))


def test_it_grades_writes_and_continues(tmp_path, calls):
    out = tmp_path / "rows.json"
    dense = job(method="dense")
    module.evaluate(Suite(TEXTS[:2], dimensions=DIMENSIONS), dense, out=out)
    result = module.evaluate(Suite(TEXTS, dimensions=DIMENSIONS), dense, out=out, command_line="dit-accel eval shapes")
    assert [prompt for prompt, _, _ in calls] == list(TEXTS)
    summary = result["summary"]["dense"]
    assert summary["color_and_motion"] == 3
    assert json.loads(out.read_text())["summary"]["dense"] == summary
    assert json.loads(out.read_text())["command_line"] == "dit-accel eval shapes"
    assert "| color | 1.000 | no interval: 1.000, 1.000, 1.000 | 100% | 3 |" in table(summary)


def test_pairs_share_prompt_and_seed(calls):
    result = module.evaluate(Suite(TEXTS, seeds=(3,), dimensions=DIMENSIONS, compare=True), job(method="radial"))
    assert calls == [(text, 3, fast) for text in TEXTS for fast in (False, True)]
    assert set(result["summary"]) == {"dense", "radial"}
    assert result["paired"]["color"]["mean"] == pytest.approx(0)
    assert result["paired"]["motion"]["mean"] == pytest.approx(-1)
    assert result["paired"]["psnr"]["videos"] == 3
    assert {row["tier"] for row in result["rows"] if row["side"] == "radial"} == {"gather"}


def test_rows_of_other_settings_are_refused(tmp_path, calls):
    out = tmp_path / "rows.json"
    module.evaluate(Suite(TEXTS[:1], dimensions=DIMENSIONS), job(method="dense"), out=out)
    with pytest.raises(UsageError, match="other settings"):
        module.evaluate(Suite(TEXTS[:1], dimensions=DIMENSIONS), job(), out=out)


@pytest.mark.parametrize(("density", "missed"), [(0.2, None), (0.5, {"asked": 0.5, "had": [0.2, 0.2]})])
def test_another_density_than_asked_for_is_told(density, missed, tmp_path, calls):
    # The drawn renders have a density of 0.2.
    suite, out = Suite(TEXTS[:2], dimensions=DIMENSIONS, compare=True), tmp_path / "rows.json"
    result = module.evaluate(suite, job(method="radial", density=density), out=out)
    assert result.get("density_missed") == missed
    assert json.loads(out.read_text()).get("density_missed") == missed


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_file_that_holds_no_rows_is_refused_and_kept(content, tmp_path, calls):
    out = tmp_path / "rows.json"
    out.write_text(content)
    with pytest.raises(UsageError, match="give another file or remove it"):
        module.evaluate(Suite(TEXTS[:1], dimensions=DIMENSIONS), job(), out=out)
    assert out.read_text() == content
    assert calls == []
