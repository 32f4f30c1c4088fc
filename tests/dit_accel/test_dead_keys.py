"""Dead keys and values hold anything and reach no output: bit for bit what zeros in their place give."""

import pytest
import torch

from dit_accel import (
    GNA,
    AdaSpa,
    AllBlocks,
    Layout,
    Pisa,
    Pyramid,
    Quant,
    Radial,
    RandomBlocks,
    Rectified,
    VMoBA,
    attend,
    plan,
)  # fmt: skip
from dit_accel.kernels.live import without_dead
from dit_accel.rows import sample, spread_slots

LAYOUT = Layout(grid=(2, 7, 8), text=20)
VALID = torch.tensor([117, LAYOUT.tokens], dtype=torch.int32)
DEAD = (torch.arange(LAYOUT.tokens) >= VALID[:, None])[:, None, :, None]
POISON = [torch.nan, -torch.inf, 3e38]
METHODS = {
    "dense": None,
    "all blocks": AllBlocks(block_size=32),
    "random blocks": RandomBlocks(block_size=16),
    "radial": Radial(block_size=32),
    "radial of partial blocks": Radial(rule="paper", block_size=32),
    "gna": GNA(window=(2, 3, 3)),
    "adaspa": AdaSpa(block_size=16),
    "vmoba": VMoBA(),
    "vmoba of blocks": VMoBA(granularity="block"),
    "pisa": Pisa(block_size=16, density=0.3),
    "pisa of first order": Pisa(block_size=16, density=0.3, order="first"),
    "rectified": Rectified(block_size=16, density=0.3),
    "pyramid": Pyramid(block_q=32, block_k=32),
    "pyramid of a threshold": Pyramid(mode="threshold", block_q=32, block_k=32),
}
FLASH = {"all blocks", "random blocks", "radial", "adaspa", "vmoba of blocks", "pisa", "rectified", "pyramid"}
CASES = [(name, tier) for name in METHODS for tier in ("reference", "gather")] + [(name, "flash") for name in FLASH]
CASES = [case for case in CASES if case != ("pisa of first order", "gather")]


def tensors(dim_v=24):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 2, LAYOUT.tokens, d, generator=generator) for d in (24, 24, dim_v)]


def check(method, poison, dim_v=24, **call):
    call = {"layout": LAYOUT, "kv_valid": VALID, **call}
    q, k, v = tensors(dim_v)
    expected = attend(q, *(x.masked_fill(DEAD, 0) for x in (k, v)), method, **call)
    given = [x.masked_fill(DEAD, poison) for x in (k, v)]
    before = [x.clone() for x in given]
    found = attend(q, *given, method, **call)
    for x, y in zip(found, expected, strict=True) if call.get("return_lse") else [(found, expected)]:
        assert torch.isfinite(x).all()
        assert torch.equal(x, y)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize(("name", "tier"), sorted(CASES))
def test_plain_tiers(name, tier, poison):
    check(METHODS[name], poison, backend=tier)


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("name", ["gna", "pisa"])
def test_compiled_tier(name, poison):
    # A value width that no other test compiles, so that the first call of its kind holds the poison.
    check(METHODS[name], poison, dim_v=20 if name == "gna" else 24, backend="flex")


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("name", ["dense", "gna", "rectified"])
def test_quantised(name, poison):
    check(METHODS[name], poison, quant=Quant.sage2())


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("name", ["dense", "gna"])
def test_lse(name, poison):
    check(METHODS[name], poison, return_lse=True)


def test_the_guards_reference_knows_no_dead_keys():
    q, k, v = tensors()
    method = METHODS["gna"]
    made, slots = plan(q, k, v, method, layout=LAYOUT), spread_slots(LAYOUT.tokens, 16, 0.3, q.device)
    clean, poisoned = (
        sample(q, *(x.masked_fill(DEAD, value) for x in (k, v)), made, slots, kv_valid=VALID)
        for value in (0, torch.nan)
    )
    for name in ("planned", "exact", "size", "kept"):
        assert torch.equal(getattr(poisoned, name), getattr(clean, name)), name


def test_only_what_can_do_harm_is_copied():
    _, k, v = tensors()
    assert without_dead(k, v, None)[0] is k
    assert without_dead(k, v, VALID)[0] is k
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        k, v = k.to(dtype), v.to(dtype)
        for poison in (torch.nan, torch.inf, -torch.inf):
            poisoned = k.masked_fill(DEAD, poison)
            assert without_dead(poisoned, v, VALID)[0] is not poisoned


def test_dead_keys_pass_no_gradient():
    q, k, v = (x.requires_grad_() for x in tensors())
    poisoned = [x.masked_fill(DEAD, torch.nan) for x in (k, v)]
    attend(q, *poisoned, METHODS["random blocks"], layout=LAYOUT, kv_valid=VALID, backend="gather").sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))
    assert k.grad[0, :, VALID[0] :].abs().max() == 0
