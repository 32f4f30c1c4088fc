import numpy as np
import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.eval.fidelity import BORDERS, fidelity, psnr, psnr_global, ssim


def flat(value, frames=1, dtype=np.uint8, side=16):
    return np.full((frames, side, side, 3), value, dtype=dtype)


@pytest.fixture
def noisy():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (3, 24, 31, 3), dtype=np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-40, 41, a.shape), 0, 255).astype(np.uint8)
    return a, b


def test_psnr_of_a_uniform_error_of_ten():
    assert psnr(flat(0), flat(10)) == pytest.approx(28.130804, abs=1e-6)


def test_an_error_of_sixteen_does_not_wrap_around_to_zero():
    assert psnr(flat(0), flat(16)) == pytest.approx(24.0485, abs=1e-4)
    assert psnr(flat(16), flat(0)) == pytest.approx(24.0485, abs=1e-4)


def test_mean_of_frames_and_global_differ():
    a, b = flat(0, 2), np.concatenate([flat(1), flat(10)])
    assert psnr(a, b) == pytest.approx(38.1308, abs=1e-4)
    assert psnr_global(a, b) == pytest.approx(31.0979, abs=1e-4)
    result = fidelity(a, b)
    assert result.psnr_frames == pytest.approx((48.1308, 28.1308), abs=1e-4)
    assert (result.psnr, result.psnr_global) == (psnr(a, b), psnr_global(a, b))


def test_identical_frames_are_capped_and_counted():
    a = flat(7, 3)
    b = a.copy()
    b[2] += 10
    result = fidelity(a, b)
    assert result.psnr_frames[:2] == (100.0, 100.0)
    assert result.n_identical == 2
    same = fidelity(a, a)
    assert (same.psnr, same.psnr_global, same.ssim, same.n_identical) == (100.0, 100.0, 1.0, 3)


def test_ssim_of_two_constants():
    assert ssim(flat(0.5, dtype=np.float64), flat(0.6, dtype=np.float64)) == pytest.approx(0.9836092, abs=1e-7)


def test_ssim_is_one_for_identity_and_symmetric(noisy):
    a, b = noisy
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-12)
    assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-12)
    assert 0 < ssim(a, b) < 1


def test_ssim_equals_a_direct_computation_window_by_window(noisy):
    a, b = (x[0] / 255.0 for x in noisy)
    g = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(g, g) / g.sum() ** 2
    values = []
    for c in range(3):
        for y in range(a.shape[0] - 10):
            for x in range(a.shape[1] - 10):
                p, q = a[y : y + 11, x : x + 11, c], b[y : y + 11, x : x + 11, c]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert ssim(noisy[0][0], noisy[1][0]) == pytest.approx(np.mean(values), abs=1e-10)


@pytest.mark.parametrize(("border", "mode"), [("reflect", "reflect"), ("zero", "constant")])
def test_padded_borders_are_the_valid_ssim_of_padded_frames(noisy, border, mode):
    """Five pixels on every side, so that every pixel is the centre of a window."""
    a, b = noisy
    padded = [np.pad(x, ((0, 0), (5, 5), (5, 5), (0, 0)), mode=mode) for x in (a, b)]
    assert ssim(a, b, border) == pytest.approx(ssim(*padded), abs=1e-12)


def test_border_conventions_differ_and_are_named(noisy):
    found = {border: fidelity(*noisy, border) for border in BORDERS}
    assert len({round(f.ssim, 6) for f in found.values()}) == 3
    for border, one in found.items():
        assert border in one.ssim_variant
        assert one.ssim == pytest.approx(ssim(*noisy, border), abs=1e-12)
    assert found["valid"].ssim == ssim(*noisy)
    with pytest.raises(UsageError, match="border convention 'same' is unknown"):
        ssim(*noisy, "same")


def test_errors_at_the_border_count_by_convention():
    """Without padding a pixel of the rim lies in few windows; zeros are alike in both clips and flatter."""
    a = np.full((1, 24, 31, 3), 128, np.uint8)
    b = a.copy()
    b[:, 0], b[:, -1], b[:, :, 0], b[:, :, -1] = 0, 0, 0, 0
    assert ssim(a, b, "reflect") < ssim(a, b)
    assert ssim(a, b, "reflect") < ssim(a, b, "zero")


def test_ssim_equals_scikit_image(noisy):
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    a, b = (x[0] / 255.0 for x in noisy)
    expected = metrics.structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=2
    )
    assert ssim(a, b) == pytest.approx(expected, abs=1e-5)


def test_kinds_of_input_agree(noisy):
    a, b = noisy
    expected = psnr(a, b), ssim(a, b)
    floats = a / 255.0, b / 255.0
    tensors = torch.from_numpy(a), torch.from_numpy(b)
    for x, y in (floats, tensors, (a, b / 255.0), (tensors[0], b)):
        assert (psnr(x, y), ssim(x, y)) == pytest.approx(expected, abs=1e-9)
    assert psnr(a[0], b[0]) == fidelity(a[:1], b[:1]).psnr


def test_half_precision_tensors_are_taken():
    x = torch.full((1, 16, 16, 3), 0.5, dtype=torch.bfloat16)
    assert psnr(x, x + 0.25) == pytest.approx(-20 * np.log10(0.25))


def test_frames_smaller_than_the_window_have_psnr_but_no_ssim():
    result = fidelity(flat(0, side=8), flat(10, side=8))
    assert result.ssim is None
    assert result.psnr == pytest.approx(28.130804, abs=1e-6)
    with pytest.raises(UsageError, match="11x11"):
        ssim(flat(0, side=8), flat(10, side=8))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (flat(0, 3), flat(0, 2), "equal frame counts"),
        (flat(0), flat(0, side=18), "differ in shape"),
        (np.zeros((2, 3, 16, 16), np.uint8), np.zeros((2, 3, 16, 16), np.uint8), "channels last"),
        (np.zeros((0, 16, 16, 3), np.uint8), np.zeros((0, 16, 16, 3), np.uint8), "channels last"),
        (flat(0, dtype=np.int32), flat(0, dtype=np.int32), "uint8, or float"),
        (flat(200.0, dtype=np.float32), flat(10.0, dtype=np.float32), r"must lie in \[0, 1\].*200"),
        (flat(np.nan, dtype=np.float32), flat(0.5, dtype=np.float32), "NaN"),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, message):
    for measure in (psnr, ssim, fidelity):
        with pytest.raises(UsageError, match=message):
            measure(a, b)
