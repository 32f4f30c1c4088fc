"""The Triton tier on a real GPU, against float64, at ragged sizes and all head dims: ``pytest -m gpu``."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel import GNA, Layout, Radial, RandomBlocks, attend, plan

pytestmark = pytest.mark.gpu

LAYOUTS = [Layout((5, 13, 17), text=77), Layout((9, 11, 24), text=31, text_first=True), Layout((33, 8, 10))]
METHODS = [RandomBlocks(seed=3), RandomBlocks(seed=4, block_size=128), GNA((3, 5, 7))]


def tensors(layout, dim, dtype, batch=2, heads=4, kv_heads=2):
    generator = torch.Generator("cuda").manual_seed(layout.tokens + dim)
    shapes = ((heads,), (kv_heads,), (kv_heads,))
    return [
        torch.randn(batch, layout.tokens, *h, dim, generator=generator, device="cuda", dtype=dtype).transpose(1, 2)
        for h in shapes
    ]


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu was asked for and torch sees no CUDA device")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [16, 64, 72, 96, 128, 256])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_error_is_at_most_twice_plain_torch(layout, method, dim, dtype):
    q, k, v = tensors(layout, dim, dtype)
    out, lse = attend(q, k, v, method, layout=layout, backend="triton", return_lse=True)
    exact, exact_lse = attend(
        *(x.double() for x in (q, k, v)), method, layout=layout, backend="reference", return_lse=True
    )
    # Plain torch over the same pairs, in the same precision.
    mask = plan(q, k, v, method, layout=layout).token_mask()
    plain = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (out, plain))
    assert torch.isfinite(out).all()
    assert error <= 2 * allowed + 1e-6
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-2, rtol=1e-3)


def test_dead_keys_are_never_seen():
    layout = LAYOUTS[0]
    q, k, v = tensors(layout, 64, torch.bfloat16)
    valid = torch.tensor([layout.tokens - 40, layout.tokens], dtype=torch.int32, device="cuda")
    method = RandomBlocks(seed=1)
    clean = attend(q, k, v, method, layout=layout, kv_valid=valid, backend="triton")
    k, v = k.clone(), v.clone()
    k[0, :, -40:] = v[0, :, -40:] = torch.nan
    assert torch.equal(clean, attend(q, k, v, method, layout=layout, kv_valid=valid, backend="triton"))


def test_long_sequences_use_wide_addresses():
    """131,072 + 77 tokens, 24 heads of 128: nearly 2^29 elements per tensor; compared on the last rows."""
    layout = Layout((37, 46, 77), text=95)
    q, k, v = tensors(layout, 128, torch.bfloat16, batch=1, heads=24, kv_heads=24)
    method = Radial()
    out = attend(q, k, v, method, layout=layout, backend="triton")
    made = plan(q, k, v, method, layout=layout)
    rows = slice(layout.tokens - 64, layout.tokens)
    seen = made.block_mask[0, 0, -1].repeat_interleave(128)[: layout.tokens]
    scores = q[:, :, rows].float() @ k.float().mT * 128**-0.5
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.float()
    assert (out[:, :, rows].float() - expected).norm() / expected.norm() < 1e-2
