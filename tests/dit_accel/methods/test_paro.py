"""PARO: reordering changes nothing, maps mean what the file says, and a plan that does not fit is refused."""

import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paro_plans import plan_file

from dit_accel.drift import recall, row_recall
from dit_accel.errors import UnsupportedError, UsageError
from dit_accel.functional import attend
from dit_accel.functional import plan as make
from dit_accel.layout import Layout
from dit_accel.methods import AllBlocks, Method, Paro, RandomBlocks
from dit_accel.methods.base import ModelFacts
from dit_accel.methods.orders import token_order
from dit_accel.methods.paro_file import PlanFile
from dit_accel.methods.paro_statistics import OrderedBlocks
from dit_accel.methods.testing import outside_main
from dit_accel.plans import Blocks, Plan
from dit_accel.processors import ParoProcessor, Processor
from dit_accel.state import State
from dit_accel.step import Step

LAYOUT = Layout((3, 4, 5), text=6)


def tensors(layout, heads=3, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn((3, 1, heads, layout.tokens, 8), generator=g).to(dtype)


def dense_plan(layout, ids, block):
    """Every block, under one axis order per head."""
    blocks = Blocks.uniform(layout.tokens, block)
    everything = make(None, None, None, AllBlocks(block), layout=layout).full
    order = torch.stack([token_order(layout, i) for i in ids])
    return Plan(layout, blocks, blocks, everything, order=order)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)),
    text=st.integers(0, 9),
    first=st.booleans(),
    ids=st.lists(st.integers(0, 5), min_size=3, max_size=3),
    block=st.sampled_from([4, 16, 64]),
    backend=st.sampled_from(["reference", "gather"]),
)
def test_p1_reordered_dense_equals_dense(grid, text, first, ids, block, backend):
    layout = Layout(grid, text=text, text_first=first)
    q, k, v = tensors(layout)
    out = attend(q, k, v, plan=dense_plan(layout, ids, block), layout=layout, backend=backend)
    torch.testing.assert_close(out, attend(q, k, v, layout=layout), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("order", range(6))
def test_p1_every_id_with_grouped_keys_and_dead_ones(order):
    q, k, v = tensors(LAYOUT, heads=4)
    k, v, valid = k[:, :2], v[:, :2], torch.tensor([61], dtype=torch.int32)
    plan = dense_plan(LAYOUT, [order, 0, order, 2], 8)
    out = attend(q, k, v, plan=plan, layout=LAYOUT, kv_valid=valid, backend="gather")
    torch.testing.assert_close(out, attend(q, k, v, layout=LAYOUT, kv_valid=valid), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("layout", "blocks", "text_blocks"),
    [(Layout((13, 30, 45), text=226, text_first=True), 278, 4), (Layout((21, 45, 80)), 1182, 0)],
)
def test_p3_published_block_counts(layout, blocks, text_blocks):
    shape = OrderedBlocks.of(layout, 64)
    assert shape.blocks.count == blocks
    assert int(outside_main(shape.blocks, layout).sum()) == text_blocks


@pytest.fixture
def made(tmp_path):
    return plan_file(tmp_path / "plan.safetensors", LAYOUT, orders={0: [2, 0, 5], 1: [3, 3, 3]})


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("index", [0, 3])
def test_attention_is_over_the_pairs_of_the_file(made, layer, index):
    path, plans = made
    q, k, v = tensors(LAYOUT, dtype=torch.float64)
    out = attend(
        q, k, v, Paro(path), layout=LAYOUT, layer=layer, step=Step(index, 4), state=State(), backend="reference"
    )
    for head in range(3):
        tokens = token_order(LAYOUT, int(plans[layer].orders[head]))
        block = torch.arange(LAYOUT.tokens) // 8
        seen = plans[layer].maps[index // 2, head][block][:, block]
        scores = q[0, head][tokens] @ k[0, head][tokens].T / 8**0.5
        expected = torch.empty_like(v[0, head])
        expected[tokens] = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[0, head][tokens]
        torch.testing.assert_close(out[0, head], expected)


def test_heads_that_agree_share_one_order_and_the_callers_own_needs_none(tmp_path):
    path, _ = plan_file(tmp_path / "p", LAYOUT, layers=3, orders={0: [0, 0, 0], 1: [4, 4, 4], 2: [4, 0, 4]})
    q, k, v = tensors(LAYOUT)
    orders = [make(q, k, v, Paro(path), layout=LAYOUT, layer=i).order for i in range(3)]
    assert orders[0] is None
    assert orders[1].shape == (66,)
    assert orders[2].shape == (3, 66)


def test_density_and_text(made):
    path, plans = made
    q, k, v = tensors(LAYOUT)
    plan = make(q, k, v, Paro(path), layout=LAYOUT)
    assert plan.density == pytest.approx(plans[0].density[0])
    mask = plan.token_mask()
    assert mask[..., 60:].all()
    assert mask[..., 60:, :].all()


def test_a_layer_holds_the_plan_of_one_bin(made, monkeypatch):
    path, _ = made
    q, k, v = tensors(LAYOUT)
    method, state, read, own = Paro(path), State(), [], PlanFile.map
    monkeypatch.setattr(PlanFile, "map", lambda self, *which: read.append(which[:2]) or own(self, *which))
    for index in range(4):
        for branch in ("cond", "uncond"):
            for layer in (0, 1):
                make(q, k, v, method, layout=LAYOUT, layer=layer, step=Step(index, 4, branch=branch), state=state)
    assert read == [(0, 0), (1, 0), (0, 1), (1, 1)]
    held = [value for key, value in state._plans.items() if isinstance(value, dict)]
    assert [list(latest) for latest in held] == [[1], [1]]


def test_a_run_of_unknown_length_takes_the_calibrations(made):
    q, k, v = tensors(LAYOUT)
    plan = make(q, k, v, Paro(made[0]), layout=LAYOUT, step=Step(3, None))
    assert torch.equal(plan.block_mask[0], made[1][0].maps[1])


def test_a_slice_of_heads_takes_its_part(made):
    path, plans = made
    q, k, v = tensors(LAYOUT, heads=1)
    plan = make(q, k, v, Paro(path), layout=LAYOUT, head_offset=2)
    assert torch.equal(plan.block_mask[0, 0], plans[0].maps[0, 2])
    assert torch.equal(plan.order, token_order(LAYOUT, 5))


def test_no_plan_file_says_how_to_make_one():
    for build in (Paro, ParoProcessor):
        with pytest.raises(UsageError, match="dit-accel calibrate paro"):
            build()


def test_misfits_name_both_values_and_the_command(made):
    path, _ = made
    method = Paro(path)

    def refused(match, layout=LAYOUT, heads=3, **told):
        q, k, v = tensors(layout, heads=heads)
        with pytest.raises(UnsupportedError, match=match) as caught:
            make(q, k, v, method, layout=layout, **told)
        assert "dit-accel calibrate paro" in str(caught.value)

    refused(r"layout main 3x4x5 \+ text 6; this call has main 3x4x5 \+ text 9", Layout((3, 4, 5), text=9))
    refused(r"layout main 3x4x5 \+ text 6; this call has main 4x4x5", Layout((4, 4, 5)))
    refused(r"head count 3; this call has heads 0\.\.4", heads=5)
    refused(r"head count 3; this call has heads 0\.\.1", heads=2)
    refused(r"layers 0\.\.1; this call has layer 2", layer=2)
    with pytest.raises(UnsupportedError, match=r"grid \(3, 4, 5\); this call has \(4, 4, 5\)"):
        method.check(Layout((4, 4, 5)))
    with pytest.raises(UnsupportedError, match=r"text 6; this call has main 3x4x5 \+ text 7"):
        method.check(Layout((3, 4, 5), text=7))
    method.check(Layout((3, 4, 5)))


def test_another_model_is_refused_by_what_differs(made):
    method = Paro(made[0])
    method.check_model(ModelFacts("Tiny", {"num_layers": 2, "new_in_a_later_version": 1}, 2))
    with pytest.raises(UnsupportedError, match="num_layers 2 in the plan and 30 here; calibrate"):
        method.check_model(ModelFacts("Tiny", {"num_layers": 30}, 30))
    with pytest.raises(UnsupportedError, match="class 'Tiny' in the plan and 'Other' here"):
        method.check_model(ModelFacts("Other", {"num_layers": 2}, 2))


def test_a_method_is_settings_only(made):
    method = Paro(made[0])
    assert isinstance(method.plan_file, str)
    assert pickle.loads(pickle.dumps(method)) == method
    assert hash(Paro(str(made[0]))) == hash(method)
    assert Method.from_dict(method.to_dict()) == method
    assert ParoProcessor(plan_file=made[0]) == ParoProcessor(plan_file=str(made[0]))
    assert Processor(method).to_dict()["method"]["plan_file"] == str(made[0])


def test_a_plan_replaced_behind_our_back_is_refused(made):
    path, _ = made
    saved = Paro(path).to_dict()
    plan_file(path, LAYOUT, density=0.3)
    with pytest.raises(UsageError, match="is not the plan this configuration names"):
        Method.from_dict(saved)


def test_density_is_the_plans(made):
    method = Paro(made[0])
    assert method.with_density(0.1, LAYOUT) == (method, PlanFile.open(made[0]).header.reached)


def test_recall_is_the_retained_mass(made):
    q, k, v = tensors(LAYOUT)
    plan = make(q, k, v, Paro(made[0]), layout=LAYOUT)
    weights = (q @ k.mT / 8**0.5).softmax(-1)
    kept = (weights * plan.token_mask()).sum(-1)
    assert recall(q, k, plan, rows=1000) == pytest.approx(float(kept.mean()), rel=1e-5)
    g = torch.Generator()
    some = row_recall(q, k, plan, 16, g.manual_seed(3))
    assert some.shape == (1, 3, 16)
    assert recall(q, k, plan, 16, g.manual_seed(3)) == pytest.approx(float(some.mean()))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 99), valid=st.integers(1, 66))
def test_recall_of_shared_plans_with_dead_keys(seed, valid):
    q, k, v = tensors(LAYOUT, seed=seed)
    plan = make(q, k, v, RandomBlocks(seed=seed, block_size=8), layout=LAYOUT)
    weights = q @ k.mT / 8**0.5
    weights[..., valid:] = -torch.inf
    kept = (weights.softmax(-1) * plan.token_mask()).sum(-1).mean()
    found = recall(q, k, plan, rows=66, kv_valid=torch.tensor([valid], dtype=torch.int32))
    assert found == pytest.approx(float(kept), rel=1e-5)


def test_recall_of_everything_is_one_and_of_no_rows_refused():
    q, k, _ = tensors(LAYOUT)
    plan = dense_plan(LAYOUT, [2, 0, 4], 8)
    assert recall(q, k, plan) == pytest.approx(1)
    with pytest.raises(UsageError, match="at least one row"):
        recall(q, k, plan, rows=0)
