"""Proxies on drawn clips whose motion is known, and their pairing; none of them is a score."""

import json

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")

from dit_accel.cli import main  # noqa: E402
from dit_accel.eval import proxies  # noqa: E402
from dit_accel.eval.proxies import MEANING, measure, name_of, sanity  # noqa: E402
from dit_accel.eval.proxy_frames import DynamicRule, flow, motion, smoothness  # noqa: E402
from dit_accel.eval.vbench import totals  # noqa: E402


def texture(width=200, height=96, seed=0):
    noise = np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return (smooth * 255).astype(np.uint8)


def pan(step, frames=6, width=128):
    whole = texture()
    return np.stack([whole[:, t * step : t * step + width] for t in range(frames)])


def test_a_shift_of_three_pixels_is_three_pixels_on_any_number_of_threads():
    clip, fields = pan(3), []
    for threads in (1, 4):
        cv2.setNumThreads(threads)
        fields.append(flow(clip[1], clip[0])[10:-10, 10:-10])
    assert np.median(fields[0][..., 0]) == pytest.approx(3.0, abs=0.02)
    assert np.array_equal(*fields)


@pytest.mark.parametrize(("size", "rule"), [
    ((81, 16, 480, 832), (2, 41, 11.25, 10)),
    ((81, 16, 720, 1280), (2, 41, 16.875, 10)),
    ((16, 8, 256, 256), (1, 16, 6.0, 4)),
])  # fmt: skip
def test_the_arithmetic_of_dynamic_degree(size, rule):
    found = DynamicRule.of(*size)
    assert (found.interval, found.sampled, found.threshold, found.needed) == rule
    assert not found.moves([found.threshold] * found.needed)
    assert found.moves([found.threshold + 0.1] * found.needed)


def test_smoothness_falls_with_jitter_and_noise():
    still, smooth = pan(0), pan(2)
    whole, shifts = texture(), (10, 14, 11, 16, 12, 18)
    jitter = np.stack([whole[:, s : s + 128] for s in shifts])
    noise = np.random.default_rng(1).integers(0, 256, smooth.shape, dtype=np.uint8)
    values = [smoothness(clip) for clip in (still, smooth, jitter, noise)]
    assert values[0] == pytest.approx(1.0, abs=1e-3)
    assert values[0] >= values[1] > values[2] > values[3]


def test_noise_moves_but_is_told_unreliable():
    noise = np.random.default_rng(1).integers(0, 256, (5, 96, 128, 3), dtype=np.uint8)
    assert motion(noise, 8)[2] < proxies.RELIABLE < motion(pan(2), 8)[2]


def test_figures_of_pictures():
    base = pan(1, frames=2)
    blocks = base.copy()
    blocks[:, :, ::8] = 255
    noisy = np.clip(base + np.random.default_rng(0).normal(0, 10, base.shape), 0, 255).astype(np.uint8)
    plain, grid, grain = (measure(clip) for clip in (base, blocks, noisy))
    assert grid[name_of("blockiness_8")] > 2 * plain[name_of("blockiness_8")]
    assert grain[name_of("noise_sigma")] > plain[name_of("noise_sigma")] + 3
    assert plain[name_of("sharpness")] < grain[name_of("sharpness")]
    assert measure(np.zeros((2, 96, 128, 3), np.uint8))[name_of("dead_frames")] == 1
    assert plain[name_of("flow_interp_smoothness")] is None, "two frames have no middle"
    assert plain[name_of("flow_consistency")] is None, "at 16 frames per second one of them is looked at"


def test_no_proxy_enters_a_total():
    for key in MEANING:
        with pytest.raises(Exception, match="is no VBench score"):
            totals({name_of(key): 0.5})


def test_what_is_plainly_wrong_is_said():
    clip = pan(2)
    assert sanity(clip, clip) == []
    black = clip.copy()
    black[2] = 0
    assert "1 of 6 frames are of one colour, the first is 2" in sanity(black, clip)
    assert "stands still" in sanity(np.repeat(clip[:1], 6, 0), clip)[0]
    assert "mean colour" in sanity(np.clip(clip.astype(int) + 40, 0, 255).astype(np.uint8), clip)[0]
    assert "differ" in sanity(clip[:3], clip)[0]


def test_differences_of_a_clip_to_itself_are_zero_and_the_command_says_what_they_are(tmp_path, capsys):
    for side in ("dense", "fast"):
        (tmp_path / side).mkdir()
        for name, step in (("a", 1), ("b", 2)):
            folder = tmp_path / f"{side}-frames" / name
            folder.mkdir(parents=True)
            for t, frame in enumerate(pan(step, frames=4)):
                cv2.imwrite(str(folder / f"{t:03}.png"), frame[..., ::-1])
            (tmp_path / side / f"{name}.mp4").touch()
    argv = ["eval", "proxies", str(tmp_path / "dense"), str(tmp_path / "fast"), "--json"]
    argv += [x for side in ("dense", "fast") for x in (f"--{side}-frames", str(tmp_path / f"{side}-frames"))]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_vbench"] is False
    assert {row["prompt"] for row in found["rows"]} == {"a", "b"}
    assert [one["mean"] for one in found["summary"].values()] == [0] * len(MEANING)
    assert all(row["reliable"] and not row["sanity"] for row in found["rows"])
    assert main([*argv[:2], str(tmp_path / "dense"), str(tmp_path)]) == 2
