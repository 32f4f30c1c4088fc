"""PARO's maps: the density asked for, the heaviest blocks, and what is kept in any case."""

import pytest
import torch
from paro_plans import observed

from dit_accel.layout import Layout
from dit_accel.methods.paro_calibration import calibrate
from dit_accel.methods.paro_statistics import OrderedBlocks
from dit_accel.methods.paro_threshold import TAUS, block_density, density_curve, forced_blocks, solve_tau, threshold

LAYOUTS = [Layout((3, 4, 5)), Layout((4, 6, 8), text=5), Layout((1, 9, 16)), Layout((2, 4, 5), text=9, text_first=True)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("density", [0.75, 0.85])
def test_every_layer_meets_the_density_from_below_to_within_a_block_of_each_head(layout, density):
    step = 3 * 8 * 8 / (3 * layout.tokens**2)
    for _, plan in calibrate(observed(layout), density=density, budget="layer"):
        for reached in plan.density:
            assert density - step - 1e-9 <= reached <= density + 1e-9


def test_the_model_meets_the_density_in_the_mean_and_evens_out_recall():
    layout, density = Layout((4, 6, 8)), 0.4
    statistics = observed(layout, layers=3)
    statistics.layers[1].mass[:, :, :, :, 0] *= 50  # a layer whose mass gathers in a column of blocks
    shared = dict(calibrate(statistics, density=density, budget="model", order=0))
    even = dict(calibrate(statistics, density=density, budget="layer", order=0))
    reached = torch.tensor([plan.density for plan in shared.values()])
    assert density - 0.01 <= float(reached.mean()) <= density
    assert float(reached[1].mean()) < float(reached[0].mean())

    def spread(plans):
        recalls = [float(plan.recall.mean()) for plan in plans.values()]
        return max(recalls) - min(recalls)

    assert spread(shared) < spread(even) / 2


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_curve_is_the_density_of_the_map(layout):
    shape = OrderedBlocks.of(layout, 8)
    mass = torch.rand((3, shape.blocks.count, shape.blocks.count), generator=torch.Generator().manual_seed(0)) ** 4
    curve = density_curve(mass, shape)
    for i in range(0, len(TAUS), 1500):
        assert curve[i].item() == pytest.approx(block_density(threshold(mass, shape, float(TAUS[i])), shape))
    assert curve[-1].item() == pytest.approx(1)


def test_each_head_keeps_its_heaviest_blocks_up_to_the_same_share():
    shape = OrderedBlocks.of(Layout((4, 6, 8)), 8)
    mass = torch.rand((3, 24, 24), generator=torch.Generator().manual_seed(1)).double() ** 4
    free = ~forced_blocks(shape)
    for head, kept in zip(mass, threshold(mass, shape, 0.7), strict=True):
        inside, outside = head[kept & free], head[~kept & free]
        assert inside.min() >= outside.max()
        share = inside.sum() / head[free].sum()
        assert share >= 0.7 > share - inside.min() / head[free].sum()


def test_blocks_kept_in_any_case():
    text = OrderedBlocks.of(Layout((3, 4, 5), text=6), 8)  # text in blocks 7 and 8, the last one ragged
    forced = forced_blocks(text)
    assert forced[7:].all()
    assert forced[:, 7:].all()
    assert torch.equal(forced[:7, :7], torch.eye(7, dtype=torch.bool))
    ragged = forced_blocks(OrderedBlocks.of(Layout((3, 4, 5)), 8))
    assert int(ragged.sum()) == 7 + 2 * 8 - 1
    whole = OrderedBlocks.of(Layout((2, 4, 5)), 8)
    assert torch.equal(threshold(torch.ones((1, 5, 5)), whole, 0.0)[0], torch.eye(5, dtype=torch.bool))


def test_a_density_below_what_is_always_kept_gives_just_that():
    statistics = observed(Layout((3, 4, 5), text=6))
    forced = forced_blocks(statistics.shape)
    for _, plan in calibrate(statistics, density=0.01, budget="model"):
        assert torch.equal(plan.maps, forced.expand_as(plan.maps))


def test_density_one_keeps_everything_even_without_mass():
    shape = OrderedBlocks.of(Layout((2, 4, 5)), 8)
    mass = torch.zeros((1, 5, 5))
    mass[0, 2, 3] = 1
    assert threshold(mass, shape, solve_tau([density_curve(mass, shape)], 1.0)).all()
    half = threshold(mass, shape, solve_tau([density_curve(mass, shape)], 0.5))
    assert int(half.sum()) == 6  # the diagonal and the one block with mass: the others hold nothing worth the budget


def test_block_density_counts_tokens_not_blocks():
    shape = OrderedBlocks.of(Layout((1, 1, 10)), 8)
    kept = torch.tensor([[[True, False], [False, False]]])
    assert block_density(kept, shape) == pytest.approx(0.64)
