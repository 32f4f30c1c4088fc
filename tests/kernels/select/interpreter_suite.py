"""Selection kernels in Triton's interpreter, against plain torch. Run by tests/kernels/block_sparse/test_triton.py."""

import pytest
import torch

from dit_accel.kernels.select import reference
from dit_accel.kernels.select import triton as kernels

SHAPES = [(1, 1), (3, 7), (2, 3, 64), (1, 2, 5, 33), (4, 130)]


def values(shape, levels):
    """With few levels most entries are ties; signs, zeros of both signs and -inf included."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randint(-levels, levels + 1, shape, generator=generator).float() / 3
    x[x == 0] *= torch.where(torch.rand(int((x == 0).sum()), generator=generator) < 0.5, -1.0, 1.0)
    return x.masked_fill(torch.rand(shape, generator=generator) < 0.1, -torch.inf)


@pytest.mark.parametrize("levels", [2, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_largest(shape, levels):
    x = values(shape, levels)
    n = shape[-1]
    for count in {0, 1, n // 3, n - 1, n, n + 5}:
        found = kernels.largest(x, count)
        assert torch.equal(found, reference.largest(x, count)), count
        assert (found.sum(-1) == min(count, n)).all()


def test_largest_with_a_count_per_row():
    x = values((3, 4, 40), 3)
    count = torch.arange(12).view(3, 4) * 4 - 2
    found = kernels.largest(x, count)
    assert torch.equal(found, reference.largest(x, count))
    assert torch.equal(found.sum(-1), count.clamp(0, 40))


def test_largest_of_a_strided_view():
    x = values((6, 50), 1000)[:, ::2]
    assert torch.equal(kernels.largest(x, 5), reference.largest(x, 5))


@pytest.mark.parametrize("chunk", [16, 1024])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_compact(shape, density, chunk, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density
    n = shape[-1]
    for width in {n, max(n // 2, 1), n + 3}:
        count, index = kernels.compact(mask, width)
        expected, listed = reference.compact(mask, min(width, n))
        assert torch.equal(count, expected)
        assert index.shape == (*shape[:-1], width)
        assert index.dtype == count.dtype == torch.int32
        inside = torch.arange(min(width, n)) < count[..., None]
        assert torch.equal(index[..., : min(width, n)][inside], listed[inside])
        assert ((index >= 0) & (index < n)).all()


def test_nothing_is_written_beside_the_outputs(monkeypatch):
    made = []
    plain = torch.empty

    def empty(shape, **how):
        if not isinstance(shape, (tuple, torch.Size)):
            return plain(shape, **how)
        size = torch.Size(shape)
        flat = torch.full((size.numel() + 16,), 77, dtype=torch.uint8).to(how["dtype"])
        made.append(flat)
        return flat[8:-8].view(size)

    monkeypatch.setattr(kernels.torch, "empty", empty)
    mask = torch.rand(3, 21) < 0.5
    kernels.compact(mask, 9)
    kernels.largest(values((5, 21), 3), 4)
    assert len(made) == 3
    for flat in made:
        assert (flat[:8] == torch.tensor(77).to(flat.dtype)).all()
        assert (flat[-8:] == torch.tensor(77).to(flat.dtype)).all()
