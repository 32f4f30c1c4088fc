"""Whole calls, planning and attention, whose buffers lie between guard bands: in the interpreter and on a GPU alike."""

import torch
from guard_bands import banded

from dit_accel import GNA, AdaSpa, Layout, Pisa, Pyramid, Quant, Radial, RandomBlocks, Rectified, VMoBA, attend
from dit_accel.methods import AllBlocks

LAYOUT = Layout((3, 5, 6), text=9)
CASES = {
    "all": (AllBlocks(block_size=32), None),
    "random": (RandomBlocks(seed=1, block_size=16), None),
    "radial": (Radial(block_size=32), None),
    "gna": (GNA((3, 5, 3)), None),
    "rectified": (Rectified(density=0.3, block_size=32), None),
    "pisa": (Pisa(density=0.3, block_size=32), None),
    "pisa-norms": (Pisa(density=0.3, block_size=32, norm_bias=True), None),
    "pyramid": (Pyramid(block_q=32, block_k=32), None),
    "vmoba": (VMoBA(select="threshold"), None),
    "vmoba-blocks": (VMoBA(granularity="block"), None),
    "adaspa": (AdaSpa(block_size=32, density=0.3), None),
    "dense+sage2": (None, Quant.sage2()),
    "random+sage1": (RandomBlocks(seed=1, block_size=16), Quant.sage1()),
    "pisa+sage2": (Pisa(density=0.3, block_size=32), Quant.sage2()),
}


def check(name, device, dtype=torch.float32):
    """Nothing beside a buffer is written, and what nobody wrote is not read: the output is the same to the bit."""
    method, quant = CASES[name]
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(2, LAYOUT.tokens, heads, 32, generator=g) for heads in (2, 2, 2))
    q, k, v = (x.to(dtype).to(device).transpose(1, 2) for x in (q, k, v))
    valid = torch.tensor([LAYOUT.tokens - 5, LAYOUT.tokens], dtype=torch.int32, device=device)
    call = {"layout": LAYOUT, "kv_valid": valid, "quant": quant, "backend": "triton"}
    expected = attend(q, k, v, method, **call)
    with banded(device) as made:
        found = attend(q, k, v, method, **call)
    assert made
    assert torch.isfinite(found).all()
    assert torch.equal(found, expected)
