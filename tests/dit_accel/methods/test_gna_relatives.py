"""What other methods are as GNA: sliding tiles and FreeSwim's inward window, against their released rules."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.errors import UsageError
from dit_accel.functional import attend
from dit_accel.functional import plan as make
from dit_accel.layout import Layout
from dit_accel.methods import GNA

HUNYUAN = (30, 48, 80)


def plan(method, layout):
    return make(None, None, None, method, layout=layout)


def qkv(layout, heads=2, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 1, heads, layout.tokens, dim, generator=generator).unbind(0)


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


@pytest.mark.parametrize("dim", [16, 32])
def test_the_inward_scale_follows_the_head_size(dim):
    assert GNA.inward((480, 832)).scale_factor ** 2 == pytest.approx(1.0942744, abs=1e-6)
    assert GNA.inward((480, 832)).scale_factor * 128**-0.5 == pytest.approx(0.09246, abs=1e-5)
    layout = Layout((2, 9, 8))
    q, k, v = qkv(layout, dim=dim)
    method = GNA.inward((64, 96))
    out = attend(q, k, v, method, layout=layout, backend="gather")
    mask = plan(method, layout).token_mask()
    expected = scaled_dot_product_attention(q, k, v, mask, scale=math.sqrt(math.log(3120, 1560) / dim))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_refusals():
    with pytest.raises(UsageError, match="one window per axis"):
        GNA.sliding_tile((3, 3))
    with pytest.raises(UsageError, match="native_size"):
        GNA.inward((480,))
    with pytest.raises(UsageError, match="each at least 32"):
        GNA.inward((480, 16))
