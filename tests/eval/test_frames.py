import numpy as np
import pytest

from dit_accel.errors import UsageError
from dit_accel.eval.frames import read_clip
from dit_accel.pipelines.video import write_frames, write_gif, write_mp4, write_png


@pytest.fixture
def video():
    return np.random.default_rng(0).integers(0, 256, (5, 16, 32, 3), dtype=np.uint8)


def test_lossless_sources_give_the_frames_back(video, tmp_path):
    write_frames(tmp_path / "frames", video)
    write_png(tmp_path / "one.png", video[0])
    np.save(tmp_path / "a.npy", video)
    np.savez(tmp_path / "a.npz", video / 255)
    for name, expected in (("frames", video), ("one.png", video[:1]), ("a.npy", video), ("a.npz", video / 255)):
        clip = read_clip(tmp_path / name)
        assert clip.lossless
        assert np.array_equal(clip.frames, expected)


def test_a_video_file_is_read_and_marked(tmp_path):
    flat = np.full((5, 16, 32, 3), 120, np.uint8)
    write_mp4(tmp_path / "v.mp4", flat, 8)
    write_gif(tmp_path / "v.gif", flat, 8)
    for name, frames in (("v.mp4", 5), ("v.gif", 1)):  # a GIF joins equal frames
        clip = read_clip(tmp_path / name)
        assert not clip.lossless
        assert clip.frames.shape == (frames, 16, 32, 3)
        assert np.abs(clip.frames.astype(int) - 120).max() < 6


def test_a_damaged_video_is_told_in_one_line(tmp_path):
    path = tmp_path / "cut.mp4"
    write_mp4(path, np.full((5, 16, 32, 3), 120, np.uint8), 8)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"cut\.mp4: ffmpeg finds no frame in its 100 bytes.*--resume") as told:
        read_clip(path)
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(("name", "message"), [
    ("absent.mp4", "no clip at"), ("empty", "no PNG frames"), ("notes.txt", "is no clip"), ("bad.npz", "cannot read"),
    ("two.npz", "holds the arrays"), ("bad.mp4", "cannot read"),
])  # fmt: skip
def test_what_cannot_be_read(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    for file in ("notes.txt", "bad.npz", "bad.mp4"):
        (tmp_path / file).write_text("nothing")
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    with pytest.raises(UsageError, match=message):
        read_clip(tmp_path / name)
