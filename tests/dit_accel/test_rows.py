"""Sampled rows against the reference tier, which holds the whole mask, and against dense attention."""

import pytest
import torch
from hypothesis import given, settings
from random_plans import plans
from represented import CASES, case
from torch.nn.functional import scaled_dot_product_attention

from dit_accel import Layout, attend
from dit_accel.blocks import Blocks
from dit_accel.kernels import BlockList
from dit_accel.plans import Plan
from dit_accel.rows import sample, spread_slots, take, visible


def every(plan):
    return torch.arange(plan.q_blocks.n)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ordered", [False, True])
def test_planned_rows_are_the_reference(name, ordered):
    options = CASES[name]
    order = torch.randperm(sum(options["sizes"]), generator=torch.Generator().manual_seed(1)) if ordered else None
    q, k, v, plan, _ = case(**options, order=order)
    slots = every(plan)[::3]
    rows = sample(q, k, v, plan, slots)
    expected = take(attend(q, k, v, plan=plan, layout=plan.layout, backend="reference"), rows.tokens)
    assert (rows.planned - expected).abs().max() < 2e-5
    dense = take(scaled_dot_product_attention(q, k, v, enable_gqa=True), rows.tokens)
    assert (rows.exact - dense).abs().max() < 2e-5
    assert (rows.size > 0).all()


@settings(max_examples=25, deadline=None)
@given(plans())
def test_visible_is_the_plans_own_mask(drawn):
    plan, seen = drawn
    slots = every(plan)[::2]
    mine = visible(plan, slots)
    tokens = slots.expand(seen.shape[1], -1) if plan.order is None else plan.order[..., slots].reshape(-1, len(slots))
    for h in range(seen.shape[1]):
        assert torch.equal(mine[0, min(h, mine.shape[1] - 1)], seen[0, h][tokens[min(h, len(tokens) - 1)]])


def test_dead_keys_and_chunks_of_heads(monkeypatch):
    q, k, v, plan, _ = case(**CASES["row factors"])
    n = q.shape[2]
    valid = torch.tensor([n, n - 9], dtype=torch.int32)
    whole = sample(q, k, v, plan, every(plan), kv_valid=valid)
    expected = attend(q, k, v, plan=plan, layout=plan.layout, backend="reference", kv_valid=valid)
    assert (whole.planned - expected).abs().max() < 2e-5
    assert whole.kept.max() <= 1 + 1e-6
    monkeypatch.setattr("dit_accel.rows.CHUNK", 1)
    parts = sample(q, k, v, plan, every(plan), kv_valid=valid)
    for name in ("planned", "exact", "size", "kept"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_a_top_p_mask_keeps_p_of_every_query_and_a_uniform_softmax_the_kept_share():
    n, p = 40, 0.8
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, n, 16, generator=g).mul(2)
    weights, order = ((q @ k.mT) / 4).softmax(-1).sort(descending=True)
    mask = torch.zeros(weights.shape, dtype=torch.bool).scatter(-1, order, weights.cumsum(-1) - weights < p)
    plan = Plan(Layout(grid=(1, 1, n)), Blocks.uniform(n, 1), Blocks.uniform(n, 1), BlockList.from_mask(mask))
    kept = sample(q, k, v, plan, every(plan)).kept
    assert (kept >= p - 1e-6).all()
    assert kept.max() < 1
    uniform = sample(torch.zeros_like(q), k, v, plan, every(plan)).kept
    torch.testing.assert_close(uniform, mask.float().mean(-1))


def test_slots_hold_both_ends_and_are_equal_for_equal_shifts():
    device = torch.device("cpu")
    for n in (1, 2, 3, 17, 4096):
        slots = spread_slots(n, 16, 0.3, device)
        assert len(slots) == min(n, 16)
        assert {0, n - 1} <= set(slots.tolist())
        assert slots.min() >= 0
        assert slots.max() < n
        assert torch.equal(slots, spread_slots(n, 16, 0.3, device))
    assert not torch.equal(spread_slots(4096, 16, 0.3, device), spread_slots(4096, 16, 0.4, device))
    assert len(set(spread_slots(4096, 16, 0.3, device).tolist())) == 16
