import errno
import subprocess
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from dit_accel.errors import UsageError
from dit_accel.eval.fidelity import psnr
from dit_accel.pipelines import video


@pytest.fixture
def clip():
    """(9, 34, 50, 3): sides that are no multiples of 4, a slow gradient."""
    t, y, x = np.meshgrid(np.arange(9), np.arange(34), np.arange(50), indexing="ij")
    return np.stack([x * 4 + t, y * 6 + t, x * 2 + y * 3], -1).astype(np.uint8)


def test_mp4_keeps_size_frame_count_and_rate(tmp_path, clip):
    path = tmp_path / "a.mp4"
    video.write_mp4(path, clip, 12)
    back = iio.imread(path)
    assert back.shape == clip.shape
    assert psnr(back, clip) > 35
    assert iio.immeta(path)["fps"] == 12
    assert iio.immeta(path)["pix_fmt"].startswith("yuv420p")


def test_the_partial_name_does_not_matter(tmp_path, clip):
    path = tmp_path / "a.mp4.partial"
    video.write_mp4(path, clip / 255.0, 16)
    assert path.stat().st_size > 0


def test_odd_sides_are_refused_not_rescaled(tmp_path, clip):
    with pytest.raises(UsageError, match=r"even sides; got 49x34"):
        video.write_mp4(tmp_path / "a.mp4", clip[:, :, :49], 16)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_as_such(tmp_path, clip):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="No space left on device") as error:
        video.write_mp4(full, clip, 16)
    assert error.value.errno == errno.ENOSPC


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path, clip, capfd):
    with pytest.raises(OSError, match=r"ffmpeg failed: .*No such file or directory"):
        video.write_mp4(tmp_path / "no" / "a.mp4", clip, 16)
    assert capfd.readouterr() == ("", "")


def test_an_interruption_ends_ffmpeg(tmp_path, clip, monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])

    def stop(frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "to_uint8", stop)
    with pytest.raises(KeyboardInterrupt):
        video.write_mp4(tmp_path / "a.mp4", clip, 16)
    assert started[0].poll() is not None


def test_png_is_lossless_and_rounds_to_nearest(tmp_path, clip):
    video.write_png(tmp_path / "a.png", clip[0])
    assert (np.asarray(Image.open(tmp_path / "a.png")) == clip[0]).all()
    values = np.array([0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.5, -1.0])
    assert video.to_uint8(values).tolist() == [0, 0, 1, 255, 255, 0]


def test_frames_are_numbered(tmp_path, clip):
    video.write_frames(tmp_path / "f", clip)
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == [f"{i:05d}.png" for i in range(9)]


def test_gif(tmp_path, clip):
    video.write_gif(tmp_path / "a.gif", clip, 16)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (9, (50, 34), 0)
        assert image.info["duration"] == 60


def test_side_by_side(clip):
    both = video.side_by_side(clip, clip / 255.0)
    assert both.shape == (9, 34, 100, 3)
    assert (both[:, :, :50] == both[:, :, 50:]).all()
