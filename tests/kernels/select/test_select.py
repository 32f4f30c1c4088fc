"""Selection in plain torch against python's own sort."""

import pytest
import torch

from dit_accel.kernels.select import compact, largest, reference


@pytest.mark.parametrize("count", [0, 1, 4, 9, 12])
def test_largest_against_a_stable_sort(count):
    x = torch.tensor([[3.0, 1.0, 3.0, -torch.inf, 2.0, 3.0, -1.0, 0.0, -0.0], [0.0] * 9])
    found = reference.largest(x, count)
    for row, values in enumerate(x.tolist()):
        best = sorted(range(9), key=lambda i, values=values: -values[i])[:count]
        assert found[row].nonzero().flatten().tolist() == sorted(best)
    assert (largest(x, count).sum(-1) == min(count, 9)).all()


def test_a_count_per_row():
    found = largest(torch.arange(12.0).view(3, 4), torch.tensor([-1, 2, 7]))
    assert found.tolist() == [[False] * 4, [False, False, True, True], [True] * 4]


def test_compact():
    mask = torch.tensor([[False, True, True], [False, False, False]])
    count, index = compact(mask, 2)
    assert count.tolist() == [2, 0]
    assert index[0].tolist() == [1, 2]
    assert count.dtype == index.dtype == torch.int32
