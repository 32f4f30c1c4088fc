from pathlib import Path

import pytest

from dit_accel.eval.shapes.job import evaluate
from dit_accel.eval.shapes.suite import Suite, prompts
from dit_accel.pipelines.acceleration import Acceleration
from dit_accel.pipelines.job import Job

pytestmark = pytest.mark.slow


def test_bundled_model_gets_colour_and_motion_of_most_prompts_right():
    pytest.importorskip("cv2", reason="grading needs OpenCV")
    suite = Suite(tuple(prompts("mini-12")), dimensions=("color", "motion"))
    result = evaluate(suite, Job(prompts=(), out=Path("."), accel=Acceleration(method="dense")))
    assert result["summary"]["dense"]["color_and_motion"] >= 8, result["rows"]
