"""BlockList: masks in and out."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.kernels import BlockList


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**20))
def test_mask_round_trip(heads, nq, nk, density, seed):
    mask = torch.rand(1, heads, nq, nk, generator=torch.Generator().manual_seed(seed)) < density
    for width in (None, nk):
        lists = BlockList.from_mask(mask, width)
        assert torch.equal(lists.mask(nk), mask)
        assert torch.equal(lists.count.long(), mask.sum(-1))
        assert lists.width == (nk if width else max(int(mask.sum(-1).max()), 1))
        # Ascending: neighbouring key tiles share cache lines and the kernels' loads stay predictable.
        inside = lists.valid()[..., 1:]
        assert (lists.index.diff(dim=-1)[inside] > 0).all()


def test_entries_past_the_count_do_not_show():
    lists = BlockList(torch.tensor([[[1]]], dtype=torch.int32), torch.tensor([[[[2, 2, 0]]]], dtype=torch.int32))
    assert lists.mask(3).tolist() == [[[[False, False, True]]]]
