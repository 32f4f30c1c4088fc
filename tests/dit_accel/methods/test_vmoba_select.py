"""The search for the cut: what a sort finds, without one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.methods.vmoba_select import largest, threshold, topk


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 60),
    scale=st.sampled_from([2.0**-90, 1.0, 2.0**90]),
    amount=st.integers(-2, 120),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_cut_is_where_a_stable_sort_puts_it(n, scale, amount, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers: many are equal, and their sums are exact.
    values = torch.randint(0 if weighted else -4, 5, (3, n), generator=generator) * scale
    values[torch.rand(values.shape, generator=generator) < 0.1] = -torch.inf
    wanted = amount / 2 * scale if weighted else amount
    found = largest(values, torch.full((3,), wanted, dtype=torch.float64), weighted=weighted)
    for row in range(3):
        expected = torch.zeros(n, dtype=torch.bool)
        total = 0
        for i in torch.argsort(values[row], dim=0, descending=True, stable=True).tolist():
            if values[row, i] == -torch.inf or total >= wanted:
                break
            expected[i] = True
            total += float(values[row, i]) if weighted else 1
        assert torch.equal(found[row], expected)


@pytest.mark.parametrize("scope", ["query_head", "block", "overall", "head_global"])
def test_equal_similarities_weigh_nothing_so_any_share_takes_all(scope):
    gate, own = torch.full((1, 2, 6, 3), 0.7), torch.eye(3, dtype=torch.bool).repeat_interleave(2, 0)
    assert torch.equal(threshold(gate, own, None, scope, 0.0), own.expand(1, 2, 6, 3))
    assert threshold(gate, own, None, scope, 0.1).all()


@pytest.mark.parametrize("scope", ["query_head", "overall", "head_global"])
def test_dead_entries_are_never_chosen_and_have_no_budget(scope):
    generator = torch.Generator().manual_seed(0)
    gate, own = torch.randn((2, 2, 6, 3), generator=generator), torch.eye(3, dtype=torch.bool).repeat_interleave(2, 0)
    valid = torch.ones((2, 6, 3), dtype=torch.bool)
    valid[1, 5] = False
    valid[1, :, 1] = False
    chosen = topk(gate, own, valid, scope, 2)
    assert not chosen[~valid[:, None].expand(chosen.shape)].any()
    live = int((own & valid[1]).sum())
    per_head = chosen[1].sum((-1, -2))
    if scope == "query_head":
        assert chosen[1, :, [0, 1, 2, 3, 4]].sum(-1).eq(2).all()
    elif scope == "head_global":
        assert per_head.eq(2 * live).all()
    else:
        assert per_head.sum() == 2 * 2 * live
    for mask in (threshold(gate, own, valid, scope, tau) for tau in (0.3, 1)):
        assert not mask[~valid[:, None].expand(mask.shape)].any()
