import numpy as np
import pytest

from dit_accel.pipelines.mini.captions import caption
from dit_accel.pipelines.mini.world import MOTIONS, Scene, draw, random_scene

cv2 = pytest.importorskip("cv2")
from dit_accel.eval.shapes import DIMENSIONS, classify_motion, grade, observe  # noqa: E402


def collect(pairs):
    values = {name: [] for name in DIMENSIONS}
    for video, text in pairs:
        for name, score in grade(video, text).items():
            if score is not None:
                values[name].append(score)
    return {name: float(np.mean(v)) for name, v in values.items() if v}


def test_drawn_videos_score_full_marks():
    rng = np.random.default_rng(11)
    scenes = [random_scene(rng) for _ in range(24)]
    scenes.append(Scene("red", "star", relation="above", second=("blue", "ring"), motion="left", seed=4))
    means = collect((draw(s, 33), caption(s, rng)) for s in scenes)
    assert set(means) == set(DIMENSIONS)
    assert min(means.values()) >= 0.98, means


def test_wrong_videos_score_near_zero():
    wrong = {
        "color": (Scene("red", "circle"), Scene("blue", "circle")),
        "motion": (Scene("red", "circle", motion="left"), Scene("red", "circle", motion="right")),
        "shape": (Scene("red", "circle"), Scene("red", "star")),
        "size": (Scene("red", "square", size="large"), Scene("red", "square", size="small")),
        "count": (Scene("red", "square", count=3), Scene("red", "square")),
        "background": (Scene("red", "square", tone="white"), Scene("red", "square", tone="navy")),
        "relation": (
            Scene("red", "square", relation="left of", second=("blue", "star")),
            Scene("blue", "square", relation="left of", second=("red", "star")),
        ),
        "persistence": (Scene("red", "circle"), Scene("blue", "circle")),
    }
    for name, (asked, shown) in wrong.items():
        assert grade(draw(shown, 17), caption(asked), (name,))[name] < 0.05, name


def test_noise_scores_near_zero():
    noise = np.random.default_rng(0).integers(0, 256, (17, 64, 80, 3), dtype=np.uint8)
    scores = grade(noise, "a red circle moves left on a white background")
    assert max(v for v in scores.values() if v is not None) < 0.2, scores


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_are_told_apart(motion):
    for speed in ("slow", "normal", "fast"):
        scene = Scene("green", "triangle", motion=motion, speed=speed, seed=9)
        assert classify_motion(observe(draw(scene, 33))) == motion, speed


def test_shaking_lowers_smoothness_and_flashing_lowers_flicker():
    scene = Scene("red", "square", motion="left")
    video = draw(scene, 33)
    shaken = np.stack([np.roll(f, 4 * (i % 2), axis=1) for i, f in enumerate(video)])
    assert grade(shaken, scene, ("smoothness",))["smoothness"] < 0.1
    flashing = video.copy()
    flashing[::2] = np.clip(flashing[::2].astype(int) - 20, 0, 255)
    assert grade(flashing, scene, ("flicker",))["flicker"] < 0.1
    assert grade(video, scene, ("flicker",))["flicker"] == 1.0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        observe(np.zeros((3, 4, 5, 3)))
    with pytest.raises(ValueError, match="unknown dimension 'taste'"):
        grade(np.zeros((3, 4, 5, 3), np.uint8), Scene("red", "circle"), ("taste",))
