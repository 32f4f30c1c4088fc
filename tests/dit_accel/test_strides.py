"""q, k and v as they may lie in memory: every tier gives what it gives for the same numbers without gaps."""

import pytest
import torch

from dit_accel import AdaSpa, AllBlocks, Layout, Pisa, Quant, Radial, RandomBlocks, VMoBA, attend

LAYOUT = Layout((3, 6, 7), text=5)


def gaps(x):
    return torch.stack([x, torch.full_like(x, 1e4)], -1).flatten(-2)[..., ::2]


LIES = {
    "head dim before tokens": lambda x: x.mT.contiguous().mT,
    "gaps in the head dim": gaps,
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "heads innermost": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "gaps between tokens": lambda x: torch.stack([x, torch.full_like(x, 1e4)], 3).flatten(2, 3)[:, :, ::2],
    "one head for all": lambda x: x[:, :1].expand_as(x),
    "one token for all": lambda x: x[:, :, 5:6].expand_as(x),
    "one number for all": lambda x: x[..., :1].expand_as(x),
}
METHODS = {
    "dense": None,
    "shared lists": RandomBlocks(block_size=32),
    "all blocks": AllBlocks(block_size=32),
    "partial": Radial(rule="paper", block_size=32),
    "orders": VMoBA(k=0.5),
    "lists by head": AdaSpa(block_size=16, density=0.4),
    "representatives": Pisa(block_size=16, density=0.4),
}
TIERS = {
    "dense": ("auto", "reference"),
    "shared lists": ("reference", "gather", "flash"),
    "all blocks": ("reference", "gather", "flash"),
    "partial": ("reference", "gather"),
    "orders": ("reference", "gather"),
    "lists by head": ("reference", "gather", "flash"),
    "representatives": ("reference", "gather", "flash"),
}
PLAIN = [(name, tier, torch.float32) for name, tiers in TIERS.items() for tier in tiers]
# torch's kernels are others for other dtypes.
PLAIN += [
    (name, tier, dtype)
    for name, tier in (("dense", "auto"), ("shared lists", "flash"), ("lists by head", "flash"))
    for dtype in (torch.bfloat16, torch.float16, torch.float64)
]


def tensors(dtype):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(1, 2, LAYOUT.tokens, 24, generator=generator).to(dtype) for _ in range(3)]


def check(lie, dtype, method, **call):
    for which in ({0}, {1}, {2}, {0, 1, 2}):
        given = [LIES[lie](x) if i in which else x for i, x in enumerate(tensors(dtype))]
        expected = attend(*(x.contiguous() for x in given), method, layout=LAYOUT, **call)
        rounding = {} if dtype.itemsize > 2 else {"atol": 0.02, "rtol": 0.02}
        torch.testing.assert_close(attend(*given, method, layout=LAYOUT, **call), expected, **rounding)


@pytest.mark.parametrize(("name", "tier", "dtype"), PLAIN)
@pytest.mark.parametrize("lie", LIES)
def test_plain_tiers(lie, name, tier, dtype):
    check(lie, dtype, METHODS[name], backend=tier)


@pytest.mark.parametrize("lie", ["head dim before tokens", "gaps in the head dim", "one head for all"])
def test_compiled_tier(lie):
    check(lie, torch.float32, METHODS["partial"], backend="flex")


@pytest.mark.parametrize("lie", LIES)
def test_quantised(lie):
    check(lie, torch.float32, METHODS["shared lists"], quant=Quant.sage2())


@pytest.mark.parametrize("lie", LIES)
def test_lse(lie):
    given = [LIES[lie](x) for x in tensors(torch.float32)]
    for method in (None, METHODS["shared lists"]):
        found = attend(*given, method, layout=LAYOUT, return_lse=True)
        expected = attend(*(x.contiguous() for x in given), method, layout=LAYOUT, return_lse=True)
        torch.testing.assert_close(found, expected)
