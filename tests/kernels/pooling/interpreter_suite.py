"""Pooling kernels in Triton's interpreter, against plain torch. Run by tests/kernels/block_sparse/test_triton.py."""

import pytest
import torch

from dit_accel.kernels.pooling import blocks
from dit_accel.kernels.pooling import triton as kernels

B, H, D, DV = 2, 2, 20, 24
SIZES = {"uniform": [8] * 5, "tail": [70, 70, 3], "ragged": [5, 40, 2, 1], "empty": [4, 0, 3], "one": [9]}
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def case(sizes, *, dead=False, order=None, dtype=torch.float32, before=0):
    """``before``: tokens ahead of the first block."""
    g = torch.Generator().manual_seed(len(sizes))
    n = sum(sizes) + before
    k, v = ((torch.randn(B, n, H, d, generator=g) + 3).to(dtype).transpose(1, 2) for d in (D, DV))
    bounds = torch.tensor([before, *sizes]).cumsum(0)
    live = torch.rand(B, n, generator=g) < torch.tensor([0.7, 0.0])[:, None] if dead else None
    if order is not None:
        order = torch.rand((n,) if order == "shared" else (H, n), generator=g).argsort(-1)
    return k, v, bounds, {"live": live, "order": order}


@pytest.mark.parametrize(
    ("name", "dead", "order"),
    [
        ("uniform", False, None), ("uniform", True, None), ("tail", True, "shared"), ("ragged", False, "per head"),
        ("ragged", True, "per head"), ("empty", False, "shared"), ("one", False, None),
    ],
)  # fmt: skip
def test_equals_torch(name, dead, order):
    k, v, bounds, more = case(SIZES[name], dead=dead, order=order)
    means, spreads, count = kernels.block_means(k, bounds, **more, spreads=True)
    for found, expected in zip((means, spreads, count), blocks.block_spreads(k, bounds, **more), strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, **CLOSE)
    for norms in (False, True):
        found = kernels.block_statistics(k, v, bounds, **more, norms=norms)
        truth = blocks.block_statistics(k, v, bounds, **more, norms=norms)
        expected = truth.key, truth.value, truth.count, truth.moment, truth.norm
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.dtype == other.dtype
                torch.testing.assert_close(one, other, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_and_a_first_slot_that_is_not_0(dtype):
    k, v, bounds, more = case([16, 16, 5], dtype=dtype, before=7)
    means, _, count = kernels.block_means(k, bounds, **more)
    expected, counts = blocks.block_means(k, bounds, **more)
    torch.testing.assert_close(means, expected, **CLOSE)
    assert torch.equal(count, counts)
    found = kernels.block_statistics(k, v, bounds, **more)
    torch.testing.assert_close(found[3], blocks.block_statistics(k, v, bounds, **more).moment, atol=2e-3, rtol=1e-4)


def test_equal_blocks_send_no_table():
    device, bounds = torch.device("cpu"), torch.tensor([0, 4, 12])
    assert kernels._table(torch.tensor([3, 11, 19, 24]), device, None) == (None, 3, 8, 24)
    table, *_ = kernels._table(bounds, device, None)
    assert table.tolist() == [0, 4, 12]
    placed = bounds.clone()
    assert kernels._table(bounds, device, placed)[0] is placed


def test_wide_heads_are_left_to_torch():
    x, wide = torch.zeros(1, 1, 300, 16), torch.zeros(1, 1, 300, 160)
    assert kernels.serves_moments(x, x)
    assert not kernels.serves_moments(wide, x)
