"""Block scores in Triton's interpreter, against plain torch. Run by tests/kernels/block_sparse/test_triton.py."""

import pytest
import torch

from dit_accel.kernels.scores import triton as kernels
from dit_accel.methods import adaspa_search, pyramid_levels

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def tensors(rows, keys, dim, dtype=torch.float32, b=2, heads=4, kv_heads=2):
    g = torch.Generator().manual_seed(rows + keys + dim)
    q = torch.randn(b, rows, heads, dim, generator=g).to(dtype).transpose(1, 2)
    k = torch.randn(b, keys, kv_heads, dim, generator=g).to(dtype).transpose(1, 2)
    return q, k


def masses(q, k, size, kv_valid=None, lse=None):
    """Masses and LSE by definition, in float64."""
    groups = q.shape[1] // k.shape[1]
    logits = q.double() @ k.double().repeat_interleave(groups, 1).mT * 0.3
    if kv_valid is not None:
        dead = torch.arange(k.shape[2]) >= kv_valid[:, None]
        logits = logits.masked_fill(dead[:, None, None], -torch.inf)
    own = logits.logsumexp(-1)
    weights = (logits - (own if lse is None else lse.double())[..., None]).exp()
    parts = [torch.stack([part.sum(-1) for part in weights.split(size, -1)], -1)]
    return torch.stack([part.sum(-2) for part in parts[0].split(size, -2)], -2), own


@pytest.mark.parametrize(
    ("size", "rows", "keys", "dim", "dead"),
    [
        (64, 200, 150, 64, False), (64, 130, 300, 72, True), (128, 200, 260, 16, True), (5, 21, 33, 20, False),
        (1, 9, 7, 96, True),
    ],
)  # fmt: skip
def test_mass_and_lse(size, rows, keys, dim, dead):
    q, k = tensors(rows, keys, dim)
    valid = torch.tensor([keys - 3, keys], dtype=torch.int32) if dead else None
    if dead:
        k = k.clone()
        k[0, :, -3:] = torch.nan
    mass, lse = kernels.block_mass(q, k, size, scale=0.3, lse=None, kv_valid=valid)
    expected, own = masses(q, k.nan_to_num(), size, valid)
    torch.testing.assert_close(mass.double(), expected, **CLOSE)
    torch.testing.assert_close(lse.double(), own, **CLOSE)
    # Under an LSE of another step, and one that is far off.
    for shift in (0.5, -200.0):
        other = lse + shift
        again, used = kernels.block_mass(q, k, size, scale=0.3, lse=other, kv_valid=valid)
        assert torch.equal(used, other)
        expected, _ = masses(q, k.nan_to_num(), size, valid, other)
        torch.testing.assert_close(again.double(), expected.clamp_max(adaspa_search._LARGEST), atol=1e-5, rtol=1e-3)


def test_mass_equals_torch_where_no_key_is_alive():
    q, k = tensors(40, 40, 16)
    valid = torch.tensor([0, 40], dtype=torch.int32)
    found = kernels.block_mass(q, k, 16, scale=0.3, lse=None, kv_valid=valid)
    expected = adaspa_search.block_mass(q, k, 16, scale=0.3, kv_valid=valid)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert (found[0][0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mass_of_16_bit_inputs(dtype):
    q, k = tensors(100, 100, 32, dtype)
    mass, lse = kernels.block_mass(q, k, 32, scale=0.3, lse=None, kv_valid=None)
    assert mass.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(mass.double(), masses(q, k, 32)[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize(
    ("per_row", "per_column", "m", "n", "dim"), [(32, 16, 5, 9, 64), (3, 5, 50, 70, 72), (1, 1, 9, 3, 16)]
)
def test_peaks(per_row, per_column, m, n, dim, dead):
    q, k = (x[0] for x in tensors(m * per_row, n * per_column, dim))
    hidden = torch.arange(n) % 3 == 1 if dead else None
    found = kernels.peaks(q, k, per_row, per_column, scale=0.3, dead=hidden)
    logits = q.double() @ k.double().repeat_interleave(2, 0).mT * 0.3
    best = logits.unflatten(-1, (n, per_column)).amax(-1)
    if dead:
        best = best.masked_fill(hidden, -torch.inf)
    expected = (best - best.amax(-1, keepdim=True)).exp().unflatten(1, (m, per_row)).amax(2)
    torch.testing.assert_close(found.double(), expected, **CLOSE)


def test_peaks_of_nothing_alive_are_0():
    q, k = (x[0] for x in tensors(8, 8, 16))
    assert (kernels.peaks(q, k, 4, 4, scale=0.3, dead=torch.ones(2, dtype=torch.bool)) == 0).all()


def test_importance_takes_the_kernel_for_tensors_on_a_gpu(monkeypatch):
    q, k = tensors(64, 96, 16)
    rows = torch.arange(16).view(1, 4, 4)
    columns = torch.stack([torch.arange(18).view(6, 3), torch.arange(50, 68).view(6, 3)])
    dead = torch.zeros(2, 6, dtype=torch.bool)
    dead[1, 2] = True
    expected = pyramid_levels.importance(q, k, rows, columns, 0.3, dead)
    calls = []
    monkeypatch.setattr(pyramid_levels, "on_gpu", lambda device: True)
    monkeypatch.setattr(kernels, "peaks", lambda *a, stock=kernels.peaks, **o: calls.append(1) or stock(*a, **o))
    torch.testing.assert_close(pyramid_levels.importance(q, k, rows, columns, 0.3, dead), expected, **CLOSE)
    assert len(calls) == 2


def test_the_search_takes_the_kernel_for_tensors_on_a_gpu(monkeypatch):
    q, k = tensors(64, 96, 16)
    expected = adaspa_search.block_mass(q, k, 16, scale=0.3)
    calls = []
    monkeypatch.setattr(adaspa_search, "on_gpu", lambda device: True)
    monkeypatch.setattr(
        kernels, "block_mass", lambda *a, stock=kernels.block_mass, **o: calls.append(1) or stock(*a, **o)
    )
    for one, other in zip(adaspa_search.block_mass(q, k, 16, scale=0.3), expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert calls == [1]


def test_what_does_not_fit_is_left_to_torch():
    x = torch.zeros(1, 64)
    assert kernels.serves(x, 128, 4)
    assert not kernels.serves(x, 129)
    assert not kernels.serves(x.double(), 4)
    assert not kernels.serves(torch.zeros(1, 257), 4)
