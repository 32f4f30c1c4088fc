"""PARO's streamed statistics: equal to the materialised softmax, for every order, layout and input kind."""

import pytest
import torch

from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.layout import Layout
from dit_accel.methods import Call
from dit_accel.methods import paro_statistics as module
from dit_accel.methods.orders import token_order
from dit_accel.methods.paro_statistics import Statistics, bin_of
from dit_accel.step import Step

LAYOUTS = [Layout((3, 4, 5)), Layout((2, 3, 7), text=9), Layout((2, 3, 7), text=9, text_first=True), Layout((1, 6, 7))]


def tensors(layout, heads=3, key_heads=3, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn((batch, h, layout.tokens, 8), generator=g) * 2 for h in (heads, key_heads))


def materialised(q, k, layout, block, order, valid=None):
    """Block sums, maxima and counts of the full softmax, (B, H, nb, nb) each."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    for b, n in enumerate(valid or []):
        scores[b, :, :, n:] = -torch.inf
    tokens = token_order(layout, order)
    weights = scores.softmax(-1)[:, :, tokens][..., tokens]
    rows = [r.split(block, -1) for r in weights.split(block, -2)]

    def table(f):
        return torch.stack([torch.stack([f(x) for x in row], -1) for row in rows], -2)

    return (
        table(lambda x: x.sum((-2, -1))),
        table(lambda x: x.amax((-2, -1))),
        table(lambda x: (x < 1e-3).sum((-2, -1))),
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("block", [8, 16, 100])
def test_a_single_pass_serves_every_order(layout, block, monkeypatch):
    monkeypatch.setitem(module.CHUNK, "cpu", 700)  # many chunks of rows, each of one head
    q, k = tensors(layout)
    statistics = Statistics(bins=1, block_size=block, detail=True)
    statistics.observe(q, k, None, Call(layout))
    tally = statistics.layers[0]
    assert tally.calls.tolist() == [2]
    for o, order in enumerate(statistics.shape.ids):
        mass, peak, small = materialised(q, k, layout, block, order)
        torch.testing.assert_close(tally.mass[0, :, o], mass.sum(0))
        torch.testing.assert_close(tally.peak[0, :, o], peak.sum(0))
        torch.testing.assert_close(tally.small[0, :, o], small.sum(0).float())


def test_chunk_size_does_not_matter(monkeypatch):
    layout = LAYOUTS[1]
    q, k = tensors(layout)
    results = []
    for limit in (1, 2000, 1 << 20):
        monkeypatch.setitem(module.CHUNK, "cpu", limit)
        statistics = Statistics(block_size=8)
        statistics.observe(q, k, None, Call(layout))
        results.append(statistics.layers[0].mass)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_dead_keys_grouped_keys_and_the_callers_scale():
    layout = LAYOUTS[1]
    q, k = tensors(layout, heads=4, key_heads=2)
    statistics = Statistics(bins=1, block_size=8)
    call = Call(layout, kv_valid=torch.tensor([45, 51], dtype=torch.int32), scale=0.9)
    statistics.observe(q, k, None, call)
    mass, _, _ = materialised(q * 0.9 * 8**0.5, k, layout, 8, 0, valid=(45, 51))
    torch.testing.assert_close(statistics.layers[0].mass[0, :, 0], mass.sum(0))


def test_calls_fall_into_bins_and_layers():
    layout = LAYOUTS[0]
    statistics = Statistics(bins=2, block_size=16)
    q, k = tensors(layout, batch=1)
    for index in range(3):
        for layer in (0, 4):
            statistics.observe(q, k, None, Call(layout, layer=layer, step=Step(index, 3)))
    assert set(statistics.layers) == {0, 4}
    assert statistics.layers[4].calls.tolist() == [2, 1]
    torch.testing.assert_close(statistics.layers[0].mass[0], statistics.layers[0].mass[1] * 2)


def test_sampled_rows_are_counted_as_such():
    """Every block of every order weighs what its rows weigh together, whichever of them were looked at."""
    layout = Layout((3, 8, 10))
    q, k = tensors(layout, batch=1)
    statistics = Statistics(bins=1, block_size=16, detail=True, rows=0.25)
    statistics.observe(q, k, None, Call(layout))
    torch.testing.assert_close(statistics.layers[0].mass.sum(-1), torch.full((1, 3, 6, 15), 16.0))
    assert torch.equal(statistics.entries.sum((-2, -1)), torch.full((6,), 240.0 * len(statistics._rows)))
    chosen = Statistics(bins=1, block_size=16, rows=0.25, orders={0: torch.tensor([4, 0, 4])})
    chosen.observe(q, k, None, Call(layout))
    for head, order in enumerate((4, 0, 4)):
        torch.testing.assert_close(chosen.layers[0].mass[0, head, 0], statistics.layers[0].mass[0, head, order])


@pytest.mark.parametrize("rows", [0.5, 0.2, 0.001])
def test_sampled_rows_leave_no_block_out_and_estimate_the_whole(rows):
    layout = Layout((4, 8, 10))
    q, k = tensors(layout, batch=1)
    some, whole = (Statistics(bins=1, block_size=16, rows=r) for r in (rows, 1.0))
    for statistics in (some, whole):
        statistics.observe(q, k, None, Call(layout))
    assert some.sampled.min() >= 1
    assert len(some._rows) >= rows * 320
    ratio = some.layers[0].mass / whole.layers[0].mass
    assert abs(float(ratio.mean()) - 1) < 0.15


@pytest.mark.parametrize(
    ("index", "total", "bins", "expected"), [(0, 30, 4, 0), (7, 30, 4, 0), (8, 30, 4, 1), (29, 30, 4, 3), (2, 3, 10, 6)]
)
def test_bins_are_uniform_over_the_run(index, total, bins, expected):
    assert bin_of(Step(index, total), bins) == expected


def test_an_unknown_run_length_needs_a_stand_in():
    assert bin_of(Step(15, None), 4, total=30) == 2
    assert bin_of(Step(45, None), 4, total=30) == 3
    with pytest.raises(UnsupportedError, match="set the processor on the pipeline"):
        bin_of(Step(15, None), 4)


def test_one_layout_and_one_head_count_per_calibration():
    statistics = Statistics(block_size=16)
    statistics.observe(*tensors(LAYOUTS[0]), None, Call(LAYOUTS[0]))
    with pytest.raises(UsageError, match=r"main 3x4x5 and now saw main 2x3x7 \+ text 9"):
        statistics.observe(*tensors(LAYOUTS[1]), None, Call(LAYOUTS[1]))
    with pytest.raises(UsageError, match="had 3 heads and now has 6"):
        statistics.observe(*tensors(LAYOUTS[0], heads=6), None, Call(LAYOUTS[0]))


@pytest.mark.parametrize("settings", [{"bins": 0}, {"block_size": 0}, {"rows": 0.0}, {"rows": 1.5}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UsageError):
        Statistics(**settings)
