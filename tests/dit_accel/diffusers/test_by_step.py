"""Density and drift by layer and step: means over the calls, and what a dynamic plan shows is the plan's density."""

import pytest
import torch

from dit_accel import Layout, Pisa, plan
from dit_accel.diffusers.by_step import Cell, series
from dit_accel.diffusers.stats import Stats


def planned(density, layout):
    q, k, v = torch.randn(3, 1, 2, layout.tokens, 16, generator=torch.Generator().manual_seed(0))
    return plan(q, k, v, Pisa(density=density, block_size=8, tile=None), layout=layout)


def test_representatives_count_as_keys_in_what_is_counted_on_the_device():
    made = planned(0.25, Layout(grid=(4, 4, 8)))
    assert made.reps
    stats = Stats([("blocks.0", "self")])
    stats.count_sparse(0, made, False, "gather", "", 100, 3)
    assert stats.layers[0].density == pytest.approx(made.density)
    assert stats.effective_density == pytest.approx(made.density)
    assert stats.layers[0].steps[3].density == pytest.approx(made.density)


def test_a_cell_is_the_mean_of_its_calls():
    made = planned(0.5, Layout(grid=(2, 4, 8)))
    cell = Cell()
    assert cell.density is cell.drift is None
    cell.add(made)
    cell.add(torch.tensor(0.1))
    cell.add(torch.tensor(0.2))
    cell.add_dense()
    assert cell.density == pytest.approx((made.density + 0.1 + 0.2 + 1) / 4)
    for value in (0.1, 0.3, float("nan")):
        cell.add_drift(torch.tensor(value))
    assert cell.drift == pytest.approx(0.2)
    cell = Cell()
    cell.add_drift(torch.tensor(float("inf")))
    assert cell.drift is None


def test_a_series_has_a_gap_where_nothing_ran():
    cells = {0: Cell(), 2: Cell()}
    cells[0].add_dense()
    cells[2].add(torch.tensor(0.123456))
    assert series(cells, "density", 4) == [1.0, None, 0.1235, None]
