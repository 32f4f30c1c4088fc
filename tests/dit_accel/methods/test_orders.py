"""Axis orders: published ids, inverses, permutations of the main segment only."""

import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.layout import Layout, Segment
from dit_accel.methods.orders import NAMES, ORDERS, candidates, grid_order, inverse, token_order

GRID = (3, 4, 5)


def test_p1_published_ids_and_inverses():
    assert NAMES == ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
    assert [inverse(i) for i in range(6)] == [0, 1, 5, 3, 4, 2]


@pytest.mark.parametrize("order", range(6))
def test_inverse_restores_the_row_major_sequence(order):
    reordered = tuple(GRID[axis] for axis in ORDERS[order])
    there, back = grid_order(GRID, order), grid_order(reordered, inverse(order))
    assert torch.equal(there[back], torch.arange(60))


def test_p2_hwf_is_token_major():
    """Token (f, h, w) goes to slot (h W + w) F + f: SVG's token-major index for H W = s."""
    order = grid_order(GRID, 2)
    frames, height, width = GRID
    for f in range(frames):
        for h in range(height):
            for w in range(width):
                assert order[(h * width + w) * frames + f] == (f * height + h) * width + w


@pytest.mark.parametrize("order", range(6))
def test_text_and_prefix_stay_in_place(order):
    layout = Layout(segments=(Segment("text", 7), Segment("prefix", 2), Segment("main", GRID), Segment("text", 3)))
    tokens = token_order(layout, order)
    assert torch.equal(tokens.sort().values, torch.arange(layout.tokens))
    outside = torch.cat([torch.arange(9), torch.arange(69, 72)])
    assert torch.equal(tokens[outside], outside)
    assert torch.equal(tokens[layout.main] - 9, grid_order(GRID, order))


@pytest.mark.parametrize(
    ("grid", "ids"), [(GRID, (0, 1, 2, 3, 4, 5)), ((1, 4, 5), (0, 1)), ((3, 1, 5), (0, 2)), ((1, 1, 9), (0,))]
)
def test_candidates_are_the_orders_that_differ(grid, ids):
    assert candidates(grid) == ids
    assert len({tuple(grid_order(grid, i).tolist()) for i in ids}) == len(ids)
    everything = {tuple(grid_order(grid, i).tolist()) for i in range(6)}
    assert everything == {tuple(grid_order(grid, i).tolist()) for i in ids}


@pytest.mark.parametrize("order", [-1, 6, 1.5])
def test_unknown_order_is_refused_with_the_known_ones(order):
    with pytest.raises(UsageError, match="0 FHW"):
        grid_order(GRID, order)
