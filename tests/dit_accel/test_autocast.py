"""Attention called directly under autocast, beside torch's own."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dit_accel
from dit_accel import AllBlocks, Layout, Pisa, UsageError, attend
from dit_accel.autocast import as_autocast

LAYOUT = Layout((3, 4, 5), text=4)
CALLS = {
    "dense": {"method": None},
    "reference": {"method": AllBlocks(block_size=16), "backend": "reference"},
    "gather": {"method": AllBlocks(block_size=16), "backend": "gather"},
    "quant": {"method": None, "quant": "sage1"},
}


def tensors(*dtypes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, LAYOUT.tokens, 32, generator=generator).to(dtype) for dtype in dtypes]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_dtypes_are_cast_as_torch_casts_them(name, dtype):
    q, k, v = tensors(torch.float32, torch.float32, dtype)
    with pytest.raises(UsageError):
        attend(q, k, v, layout=LAYOUT, **CALLS[name])
    with torch.autocast("cpu", dtype=dtype):
        stock = sdpa(q, k, v)
        ours = attend(q, k, v, layout=LAYOUT, **CALLS[name])
    assert ours.dtype == stock.dtype == dtype
    assert (ours - stock).float().norm() < 0.02 * stock.float().norm()
    cast = attend(q.to(dtype), k.to(dtype), v, layout=LAYOUT, **CALLS[name])
    assert torch.equal(ours, cast)


def test_float64_stays_float64():
    q, k, v = tensors(*[torch.float64] * 3)
    expected = attend(q, k, v, AllBlocks(block_size=16), layout=LAYOUT, backend="gather")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sdpa(q, k, v).dtype == torch.float64
        assert torch.equal(attend(q, k, v, AllBlocks(block_size=16), layout=LAYOUT, backend="gather"), expected)


def test_a_plan_is_the_one_that_attend_executes():
    q, k, v = tensors(torch.float32, torch.float32, torch.bfloat16)
    method = Pisa(density=0.4, block_size=8, tile=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = dit_accel.plan(q, k, v, method, layout=LAYOUT)
    cast = dit_accel.plan(q.bfloat16(), k.bfloat16(), v, method, layout=LAYOUT)
    assert torch.equal(plan.block_mask, cast.block_mask)


def test_what_is_no_tensor_is_told_as_without_autocast():
    q, k, _ = tensors(*[torch.float32] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(UsageError):
        attend(q, k, "v", layout=LAYOUT)


def test_devices_without_autocast_keep_what_they_have():
    x = torch.zeros(1, device="meta")
    assert as_autocast(x)[0] is x
