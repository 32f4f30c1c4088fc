import numpy as np
import pytest

from dit_accel.pipelines.mini.world import COLORS, DIRECTION, Scene, draw, random_scene, tracks


def test_same_seed_same_video():
    scene = random_scene(np.random.default_rng(5))
    assert random_scene(np.random.default_rng(5)) == scene
    np.testing.assert_array_equal(draw(scene, 9), draw(scene, 9))


def test_clip_is_uint8_and_antialiased():
    video = draw(Scene("red", "circle", size="large"), 3)
    assert video.shape == (3, 64, 80, 3)
    assert video.dtype == np.uint8
    red = np.array(COLORS["red"])
    assert (video == red).all(-1).any()
    # Between the object and the background there are mixed pixels.
    assert len(np.unique(video[0].reshape(-1, 3), axis=0)) > 4


def test_chosen_times_are_frames_of_the_whole_clip():
    scene = Scene("blue", "star", motion="right", seed=3)
    np.testing.assert_array_equal(draw(scene, 65)[[7, 40]], draw(scene, times=np.array([7, 40]) / 64))


@pytest.mark.parametrize("motion", list(DIRECTION))
def test_translation_follows_its_name(motion):
    (track,) = tracks(Scene("red", "circle", motion=motion, seed=1), np.linspace(0, 1, 5))
    moved = np.array([track.x[-1] - track.x[0], track.y[-1] - track.y[0]])
    np.testing.assert_array_equal(np.sign(moved.round(6)), np.sign(DIRECTION[motion]))


def test_everything_stays_in_the_frame():
    rng = np.random.default_rng(0)
    times = np.linspace(0, 1, 9)
    for _ in range(300):
        scene = random_scene(rng)
        for track in tracks(scene, times):
            inside = [
                track.x - track.radius,
                80 - track.x - track.radius,
                track.y - track.radius,
                64 - track.y - track.radius,
            ]
            assert np.min(inside) > -1.5, scene


def test_bad_facts_say_what_is_allowed():
    with pytest.raises(ValueError, match=r"'maroon'.*'red'"):
        Scene("maroon", "circle")
    with pytest.raises(ValueError, match="two different objects"):
        Scene("red", "circle", relation="above")
