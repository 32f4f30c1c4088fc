import pytest
from dit_accel.eval.shapes.__main__ import pipeline_renderer
from dit_accel.eval.shapes.suite import prompts, run

pytestmark = pytest.mark.slow


def test_bundled_model_gets_colour_and_motion_of_most_prompts_right():
    pytest.importorskip("cv2")
    result = run(pipeline_renderer(), prompts("mini-12"), dimensions=("color", "motion"))
    assert result["summary"]["color_and_motion"] >= 8, result["rows"]
