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
from dit_accel.methods import Clear, Method, find

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


def test_it_says_that_it_is_experimental():
    with pytest.warns(UserWarning, match="experimental"):
        method = Clear(8)
    assert find("clear") is Clear
    assert Method.from_dict(method.to_dict()) == method
    assert Clear().radius == 16


@pytest.mark.parametrize("text_first", [False, True], ids=["text last", "text first"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_pooled_keys_beside_the_disc(backend, text_first):
    layout, side = Layout((1, 16, 24), text=9, text_first=text_first), 4
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, layout.tokens, 16, generator=generator) for _ in range(3))
    out = attend(q, k, v, Clear(4, pool=side), layout=layout, backend=backend)

    def cells(x):
        image = x[:, :, layout.main].view(2, 3, 16 // side, side, 24 // side, side, 16)
        return image.mean((3, 5)).flatten(2, 3)

    keys, values = torch.cat([k, cells(k)], 2), torch.cat([v, cells(v)], 2)
    pooled = torch.zeros(layout.tokens, keys.shape[2] - layout.tokens, dtype=torch.bool)
    pooled[layout.main] = True  # text rows see no pooled key
    mask = torch.cat([brute(layout, 4), pooled], 1)
    expected = scaled_dot_product_attention(q.double(), keys.double(), values.double(), attn_mask=mask)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_density_with_pooled_keys():
    layout = Layout((1, 16, 24), text=9)
    q, k, v = (torch.randn(1, 1, layout.tokens, 8) for _ in range(3))
    bare, pooled = plan(Clear(4), layout), make(q, k, v, Clear(4, pool=4), layout=layout)
    assert pooled.density == pytest.approx(bare.density + 384 * 24 / layout.tokens**2)
    assert not pooled.rep_mask().any()
    assert torch.equal(pooled.token_mask(), bare.token_mask())
    method, reached = Clear(pool=4).with_density(0.3, layout)
    assert make(q, k, v, method, layout=layout).density == pytest.approx(reached)


def test_pooled_keys_need_whole_blocks_of_image_tokens():
    layout = Layout((1, 4, 6), text=3)
    q = torch.randn(1, 1, layout.tokens, 8)
    size = plan(Clear(2), layout).q_blocks.size
    assert 24 % size
    with pytest.raises(UnsupportedError, match=f"whole blocks of {size}"):
        make(q, q, q, Clear(2, pool=2), layout=layout)
