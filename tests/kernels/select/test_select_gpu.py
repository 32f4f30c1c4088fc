"""Selection and pooling kernels on a real GPU, against plain torch: ``pytest -m gpu``."""

import pytest
import torch

from dit_accel.kernels.pooling import block_spreads, block_statistics, blocks
from dit_accel.kernels.select import compact, largest, reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu was asked for and torch sees no CUDA device")


@pytest.mark.parametrize("n", [1, 33, 512, 2049, 16384])
def test_largest_and_compact(n):
    x = torch.randint(-50, 50, (3, 5, n), device="cuda").float()
    for count in (1, n // 3, n):
        taken = largest(x, count)
        assert torch.equal(taken, reference.largest(x, count))
        number, index = compact(taken, n)
        expected, listed = reference.compact(taken, n)
        assert torch.equal(number, expected)
        inside = torch.arange(n, device="cuda") < number[..., None]
        assert torch.equal(index[inside], listed[inside])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [[64] * 20 + [9], [70, 1, 128, 3]], ids=["even", "ragged"])
@pytest.mark.parametrize("dim", [64, 72, 128], ids="d{}".format)
def test_block_statistics(sizes, dim, dtype, monkeypatch):
    n = sum(sizes)
    k, v = (torch.randn(2, n, 3, dim, device="cuda", dtype=dtype).transpose(1, 2) + 1 for _ in range(2))
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    live = torch.rand(2, n, device="cuda") < 0.8
    order = torch.randperm(n, device="cuda")
    found = block_statistics(k, v, bounds, live=live, order=order, norms=True)
    spread = block_spreads(k, bounds, live=live, order=order)
    monkeypatch.setattr(blocks, "on_gpu", lambda device: False)
    expected = block_statistics(k, v, bounds, live=live, order=order, norms=True)
    for name in ("key", "value", "count", "moment", "norm"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=2e-3, rtol=1e-3)
    for one, other in zip(spread, block_spreads(k, bounds, live=live, order=order), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
