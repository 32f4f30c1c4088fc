"""The cost model against the published simulator, and against what plans really visit."""

import pytest

from dit_accel.cost import end_to_end, plan_cost, tile_cost
from dit_accel.errors import UsageError
from dit_accel.functional import plan as make
from dit_accel.layout import Layout
from dit_accel.methods import GNA
from dit_accel.methods.gna_presets import PRESETS
from dit_accel.methods.tile_shapes import Shapes
from dit_accel.methods.tiles import box_plan

HUNYUAN, COSMOS, FLUX = (30, 48, 80), (16, 44, 80), (1, 256, 256)
TILES = {
    HUNYUAN: ((4, 8, 8), (2, 8, 8)), COSMOS: ((8, 4, 8), (4, 4, 8)), FLUX: ((1, 16, 16), (1, 16, 8)),
}  # fmt: skip


def cost(window, stride, grid):
    return tile_cost(GNA(window, stride), grid, *TILES[grid])


@pytest.mark.parametrize(
    ("window", "stride", "grid", "worst", "total"),
    [
        ((18, 24, 24), 1, HUNYUAN, 275, 900),
        ((18, 24, 24), (1, 1, 8), HUNYUAN, 165, 900),
        ((18, 24, 24), (1, 8, 8), HUNYUAN, 99, 900),
        ((18, 24, 24), (2, 8, 8), HUNYUAN, 90, 900),
        ((18, 24, 24), (16, 8, 8), HUNYUAN, 81, 900),
        ((80, 80), 1, FLUX, 84, 512),
        ((80, 80), (16, 1), FLUX, 60, 512),
        ((80, 80), 16, FLUX, 50, 512),
    ],
)
def test_visited_tiles_are_the_published_ones(window, stride, grid, worst, total):
    found = cost(window, stride, grid)
    assert (found.worst, found.total) == (worst, total)


@pytest.mark.parametrize(
    ("window", "stride", "grid"),
    [
        ((18, 24, 24), (16, 8, 8), HUNYUAN), ((30, 40, 40), (1, 32, 8), HUNYUAN), ((80, 80), 16, FLUX),
        ((16, 32, 48), (1, 8, 16), COSMOS), ((16, 24, 16), (1, 8, 16), COSMOS),
    ],
)  # fmt: skip
def test_fully_block_sparse_settings_reach_the_bound(window, stride, grid):
    found = cost(window, stride, grid)
    assert found.partial == 0
    assert found.op_bound == pytest.approx(found.flop_bound) == pytest.approx(found.op_mean)


def test_sliding_settings_do_not_reach_it():
    found = cost((18, 24, 24), 1, HUNYUAN)
    assert found.partial > 0.5
    assert found.op_bound == pytest.approx(3.27, abs=0.005)
    assert found.op_bound < found.op_mean < found.flop_bound == pytest.approx(11.11, abs=0.005)


def test_blocked_windows_differ_from_tile_to_tile():
    found = cost((18, 24, 24), (18, 24, 24), HUNYUAN)
    assert found.op_bound == pytest.approx(6.7, abs=0.05)
    assert found.op_mean == pytest.approx(10.3, abs=0.05)


# End-to-end speed-ups of the published simulator; its Cosmos tiles were not published.
@pytest.mark.parametrize(
    ("preset", "stride", "grid", "dense", "simulated", "bound", "slack"),
    [
        ("hunyuan", 1, HUNYUAN, 15, 1.42, 1.63, 0.006),
        ("hunyuan", None, HUNYUAN, 15, 1.63, 1.63, 0.006),
        ("hunyuan", None, HUNYUAN, 0, 2.23, 2.23, 0.006),
        ("hunyuan-58", None, HUNYUAN, 0, 1.55, 1.55, 0.006),
        ("hunyuan-58", None, HUNYUAN, 15, 1.33, 1.33, 0.006),
        ("flux-4k", 1, FLUX, 9, 1.42, 1.46, 0.006),
        ("flux-4k", None, FLUX, 9, 1.46, 1.46, 0.006),
        ("cosmos", 1, COSMOS, 12, 1.21, 1.28, 0.016),
        ("cosmos", None, COSMOS, 12, 1.28, 1.28, 0.016),
        ("cosmos-fast", None, COSMOS, 12, 1.52, 1.52, 0.016),
        ("cosmos-fast", None, COSMOS, 0, 2.10, 2.10, 0.016),
    ],
)
def test_end_to_end_speedups_are_the_published_ones(preset, stride, grid, dense, simulated, bound, slack):
    published = PRESETS[preset]
    found = cost(published.window, stride or published.stride, grid)
    op = found.op_bound if preset.startswith("cosmos") else round(found.op_bound, 1)
    assert end_to_end(op, published.share, published.steps, dense) == pytest.approx(simulated, abs=slack)
    assert end_to_end(found.flop_bound, published.share, published.steps, dense) == pytest.approx(bound, abs=slack)


def test_dynamic_tiles_start_at_the_window():
    method, tiles = GNA((1, 1, 24), (1, 1, 4)), ((1, 1, 4), (1, 1, 16))
    fixed, dynamic = (tile_cost(method, (1, 1, 80), *tiles, dynamic=flag) for flag in (False, True))
    assert (fixed.worst, dynamic.worst) == (3, 2)
    assert dynamic.mean == 2
    assert dynamic.whole == 1


@pytest.mark.parametrize(
    ("method", "grid", "shape"),
    [
        (GNA((18, 24, 24), (2, 8, 8)), HUNYUAN, (2, 8, 8)),
        (GNA((5, 6, 9)), (8, 12, 24), (2, 2, 4)),
        (GNA((4, 6, 8), (3, 5, 2), causal=(True, False, False)), (8, 12, 24), (4, 2, 2)),
        (GNA((4, 3, 3), 1, (1, 2, 4)), (8, 16, 32), (2, 4, 4)),
    ],
)
def test_the_model_counts_what_a_plan_visits(method, grid, shape):
    axes = [window.axis() for window in method.windows(grid)]
    size = shape[0] * shape[1] * shape[2]
    counted = plan_cost(box_plan(Layout(grid), axes, Shapes(size, {shape: 1.0})))
    modelled = tile_cost(method, grid, shape, shape)
    assert (counted.total, counted.worst) == (modelled.total, modelled.worst)
    assert (counted.mean, counted.whole) == pytest.approx((modelled.mean, modelled.whole))
    assert counted.density == pytest.approx(modelled.density)


def test_a_plan_counts_its_text():
    made = make(None, None, None, GNA.preset("hunyuan"), layout=Layout(HUNYUAN, text=256))
    assert (plan_cost(made).total, plan_cost(made).worst) == (902, 902)
    assert plan_cost(made).partial == 0


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="tile_q must be three positive"):
        tile_cost(GNA(3), (4, 4, 4), (2, 2), (2, 2, 2))
    with pytest.raises(UsageError, match="tile_k"):
        tile_cost(GNA(3), (4, 4, 4), (2, 2, 2), (2, 0, 2))
    with pytest.raises(UsageError, match="window is 5"):
        tile_cost(GNA(5), (4, 4, 4), (2, 2, 2), (2, 2, 2))
    for bad in ({"op": 0, "share": 0.5}, {"op": 2, "share": 1.5}, {"op": 2, "share": 0.5, "dense_steps": 2}):
        with pytest.raises(UsageError, match="end_to_end needs"):
            end_to_end(**bad)
    assert end_to_end(2.0, 0.5, 10, 10) == 1
