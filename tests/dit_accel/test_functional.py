"""The functional contract."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dit_accel
from dit_accel import (
    GNA,
    AllBlocks,
    Clear,
    Layout,
    Pisa,
    Pyramid,
    Radial,
    RandomBlocks,
    Rectified,
    State,
    UnsupportedError,
    UsageError,
    attend,
    functional,
)

LAYOUT = Layout((5, 6, 7), text=9)


def tensors(layout=LAYOUT, batch=2, heads=4, kv_heads=4, dim=24, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, h, layout.tokens, dim, generator=generator, dtype=dtype) for h in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_all_blocks_is_dense(backend, kv_heads):
    q, k, v = tensors(kv_heads=kv_heads)
    out = attend(q, k, v, AllBlocks(block_size=32), layout=LAYOUT, backend=backend)
    torch.testing.assert_close(out, sdpa(q, k, v, enable_gqa=kv_heads != 4))


def test_a_method_is_its_token_mask():
    q, k, v = tensors()
    for method in (Radial(block_size=32), RandomBlocks(seed=3, block_size=32)):
        mask = dit_accel.plan(None, None, None, method, layout=LAYOUT).token_mask()
        out, lse = attend(q, k, v, method, layout=LAYOUT, backend="gather", return_lse=True)
        torch.testing.assert_close(out, sdpa(q, k, v, attn_mask=mask))
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_flex_tier_runs_and_agrees():
    q, k, v = tensors(dtype=torch.float32)
    method = RandomBlocks(seed=1, block_size=32)
    expected = attend(*(x.double() for x in (q, k, v)), method, layout=LAYOUT, backend="reference")
    out = attend(q, k, v, method, layout=LAYOUT, backend="flex")
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


def test_kv_valid_hides_each_samples_own_tail():
    q, k, v = tensors()
    valid = torch.tensor([LAYOUT.tokens - 4, LAYOUT.tokens], dtype=torch.int32)
    poisoned = k.clone()
    poisoned[0, :, -4:] = 1e6
    for method in (None, AllBlocks(block_size=32)):
        clean, dirty = (attend(q, x, v, method, layout=LAYOUT, kv_valid=valid) for x in (k, poisoned))
        torch.testing.assert_close(clean, dirty)
        torch.testing.assert_close(clean[0], sdpa(q[:1], k[:1, :, :-4], v[:1, :, :-4])[0])


def test_dense_returns_an_lse_too():
    q, k, v = tensors()
    out, lse = attend(q, k, v, layout=LAYOUT, return_lse=True)
    torch.testing.assert_close(out, sdpa(q, k, v))
    torch.testing.assert_close(lse, (q @ k.mT * q.shape[-1] ** -0.5).logsumexp(-1))


def test_scale_is_the_callers_then_the_methods_then_the_default():
    q, k, v = tensors()
    out = attend(q, k, v, AllBlocks(), layout=LAYOUT, scale=0.7)
    torch.testing.assert_close(out, sdpa(q, k, v, scale=0.7))


def test_keys_may_have_their_own_layout():
    q, _, _ = tensors()
    keys = Layout((8, 6, 7), text=3)
    _, k, v = tensors(keys)
    out = attend(q, k, v, RandomBlocks(block_size=32), layout=LAYOUT, kv_layout=keys)
    mask = dit_accel.plan(None, None, None, RandomBlocks(block_size=32), layout=LAYOUT, kv_layout=keys).token_mask()
    torch.testing.assert_close(out, sdpa(q, k, v, attn_mask=mask))


@pytest.mark.parametrize("method", [Pisa(), Rectified(), Pyramid(), Clear(radius=2, pool=2)])
def test_a_plan_that_holds_means_of_values_asks_for_them(method):
    q = torch.zeros(1, 1, 64, 8)
    with pytest.raises(UsageError, match=f"^{type(method).__name__} looks at q, k, v; pass them$"):
        dit_accel.plan(q, q, None, method, layout=Layout((1, 8, 8)))


def test_static_plans_are_made_once_per_layout():
    state, made = State(), []

    class Counting(RandomBlocks):
        name = ""

        def plan(self, q, k, v, call):
            made.append(call.layout)
            return super().plan(q, k, v, call)

    q, k, v = tensors()
    for layer in range(3):
        attend(q, k, v, Counting(block_size=32), layout=LAYOUT, state=state, layer=layer)
    assert made == [LAYOUT]


@pytest.mark.parametrize("dim", [16, 40, 96, 256])
def test_head_dims_and_half_precision(dim):
    q, k, v = tensors(dim=dim)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        half = [x.to(dtype) for x in (q, k, v)]
        out = attend(*half, RandomBlocks(block_size=32), layout=LAYOUT, backend="gather")
        exact = attend(*(x.double() for x in half), RandomBlocks(block_size=32), layout=LAYOUT, backend="reference")
        assert out.dtype == dtype
        assert (out.double() - exact).abs().max() < tolerance


def test_errors_name_what_is_wrong():
    q, k, v = tensors()
    with pytest.raises(UsageError, match=r"219 tokens but its layout .* 105"):
        attend(q, k, v, AllBlocks(), layout=Layout((3, 5, 7)))
    with pytest.raises(UsageError, match="choose one of auto, reference, gather, flex, triton"):
        attend(q, k, v, AllBlocks(), layout=LAYOUT, backend="cuda")
    with pytest.raises(UnsupportedError, match=r"float16 and bfloat16; use backend='auto'|float64"):
        attend(q, k, v, AllBlocks(), layout=LAYOUT, backend="flex")
    with pytest.raises(UsageError, match="one length per sample"):
        attend(q, k, v, AllBlocks(), layout=LAYOUT, kv_valid=torch.tensor([3]))
    with pytest.raises(UsageError, match=r"quant 'int8' is unknown\. Give a dit_accel\.Quant"):
        attend(q, k, v, AllBlocks(), layout=LAYOUT, quant="int8")
    with pytest.raises(UsageError, match=r"\(B, H, N, D\)"):
        attend(q[0], k, v, AllBlocks(), layout=LAYOUT)


def test_the_tier_of_a_plan_that_is_kept_is_chosen_once_for_equal_calls(monkeypatch):
    asked, stock = [], functional.choose
    monkeypatch.setattr(
        functional, "choose", lambda q, *a, **k: asked.append((q.dtype, k["backend"])) or stock(q, *a, **k)
    )
    q, k, v = tensors(dtype=torch.float32)
    method, state = Radial(block_size=32), State()
    for _ in range(3):
        attend(q, k, v, method, layout=LAYOUT, state=state, backend="gather")
    assert asked == [(torch.float32, "gather")]
    attend(*(x.double() for x in (q, k, v)), method, layout=LAYOUT, state=state, backend="gather")
    attend(q, k, v, method, layout=LAYOUT, state=state, backend="reference")
    assert asked[1:] == [(torch.float64, "gather"), (torch.float32, "reference")]


GRADIENT_METHODS = {
    "whole blocks": RandomBlocks(block_size=32),
    "partial blocks": GNA(window=(3, 3, 3)),
    "representatives": Pyramid(block_q=32, block_k=32),
    "deviations": Rectified(block_size=16, density=0.3),
    "a matrix for each": Pisa(block_size=16, density=0.3, order="first"),
}


@pytest.mark.parametrize("wanted", [(0, 1, 2), (1,), (2,)])
@pytest.mark.parametrize("name", GRADIENT_METHODS)
def test_auto_takes_a_tier_with_a_backward(name, wanted):
    found = []
    for backend in ("auto", "reference"):
        inputs = [x.requires_grad_(i in wanted) for i, x in enumerate(tensors(dtype=torch.float32))]
        valid = torch.tensor([LAYOUT.tokens, LAYOUT.tokens - 7], dtype=torch.int32)
        out = attend(*inputs, GRADIENT_METHODS[name], layout=LAYOUT, backend=backend, kv_valid=valid)
        out.square().sum().backward()
        found.append([inputs[i].grad for i in wanted])
    for mine, expected in zip(*found, strict=True):
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["flex", "flash", "triton"])
def test_a_tier_without_a_backward_says_so(backend):
    q, k, v = tensors(dtype=torch.float32)
    method = RandomBlocks(block_size=32)
    with pytest.raises(UnsupportedError, match=rf"backend '{backend}' has no backward .*backend='auto' or 'gather'"):
        attend(q, k.requires_grad_(), v, method, layout=LAYOUT, backend=backend)
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            assert not attend(q, k, v, method, layout=LAYOUT, backend="flash").requires_grad
