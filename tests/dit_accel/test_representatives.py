"""Representatives, first-order term and row factors through ``attend``, against loops over queries in float64."""

from dataclasses import replace

import pytest
import torch
from represented import CASES, RAGGED, UNIFORM, B, brute, case

from dit_accel import attend
from dit_accel.errors import UnsupportedError
from dit_accel.kernels.block_sparse import choose, flash_rows
from dit_accel.lowering import lower


@pytest.mark.parametrize("backend", ["reference", "gather", "flash"])
@pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted"])
@pytest.mark.parametrize("name", CASES)
def test_equals_brute_force(name, permuted, backend):
    settings = dict(CASES[name])
    order = torch.randperm(sum(settings["sizes"]), generator=torch.Generator().manual_seed(1)) if permuted else None
    q, k, v, plan, kind = case(**settings, order=order)
    out = attend(q, k, v, plan=plan, layout=plan.layout, backend=backend)
    expected, _ = brute(q, k, v, plan, kind, settings["sizes"])
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-5)


def test_compiled_flex_equals_brute_force():
    order = torch.randperm(sum(RAGGED), generator=torch.Generator().manual_seed(1))
    q, k, v, plan, kind = case(**CASES["everything"], order=order)
    assert choose(q, lower(plan), backend="flex") == ("flex", "first choice on this device")
    out = attend(q, k, v, plan=plan, layout=plan.layout, backend="flex")
    torch.testing.assert_close(out.double(), brute(q, k, v, plan, kind, RAGGED)[0], atol=2e-6, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_through_compiled_flex(name, permuted):
    settings = dict(CASES[name])
    order = torch.randperm(sum(settings["sizes"]), generator=torch.Generator().manual_seed(1)) if permuted else None
    q, k, v, plan, kind = case(**settings, order=order)
    out = attend(q, k, v, plan=plan, layout=plan.layout, backend="flex")
    torch.testing.assert_close(out.double(), brute(q, k, v, plan, kind, settings["sizes"])[0], atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_heads_in_turn_are_the_same(name, monkeypatch):
    q, k, v, plan, _ = case(**CASES[name])
    once = attend(q, k, v, plan=plan, layout=plan.layout, backend="flash")
    monkeypatch.setattr(flash_rows, "SOURCE", 1)
    torch.testing.assert_close(attend(q, k, v, plan=plan, layout=plan.layout, backend="flash"), once)


@pytest.mark.parametrize("backend", ["reference", "gather", "flash"])
def test_lse_counts_representatives(backend):
    q, k, v, plan, kind = case(RAGGED, widths=(2,))
    _, lse = attend(q, k, v, plan=plan, layout=plan.layout, backend=backend, return_lse=True)
    _, expected = brute(q, k, v, plan, kind, RAGGED)
    torch.testing.assert_close(lse.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"first_order": True}, {"factors": True}], ids=["first order", "row factors"])
def test_lse_without_a_meaning_is_refused(settings):
    q, k, v, plan, _ = case(UNIFORM, **settings)
    with pytest.raises(UnsupportedError, match="LSE"):
        attend(q, k, v, plan=plan, layout=plan.layout, return_lse=True)


def test_masks_and_density_in_token_order():
    order = torch.randperm(sum(RAGGED), generator=torch.Generator().manual_seed(3))
    _, _, _, plan, kind = case(RAGGED, widths=(2, 1), order=order)
    owner = torch.repeat_interleave(torch.arange(len(RAGGED)), torch.tensor(RAGGED))
    by_token = torch.empty_like(owner)
    by_token[order] = owner
    kinds = kind[:, :, by_token][..., by_token]
    assert torch.equal(plan.token_mask(), kinds == 0)
    assert torch.equal(plan.rep_mask(), kinds > 0)
    live = [torch.tensor([min(width, size) for size in RAGGED]) for width in (2, 1)]
    seen = (kinds == 0).sum((-2, -1)).double()
    for which, per_block in enumerate(live, start=1):
        rows = torch.tensor(RAGGED)[:, None] * (kind == which)
        seen = seen + (rows * per_block).sum((-2, -1))
    assert plan.density == pytest.approx(float(seen.mean()) / sum(RAGGED) ** 2)


def test_dead_representatives_are_not_seen():
    q, k, v, plan, _ = case(UNIFORM)
    group = plan.reps[0]
    count = group.count.expand(B, 1, -1).clone()
    count[1, 0, 2:] = 0
    key = group.key.clone()
    key[1, :, 2:] = 1e4
    emptied = replace(group, key=key, count=count)
    a = attend(q, k, v, plan=replace(plan, reps=(emptied,), _memo={}), layout=plan.layout, backend="gather")
    b = attend(q, k, v, plan=replace(plan, reps=(emptied,), _memo={}), layout=plan.layout, backend="reference")
    torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    unchanged = attend(q, k, v, plan=plan, layout=plan.layout, backend="reference")
    torch.testing.assert_close(a[0], unchanged[0], atol=2e-6, rtol=1e-5)
    assert not torch.allclose(a[1], unchanged[1])


def test_a_tile_that_straddles_blocks_is_refused():
    _, _, _, plan, _ = case(UNIFORM)
    with pytest.raises(UnsupportedError, match="straddle"):
        lower(plan, (24, 16))
