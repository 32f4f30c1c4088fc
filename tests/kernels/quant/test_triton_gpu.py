"""The quantised kernel on a real GPU, against the emulation in plain torch: ``pytest -m gpu``."""

import pytest
import torch

from dit_accel import Layout, Quant, RandomBlocks, attend
from dit_accel.kernels.quant.capability import preset_for, refusal
from dit_accel.quant import PRESETS

pytestmark = pytest.mark.gpu

LAYOUTS = [Layout((5, 13, 17), text=77), Layout((9, 11, 24), text=31, text_first=True)]
RECIPES = {
    **{name: make() for name, make in PRESETS.items()},
    "int8-rows": Quant(qk="int8", pv="int8", smooth_v=True),
    "logits-only": Quant(qk="int8"),
}


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu was asked for and torch sees no CUDA device")


def tensors(tokens, dim, dtype=torch.bfloat16, heads=4, kv_heads=2, bias=2.0):
    g = torch.Generator("cuda").manual_seed(tokens + dim)
    q, k, v = (
        torch.randn(1, tokens, h, dim, generator=g, device="cuda").transpose(1, 2) for h in (heads, kv_heads, kv_heads)
    )
    return q.to(dtype), (k + bias * k[:, :, :1]).to(dtype), v.to(dtype)


@pytest.mark.parametrize("dim", [64, 72, 96, 128, 256], ids="d{}".format)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("method", [None, RandomBlocks(seed=3)], ids=["dense", "sparse"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_the_emulation(layout, method, name, dim):
    recipe = RECIPES[name]
    why = refusal(recipe, torch.cuda.get_device_capability())
    if why:
        pytest.skip(why)
    q, k, v = tensors(layout.tokens, dim)
    valid = torch.tensor([layout.tokens - 9], dtype=torch.int32, device="cuda")
    k[:, :, -9:] = torch.nan
    common = {"layout": layout, "quant": recipe, "kv_valid": valid, "return_lse": True}
    out, lse = attend(q, k, v, method, backend="triton", **common)
    expected, expected_lse = attend(q, k, v, method, backend="reference", **common)
    assert out.isfinite().all()
    lost = (out.float() - expected.float()).abs().sum() / expected.float().abs().sum()
    assert lost < (0.03 if recipe.pv in ("fp8", "int8") else 0.01)
    torch.testing.assert_close(lse, expected_lse, atol=1e-2, rtol=1e-3)


def test_past_two_to_the_31st_element():
    """24 heads of 128 over 720,896 tokens: the last head begins beyond 2^31 elements."""
    layout = Layout((176, 64, 64))
    assert 24 * layout.tokens * 128 > 2**31
    quant = PRESETS[preset_for(torch.cuda.get_device_capability())]()
    q, k, v = tensors(layout.tokens, 128, heads=24, kv_heads=24)
    method = RandomBlocks(seed=1, density=0.002, block_size=128)
    out = attend(q, k, v, method, layout=layout, quant=quant, backend="triton")
    exact = attend(q, k, v, method, layout=layout, backend="triton")
    assert out.isfinite().all()
    rows = slice(-4096, None)
    lost = (out[:, -1, rows].float() - exact[:, -1, rows].float()).abs().sum() / exact[:, -1, rows].float().abs().sum()
    assert lost < 0.1
