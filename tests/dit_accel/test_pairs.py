"""Densities against every pair's definition, in one piece and in many, and in bounded memory."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_plans import plans
from represented import case
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel import GNA, Layout, VMoBA, pairs, plan
from dit_accel.blocks import Blocks
from dit_accel.kernels import BlockList, Box, Predicate
from dit_accel.plans import Plan


def counted(made, most=None):
    with mock.patch.object(pairs, "MOST", most or pairs.MOST):
        return pairs.count_pairs(made)


def shares(seen, layout):
    """Share of all pairs and of main ones, of bool masks in token order."""
    main = seen[..., layout.main, layout.main]
    return tuple(int(x.sum()) / x.numel() for x in (seen, main))


@settings(max_examples=60, deadline=None)
@given(plans(), st.sampled_from([1, 40, 1000, None]))
def test_every_plan_is_counted_exactly(pair, most):
    made, seen = pair
    assert counted(made, most) == pytest.approx(shares(seen, made.layout), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(plans(), st.booleans(), st.sampled_from([1, None]))
def test_tables_of_a_batch_are_averaged(pair, other, most):
    """Two samples: the plan's own and one that lists nothing, or nothing but every block in part."""
    made, seen = pair
    n, h = made.k_blocks.count, made.partial.count.shape[1]
    part = torch.full((1, h, made.q_blocks.count, n), other)
    both = [torch.cat([x.mask(n), y]) for x, y in ((made.full, part & False), (made.partial, part))]
    two = replace(made, full=BlockList.from_mask(both[0]), partial=BlockList.from_mask(both[1]), _memo={})
    alone = replace(
        made, full=BlockList.from_mask(part & False), partial=BlockList.from_mask(part), _memo={}
    ).token_mask()  # fmt: skip
    beside = torch.cat([seen, alone.expand_as(seen)])
    assert counted(two, most) == pytest.approx(shares(beside, made.layout), rel=1e-12)


@pytest.mark.parametrize("most", [1, None])
@pytest.mark.parametrize("ordered", [False, True])
def test_representatives_count_once(ordered, most):
    sizes = (5, 9, 2, 16, 7)
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(3)) if ordered else None
    _, _, _, made, kind = case(sizes, widths=(2, 1), order=order)
    rows = torch.tensor(sizes)
    keys = {0: rows, 1: torch.tensor([min(2, size) for size in sizes]), 2: torch.ones(len(sizes), dtype=torch.int64)}
    expected = sum(int((rows[:, None] * (kind == which) * per).sum()) for which, per in keys.items())
    share = expected / kind[..., 0, 0].numel() / sum(sizes) ** 2
    assert counted(made, most) == pytest.approx((share, share), rel=1e-12)


class Largest(TorchDispatchMode):
    """``seen``: elements of the largest tensor that any operation gave."""

    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            # Views hold nothing of their own.
            if isinstance(x, torch.Tensor) and x._base is None:
                self.seen = max(self.seen, x.untyped_storage().nbytes() // x.element_size())
        return out


def ragged_windows():
    made = plan(None, None, None, GNA((5, 9, 11), stride=1), layout=Layout((8, 24, 24), text=40))
    assert made.partial.count.sum() > 1000
    return made


def one_list_per_head():
    layout = Layout((8, 16, 24))
    q, k = (torch.randn(1, 6, layout.tokens, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))
    return plan(q, k, k, VMoBA(), layout=layout)


def uneven():
    """A block of 2,000 tokens among blocks of 8."""
    layout = Layout((1, 4, 800))
    cuts = [*range(0, 600, 8), *range(2600, 3200, 8), 3200]
    blocks = Blocks(torch.tensor(cuts))
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 3, (1, 2, blocks.count, blocks.count), generator=generator)
    x = torch.arange(3200, dtype=torch.int32)
    box = Predicate(box=Box((x - 90,), (x + 700,), (x,)))
    return Plan(layout, blocks, blocks, BlockList.from_mask(kinds == 1), BlockList.from_mask(kinds == 2), box)


@pytest.mark.parametrize(("make", "most"), [(ragged_windows, 1 << 16), (one_list_per_head, 1 << 16), (uneven, 1 << 22)])
def test_temporaries_are_bounded(make, most):
    made = make()
    seen = made.token_mask()
    expected = shares(seen, made.layout)
    with Largest() as largest:
        found = counted(made, most)
    assert found == pytest.approx(expected, rel=1e-12)
    assert largest.seen <= most < seen.numel()
