"""GNA: NATTEN's semantics against a brute force from its definition, published tile counts."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.functional import attend
from dit_accel.functional import plan as make
from dit_accel.layout import Layout, Segment
from dit_accel.lowering import lower
from dit_accel.methods import GNA, Method, find
from dit_accel.methods.gna_presets import PRESETS
from dit_accel.methods.tile_shapes import choose, counter
from dit_accel.methods.tiles import box_plan

HUNYUAN = (30, 48, 80)


def plan(method, layout):
    return make(None, None, None, method, layout=layout)


def seen(i, length, w, s, d, causal):
    """Keys that coordinate i sees on one axis: NATTEN's definition, through leader and centre."""
    group, p = i % d, i // d
    n = len(range(group, length, d))
    left, right = w // 2, w // 2 + w % 2 - 1
    if causal:
        leader = min(p // s * s + s - 1, n - 1)
        keys = range(max(leader - (w - 1), 0), p + 1)
    else:
        leader = min(p // s * s + s // 2, n - 1)
        centre = min(max(leader, left), n - 1 - right)
        keys = range(centre - left, centre + right + 1)
    return {k * d + group for k in keys}


def brute(grid, windows, outside=(0, 0)):
    """bool (N, N) of per-axis (w, s, d, causal); ``outside``: tokens before and after that see and are seen by all."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for length, window in zip(grid, windows, strict=True):
        axis = torch.zeros(length, length, dtype=torch.bool)
        for i in range(length):
            axis[i, list(seen(i, length, *window))] = True
        mask = torch.kron(mask.byte(), axis.byte()).bool()
    before, after = outside
    return torch.nn.functional.pad(mask, (before, after, before, after), value=True)


def rows(length, **parameters):
    """First and last key of each query on a plain sequence, checked to be an interval."""
    mask = plan(GNA(**parameters), Layout((1, 1, length))).token_mask()[0, 0]
    keys = [row.nonzero().flatten().tolist() for row in mask]
    assert all(k == list(range(k[0], k[-1] + 1)) for k in keys)
    return [(k[0], k[-1]) for k in keys]


# The spec's worked examples, printed by NATTEN 0.21.7.
@pytest.mark.parametrize(
    ("window", "stride", "expected"),
    [
        (5, 1, [(0, 4)] * 3 + [(1, 5), (2, 6), (3, 7), (4, 8)] + [(5, 9)] * 3),
        (5, 2, [(0, 4)] * 2 + [(1, 5)] * 2 + [(3, 7)] * 2 + [(5, 9)] * 4),
        (4, 2, [(0, 3)] * 2 + [(1, 4)] * 2 + [(3, 6)] * 2 + [(5, 8)] * 2 + [(6, 9)] * 2),
        (4, 4, [(0, 3)] * 4 + [(4, 7)] * 4 + [(6, 9)] * 2),
    ],
)
def test_worked_examples_in_one_dimension(window, stride, expected):
    assert rows(10, window=window, stride=stride) == expected


def test_even_windows_lean_left():
    assert rows(10, window=4)[5] == (3, 6)


def test_worked_examples_with_causality():
    causal = rows(10, window=5, stride=2, causal=True)
    assert [causal[i] for i in (3, 4, 5, 6, 9)] == [(0, 3), (1, 4), (1, 5), (3, 6), (5, 9)]
    assert rows(10, window=5, stride=5, causal=True) == [(0, q) for q in range(5)] + [(5, q) for q in range(5, 10)]


@pytest.mark.parametrize(
    ("length", "parameters", "expected"),
    [
        (10, {"window": 3, "dilation": 2},
         {(0, 2): {0, 2, 4}, (4,): {2, 4, 6}, (6, 8): {4, 6, 8}, (1, 3): {1, 3, 5}, (5,): {3, 5, 7},
          (7, 9): {5, 7, 9}}),
        (11, {"window": 3, "stride": 2, "dilation": 3},
         {(0, 3): {0, 3, 6}, (6, 9): {3, 6, 9}, (1, 4): {1, 4, 7}, (7, 10): {4, 7, 10}, (2, 5, 8): {2, 5, 8}}),
    ],
)  # fmt: skip
def test_worked_examples_with_dilation(length, parameters, expected):
    mask = plan(GNA(**parameters), Layout((1, 1, length))).token_mask()[0, 0]
    for queries, keys in expected.items():
        for q in queries:
            assert set(mask[q].nonzero().flatten().tolist()) == keys


def test_worked_examples_in_three_dimensions():
    t, h, w = GNA((18, 24, 24), (16, 8, 8)).windows(HUNYUAN)
    assert t.axis().lo.tolist() == [0] * 16 + [12] * 14
    assert h.axis().lo.tolist() == [0] * 16 + [8] * 8 + [16] * 8 + [24] * 16
    assert w.axis().lo.tolist() == [min(max(8 * (i // 8) - 8, 0), 56) for i in range(80)]
    assert all(((x.axis().hi - x.axis().lo) == size).all() for x, size in zip((t, h, w), (18, 24, 24), strict=True))
    t, h, w = GNA((16, 32, 48), (1, 8, 16)).windows((16, 44, 80))
    assert t.axis().whole
    assert h.axis().lo[::8].tolist() == [0, 0, 4, 12, 12, 12]
    assert w.axis().lo[::16].tolist() == [0, 0, 16, 32, 32]


@st.composite
def axes(draw, most=9):
    length = draw(st.integers(1, most))
    dilation = draw(st.integers(1, length))
    window = draw(st.integers(1, length // dilation))
    return length, (window, draw(st.integers(1, window)), dilation, draw(st.booleans()))


@st.composite
def cases(draw):
    found = draw(st.lists(axes(), min_size=1, max_size=3))
    found = [(1, (1, 1, 1, False))] * (3 - len(found)) + found
    grid, windows = (tuple(x) for x in zip(*found, strict=True))
    layout = Layout(grid, text=draw(st.integers(0, 5)), text_first=draw(st.booleans()), prefix=draw(st.integers(0, 2)))
    return layout, windows


def method_of(windows, **more):
    names = ("window", "stride", "dilation", "causal")
    return GNA(**dict(zip(names, zip(*windows, strict=True), strict=True)), **more)


def outside(layout):
    return layout.main.start, layout.tokens - layout.main.stop


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases(), st.sampled_from([(2,), (4,), (8,), (16,), (8, 4)]))
def test_the_mask_is_the_brute_force_for_every_tile_size(case, blocks):
    layout, windows = case
    resolved = [window.axis() for window in method_of(windows).windows(layout.grid)]
    _, shapes = choose([counter(axis) for axis in resolved], layout.grid, blocks)
    made = box_plan(layout, resolved, shapes)
    expected = brute(layout.grid, windows, outside(layout))
    assert torch.equal(made.token_mask()[0, 0], expected)
    if made.partial is not None:
        count = made.k_blocks.count
        assert not (made.full.mask(count) & made.partial.mask(count)).any()
    counted = replace(made, _memo={})
    assert (made.density, made.density_video) == pytest.approx((counted.density, counted.density_video))
    assert made.density == pytest.approx(expected.double().mean().item())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_the_public_plan_is_the_brute_force(case):
    layout, windows = case
    mask = plan(method_of(windows), layout).token_mask()[0, 0]
    assert torch.equal(mask, brute(layout.grid, windows, outside(layout)))


@pytest.mark.parametrize(
    ("grid", "windows"),
    [
        ((5, 7, 11), ((3, 2, 1, False), (4, 1, 1, False), (5, 3, 2, True))),
        ((3, 13, 17), ((3, 1, 1, True), (3, 2, 4, False), (8, 8, 2, False))),
        ((1, 19, 23), ((1, 1, 1, False), (6, 4, 3, False), (7, 5, 1, False))),
        ((6, 9, 20), ((4, 3, 1, False), (9, 1, 1, False), (6, 2, 3, True))),
    ],
)
def test_ragged_grids_of_several_blocks(grid, windows):
    layout = Layout(segments=(Segment("text", 5), Segment("main", grid), Segment("reference", 7)))
    made = plan(method_of(windows), layout)
    assert made.q_blocks.count > 5
    assert torch.equal(made.token_mask()[0, 0], brute(grid, windows, (5, 7)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_every_query_without_causality_has_the_whole_window(case):
    layout, windows = case
    windows = tuple((*window[:3], False) for window in windows)
    mask = plan(method_of(windows), Layout(layout.grid)).token_mask()[0, 0]
    assert (mask.sum(-1) == math.prod(window[0] for window in windows)).all()


def test_stride_equal_to_window_is_block_diagonal():
    grid, size = (4, 6, 10), (2, 3, 5)
    mask = plan(GNA(size, size), Layout(grid)).token_mask()[0, 0]
    t, h, w = torch.unravel_index(torch.arange(math.prod(grid)), grid)
    block = (t // 2 * 2 + h // 3) * 2 + w // 5
    assert torch.equal(mask, block[:, None] == block[None, :])


def test_the_whole_window_is_dense_and_moves_nothing():
    made = plan(GNA(-1), Layout((3, 5, 7), text=4))
    assert made.density == 1
    assert made.order is None
    assert made.partial is None


def qkv(layout, heads=2, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 1, heads, layout.tokens, dim, generator=generator).unbind(0)


@pytest.mark.parametrize("text_first", [False, True])
def test_attention_is_dense_attention_under_the_mask(text_first):
    layout, windows = Layout((3, 9, 13), 11, text_first), ((3, 1, 1, False), (4, 2, 2, False), (5, 1, 1, True))
    method = method_of(windows, scale=0.3)
    q, k, v = qkv(layout)
    out = attend(q, k, v, method, layout=layout, backend="gather")
    mask = brute(layout.grid, windows, outside(layout))
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, mask, scale=0.3), atol=1e-5, rtol=1e-5)


def test_dead_text_keys_are_seen_by_none():
    layout, windows = Layout((2, 7, 9), 8), ((2, 1, 1, False), (3, 1, 1, False), (4, 2, 1, False))
    q, k, v = qkv(layout)
    out = attend(q, k, v, method_of(windows), layout=layout, kv_valid=torch.tensor([129]), backend="gather")
    mask = brute(layout.grid, windows, outside(layout)) & (torch.arange(layout.tokens) < 129)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, mask), atol=1e-5, rtol=1e-5)


def test_window_and_text_merged_through_their_masses_are_one_softmax():
    layout, method = Layout((3, 6, 11), 9), GNA((2, 4, 5), (1, 2, 1))
    q, k, v = qkv(layout)
    joint = attend(q, k, v, method, layout=layout, backend="gather")[:, :, :198]
    (qv, kv, vv), (kt, vt) = (x[:, :, :198] for x in (q, k, v)), (x[:, :, 198:] for x in (k, v))
    one, m1 = attend(qv, kv, vv, method, layout=Layout((3, 6, 11)), backend="gather", return_lse=True)
    two, m2 = attend(qv, kt, vt, layout=Layout((3, 6, 11)), kv_layout=Layout((1, 1, 9)), return_lse=True)
    both = torch.logaddexp(m1, m2)[..., None]
    merged = one * (m1[..., None] - both).exp() + two * (m2[..., None] - both).exp()
    assert (merged - joint).abs().max() < 1e-6


@pytest.mark.slow
def test_flex_runs_the_same_plan():
    layout, windows = Layout((4, 10, 14), 9), ((4, 1, 1, False), (4, 2, 1, False), (3, 1, 3, False))
    q, k, v = qkv(layout)
    out = attend(q, k, v, method_of(windows), layout=layout, backend="flex")
    mask = brute(layout.grid, windows, outside(layout))
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, mask), atol=1e-5, rtol=1e-5)


# Grid, key tiles that a query tile of 128 tokens visits, out of how many.
@pytest.mark.parametrize(
    ("name", "grid", "visited", "total"),
    [
        ("hunyuan", HUNYUAN, 81, 900),
        ("hunyuan-58", HUNYUAN, 375, 900),
        ("cosmos", (16, 44, 80), 192, 440),
        ("cosmos-fast", (16, 44, 80), 48, 440),
        ("flux-4k", (1, 256, 256), 50, 512),
        ("cosmos-predict2-a", (24, 44, 80), 12, 660),
        ("cosmos-predict2-b", (24, 44, 80), 36, 660),
        ("cosmos-predict2-c", (24, 44, 80), 54, 660),
        ("cosmos-predict2-d", (24, 44, 80), 150, 660),
        ("cosmos-predict2-e", (24, 44, 80), 294, 660),
    ],
)
@pytest.mark.parametrize("text", [0, 300])
def test_published_presets_execute_no_partial_block(name, grid, visited, total, text):
    made = plan(GNA.preset(name), Layout(grid, text=text))
    tiles = lower(made)
    assert (tiles.tile_q, tiles.tile_k, tiles.partial) == (128, 128, None)
    text_tiles = -(-text // 128)
    assert tiles.tiles_k == total + text_tiles
    assert (tiles.full.count[..., :total] == visited + text_tiles).all()
    assert (tiles.full.count[..., total:] == total + text_tiles).all()
    assert made.density_video == visited / total


def test_a_long_sequence_stays_in_order():
    made = plan(GNA(2048, 256), Layout((1, 1, 32_768)))
    assert made.order is None
    assert made.partial is None
    assert (made.full.count == 2048 // 128).all()


@pytest.mark.parametrize(
    ("name", "sparsity"),
    [("cosmos", 0.564), ("cosmos-fast", 0.891), ("hunyuan", 0.91), ("hunyuan-58", 0.583), ("flux-4k", 0.902),
     ("cosmos-predict2-a", 0.98), ("cosmos-predict2-b", 0.95), ("cosmos-predict2-c", 0.92),
     ("cosmos-predict2-d", 0.77), ("cosmos-predict2-e", 0.55)],
)  # fmt: skip
def test_published_sparsity(name, sparsity):
    grid = tuple(24 if n == -1 else n for n in PRESETS[name].grid)
    layout = Layout((1,) * (3 - len(grid)) + grid)
    assert 1 - GNA.preset(name).density(layout) == pytest.approx(sparsity, abs=0.0055)


@pytest.mark.parametrize(
    ("name", "dense", "steps"),
    [("cosmos", 12, 35), ("cosmos-fast", 12, 35), ("hunyuan", 15, 50), ("flux-4k", 9, 28), ("hunyuan-58", 0, 50),
     ("cosmos-predict2-b", 0, 35)],
)  # fmt: skip
def test_published_dense_steps(name, dense, steps):
    assert GNA.preset_schedule(name).dense_steps(steps) == list(range(dense))


def test_a_ragged_grid_tests_few_blocks():
    """45 rows are no multiple of a tile, and yet 78,360 blocks do what 72,900 would at best, most of them whole."""
    made = plan(GNA((18, 24, 24), (16, 8, 8)), Layout((32, 45, 80)))
    tested, listed = int(made.partial.count.sum()), int(made.block_mask.sum())
    assert made.q_blocks.count == 900
    assert (tested, listed) == (8_580, 78_360)
    assert made.density == pytest.approx(18 * 24 * 24 / 115_200)


def test_planning_builds_no_table_of_pairs():
    """Tables grow with blocks squared and tokens, never tokens squared: 115,200 tokens, fully sliding."""
    made = plan(GNA((18, 24, 24)), Layout((32, 45, 80)))
    tables = [t for part in made.predicate.box.__dict__.values() for t in part]
    assert all(t.numel() == 115_200 for t in tables)
    assert made.bytes() <= 2 * 4 * made.q_blocks.count * (made.k_blocks.count + 1)


@pytest.mark.parametrize("tile", [(128, 64), (64, 128), (32, 32)])
def test_lowering_to_other_tiles_keeps_the_mask(tile):
    layout, windows = Layout((4, 12, 18), text=9), ((4, 2, 1, False), (6, 2, 1, False), (6, 3, 3, False))
    made = plan(method_of(windows), layout)
    tiles = lower(made, tile)
    mask = brute(layout.grid, windows, outside(layout))
    order = torch.arange(layout.tokens) if made.order is None else made.order
    assert torch.equal(tiles.token_mask()[0, 0], mask[order][:, order])


def test_single_frames_drop_the_time_axis():
    image, video = Layout((1, 24, 40), text=3), GNA((18, 12, 8), (16, 4, 8))
    assert torch.equal(plan(video, image).token_mask(), plan(GNA((12, 8), (4, 8)), image).token_mask())
    assert torch.equal(
        plan(GNA(5), Layout((1, 1, 30))).token_mask(), plan(GNA((9, 9, 5)), Layout((1, 1, 30))).token_mask()
    )


# window, stride, dilation for the base grid -> for another one, by Cosmos-Predict2's rule.
@pytest.mark.parametrize(
    ("method", "grid", "expected"),
    [
        (GNA((12, 24), (4, 8), base_size=(44, 80)), (1, 88, 160), [(24, 8, 2), (48, 16, 2)]),
        (GNA((12, 24), (4, 8), base_size=(44, 80)), (1, 60, 110), [(16, 5, 1), (33, 11, 1)]),
        (GNA((12, 24), (4, 8), base_size=(44, 80)), (1, 22, 10), [(6, 2, 1), (3, 1, 1)]),
        (GNA((4, 16), 1, (11, 5), base_size=(44, 80)), (1, 22, 160), [(2, 1, 6), (32, 2, 5)]),
        (GNA((50, 9), (3, 9), base_size=-1), (1, 20, 30), [(20, 3, 1), (9, 9, 1)]),
        (GNA((-1, 9), (1, 3), base_size=(5, 90)), (1, 20, 30), [(20, 1, 1), (3, 1, 1)]),
        (GNA((4, 4), base_size=(400, 400)), (1, 20, 30), [(2, 1, 1), (2, 1, 1)]),
    ],
)
def test_base_size_rescales(method, grid, expected):
    assert [(w.size, w.stride, w.dilation) for w in method.windows(grid)[1:]] == expected


def test_defaults_are_the_published_hunyuan_setting():
    assert GNA() == find("gna")() == GNA.preset("hunyuan", base_size=-1)
    assert (GNA().window, GNA().stride, GNA().base_size) == ((18, 24, 24), (16, 8, 8), -1)
    assert (GNA(5).stride, GNA(5).dilation, GNA(5).causal, GNA(5).base_size, GNA(5).scale) == (1, 1, False, None, None)
    assert GNA(stride=1) == GNA((18, 24, 24), 1, base_size=-1)
    assert GNA.preset("hunyuan", stride=1).stride == 1
    for method in (GNA(), GNA(5, causal=(True, False, False)), GNA.inward((480, 832))):
        assert Method.from_dict(method.to_dict()) == method
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in method.to_dict().items()}
        assert Method.from_dict(listed) == method
        assert hash(Method.from_dict(listed)) == hash(method)


@pytest.mark.parametrize("density", [0.05, 0.09, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    ("method", "layout"),
    [
        (GNA(), Layout(HUNYUAN)),
        (GNA(), Layout((33, 8, 10))),
        (GNA(-1), Layout((1, 30, 47), text=20)),
        (GNA.preset("flux-4k"), Layout((1, 64, 64))),
        (GNA.preset("cosmos"), Layout((16, 44, 80))),
        (GNA((9, 9, 9), causal=(True, False, False)), Layout((12, 30, 20))),
    ],
)
def test_density_is_solved(method, layout, density):
    solved, reached = method.with_density(density, layout)
    assert reached == pytest.approx(solved.density(layout)) == pytest.approx(plan(solved, layout).density)
    floor = GNA(1).density(layout)
    most = 1 - (0.5 if solved.causal[0] else 0)
    if floor < density / 2 and density < most:
        assert reached == pytest.approx(density, rel=0.2)


def test_a_solved_strided_window_keeps_its_tiles_whole():
    solved, reached = GNA.preset("hunyuan").with_density(0.2, Layout(HUNYUAN))
    assert reached == pytest.approx(0.2, rel=0.1)
    made = plan(solved, Layout(HUNYUAN))
    assert made.partial is None or made.partial.count.sum() < 0.2 * made.block_mask.sum()


@pytest.mark.parametrize(
    ("parameters", "grid", "message"),
    [
        ({"window": 0}, None, "GNA.window must be a positive integer or -1"),
        ({"window": (4, 0, 4)}, None, "GNA.window must be a positive"),
        ({"window": (4, 4, 4, 4)}, None, "one to three"),
        ({"window": 2.5}, None, "got 2.5"),
        ({"window": 4, "stride": 0}, None, "GNA.stride must be a positive integer"),
        ({"window": 4, "dilation": -1}, None, "GNA.dilation"),
        ({"window": 4, "stride": 5}, None, r"stride 5 is larger than window 4 on axis W.*allowed 1\.\.4"),
        ({"window": (4, 8, 8), "stride": (5, 1, 1)}, None, "on axis T"),
        ({"window": (4, 8), "stride": (1, 1, 1)}, None, "same number of axes"),
        ({"window": 4, "causal": "yes"}, None, "GNA.causal"),
        ({"window": 4, "scale": 0.0}, None, "GNA.scale"),
        ({"window": 4, "base_size": 0}, None, "GNA.base_size"),
        ({"window": (9, 4, 4)}, (8, 8, 8), r"GNA.window is 9 on axis T of length 8.*allowed 1\.\.8"),
        ({"window": (8, 4, 17)}, (8, 8, 16), "on axis W of length 16"),
        ({"window": (4, 4, 4), "dilation": (1, 3, 1)}, (8, 8, 8), r"dilation 1\.\.2, or window 1\.\.2"),
        ({"window": (1, 4, 4), "stride": 4}, (8, 8, 8), r"GNA.stride is 4 with window 1 on axis T"),
        ({"window": (4, 4)}, (8, 8, 8), r"give three, with -1 for a whole axis, e.g. window=\(-1, 4, 4\)"),
    ],
)
def test_what_cannot_be_is_refused(parameters, grid, message):
    with pytest.raises(UsageError, match=message):
        plan(GNA(**parameters), Layout(grid or (8, 8, 8)))


def test_other_refusals():
    with pytest.raises(UsageError, match="choose one of cosmos"):
        GNA.preset("sora")
    with pytest.raises(UsageError, match="density"):
        GNA(3).with_density(0, Layout((1, 8, 8)))
    with pytest.raises(UnsupportedError, match="queries' layout"):
        make(None, None, None, GNA(3), layout=Layout((1, 8, 8)), kv_layout=Layout((1, 9, 9)))
