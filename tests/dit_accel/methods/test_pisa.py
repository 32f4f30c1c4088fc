"""PISA against its formula, evaluated block by block in float64, and the limits in which it must be dense attention."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.eval.atlas import synthetic_tensors
from dit_accel.functional import attend
from dit_accel.functional import plan as make
from dit_accel.layout import Layout, Segment
from dit_accel.methods import Method, Pisa
from dit_accel.methods.pisa_blocks import compact_tile, regions, tile_order
from dit_accel.processors import PisaProcessor
from dit_accel.schedule import Schedule

B, H, HK, D, DV = 2, 4, 2, 8, 8
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# Image with ragged tiles, video with ragged tiles, plain sequence with a ragged tail.
LAYOUTS = {
    "image": (Layout((1, 7, 9)), (4, 4)),
    "image, text first": (Layout((1, 7, 9), text=21, text_first=True), (4, 4)),
    "video, text last": (Layout((5, 3, 6), text=19), (2, 2, 4)),
    "video by frames": (Layout((3, 4, 5), text=5), (4, 4)),
    "sequence": (Layout((1, 1, 75)), None),
    "sequence, text first": (Layout((1, 1, 75), text=10, text_first=True), None),
    "segments around": (
        Layout(segments=(Segment("text", 9), Segment("main", (2, 5, 6)), Segment("reference", 20))),
        (1, 4, 4),
    ),
}


def tensors(layout, seed=0, scale=1.5):
    g = torch.Generator().manual_seed(seed)
    n = layout.tokens
    q, k = (scale * torch.randn(B, heads, n, D, generator=g) for heads in (H, HK))
    return q, k, torch.randn(B, HK, n, DV, generator=g)


def partition(layout, size, tile):
    """Token lists of the blocks beside the main segment and of the main ones, row by row of the definition."""
    start, (frames, height, width) = layout.main.start, layout.grid
    main = []
    if tile is None:
        tokens = list(range(layout.main.start, layout.main.stop))
        main = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    else:
        a, b, c = (1,) * (3 - len(tile)) + tile
        for t, y, x in itertools.product(range(0, frames, a), range(0, height, b), range(0, width, c)):
            cells = itertools.product(
                range(t, min(t + a, frames)), range(y, min(y + b, height)), range(x, min(x + c, width))
            )
            main.append([start + (i * height + j) * width + l for i, j, l in cells])
    beside = []
    for tokens in (list(range(start)), list(range(layout.main.stop, layout.tokens))):
        beside += [tokens[i : i + size] for i in range(0, len(tokens), size)]
    return beside, main


def brute(q, k, v, layout, method, valid=None):
    """The formula of the paper, section by section, and the exact main blocks of each (batch, head, main block)."""
    q, k, v = (x.double() for x in (q, k, v))
    s = D**-0.5
    beside, main = partition(layout, method.block_size, method.tile)
    count = max(1, int(method.density * len(main)))
    out, chosen = torch.zeros(*q.shape[:3], DV).double(), {}
    for b, h in itertools.product(range(B), range(H)):
        hk = h * HK // H
        alive = [i for i in range(layout.tokens) if valid is None or i < valid[b]]

        def live(tokens, last=alive[-1]):
            return [i for i in tokens if i <= last]

        kbar = [k[b, hk, live(j)].mean(0) if live(j) else torch.zeros(D).double() for j in main]
        matrices = [torch.zeros(D, DV).double()] * len(beside + main)
        for number, tokens in enumerate(map(live, beside + main)):
            if tokens:
                matrices[number] = (k[b, hk, tokens] - k[b, hk, tokens].mean(0)).T @ v[b, hk, tokens]
        own, total = matrices[len(beside) :], sum(matrices)
        for block in beside + main:
            if block in beside:
                exact, pooled = alive, []
            else:
                score = torch.stack([s * (q[b, h, block].mean(0) @ mean) for mean in kbar])
                if method.norm_bias:
                    score = score + torch.stack([(x.norm() + 1e-5).log() for x in own])
                score[[not live(j) for j in main]] = -math.inf
                top = score.argsort(descending=True)[:count].tolist()
                chosen[b, h, main.index(block)] = set(top)
                exact = live(itertools.chain(*beside, *(main[j] for j in top)))
                pooled = [j for j in range(len(main)) if j not in top and live(main[j])]
            query = q[b, h, block]
            e = (s * (query @ k[b, hk, exact].T)).exp()
            num, den = e @ v[b, hk, exact], e.sum(1, keepdim=True)
            g = torch.zeros_like(den)
            for j in pooled:
                a = (s * (query @ kbar[j])).exp()[:, None]
                num = num + a * v[b, hk, live(main[j])].sum(0)
                g = g + len(live(main[j])) * a
                if method.order == "first":
                    num = num + a * s * (query @ own[j])
            if method.order == "hybrid":
                num = num + s * (g / len(alive)) * (query @ total)
            out[b, h, block] = num / (den + g)
    return out, chosen


def backends(order):
    return ["reference"] if order == "first" else ["reference", "auto"]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "norm bias"])
@pytest.mark.parametrize("order", ["zeroth", "hybrid", "first"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_the_formula(name, order, bias):
    layout, tile = LAYOUTS[name]
    q, k, v = tensors(layout)
    method = Pisa(density=0.3, block_size=16, order=order, norm_bias=bias, tile=tile)
    expected, chosen = brute(q, k, v, layout, method)
    for backend in backends(order):
        torch.testing.assert_close(attend(q, k, v, method, layout=layout, backend=backend).double(), expected, **CLOSE)
    made = make(q, k, v, method, layout=layout)
    beside, main = partition(layout, 16, tile)
    where, rows = made.block_mask, method.regions(layout).main
    assert made.block_mask.shape[-2:] == (len(beside) + len(main),) * 2
    for (b, h, row), blocks in chosen.items():
        listed = where[b, h, rows[row], rows.start : rows.stop].nonzero().flatten().tolist()
        assert listed == sorted(blocks)
    every = torch.ones_like(where, dtype=torch.bool)
    every[:, :, rows.start : rows.stop, rows.start : rows.stop] = False
    assert where[every].all()


@pytest.mark.parametrize("order", ["zeroth", "hybrid", "first"])
@pytest.mark.parametrize("valid", [(90, 80), (109, 13)], ids=["padded text", "dead blocks"])
def test_dead_keys_are_in_no_statistic(order, valid):
    layout, tile = LAYOUTS["video, text last"]
    q, k, v = tensors(layout, seed=1)
    kv_valid = torch.tensor(valid, dtype=torch.int32)
    for b, n in enumerate(valid):
        k[b, :, n:] = 30
        v[b, :, n:] = 1e3
    method = Pisa(density=0.3, block_size=16, order=order, norm_bias=True, tile=tile)
    expected, _ = brute(q, k, v, layout, method, valid)
    for backend in backends(order):
        out = attend(q, k, v, method, layout=layout, kv_valid=kv_valid, backend=backend)
        torch.testing.assert_close(out.double(), expected, **CLOSE)
    counts = make(q, k, v, method, layout=layout, kv_valid=kv_valid).reps[0].count
    assert counts.sum(-1).flatten().tolist() == [min(n, 90) for n in valid]


def test_keys_of_another_layout():
    """Text keys that no query belongs to, so that queries and keys are in orders of their own."""
    layout, kv_layout = Layout((1, 7, 9)), Layout((1, 7, 9), text=21, text_first=True)
    q, k, v = tensors(kv_layout)
    whole = attend(q, k, v, Pisa(0.3, 16, tile=(4, 4)), layout=kv_layout, backend="reference")
    for backend in ("reference", "auto"):
        out = attend(
            q[:, :, 21:], k, v, Pisa(0.3, 16, tile=(4, 4)), layout=layout, kv_layout=kv_layout, backend=backend
        )
        torch.testing.assert_close(out, whole[:, :, 21:], **CLOSE)
    made = make(q[:, :, 21:], k, v, Pisa(0.3, 16, tile=(4, 4)), layout=layout, kv_layout=kv_layout)
    assert (made.order is None, made.kv_order is None) == (False, False)


def dense(q, k, v):
    return scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)


CASES = [(order, name) for order in ("zeroth", "hybrid", "first") for name in ("image, text first", "sequence")]


@pytest.mark.parametrize(("order", "name"), CASES)
def test_density_one_is_dense(order, name):
    layout, tile = LAYOUTS[name]
    q, k, v = tensors(layout)
    method = Pisa(density=1.0, block_size=16, order=order, norm_bias=True, tile=tile)
    assert make(q, k, v, method, layout=layout).reps == ()
    assert make(q, k, v, method, layout=layout).density == 1
    torch.testing.assert_close(attend(q, k, v, method, layout=layout).double(), dense(q, k, v), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("order", "name"), CASES)
def test_keys_constant_in_each_block_are_dense_at_any_density(order, name):
    layout, tile = LAYOUTS[name]
    q, k, v = tensors(layout)
    for block in itertools.chain(*partition(layout, 16, tile)):
        k[:, :, block] = k[:, :, block[:1]]
    for density in (0.01, 0.5):
        method = Pisa(density, 16, order=order, norm_bias=True, tile=tile)
        assert not make(q, k, v, method, layout=layout).block_mask.all()
        out = attend(q, k, v, method, layout=layout, backend="reference")
        torch.testing.assert_close(out.double(), dense(q, k, v), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(("order", "name"), CASES)
def test_weights_sum_to_one(order, name):
    layout, tile = LAYOUTS[name]
    q, k, v = tensors(layout)
    method = Pisa(0.2, 16, order=order, tile=tile)
    out = attend(q, k, v, method, layout=layout, backend="reference")
    shift = torch.linspace(-2, 3, DV)
    moved = attend(q, k, v + shift, method, layout=layout, backend="reference")
    torch.testing.assert_close(moved, out + shift, atol=2e-5, rtol=1e-5)
    assert not attend(q, k, torch.zeros_like(v), method, layout=layout, backend="reference").any()


def test_the_bias_changes_what_is_selected():
    layout, tile = LAYOUTS["image"]
    q, k, v = tensors(layout)
    # The spread of one block's keys, which their mean does not show.
    block = partition(layout, 16, tile)[1][0]
    k[:, :, block[0]] += 20
    k[:, :, block[1]] -= 20
    shares = []
    for bias in (False, True):
        made = make(q, k, v, Pisa(0.3, 16, norm_bias=bias, tile=tile), layout=layout)
        shares.append(made.block_mask[..., 0].double().mean())
    assert shares[1] > shares[0]


def test_first_order_of_every_block_is_for_the_reference_tier():
    layout, _ = LAYOUTS["sequence"]
    q, k, v = tensors(layout)
    with pytest.raises(UnsupportedError, match="backend='reference'"):
        attend(q, k, v, Pisa(0.2, 16, order="first"), layout=layout, backend="gather")
    with pytest.raises(UnsupportedError, match="LSE"):
        attend(q, k, v, Pisa(0.2, 16), layout=layout, return_lse=True)
    _, lse = attend(q, k, v, Pisa(0.2, 16, order="zeroth"), layout=layout, return_lse=True)
    assert lse.shape == q.shape[:3]


def test_representatives_are_one_per_block_and_counted_in_the_density():
    layout = Layout((1, 7, 9), text=21)
    q, k, v = tensors(layout)
    method = Pisa(0.3, 16, tile=(4, 4))
    made = make(q.bfloat16(), k.bfloat16(), v.bfloat16(), method, layout=layout)
    (group,) = made.reps
    assert (group.key.dtype, group.value.dtype, made.first_order.dtype) == (torch.bfloat16,) * 2 + (torch.float32,)
    blocks = len(partition(layout, 16, (4, 4))[1])
    assert group.key.shape == (B, HK, blocks, D)
    exact = made.token_mask().sum((-2, -1)).double().mean()
    seen = 0.0
    for b, h in itertools.product(range(B), range(H)):
        for row in method.regions(layout).main:
            seen += int(group.seen.count[b, h, row]) * int(made.q_blocks.sizes[row])
    assert made.density == pytest.approx((float(exact) + seen / (B * H)) / layout.tokens**2)
    assert torch.equal(made.token_mask() | made.rep_mask(), torch.ones_like(made.token_mask()))
    assert not (made.token_mask() & made.rep_mask()).any()


@pytest.mark.parametrize("layout", [Layout((1, 32, 40), text=64), Layout((9, 8, 12)), Layout((1, 1, 1000))], ids=str)
@pytest.mark.parametrize("wanted", [0.15, 0.5, 1.0])
def test_with_density(layout, wanted):
    method, reached = Pisa(block_size=16).with_density(wanted, layout)
    assert reached == pytest.approx(wanted, rel=0.2)
    q, k, v = (torch.randn(1, 1, layout.tokens, 4, generator=torch.Generator().manual_seed(2)) for _ in range(3))
    assert make(q, k, v, method, layout=layout).density == pytest.approx(reached, rel=0.05)


@pytest.mark.parametrize("layout", [Layout((33, 8, 10)), Layout((13, 20, 26)), Layout((1, 48, 40), text=70)], ids=str)
@pytest.mark.parametrize("wanted", [0.1, 0.2, 0.5])
def test_the_density_told_is_that_of_smooth_tensors(layout, wanted):
    method, told = Pisa().with_density(wanted, layout)
    assert make(*synthetic_tensors(layout), method, layout=layout).density == pytest.approx(told, rel=0.1)


def test_the_published_flux_blocks():
    """FLUX at 1024 x 1024: 512 text tokens in 8 blocks, 64 x 64 image tokens in 64 patches of 8 x 8."""
    layout = Layout((1, 64, 64), text=512, text_first=True)
    found = Pisa.preset("flux").regions(layout)
    assert found.blocks.count == 72
    assert found.blocks.size == 64
    assert found.main == range(8, 72)
    patch = torch.arange(64 * 64).view(64, 64)[:8, 8:16].flatten() + 512
    assert torch.equal(found.order[9 * 64 : 10 * 64], patch)


@pytest.mark.parametrize(
    ("grid", "size", "tile"),
    [((1, 64, 64), 64, (1, 8, 8)), ((21, 30, 52), 64, (4, 4, 4)), ((21, 45, 80), 64, (4, 4, 4)),
     ((1, 1, 999), 64, (1, 1, 64)), ((1, 3, 5), 64, None), ((5, 6, 7), 48, None)],
)  # fmt: skip
def test_the_tile_picked_by_itself(grid, size, tile):
    assert compact_tile(grid, size) == tile


def test_a_sequence_or_a_small_grid_is_not_reordered():
    for layout in (Layout((1, 1, 200), text=7), Layout((1, 3, 5))):
        assert Pisa().regions(layout).order is None
    assert Pisa(tile=None).regions(Layout((4, 16, 16), text=7)).order is None


def test_tiles_partition_the_grid():
    order, sizes = tile_order((5, 3, 6), (2, 2, 4))
    assert torch.equal(order.sort().values, torch.arange(90))
    assert sizes.tolist() == [len(block) for block in partition(Layout((5, 3, 6)), 16, (2, 2, 4))[1]]
    found = regions(Layout((5, 3, 6), text=19), 16, (2, 2, 4))
    assert found.blocks.n == 109
    assert found.beside == (0, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"density": 0}, "density"), ({"block_size": 0}, "block_size"), ({"order": "second"}, "zeroth, hybrid, first"),
     ({"tile": (8, 8), "block_size": 32}, "tile"), ({"tile": (64,)}, "tile"), ({"tile": "cube"}, "tile")],
)  # fmt: skip
def test_bad_values(settings, message):
    with pytest.raises(UsageError, match=message):
        Pisa(**settings)


def test_presets_and_round_trip():
    processor = PisaProcessor.preset("flux", block_size=16, tile=(4, 4))
    assert processor.method == Pisa(density=0.15, block_size=16, norm_bias=True, tile=(4, 4))
    assert processor.schedule == Schedule(first=0, layers=4)
    assert PisaProcessor.preset("flux", schedule=Schedule(first=2)).schedule == Schedule(first=2)
    assert PisaProcessor.preset("wan").schedule == PisaProcessor().schedule == Schedule()
    with pytest.raises(UsageError, match="flux, wan, wan-sol-engine, hunyuan-video"):
        PisaProcessor.preset("flix")
    method = Pisa(tile=[1, 8, 8])
    assert Method.from_dict(method.to_dict()) == method
    assert hash(method) == hash(Pisa(tile=(1, 8, 8)))
