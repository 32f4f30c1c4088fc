"""The flex tier on a real GPU with tiles that torch's own block sizes do not divide: ``pytest -m gpu``."""

import pytest
import torch

from dit_accel import GNA, Layout, Pisa, RandomBlocks, attend, plan

pytestmark = pytest.mark.gpu

LAYOUT = Layout((5, 13, 17), text=77)
METHODS = [RandomBlocks(seed=3, block_size=64), RandomBlocks(seed=4, block_size=32), GNA((3, 5, 7)), Pisa(density=0.3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dim", [64, 128], ids="d{}".format)
def test_any_tile_is_served(method, dim, dtype):
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu was asked for and torch sees no CUDA device")
    generator = torch.Generator("cuda").manual_seed(dim)
    q, k, v = (
        torch.randn(1, LAYOUT.tokens, 2, dim, generator=generator, device="cuda", dtype=dtype).transpose(1, 2)
        for _ in range(3)
    )
    made = plan(q, k, v, method, layout=LAYOUT)
    out = attend(q, k, v, plan=made, layout=LAYOUT, backend="flex")
    exact = attend(q, k, v, plan=made, layout=LAYOUT, backend="reference")
    # float32 products are tf32 where torch is told so.
    assert (out.double() - exact.double()).norm() / exact.double().norm() < 1e-2
