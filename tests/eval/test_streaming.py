"""What a long clip is told about itself, on clips whose answer is known."""

import numpy as np
import pytest

from dit_accel.eval.streaming import StreamJudge
from dit_accel.pipelines.mini.captions import caption
from dit_accel.pipelines.mini.world import Scene, draw

FPS = 8


def judged(frames, prompt="", portions=3):
    judge = StreamJudge(prompt, FPS)
    for part in np.array_split(frames, portions):
        judge.add(part)
    return judge.verdict()


def test_a_still_clip():
    assert judged(np.full((40, 6, 8, 3), 90, np.uint8)) == {
        "drift": 0.0, "dynamic": 0.0, "persistence": None, "persistence_late": None, "colour": None,
    }  # fmt: skip


def test_a_clip_that_brightens():
    frames = np.full((40, 6, 8, 3), 90, np.uint8)
    frames[20:] = 100
    found = judged(frames)
    assert found["drift"] == pytest.approx(10 * 3**0.5)
    assert found["dynamic"] == pytest.approx(10 / 39)
    assert judged(frames, portions=40) == found


def test_objects_of_the_caption():
    scene = Scene("red", "circle")
    prompt = caption(scene, np.random.default_rng(0))
    frames = draw(scene, 40)
    assert judged(frames, prompt)["persistence"] == judged(frames, prompt)["colour"] == 1.0
    gone = frames.copy()
    gone[30:] = 128
    found = judged(gone, prompt)
    assert (found["persistence"], found["persistence_late"], found["colour"]) == (0.75, 0.5, 0.75)
    assert judged(gone, "a cat on a sofa")["persistence"] is None


def test_objects_of_another_colour_and_number():
    told = "two red circles stay still on a white background"
    pair = draw(Scene("red", "circle", relation="left of", second=("blue", "circle")), 4)
    found = judged(pair, told, 1)
    assert (found["persistence"], found["colour"]) == (1.0, 0.5)
    found = judged(draw(Scene("red", "circle", count=3), 4), told, 1)
    assert (found["persistence"], found["colour"]) == (0.0, 1.0)
