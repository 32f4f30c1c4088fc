"""Block scores on a real GPU, against their definition in float64: ``pytest -m gpu``."""

import pytest
import torch

from dit_accel.methods import adaspa_search, pyramid_levels

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu was asked for and torch sees no CUDA device")


@pytest.fixture
def kernels(monkeypatch):
    """The module, and which of its kernels were called."""
    from dit_accel.kernels.scores import triton

    triton.called = []
    for name in ("block_mass", "peaks"):
        stock = getattr(triton, name)
        monkeypatch.setattr(
            triton, name, lambda *a, stock=stock, name=name, **o: triton.called.append(name) or stock(*a, **o)
        )
    return triton


def tensors(rows, keys, dim, dtype):
    g = torch.Generator("cuda").manual_seed(rows + dim)
    q = torch.randn(2, rows, 4, dim, generator=g, device="cuda").to(dtype).transpose(1, 2)
    k = torch.randn(2, keys, 2, dim, generator=g, device="cuda").to(dtype).transpose(1, 2)
    return q, k, q.double() @ k.double().repeat_interleave(2, 1).mT * dim**-0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [64, 72, 96, 128, 256], ids="d{}".format)
@pytest.mark.parametrize("size", [64, 128, 50])
def test_mass(size, dim, dtype, kernels):
    rows, keys = 1000, 777
    q, k, logits = tensors(rows, keys, dim, dtype)
    valid = torch.tensor([keys - 13, keys], dtype=torch.int32, device="cuda")
    logits = logits.masked_fill((torch.arange(keys, device="cuda") >= valid[:, None])[:, None, None], -torch.inf)
    k[0, :, -13:] = torch.nan
    mass, lse = adaspa_search.block_mass(q, k, size, scale=dim**-0.5, kv_valid=valid)
    again, _ = adaspa_search.block_mass(q, k, size, scale=dim**-0.5, kv_valid=valid, lse=lse)
    assert kernels.called == ["block_mass"] * 2
    own = logits.logsumexp(-1)
    weights = (logits - own[..., None]).exp()
    expected = torch.stack([part.sum(-1) for part in weights.split(size, -1)], -1)
    expected = torch.stack([part.sum(-2) for part in expected.split(size, -2)], -2)
    torch.testing.assert_close(lse.double(), own, atol=1e-3, rtol=1e-4)
    for found in (mass, again):
        torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [64, 72, 96, 128, 256], ids="d{}".format)
@pytest.mark.parametrize(("per_row", "per_column"), [(32, 16), (5, 3)])
def test_importance(per_row, per_column, dim, dtype, kernels):
    m, n = 900 // per_row, 700 // per_column
    q, k, logits = tensors(900, 700, dim, dtype)
    g = torch.Generator("cuda").manual_seed(1)
    rows = torch.randperm(900, generator=g, device="cuda")[: m * per_row].view(1, m, per_row)
    columns = torch.randperm(700, generator=g, device="cuda")[: n * per_column].view(1, n, per_column)
    dead = (torch.arange(n, device="cuda") % 5 == 2)[None]
    found = pyramid_levels.importance(q, k, rows, columns, dim**-0.5, dead)
    assert kernels.called == ["peaks"] * 2
    best = logits[:, :, rows.flatten()][..., columns.flatten()].unflatten(-1, (n, per_column)).amax(-1)
    best = best.masked_fill(dead[:, None, None], -torch.inf)
    expected = (best - best.amax(-1, keepdim=True)).exp().unflatten(2, (m, per_row)).amax(3)
    torch.testing.assert_close(found.double(), expected / expected.sum(-1, keepdim=True), atol=1e-4, rtol=5e-3)
