"""Plan and lowering: geometry fuzz against brute force. Grids are never cubes only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_plans import plans

from dit_accel.errors import UsageError
from dit_accel.kernels import BlockList, Box, Predicate
from dit_accel.layout import Layout
from dit_accel.lowering import lower
from dit_accel.plans import Blocks, Plan


@settings(max_examples=30, deadline=None)
@given(plans())
def test_a_row_is_a_row_of_the_token_mask(case):
    plan, seen = case
    for token in range(0, plan.q_blocks.n, 7):
        for head in range(seen.shape[1]):
            assert torch.equal(plan.row(token, head), seen[0, head, token])


def test_a_row_outside_the_queries_is_refused():
    blocks = Blocks.uniform(6, 4)
    plan = Plan(Layout(grid=(1, 2, 3)), blocks, blocks, BlockList.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool)))
    with pytest.raises(UsageError, match=r"token 6 is not a query of this plan; allowed 0\.\.5"):
        plan.row(6)


@settings(max_examples=40, deadline=None)
@given(plans(), st.sampled_from([None, (4, 4), (8, 4), (5, 7), (64, 64)]))
def test_lowering_to_any_tile_shows_exactly_the_plan(pair, tile):
    made, seen = pair
    assert torch.equal(made.token_mask().expand_as(seen), seen)
    tiles = lower(made, tile)
    back = lower(made, None).token_mask() if tile is None else tiles.token_mask()
    assert torch.equal(back, lower(made).token_mask())
    assert made.density == pytest.approx(seen.float().mean().item(), rel=1e-5)
    main = made.layout.main
    assert made.density_video == pytest.approx(seen[..., main, main].float().mean().item(), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(20, 90),
    single=st.booleans(),
    cuts=st.sets(st.integers(1, 19), max_size=4),
    tile=st.sampled_from([None, (4, 4), (16, 8), (7, 5), (64, 64)]),
    seed=st.integers(0, 9),
)
def test_ragged_blocks_with_and_without_holes_show_exactly_the_plan(n, single, cuts, tile, seed):
    generator = torch.Generator().manual_seed(seed)
    k_blocks = Blocks(torch.tensor([0, *sorted(cuts), n]))
    q_blocks = Blocks.uniform(n, 1) if single else k_blocks
    mask = torch.rand((2, 2, q_blocks.count, k_blocks.count), generator=generator) < 0.5
    order = torch.randperm(n, generator=generator)
    plan = Plan(Layout((1, 1, n)), q_blocks, k_blocks, BlockList.from_mask(mask), order=order)
    tiles = lower(plan, tile)
    seen, live_q = tiles.token_mask(), tiles.order >= 0
    live_k = live_q if tiles.kv_order is None else tiles.kv_order >= 0
    assert not seen[..., ~live_k].any()
    assert torch.equal(seen[..., live_q, :][..., live_k], mask[:, :, q_blocks.owner()][..., k_blocks.owner()])
    if tiles.partial is not None:
        assert not (tiles.full.mask(tiles.tiles_k) & tiles.partial.mask(tiles.tiles_k)).any()


def test_lists_never_hold_a_tile_twice():
    layout = Layout((3, 5, 7))
    blocks = Blocks(torch.tensor([0, 13, 50, 105]))
    kinds = torch.tensor([[[[1, 2, 0], [2, 1, 2], [0, 2, 1]]]])
    box = Predicate(box=Box((torch.arange(105, dtype=torch.int32) - 9,), (torch.arange(105, dtype=torch.int32) + 9,),
                            (torch.arange(105, dtype=torch.int32),)))  # fmt: skip
    made = Plan(layout, blocks, blocks, BlockList.from_mask(kinds == 1), BlockList.from_mask(kinds == 2), box)
    tiles = lower(made, (16, 16))
    both = tiles.full.mask(tiles.tiles_k) & tiles.partial.mask(tiles.tiles_k)
    assert not both.any()


def test_aligned_blocks_split_without_becoming_partial():
    layout = Layout((4, 8, 8))
    blocks = Blocks.uniform(256, 64)
    made = Plan(layout, blocks, blocks, BlockList.from_mask(torch.eye(4, dtype=torch.bool)[None, None]))
    tiles = lower(made, (32, 16))
    assert tiles.partial is None
    assert tiles.visited == 4 * 2 * 4


def test_lowering_is_cached_per_tile():
    layout = Layout((4, 8, 8))
    blocks = Blocks.uniform(256, 64)
    made = Plan(layout, blocks, blocks, BlockList.from_mask(torch.eye(4, dtype=torch.bool)[None, None]))
    assert lower(made, (32, 32)) is lower(made, (32, 32))


def test_plans_of_one_partition_share_what_their_order_becomes():
    layout, blocks = Layout((1, 5, 6)), Blocks(torch.tensor([0, 16, 23, 30]))
    seen, generator = BlockList.from_mask(torch.eye(3, dtype=torch.bool)[None, None]), torch.Generator().manual_seed(0)

    def placed(order):
        return lower(Plan(layout, blocks, blocks, seen, order=order), (16, 16)).order

    first, other = (torch.randperm(30, generator=generator) for _ in range(2))
    with torch.inference_mode():
        kept = placed(first)
    assert placed(first) is kept
    assert not kept.is_inference()
    for order in (other, first):
        assert torch.equal(placed(order)[placed(order) >= 0], order)


def test_token_mask_refuses_what_does_not_fit():
    layout = Layout((32, 45, 80))
    blocks = Blocks.uniform(layout.tokens, 128)
    made = Plan(layout, blocks, blocks, BlockList.from_mask(torch.eye(blocks.count, dtype=torch.bool)[None, None]))
    with pytest.raises(UsageError, match=r"2 GiB"):
        made.token_mask()
    assert 0 < made.density < 0.01


def test_blocks_know_their_sizes():
    ragged = Blocks(torch.tensor([0, 3, 10, 12]))
    assert (ragged.n, ragged.count, ragged.size) == (12, 3, None)
    assert Blocks.uniform(10, 4).size == 4
    assert Blocks.uniform(10, 16).size == 10
    assert Blocks.uniform(10, 4).owner().tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
