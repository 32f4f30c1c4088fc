"""GNA: NATTEN's semantics against a brute force from its definition, published tile counts, its relatives."""

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
from dit_accel.methods import GNA, Method, find
from dit_accel.methods.gna_presets import PRESETS
from dit_accel.methods.tiles import box_plan, choose
from dit_accel.plans import lower

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
    made = box_plan(layout, resolved, *choose(resolved, blocks))
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


def test_a_ragged_grid_tests_few_blocks():
    """45 rows are no multiple of a tile: blocks of the last 5 are tested, the rest stays whole."""
    made = plan(GNA((18, 24, 24), (16, 8, 8)), Layout((32, 45, 80)))
    tested, listed = int(made.partial.count.sum()), int(made.block_mask.sum())
    assert made.q_blocks.count == 900
    assert (tested, listed) == (15_820, 83_220)
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
    with pytest.raises(UsageError, match="one window per axis"):
        GNA.sliding_tile((3, 3))
    with pytest.raises(UsageError, match="native_size"):
        GNA.inward((480,))
    with pytest.raises(UnsupportedError, match="queries' layout"):
        make(None, None, None, GNA(3), layout=Layout((1, 8, 8)), kv_layout=Layout((1, 9, 9)))


# Sliding tiles.


def sta(canvas, tile, window):
    """FastVideo's rule, tile by tile: centre clamped to window // 2 from either end, window // 2 on both sides."""
    masks = []
    for length, size, k in zip(canvas, tile, window, strict=True):
        n, half = length // size, k // 2
        u = torch.arange(length) // size
        centre = u.clamp(max=n - 1 - half).clamp(min=half) if k < n else u
        masks.append((centre[:, None] - u[None, :]).abs() <= (half if k < n else n))
    t, h, w = (m.byte() for m in masks)
    return torch.kron(torch.kron(t, h), w).bool()


@pytest.mark.parametrize(
    ("canvas", "tile", "window"),
    [
        ((6, 8, 12), (2, 4, 4), (3, 1, 3)),
        ((6, 8, 12), (2, 4, 4), (1, 1, 1)),
        ((10, 12, 8), (2, 3, 2), (3, 3, 1)),
        ((10, 12, 8), (2, 3, 2), (2, 4, 2)),
        ((4, 9, 10), (1, 3, 2), (2, 3, 5)),
    ],
)
def test_sliding_tiles_are_the_released_rule(canvas, tile, window):
    layout = Layout(canvas, text=5)
    mask = plan(GNA.sliding_tile(window, tile), layout).token_mask()[0, 0]
    n = math.prod(canvas)
    assert torch.equal(mask[:n, :n], sta(canvas, tile, window))
    assert mask[n:].all()
    assert mask[:, n:].all()
    t, h, w = torch.unravel_index(torch.arange(n), canvas)
    owner = (t // tile[0] * (canvas[1] // tile[1]) + h // tile[1]) * (canvas[2] // tile[2]) + w // tile[2]
    for block in owner.unique():
        assert (mask[:n][owner == block] == mask[:n][owner == block][:1]).all()
    odd = [min(k // 2 * 2 + 1, c // s) for k, c, s in zip(window, canvas, tile, strict=True)]
    assert (mask[:n, :n].sum(-1) == math.prod(odd) * math.prod(tile)).all()
    if window == (1, 1, 1):
        assert torch.equal(mask[:n, :n], owner[:, None] == owner[None, :])


@pytest.mark.parametrize(("window", "tiles"), [(3, 27), (5, 125), ((5, 6, 10), 300), ((3, 6, 10), 180)])
def test_sliding_tile_counts_at_the_released_canvas(window, tiles):
    made = plan(GNA.sliding_tile(window), Layout(HUNYUAN))
    assert made.density == pytest.approx(tiles / 300)
    assert made.partial is None
    assert GNA.sliding_tile().window == (18, 24, 24)
    assert GNA.sliding_tile().stride == (6, 8, 8)


def test_sliding_tiles_are_strided_windows():
    layout = Layout((12, 16, 24))
    tiles, windows = GNA.sliding_tile(3, (4, 4, 8)), GNA((12, 12, 24), (4, 4, 8))
    assert torch.equal(plan(tiles, layout).token_mask(), plan(windows, layout).token_mask())


def test_dead_text_beside_sliding_tiles():
    layout = Layout((2, 8, 8), text=6)
    q, k, v = qkv(layout)
    out = attend(q, k, v, GNA.sliding_tile(1, (2, 4, 4)), layout=layout, kv_valid=torch.tensor([131]), backend="gather")
    mask = torch.ones(134, 134, dtype=torch.bool)
    mask[:128, :128] = sta((2, 8, 8), (2, 4, 4), (1, 1, 1))
    mask[:, 131:] = False
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, mask), atol=1e-5, rtol=1e-5)


# FreeSwim.


def inward(length, d):
    """FreeSwim's rule: what the window lacks at one border is added at the other."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for y in range(length):
        under, over = max(d - y, 0), max(d + y - length + 1, 0)
        mask[y, max(y - d - over, 0) : y + d + under + 1] = True
    return mask


@pytest.mark.parametrize(
    ("native", "grid"), [((64, 64), (3, 7, 9)), ((80, 48), (2, 11, 6)), ((128, 256), (2, 7, 10)), ((96, 32), (1, 9, 4))]
)
def test_the_inward_window_is_the_released_rule(native, grid):
    d_h, d_w = native[0] // 16 // 2, native[1] // 16 // 2
    mask = plan(GNA.inward(native), Layout(grid)).token_mask()[0, 0]
    frames = torch.ones(grid[0], grid[0], dtype=torch.uint8)
    expected = torch.kron(torch.kron(frames, inward(grid[1], d_h).byte()), inward(grid[2], d_w).byte()).bool()
    assert torch.equal(mask, expected)
    assert (mask.sum(-1) == grid[0] * min(2 * d_h + 1, grid[1]) * min(2 * d_w + 1, grid[2])).all()


def test_the_inward_window_at_published_sizes():
    assert GNA.inward((480, 832)).window == (-1, 31, 53)
    assert GNA.inward((720, 1280)).window == (-1, 45, 81)
    assert GNA.inward((480, 832)).density(Layout((21, 68, 120))) == pytest.approx(1643 / 8160)
    mask = plan(GNA.inward((64, 32)), Layout((1, 7, 2))).token_mask()[0, 0]
    first = {y: [k // 2 for k in mask[2 * y].nonzero().flatten().tolist()] for y in range(7)}
    assert [(first[y][0], first[y][-1]) for y in range(7)] == [(0, 4)] * 3 + [(1, 5)] + [(2, 6)] * 3


def test_the_inward_scale():
    assert GNA.inward((480, 832), head_dim=1).scale ** 2 == pytest.approx(1.0942744, abs=1e-6)
    assert GNA.inward((480, 832)).scale == pytest.approx(0.09246, abs=1e-5)
    layout = Layout((2, 9, 8))
    q, k, v = qkv(layout, dim=32)
    method = GNA.inward((64, 96), head_dim=32)
    out = attend(q, k, v, method, layout=layout, backend="gather")
    mask = plan(method, layout).token_mask()
    expected = scaled_dot_product_attention(q, k, v, mask, scale=math.sqrt(math.log(3120, 1560) / 32))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
