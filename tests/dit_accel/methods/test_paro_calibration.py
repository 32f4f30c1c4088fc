"""PARO's choices: the synthetic table of known heads, the printed metric, thresholds that meet the density."""

import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.layout import Layout
from dit_accel.methods import Call
from dit_accel.methods.paro_calibration import (
    OrderVotes,
    block_count,
    calibrate,
    costs,
    peakedness,
    sparse_share,
)
from dit_accel.methods.paro_statistics import BlockSums, LayerTally, OrderedBlocks, Statistics
from dit_accel.step import Step

GRID = (8, 16, 16)


def known_heads():
    """Three uniform attention patterns on 8x16x16, (3, N, N): same position in all frames, same frame, column +-1."""
    tokens = torch.arange(2048)
    f, h, w = tokens // 256, tokens // 16 % 16, tokens % 16
    same = (h[:, None] == h) & (w[:, None] == w)
    frame = f[:, None] == f
    column = (w[:, None] - w).abs() <= 1
    masks = torch.stack([same, frame, column]).float()
    return masks / masks.sum(-1, keepdim=True)


@pytest.fixture(scope="module")
def table():
    statistics = Statistics(bins=1, block_size=64, detail=True)
    statistics.shape = OrderedBlocks.of(Layout(GRID), 64)
    sums = BlockSums(statistics.shape, 3, torch.device("cpu"), detail=True, epsilon=1e-3)
    weights = known_heads()
    for rows in torch.arange(2048).split(512):
        sums.add(weights[:, rows].mT.contiguous(), rows)
    statistics.layers[0] = LayerTally(sums.mass[None], sums.peak[None], sums.small[None], torch.tensor([1]))
    return statistics


def test_p4_blocks_of_95_percent_mass(table):
    assert block_count(table, table.layers[0]).int().tolist() == [
        [244, 244, 31, 61, 31, 61],
        [122, 122, 973, 487, 973, 487],
        [973, 487, 508, 973, 175, 175],
    ]


def test_p4_orders_chosen(table):
    assert costs(table, table.layers[0]).argmin(-1).tolist() == [2, 0, 4]
    assert costs(table, table.layers[0], alpha=0.5).argmin(-1).tolist() == [2, 0, 4]


def test_p4_printed_terms(table):
    share, peaks = sparse_share(table, table.layers[0]), peakedness(table, table.layers[0])
    assert share[0].tolist() == [1, 1, 0.96875, 1, 0.96875, 1]
    assert share[1].tolist() == [0.875, 0.875, 0, 0.5, 0, 0.5]
    torch.testing.assert_close(share[2], torch.tensor([0, 0.75, 0.5, 0, 0.8203125, 0.8203125], dtype=torch.float64))
    assert peaks[0].tolist() == [16.75, 16.75, 1.21875, 1.9375, 1.21875, 1.9375]
    assert peaks[1].tolist() == [1, 1, 8, 2.5, 8, 2.5]
    assert peaks[2, 4].item() == pytest.approx(1)
    torch.testing.assert_close(peaks[2, :4], torch.tensor([8, 6.85, 34.1, 8]).double(), atol=0.06, rtol=0)


def test_the_printed_metric_by_name_and_its_sign(table):
    plain = costs(table, table.layers[0], metric="paper").argmin(-1).tolist()
    turned = costs(table, table.layers[0], metric="paper", maximize_sparse=True).argmin(-1).tolist()
    assert plain == [2, 2, 0]
    assert turned == [0, 0, 4]


def test_p5_peakedness_of_a_row():
    """Psi of [8, 1, 1, 1] is 2.909, of a constant block 1, and of an empty one 1 by definition."""
    layout = Layout((1, 1, 4))
    for row, psi in (([8.0, 1, 1, 1], 8 / 2.75), ([2.0, 2, 2, 2], 1), ([0.0, 0, 0, 0], 1)):
        statistics = Statistics(bins=1, block_size=4, detail=True)
        statistics.shape = OrderedBlocks.of(layout, 4)
        sums = BlockSums(statistics.shape, 1, torch.device("cpu"), detail=True, epsilon=1e-3)
        sums.add(torch.tensor(row)[None, :, None].repeat(1, 1, 4), torch.arange(4))
        tally = LayerTally(sums.mass[None], sums.peak[None], sums.small[None], torch.tensor([1]))
        assert peakedness(statistics, tally).item() == pytest.approx(psi, rel=1e-6)


def planned(statistics, **settings):
    return dict(calibrate(statistics, **settings))


def observed(layout, *, bins=2, block=8, heads=3, detail=False, seed=0, steps=4):
    statistics = Statistics(bins=bins, block_size=block, detail=detail)
    g = torch.Generator().manual_seed(seed)
    for index in range(steps):
        q, k = torch.randn((2, 1, heads, layout.tokens, 8), generator=g) * 2
        statistics.observe(q, k, None, Call(layout, step=Step(index, steps)))
    return statistics


def test_reordering_is_not_worse_than_order_zero_on_its_own_criterion():
    statistics = observed(Layout((4, 6, 8)), seed=3)
    count = block_count(statistics, statistics.layers[0])
    assert (count.min(-1).values <= count[:, 0]).all()


def test_bins_that_saw_no_step_take_the_nearest_map():
    plan = planned(observed(Layout((3, 4, 5)), bins=4, steps=2), density=0.6)[0]
    assert torch.equal(plan.maps[1], plan.maps[0])
    assert torch.equal(plan.maps[3], plan.maps[2])


def replay(listener, layout, calls=4, heads=3, total=4):
    g = torch.Generator().manual_seed(5)
    for index in range(calls):
        q, k = torch.randn((2, 1, heads, layout.tokens, 8), generator=g) * 2
        listener.observe(q, k, None, Call(layout, step=Step(index, total)))


@pytest.mark.parametrize("how", [{}, {"metric": "paper", "alpha": 0.5, "maximize_sparse": True}])
def test_votes_on_one_call_choose_as_its_block_sums_do(how):
    layout = Layout((3, 4, 5), text=6)
    votes, statistics = OrderVotes(block_size=8, **how), Statistics(bins=1, block_size=8, detail=True)
    for listener in (votes, statistics):
        replay(listener, layout, calls=1)
    assert torch.equal(votes.winners()[0], planned(statistics, density=0.5, **how)[0].orders)


def test_maps_under_chosen_orders_equal_those_taken_with_all_orders():
    layout = Layout((3, 4, 5), text=6)
    everything = Statistics(bins=2, block_size=8)
    replay(everything, layout)
    expected = planned(everything, density=0.6)[0]
    some = Statistics(bins=2, block_size=8, orders={0: expected.orders})
    replay(some, layout)
    assert some.bytes(layout, 3, 1) * 6 == everything.bytes(layout, 3, 1)
    found = planned(some, density=0.6)[0]
    assert torch.equal(found.orders, expected.orders)
    assert torch.equal(found.maps, expected.maps)
    with pytest.raises(UsageError, match="know no other"):
        calibrate(some, density=0.6, order=0)


def test_a_calibration_that_saw_nothing_says_so():
    with pytest.raises(UsageError, match="saw no attention call"):
        planned(Statistics(), density=0.5)
