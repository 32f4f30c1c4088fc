"""Clear: the disc against a brute force, the published counts, and what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.functional import attend
from dit_accel.functional import plan as make
from dit_accel.layout import Layout
from dit_accel.lowering import lower
from dit_accel.methods import Clear, Method, ModelFacts, find

pytestmark = pytest.mark.filterwarnings("ignore:Clear is experimental")


def plan(method, layout):
    return make(None, None, None, method, layout=layout)


def brute(layout, radius):
    _, height, width = layout.grid
    y, x = (g.flatten() for g in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    mask = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    near = (y[:, None] - y[None, :]) ** 2 + (x[:, None] - x[None, :]) ** 2 < radius**2
    mask[layout.main, layout.main] = near
    return mask


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 24), st.integers(1, 24), st.integers(1, 40), st.integers(0, 9), st.booleans(), st.integers(0, 3)
)  # fmt: skip
def test_the_mask_is_the_brute_force(height, width, radius, text, text_first, prefix):
    layout = Layout((1, height, width), text, text_first, prefix)
    made = plan(Clear(radius), layout)
    expected = brute(layout, radius)
    assert torch.equal(made.token_mask()[0, 0], expected)
    assert made.density == pytest.approx(expected.double().mean().item())
    counted = replace(made, _memo={})
    assert (made.density, made.density_video) == pytest.approx((counted.density, counted.density_video))


@pytest.mark.parametrize(("radius", "keys"), [(1, 1), (8, 193), (16, 793), (32, 3205)])
def test_published_counts(radius, keys):
    """Keys of a token in the middle: pi r^2, with the strict border."""
    layout = Layout((1, 64, 64))
    made = plan(Clear(radius), layout)
    middle = 32 * 64 + 31
    order = torch.arange(layout.tokens) if made.order is None else made.order
    slot = int((order == middle).nonzero())
    block = slot // int(made.q_blocks.bounds[1])
    whole = made.full.mask(made.k_blocks.count)[0, 0, block].repeat_interleave(made.q_blocks.sizes)
    seen = whole.clone()
    if made.partial is not None:
        tested = made.partial.mask(made.k_blocks.count)[0, 0, block].repeat_interleave(made.q_blocks.sizes)
        seen |= tested & made.predicate.visible(torch.tensor(slot), torch.arange(layout.tokens))
    assert int(seen.sum()) == keys


def test_the_border_is_strict_and_one_is_the_token_itself():
    layout = Layout((1, 11, 20), text=3)
    mask = plan(Clear(5), layout).token_mask()[0, 0]
    at = 5 * 20 + 10
    assert mask[at, at + 4]
    assert not mask[at, at + 5]
    assert mask[at, at + 3 * 20 + 3]
    assert not mask[at, at + 3 * 20 + 4]
    alone = plan(Clear(1), layout).token_mask()[0, 0]
    assert torch.equal(alone[:220, :220], torch.eye(220, dtype=torch.bool))
    assert alone[:220, 220:].all()
    assert alone[220:].all()


def test_the_mask_is_symmetric():
    mask = plan(Clear(4), Layout((1, 9, 14), text=2)).token_mask()[0, 0]
    assert torch.equal(mask, mask.T)


def test_the_disc_skips_and_keeps_whole_blocks():
    made = plan(Clear(16), Layout((1, 64, 64), text=512))
    listed = made.block_mask.float().mean().item()
    assert int(made.full.count[..., :32].min()) > 4  # the text, and something of the image
    assert made.density < listed < 0.55
    assert (made.full.count[..., -4:] == made.k_blocks.count).all()


def test_attention_is_dense_attention_under_the_mask():
    layout = Layout((1, 13, 19), 7, True)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, layout.tokens, 16, generator=generator).unbind(0)
    out = attend(q, k, v, Clear(4), layout=layout, backend="gather")
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, brute(layout, 4)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6, 1.0])
def test_density_is_solved(density):
    layout = Layout((1, 40, 57), text=10)
    solved, reached = Clear().with_density(density, layout)
    assert reached == pytest.approx(density, rel=0.2)
    assert reached == pytest.approx(plan(solved, layout).density)


def test_refusals():
    with pytest.raises(UsageError, match="2 or more, or None; got 1"):
        Clear(8, pool=1)
    with pytest.raises(UsageError, match="must divide height and width; the grid is 16 x 18"):
        Clear(8, pool=4).check(Layout((1, 16, 18)))
    with pytest.raises(UnsupportedError, match="Radial or GNA"):
        plan(Clear(), Layout((2, 8, 8)))
    with pytest.raises(UsageError, match="allowed 1 and more"):
        Clear(0)
    with pytest.raises(UsageError, match=r"got 2\.5"):
        Clear(2.5)
    with pytest.raises(UnsupportedError, match="in the queries"):
        make(None, None, None, Clear(), layout=Layout((1, 8, 8)), kv_layout=Layout((1, 9, 9)))


def test_a_cell_is_refused_on_the_image_it_does_not_divide_and_on_no_other():
    flux = ModelFacts("Flux", {}, layers=1, image=True)
    Clear(8, pool=3).check_model(flux)
    Clear(8, pool=3).check(Layout((1, 12, 15)))


def test_it_says_that_it_is_experimental():
    with pytest.warns(UserWarning, match="experimental"):
        method = Clear(8)
    assert find("clear") is Clear
    assert Method.from_dict(method.to_dict()) == method
    assert Clear().radius == 16


def pooled_brute(q, k, v, layout, radius, side, kv_valid=None):
    """Loops over cells: their mean key and value beside the tokens, for image rows only; float64."""
    _, height, width = layout.grid
    b, n = q.shape[0], layout.tokens
    live = torch.arange(n) < torch.tensor([n] * b if kv_valid is None else kv_valid.tolist())[:, None]
    keys, values, seen = [k.double()], [v.double()], [live]
    for top in range(0, height, side):
        for left in range(0, width, side):
            y, x = torch.meshgrid(torch.arange(top, top + side), torch.arange(left, left + side), indexing="ij")
            cell = layout.main.start + (y * width + x).flatten()
            weight = live[:, cell].double() / live[:, cell].sum(1, keepdim=True).clamp_min(1)
            for held, tensor in ((keys, k), (values, v)):
                held.append((tensor[:, :, cell].double() * weight[:, None, :, None]).sum(2, keepdim=True))
            seen.append(live[:, cell].any(1, keepdim=True))
    cells = len(keys) - 1
    rows = torch.zeros(n, cells, dtype=torch.bool)
    rows[layout.main] = True  # text rows see no pooled key
    mask = torch.cat([brute(layout, radius), rows], 1) & torch.cat(seen, 1)[:, None, None]
    return scaled_dot_product_attention(q.double(), torch.cat(keys, 2), torch.cat(values, 2), attn_mask=mask)


POOLED = [
    (Layout((1, 16, 24), text=9), 4),
    (Layout((1, 24, 20), text=6), 4),
    (Layout((1, 24, 20), text=6, text_first=True, prefix=3), 4),
    (Layout((1, 24, 20)), 4),
    (Layout((1, 9, 15), text=70), 3),
    (Layout((1, 4, 6), text=3), 2),
    (Layout((1, 10, 34), text=200), 2),
]


@pytest.mark.parametrize(("layout", "side"), POOLED, ids=str)
@pytest.mark.parametrize("backend", ["reference", "auto", "gather"])
def test_pooled_keys_beside_the_disc(backend, layout, side):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, layout.tokens, 16, generator=generator) for _ in range(3))
    out = attend(q, k, v, Clear(4, pool=side), layout=layout, backend=backend)
    expected = pooled_brute(q, k, v, layout, 4, side)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_pooled_keys_of_padded_tokens(backend):
    layout = Layout((1, 10, 14), text=11)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, layout.tokens, 16, generator=generator) for _ in range(3))
    valid = torch.tensor([layout.tokens - 5, layout.tokens], dtype=torch.int32)
    out = attend(q, k, v, Clear(5, pool=2), layout=layout, kv_valid=valid, backend=backend)
    torch.testing.assert_close(out.double(), pooled_brute(q, k, v, layout, 5, 2, valid), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (64, 32), (128, 128), (24, 40)])
def test_pooled_plans_survive_any_tile(tile):
    layout = Layout((1, 24, 20), text=6)
    q, k, v = (torch.randn(1, 2, layout.tokens, 8) for _ in range(3))
    made = make(q, k, v, Clear(5, pool=4), layout=layout)
    tiles = lower(made, tile)
    slot = torch.arange(tiles.n_q) if tiles.order is None else tiles.order
    mask = tiles.token_mask()[0, 0][slot >= 0]
    mine = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool)
    columns = torch.arange(tiles.n_k) if tiles.kv_order is None else tiles.kv_order
    mine[slot[slot >= 0][:, None], columns[None]] = mask
    assert torch.equal(mine, brute(layout, 5))


def test_density_with_pooled_keys():
    layout = Layout((1, 16, 24), text=9)
    q, k, v = (torch.randn(1, 1, layout.tokens, 8) for _ in range(3))
    bare, pooled = plan(Clear(4), layout), make(q, k, v, Clear(4, pool=4), layout=layout)
    assert pooled.density == pytest.approx(bare.density + 384 * 24 / layout.tokens**2)
    assert not pooled.rep_mask().any()
    assert torch.equal(pooled.token_mask(), bare.token_mask())
    method, reached = Clear(pool=4).with_density(0.3, layout)
    assert make(q, k, v, method, layout=layout).density == pytest.approx(reached)
