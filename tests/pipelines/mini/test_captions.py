import numpy as np
import pytest

from dit_accel.pipelines.mini.captions import caption, parse, vocabulary
from dit_accel.pipelines.mini.world import MOTIONS, Scene, random_scene


def test_captions_read_back_as_their_facts():
    rng = np.random.default_rng(1)
    for _ in range(1500):
        scene = random_scene(rng)
        text = caption(scene, rng)
        assert parse(text) == scene.facts(), text


def test_every_motion_has_a_caption():
    for motion in MOTIONS:
        scene = Scene("red", "star", motion=motion)
        assert parse(caption(scene)) == scene


def test_vocabulary_is_fixed_and_covers_the_grammar():
    words = vocabulary()
    assert len(words) == len(set(words))
    assert words == vocabulary()
    rng = np.random.default_rng(2)
    for _ in range(500):
        assert set(caption(random_scene(rng), rng).replace(",", " ,").split()) <= set(words)


def test_phrasings_differ():
    scene = Scene("red", "circle", motion="left")
    assert len({caption(scene, np.random.default_rng(i)) for i in range(40)}) > 5


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("a red circle moves left", "background"),
        ("a dog moves left on a white background", "subject"),
        ("a red circle sings on a white background", "motion"),
    ],
)
def test_unreadable_captions_name_what_is_missing(text, missing):
    with pytest.raises(ValueError, match=f"no {missing}"):
        parse(text)
