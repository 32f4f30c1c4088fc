"""FP8, INT8 and FP16 values and weights: the number formats, checked by enumeration."""

import pytest
import torch

from dit_accel.kernels.quant.smooth import block_mean, mean
from dit_accel.kernels.quant.values import (
    E4M3_NARROW,
    FP16_CHAIN,
    FP16_MAX,
    quantize_values,
    round_e4m3,
    round_int8,
)  # fmt: skip

# float8_e4m3fn by definition: 4 exponent bits of bias 7, 3 mantissa bits, 0x7F is NaN.
GRID = sorted(
    (m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8) if (e, m) != (15, 7)
)


def test_e4m3_is_the_nearest_of_the_grid():
    grid = torch.tensor(GRID)
    assert grid[-1] == 448
    x = torch.linspace(-500, 500, 20011)
    nearest = (x.abs()[:, None].clamp_max(448) - grid).abs().amin(1)
    assert torch.equal((round_e4m3(x).abs() - x.abs().clamp_max(448)).abs(), nearest)
    assert torch.isin(round_e4m3(x).abs(), grid).all()
    assert round_e4m3(torch.tensor(torch.nan)).isnan()


def test_relative_error_of_weights():
    p = torch.linspace(0, 1, 100001)
    back = round_e4m3(448 * p) / 448
    normal = 448 * p >= 2**-6
    assert ((back - p).abs()[normal] <= p[normal] / 17 * (1 + 1e-6)).all()
    assert ((back - p).abs()[~normal] <= 2**-10 / 448).all()
    assert back[-1] == 1


def test_int8_rounds_half_away_and_keeps_nan():
    x = torch.tensor([0.5, -0.5, 1.49, 126.9, 200.0, -200.0, torch.nan])
    assert round_int8(x)[:-1].tolist() == [1, -1, 1, 127, 127, -127]
    assert round_int8(x)[-1].isnan()


@pytest.mark.parametrize(("kind", "step"), [("fp8", 1 / 17), ("int8", 0.5), ("fp16", 2**-11)])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_values_come_back(kind, step, narrow, size):
    v = torch.randn(2, 3, 70, 8, generator=torch.Generator().manual_seed(0)) * size
    codes, scales = quantize_values(v, kind, narrow=narrow)
    assert scales.shape == (2, 3, 1, 8)
    error = (codes.float() * scales - v).abs()
    if kind == "int8":
        assert (error <= (step + 1e-4) * scales).all()
    else:
        tiny = {"fp8": 2**-10, "fp16": 2**-25}[kind] * scales
        assert (error <= step * v.abs() * (1 + 1e-5) + tiny).all()


def test_an_fp16_accumulator_cannot_overflow():
    assert 448 * E4M3_NARROW * FP16_CHAIN == 64512 <= FP16_MAX
    for kind, weight in (("fp8", 448.0), ("fp16", 1.0)):
        codes, _ = quantize_values(torch.full((1, 1, 3, 2), 3e5), kind, narrow=True)
        assert codes.float().max() * weight * FP16_CHAIN <= FP16_MAX


def test_ordinary_values_are_only_rounded_to_fp16():
    v = torch.randn(1, 1, 9, 4) * 100
    codes, scales = quantize_values(v, "fp16", narrow=True)
    assert torch.equal(codes, v.half())
    assert (scales == 1).all()


@pytest.mark.parametrize("kind", ["fp8", "int8", "fp16"])
def test_large_values_are_shifted_and_zeros_stay(kind):
    v = torch.tensor([[[[7e4, 0.0, 1.0], [-3e5, 0.0, 2.0]]]])
    codes, scales = quantize_values(v, kind)
    back = codes.float() * scales
    assert back.isfinite().all()
    torch.testing.assert_close(back, v, rtol=0.06, atol=2e-2)
    assert (back[..., 1] == 0).all()


@pytest.mark.parametrize("kind", ["fp8", "int8", "fp16"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_fault_shows_in_its_channel(kind, bad):
    v = torch.ones(1, 1, 5, 3)
    v[0, 0, 2, 1] = bad
    codes, scales = quantize_values(v, kind)
    out = codes.float().sum(2, keepdim=True) * scales
    assert not out[..., 1].isfinite().any()
    assert out[..., ::2].isfinite().all()


def test_means_are_over_live_tokens():
    x = torch.randn(2, 3, 10, 4, dtype=torch.bfloat16)
    live = torch.arange(10) < torch.tensor([7, 0])[:, None, None]
    x[0, :, 7:] = torch.nan
    found = mean(x, live)
    torch.testing.assert_close(found[0], x[0, :, :7].float().mean(1, keepdim=True))
    assert (found[1] == 0).all()


def test_block_means_of_a_ragged_end():
    x = torch.randn(1, 2, 10, 4)
    live = torch.ones(1, 1, 10, dtype=torch.bool)
    live[..., 5] = False
    found = block_mean(x, 4, live)
    torch.testing.assert_close(found[:, :, 0], x[:, :, :4].mean(2))
    torch.testing.assert_close(found[:, :, 1], x[:, :, [4, 6, 7]].mean(2))
    torch.testing.assert_close(found[:, :, 2], x[:, :, 8:].mean(2))
    torch.testing.assert_close(block_mean(x, 4)[:, :, 1], x[:, :, 4:8].mean(2))
