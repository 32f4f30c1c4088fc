"""A file that plays while it grows, and after its writer was killed."""

import os
import signal
import time

import imageio.v3 as iio
import numpy as np
import pytest

from dit_accel.errors import UsageError
from dit_accel.eval.fidelity import psnr
from dit_accel.pipelines.streaming.movie import MovieWriter


@pytest.fixture
def clip():
    t, y, x = np.meshgrid(np.arange(40), np.arange(34), np.arange(50), indexing="ij")
    return np.stack([x * 4 + t, y * 6 + t, x * 2 + y * 3], -1).clip(0, 255).astype(np.uint8)


def playable(path):
    """Frames that a player gets now; 0 where it gets none."""
    try:
        return len(iio.imread(path))
    except Exception:
        return 0


def wait_for(path, frames, seconds=30):
    deadline = time.monotonic() + seconds
    while playable(path) < frames and time.monotonic() < deadline:
        time.sleep(0.1)
    return playable(path)


def test_the_whole_clip(tmp_path, clip):
    with MovieWriter(tmp_path / "a.mp4", (50, 34), 8) as movie:
        for part in np.split(clip, [9, 21]):
            movie.write(part)
        assert movie.frames == 40
    back = iio.imread(tmp_path / "a.mp4")
    assert back.shape == clip.shape
    assert psnr(back, clip) > 35
    assert iio.immeta(tmp_path / "a.mp4")["fps"] == 8


def test_it_plays_while_it_grows_and_after_a_kill(tmp_path, clip):
    movie = MovieWriter(tmp_path / "a.mp4", (50, 34), 8)
    movie.write(clip)
    # Whole seconds are in the file; the last one waits for its end.
    seen = wait_for(tmp_path / "a.mp4", 32)
    assert 32 <= seen <= 40
    os.kill(movie.process.pid, signal.SIGKILL)
    movie.process.wait()
    assert playable(tmp_path / "a.mp4") == seen
    with pytest.raises(OSError, match="ffmpeg failed"):
        movie.write(clip)
    with pytest.raises(OSError, match="ffmpeg failed"):
        movie.close()


def test_an_exception_leaves_what_was_written(tmp_path, clip):

    def interrupted():
        with MovieWriter(tmp_path / "a.mp4", (50, 34), 8) as movie:
            movie.write(clip[:13] / 255.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert playable(tmp_path / "a.mp4") == 13


def test_refused(tmp_path, clip):
    with pytest.raises(UsageError, match="even sides; got 49x34"):
        MovieWriter(tmp_path / "a.mp4", (49, 34), 8)
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(OSError, match="No such file or directory"),
        MovieWriter(tmp_path / "no/a.mp4", (50, 34), 8) as m,
    ):
        m.write(np.concatenate([clip] * 9))
