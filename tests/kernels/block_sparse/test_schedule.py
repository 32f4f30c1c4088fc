"""The order of rows: every row once, long ones first, heads that share keys together."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.kernels import BlockList, Group, Predicate, TilePlan
from dit_accel.kernels.block_sparse import schedule

TILES, HEADS, B = 24, 4, 2


def plan(mask, *, partial=None, reps=(), kept=True):
    part = None if partial is None else BlockList.from_mask(partial)
    n = TILES * 16
    rule = None if partial is None else Predicate(always=torch.zeros(n, dtype=torch.bool))
    return TilePlan(16, 16, n, n, BlockList.from_mask(mask), part, rule, reps=reps, kept=kept)


@pytest.fixture
def uneven():
    """bool (B, HEADS, TILES, TILES): head 2 has most work, rows of every length."""
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(B, HEADS, TILES, 1, generator=generator) * torch.tensor([0.3, 0.5, 1.0, 0.4])[:, None, None]
    return torch.rand(B, HEADS, TILES, TILES, generator=generator) < share


@pytest.mark.parametrize("groups", [1, 2])
def test_every_row_comes_once_and_long_ones_first_within_their_keys(uneven, groups):
    made = plan(uneven)
    rows = schedule.row_order(made, B, HEADS, groups)
    assert rows.dtype == torch.int32
    assert rows.sort().values.tolist() == list(range(B * HEADS * TILES))
    work = schedule.row_work(made).flatten()[rows.long()].view(-1, groups * TILES)
    step = float(work.max()) / schedule.STEPS
    assert (work.diff(dim=-1) <= step).all()
    assert (work.sum(-1).diff() <= 0).all()
    owner = rows.view(-1, groups * TILES) // (groups * TILES)
    assert (owner == owner[:, :1]).all()


def test_equal_rows_keep_their_order():
    rows = schedule.row_order(plan(torch.ones(1, 1, TILES, TILES, dtype=torch.bool)), B, HEADS, 1)
    assert rows.tolist() == list(range(B * HEADS * TILES))


def test_empty_plans_have_an_order():
    rows = schedule.row_order(plan(torch.zeros(1, 1, TILES, TILES, dtype=torch.bool)), 1, HEADS, 1)
    assert rows.tolist() == list(range(HEADS * TILES))


def test_work_counts_what_each_loop_visits(uneven):
    full, partial = uneven[:1, :1], ~uneven[:1, :1]
    pooled = torch.zeros(1, HEADS, TILES, 8)
    seen = BlockList.from_mask(torch.ones(1, 1, TILES, TILES, dtype=torch.bool))
    group = Group(pooled, pooled, torch.ones(1, 1, TILES, dtype=torch.int32), seen, torch.arange(TILES + 1), 1)
    work = schedule.row_work(plan(full, partial=partial, reps=(group,)))
    assert torch.equal(work, (full.sum(-1) * 16 + partial.sum(-1) * 32 + TILES).float())


def test_it_is_made_once_for_a_plan_that_is_kept_and_not_for_a_short_one_that_is_not(uneven):
    made = plan(uneven)
    assert schedule.row_order(made, B, HEADS, 1) is schedule.row_order(made, B, HEADS, 1)
    assert schedule.row_order(plan(uneven, kept=False), B, HEADS, 1) is None


def test_nothing_is_read_back(uneven):
    """On a GPU these would be transfers: a call per attention must not wait for one."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(func)
            assert "nonzero" not in str(func)
            return func(*args, **(kwargs or {}))

    made = plan(uneven)
    with Watch():
        schedule.row_order(made, B, HEADS, 1)
