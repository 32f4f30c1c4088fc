"""Integer quantisers against loops written from SageAttention2's table of granularities."""

import math

import numpy as np
import pytest
import torch

from dit_accel.kernels.quant import groups, pack_int4, quantize, unpack_int4

# (role, block, warp): the tiles of sm80/sm89, of sm90 and of PAROAttention's kernel.
TILES = [("q", 128, 32), ("q", 64, 16), ("q", 64, 32), ("k", 64, 64), ("k", 128, 128), ("k", 128, 64)]


def group_of(n, granularity, role, block, warp):
    if granularity == "token":
        return n
    if granularity == "block" or (granularity == "warp" and role == "k"):
        return n // block
    if granularity == "warp":
        return n // warp
    return 8 * (n // warp) + n % 8 if role == "q" else 4 * (n // warp) + (n % 8) // 2


def loops(x, bits, granularity, role, block, warp, scale=None):
    """Codes and scales, one token at a time, in numpy float32."""
    qmax = np.float32({8: 127, 4: 7}[bits])
    b, h, n, _ = x.shape
    x = x.float().numpy()
    if scale is not None:
        x = x * np.float32(scale * math.log2(math.e))
    per_block = {"token": None, "block": 1, "warp": block // warp, "thread": block // warp * 8}[granularity]
    if role == "k" and granularity != "token":
        per_block = {"block": 1, "warp": 1, "thread": block // warp * 4}[granularity]
    count = n if per_block is None else math.ceil(n / block) * per_block
    codes, scales = np.zeros(x.shape, np.int8), np.zeros((b, h, count), np.float32)
    for i in range(b):
        for j in range(h):
            amax = [np.float32(0)] * count
            for t in range(n):
                g = group_of(t, granularity, role, block, warp)
                amax[g] = max(amax[g], np.abs(x[i, j, t]).max())
            for g in range(count):
                scales[i, j, g] = amax[g] / qmax + np.float32(1e-7)
            for t in range(n):
                ratio = x[i, j, t] / scales[i, j, group_of(t, granularity, role, block, warp)]
                codes[i, j, t] = np.trunc(ratio + np.where(ratio >= 0, np.float32(0.5), np.float32(-0.5)))
    return torch.from_numpy(codes), torch.from_numpy(scales)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("granularity", ["block", "warp", "thread", "token"])
@pytest.mark.parametrize(("role", "block", "warp"), TILES)
@pytest.mark.parametrize("n", [1, 127, 200])
def test_codes_and_scales_bit_for_bit(bits, granularity, role, block, warp, n):
    x = torch.randn(1, 2, n, 6, generator=torch.Generator().manual_seed(n)) * 3
    arguments = {"bits": bits, "granularity": granularity, "role": role, "block": block, "warp": warp}
    codes, scales = quantize(x, **arguments)
    expected = loops(x, **arguments)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_softmax_scale_in_the_codes(dtype):
    x = torch.randn(1, 2, 70, 16).to(dtype)
    before = x.clone()
    arguments = {"bits": 8, "granularity": "block", "role": "q", "block": 32, "warp": 32, "scale": 16**-0.5}
    codes, scales = quantize(x, **arguments)
    expected = loops(x, **arguments)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])
    assert torch.equal(x, before)


def test_every_token_in_one_group_of_the_published_size():
    for role, block, warp, size in (("q", 128, 32, 4), ("q", 64, 16, 2), ("k", 64, 64, 16), ("k", 128, 128, 32)):
        index, count = groups(4 * block, "thread", role, block=block, warp=warp)
        assert torch.bincount(index, minlength=count).tolist() == [size] * count
    index, _ = groups(128, "thread", "q", block=128, warp=32)
    assert (index == 3).nonzero().flatten().tolist() == [3, 11, 19, 27]
    index, _ = groups(64, "thread", "k", block=64)
    assert (index == 1).nonzero().flatten().tolist() == [8 * a + j for a in range(8) for j in (2, 3)]


def test_groups_past_the_end_hold_the_epsilon():
    _, scales = quantize(torch.ones(1, 1, 3, 4), bits=8, granularity="thread", role="q", block=128, warp=32)
    assert scales.shape == (1, 1, 32)
    assert (scales[..., 3:] == torch.tensor(1e-7)).all()


@pytest.mark.parametrize(("bits", "qmax"), [(8, 127), (4, 7)])
def test_error_is_at_most_half_a_step_and_the_range_symmetric(bits, qmax):
    x = torch.randn(1, 3, 500, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0, 7, 3] = -40.0
    codes, scales = quantize(x, bits=bits, granularity="token", role="k", block=64)
    error = (x - codes * scales[..., None]).abs() / scales[..., None]
    assert 0.49 < error.max() <= 0.5 + 1e-4
    assert codes.abs().max() == qmax


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_fault_shows_in_the_products(bad):
    x = torch.ones(1, 1, 64, 8)
    x[0, 0, 5, 2] = bad
    codes, scales = quantize(x, bits=8, granularity="block", role="k", block=32)
    product = codes[0, 0].float().sum(-1) * scales[0, 0].repeat_interleave(32)
    assert not product[:32].isfinite().any()
    assert product[32:].isfinite().all()


def test_zeros_stay_zero():
    codes, scales = quantize(torch.zeros(1, 1, 5, 8), bits=8, granularity="block", role="q", block=4)
    assert not codes.any()
    assert torch.equal(scales, torch.full((1, 1, 2), 1e-7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 6}, "choose 8 or 4"),
        ({"granularity": "row"}, "block, warp, thread, token"),
        ({"role": "v"}, "choose 'q'"),
        ({"warp": 48}, "does not divide block 128"),
        ({"granularity": "thread", "block": 12, "warp": 4}, "multiple of 8"),
    ],
)
def test_what_is_not_served(change, message):
    arguments = {"bits": 8, "granularity": "warp", "role": "q", "block": 128, "warp": 32} | change
    with pytest.raises(ValueError, match=message):
        quantize(torch.zeros(1, 1, 8, 8), **arguments)


def test_packing_halves_the_bytes_and_comes_back():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 16)
    low, high = packed & 15, packed >> 4
    assert torch.equal(low, codes[:, :16].view(torch.uint8) & 15)
    assert torch.equal(high, codes[:, 16:].view(torch.uint8) & 15)
    assert torch.equal(unpack_int4(packed), codes)
    with pytest.raises(ValueError, match="even"):
        pack_int4(codes[:, :3])


def test_integer_sums_are_exact_in_float32():
    assert 127 * 127 * 1040 < 2**24
