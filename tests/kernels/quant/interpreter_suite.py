"""The quantised Triton kernel in Triton's interpreter, against the reference tier. Run with TRITON_INTERPRET=1 set."""

from dataclasses import replace

import covering
import pytest
import quantised
import represented
import torch

import dit_accel
from dit_accel import Layout
from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse import schedule
from dit_accel.kernels.quant import triton as tier
from dit_accel.kernels.quant.api import choose, quantized_attention
from dit_accel.lowering import lower
from dit_accel.methods import REGISTRY
from dit_accel.quant import PRESETS, Quant

SMALL = tuning.Tuning(block_q=32, full=32, tested=32, gathered=32, warps=4, stages=1)
RECIPES = {
    **{name: make() for name, make in PRESETS.items()},
    "rows": Quant(qk="int4", pv="fp8", granularity="warp", p_scale="row", smooth_v=True),
    "int8-row": Quant(qk="int8", pv="int8", granularity="token", smooth_q=True),
    "int8-tile": Quant(qk="int8", pv="int8", p_scale="tile", smooth_v=True),
    "logits-only": Quant(qk="int8", granularity="thread"),
}
FEATURES = {
    "plain": {},
    "batch": {"b": 2, "per_sample": True, "heads": 4, "kv_heads": 2},
    "predicate": {"predicate": "box2+always", "gate": "h"},
    "orders": {"order": "heads", "kv_order": "heads", "kv_heads": 1, "predicate": "disc"},
    "dead": {"b": 2, "alive": [61, 0], "kv_order": "shared", "predicate": "band", "empty": True},
    "dead-shared": {"alive": [40], "kv_heads": 1},
}


def compare(case, recipe, **arguments):
    run = {
        tier: quantized_attention(
            case.q, case.k, case.v, case.plan, recipe, scale=case.scale, kv_valid=case.kv_valid, backend=tier,
            return_lse=True, **arguments,
        )
        for tier in ("triton", "reference")
    }  # fmt: skip
    out, expected = run["triton"][0].double(), run["reference"][0].double()
    assert out.isfinite().all()
    torch.testing.assert_close(run["triton"][1], run["reference"][1], atol=1e-4, rtol=1e-4)
    # A quotient next to a rounding boundary moves one weight by one step.
    step = {None: 0, "fp16": 2**-10, "fp8": 1 / 16, "int8": 1 / 127}[recipe.pv]
    assert (out - expected).abs().max() <= 1e-5 + step * case.v.abs().max() / 4
    assert (out - expected).abs().mean() <= 1e-5 + (3e-4 if recipe.pv else 0)


def dead_and_smooth(name, features):
    """Rows without a key must not get the values' mean back."""
    return features == "dead" and RECIPES[name].smooth_v


@pytest.mark.parametrize(("name", "features"), covering.diagonal(RECIPES, FEATURES, step=3, also=dead_and_smooth))
def test_equals_the_reference(make_case, name, features):
    compare(make_case(seed=len(name), n_q=37, tile=(32, 32), dim=32, **FEATURES[features]), RECIPES[name])


@pytest.mark.parametrize(("name", "dim"), covering.diagonal(PRESETS, [16, 64, 72, 96, 256]))
def test_head_dims(make_case, name, dim):
    compare(make_case(seed=dim, dim=dim, n_q=40, n_k=70, tile=(32, 32), heads=1), PRESETS[name]())


@pytest.mark.parametrize(
    ("name", "dtype"), covering.diagonal(["sage1", "sage2-int4", "logits-only"], [torch.bfloat16, torch.float16])
)
def test_16_bit_inputs(make_case, dtype, name):
    case = make_case(dtype=dtype, n_q=40, n_k=70, tile=(32, 32), dim=32, bshd=True)
    out = [
        quantized_attention(case.q, case.k, case.v, case.plan, RECIPES[name], scale=case.scale, backend=tier)[0]
        for tier in ("triton", "reference")
    ]
    assert out[0].dtype == dtype
    torch.testing.assert_close(*out, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("name", "compute"), covering.diagonal(sorted(REGISTRY), quantised.COMPUTE, step=3))
@pytest.mark.filterwarnings("ignore:Clear is experimental")
def test_every_method_takes_every_format(name, compute, tmp_path):
    """As the test of the same name on the reference tier."""
    method, layout = quantised.make(name, tmp_path, Layout((3, 5, 6), text=7), heads=2)
    q, k, v = quantised.tensors(layout, heads=2, dim=16)
    plan = dit_accel.plan(q, k, v, method, layout=layout, step=quantised.LATE)
    out = [
        dit_accel.attend(q, k, v, plan=plan, layout=layout, quant=quantised.COMPUTE[compute], backend=tier)
        for tier in ("triton", "reference")
    ]
    # Weights of 8 bits go by the running maximum of a block, and the kernel's blocks are not the plan's tiles.
    assert quantised.error(*out) < (0.01 if compute == "int8-fp8" else 1e-5)


@pytest.mark.parametrize("name", ["sage2-int4", "int8-tile"])
@pytest.mark.parametrize("features", ["everything", "first order", "shared row factors"])
def test_representatives(features, name):
    settings = dict(represented.CASES["row factors" if features == "shared row factors" else features])
    order = torch.randperm(sum(settings["sizes"]), generator=torch.Generator().manual_seed(1))
    q, k, v, plan, _ = represented.case(**settings, order=order)
    if features == "shared row factors":
        plan = replace(plan, row_scale=plan.row_scale[:1, :1], row_add=plan.row_add[:1, :1], _memo={})
    run = [
        quantized_attention(q, k, v, lower(plan), RECIPES[name], scale=0.25, backend=tier)[0]
        for tier in ("triton", "reference")
    ]
    assert run[0].isfinite().all()
    assert (run[0] - run[1]).abs().max() < 0.05
    assert (run[0] - run[1]).abs().mean() < 1e-3


def test_longest_rows_come_first_and_change_nothing(make_case, monkeypatch):
    case = make_case(seed=9, n_q=70, n_k=90, b=2, heads=3, predicate="box1", per_sample=True, tile=(16, 32), dim=32)
    case.plan = replace(case.plan, kept=True, _memo={})
    orders = []
    monkeypatch.setattr(tier, "row_order", lambda *a: orders.append(schedule.row_order(*a)) or orders[-1])
    compare(case, RECIPES["sage2"])
    (rows,) = orders
    assert rows.tolist() != list(range(len(rows)))
    assert rows.sort().values.tolist() == list(range(2 * 3 * case.plan.tiles_q))


def test_blocks_smaller_than_tiles(make_case, monkeypatch):
    monkeypatch.setattr(tuning, "EMULATED", SMALL)
    for name in ("logits-only", "sage1"):
        compare(make_case(tile=(64, 96), n_q=70, n_k=110, dim=32, predicate="box1"), RECIPES[name])


def test_the_kernel_is_taken_by_name_only(make_case):
    case = make_case()
    assert choose(case.q, case.plan, Quant.sage2(), backend="triton")[0] == "quant-triton"
    assert choose(case.q, case.plan, Quant.sage2())[0] == "quant-reference"
    with pytest.raises(NotImplementedError, match="qk=None"):
        choose(case.q, case.plan, Quant(qk=None, pv="fp8"), backend="triton")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_fault_is_never_hidden(make_case, where):
    case = make_case(n_q=33, n_k=33, tile=(32, 32), dim=32, per_head=False)
    getattr(case, where)[0, 0, 20, 3] = torch.nan
    for name in PRESETS:
        out, _ = quantized_attention(
            case.q, case.k, case.v, case.plan, PRESETS[name](), scale=case.scale, backend="triton"
        )
        assert not out[0, 0, :32].isfinite().all()
        assert out[0, 1].isfinite().all()
