"""NaN and Inf in live q, k or v: every tier shows them in the output, or the guard tells of them."""

import pytest
import torch

from dit_accel import (
    GNA,
    AdaSpa,
    AllBlocks,
    Guard,
    Layout,
    Pisa,
    Pyramid,
    Quant,
    Radial,
    RandomBlocks,
    Rectified,
    Step,
    VMoBA,
    attend,
    plan,
)
from dit_accel.diffusers.stats import Stats
from dit_accel.diffusers.watch import Ran, Watch
from dit_accel.guard import fault_of
from dit_accel.kernels.block_sparse import gather
from dit_accel.rows import Rows

LAYOUT = Layout(grid=(2, 7, 8), text=9)
TOKEN = 5
METHODS = {
    "dense": None,
    "all blocks": AllBlocks(block_size=32),
    "random blocks": RandomBlocks(block_size=16),
    "radial of partial blocks": Radial(rule="paper", block_size=32),
    "gna": GNA(window=(2, 3, 3)),
    "vmoba": VMoBA(),
    "vmoba of blocks": VMoBA(granularity="block"),
    "vmoba of a head": VMoBA(scope="head_global"),
    "vmoba of a threshold": VMoBA(select="threshold"),
    "pisa": Pisa(block_size=16, density=0.3),
    "rectified": Rectified(block_size=16, density=0.3),
    "adaspa": AdaSpa(block_size=16),
    "pyramid": Pyramid(block_q=32, block_k=32),
}
COMPILED = ["gna", "vmoba", "pisa"]


def tensors():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, 2, LAYOUT.tokens, 24, generator=generator) for _ in range(3)]


def poisoned(which, value, where):
    given = tensors()
    given[which][where] = value
    return given


def bad_rows(out):
    return ~out.isfinite().all(-1)


def seen(given, made, out):
    """Whether the guard's checks of one call find it: the flag that they raise, and the trial's verdict."""
    watch = Watch(Guard(rate=1.0), Stats([("layer", "self")]), lambda text: None)
    ran = Ran(*given, out, made, None, None, None)
    watch.look(0, Step(), ran)
    return watch.read(), watch.passes(0, Step(), ran), watch._stats.guard_events


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tier", ["reference", "gather", "auto"])
@pytest.mark.parametrize("name", sorted(METHODS.keys() - set(COMPILED)))
def test_a_token(name, tier, value):
    _check_token(name, tier, value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tier", ["reference", "gather", "flex", "auto"])
@pytest.mark.parametrize("name", COMPILED)
def test_a_token_where_a_tier_is_compiled(name, tier, value):
    _check_token(name, tier, value)


def _check_token(name, tier, value):
    method = METHODS[name]
    for which in range(3):
        given = poisoned(which, value, (0, 1, TOKEN))
        out = attend(*given, method, layout=LAYOUT, backend=tier)
        bad = bad_rows(out)
        assert not bad[:, 0].any(), "the other head has nothing to do with it"
        if which == 0:
            assert bad[0, 1, TOKEN]
        if method is None:
            assert bad[:, 1].any()
            continue
        flags, passed, events = seen(given, plan(*given, method, layout=LAYOUT), out)
        assert flags == {0: "nonfinite"}
        assert bad.any() or (not passed and events[0]["kind"] == "nonfinite")


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_channel_of_nan_leaves_no_row_finite(name, which):
    given = poisoned(which, torch.nan, (..., 0))
    assert bad_rows(attend(*given, METHODS[name], layout=LAYOUT)).all()


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("quant", [Quant.sage1(), Quant.sage2(), Quant(qk="int4", pv="int8")])
def test_quantised_products(quant, which):
    given = poisoned(which, torch.nan, (0, 1, TOKEN))
    for method in (None, METHODS["gna"]):
        assert bad_rows(attend(*given, method, layout=LAYOUT, quant=quant))[0, 1].any()


def test_a_compiled_answer_is_not_checked_against_what_is_not_finite():
    """The first call of a kind, whose values lie where its checked rows do not look."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 2, 128, d, generator=generator) for d in (16, 16, 12))
    v[:, :, TOKEN] = torch.nan
    layout, method = Layout(grid=(1, 1, 128)), RandomBlocks(block_size=16)
    out = attend(q, k, v, method, layout=layout, backend="flex")
    bad = bad_rows(attend(q, k, v, method, layout=layout, backend="gather"))
    assert bad.any()
    assert not bad.all()
    assert torch.equal(bad_rows(out), bad)


def test_finite_queries_and_keys_stay_in_the_compiled_tier(monkeypatch):
    q, k, v = tensors()
    attend(q, k, v, METHODS["gna"], layout=LAYOUT, backend="flex")
    monkeypatch.setattr(gather, "attention", lambda *a, **b: pytest.fail("gather ran"))
    attend(q, k, v, METHODS["gna"], layout=LAYOUT, backend="flex")
    # A sum past what a float16 holds is no fault.
    attend(*(x.half() + 8 for x in (q, k, v)), METHODS["gna"], layout=LAYOUT, backend="flex")


def test_a_key_that_a_plan_leaves_out_is_told_by_the_guard():
    given = poisoned(1, torch.nan, (0, 1, TOKEN))
    made = plan(*given, METHODS["random blocks"], layout=LAYOUT)
    sound = attend(*tensors(), plan=made, layout=LAYOUT)
    flags, passed, events = seen(given, made, sound)
    assert flags == {0: "nonfinite"}
    assert not passed
    assert events == [{"layer": 0, "name": "layer", "step": 0, "kind": "nonfinite"}]


def test_dead_tokens_are_no_fault():
    given = [x.clone() for x in tensors()]
    for x in given:
        x[:, :, -3:] = torch.nan
    valid = torch.tensor([LAYOUT.tokens - 3], dtype=torch.int32)
    ran = Ran(*given, given[0], None, None, valid, None)
    assert ran.finite()
    assert ran.summed().isfinite()


def test_a_finite_row_where_the_reference_has_none_is_a_fault():
    def fault(planned, out):
        rows = Rows(None, planned, None, torch.ones(1, 1, 2), None)
        return float(fault_of(out, rows))

    sound, bad = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
    bad[..., 1, 0] = torch.nan
    assert fault(sound, sound) == 0
    assert fault(bad, sound) == torch.inf
    assert fault(sound, bad) == torch.inf
    assert fault(bad, bad) == 0
