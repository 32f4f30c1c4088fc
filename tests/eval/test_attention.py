"""Attention error against computations written out by hand, and its collection on a tiny pipeline's dense run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_accel import AllBlocksProcessor, Layout, Plan, Processor, RandomBlocks, RandomBlocksProcessor, Schedule, State
from dit_accel.blocks import Blocks
from dit_accel.errors import UsageError
from dit_accel.eval.attention import Collector, exact_rows, kernel_density, layer_errors, measure, output_errors
from dit_accel.kernels import BlockList
from dit_accel.methods import AllBlocks, Call, Method
from dit_accel.pipelines.acceleration import Acceleration
from dit_accel.pipelines.job import Job, resolve
from dit_accel.pipelines.load import load
from dit_accel.pipelines.model import inspect_model
from dit_accel.pipelines.prompts import Prompt
from dit_accel.step import Step

LAYOUT = Layout(grid=(3, 5, 7), text=4)


def tensors(heads=2, kv_heads=2, batch=2, seed=0, layout=LAYOUT):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, layout.tokens, 16, generator=g)
    return q, *(torch.randn(batch, kv_heads, layout.tokens, 16, generator=g) for _ in range(2))


def softmax(q, k, v, keep=None):
    """Float64 attention by numpy; ``keep`` (Nq, Nk) masks and renormalises."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    k, v = (x.repeat(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    dense = weights / weights.sum(-1, keepdims=True)
    if keep is not None:
        weights = weights * keep
    weights = weights / weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bhkd->bhqd", weights, v), dense


def test_errors_by_hand():
    o, r = torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[1.0, 1.0]]]])
    l1, cosine, rmse, largest = output_errors(o, r).flatten().tolist()
    assert l1 == pytest.approx(3 / 2)
    assert cosine == pytest.approx(3 / (3 * 2**0.5))
    assert rmse == pytest.approx((5 / 2) ** 0.5)
    assert largest == 2


def test_a_head_of_zeros():
    zero, one = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    assert output_errors(zero, zero).flatten().tolist() == [0, 1, 0, 0]
    assert output_errors(one, zero)[0].item() == float("inf")


def test_exact_rows_are_rows_of_exact_attention():
    q, k, v = tensors(heads=4)
    valid = torch.tensor([LAYOUT.tokens, 60], dtype=torch.int32)
    rows = torch.tensor([0, 7, 100])
    expected, _ = softmax(q, k, v)
    assert np.allclose(exact_rows(q, k, v, rows, 0.25)[0], expected[0][:, rows], atol=1e-6)
    masked = exact_rows(q, k, v, rows, 0.25, valid)
    assert np.allclose(masked[1], softmax(q[1:], k[1:, :, :60], v[1:, :, :60])[0][0][:, rows], atol=1e-6)
    assert torch.equal(masked[0], exact_rows(q, k, v, rows, 0.25)[0])


def collect(processor, layout=LAYOUT, rows=10_000, heads=2, steps=1, **settings):
    """Every row of every call, two layers, two guidance branches."""
    collector = Collector({"it": processor}, rows=rows, **settings)
    for index in range(steps):
        for branch in ("cond", "uncond"):
            for layer in range(2):
                q, k, v = tensors(heads, seed=index * 10 + layer, layout=layout)
                step = Step(index=index, total=steps, branch=branch)
                collector.observe(q, k, v, Call(layout, layer=layer, step=step, state=State()))
    return collector.result()["it"]


def test_a_block_mask_against_brute_force():
    method = RandomBlocks(seed=3, density=0.4, block_size=16)
    found = collect(Processor(method, schedule=Schedule.none()))
    plan = method.plan(None, None, None, Call(LAYOUT))
    keep = plan.token_mask()[0, 0].numpy()
    for layer, row in enumerate(found["layers"]):
        q, k, v = tensors(seed=layer)
        exact, dense = softmax(q, k, v)
        sparse, _ = softmax(q, k, v, keep)
        difference = np.abs(sparse - exact)
        l1 = (difference.sum((-2, -1)) / np.abs(exact).sum((-2, -1))).mean(0)
        assert row["rel_l1"] == pytest.approx(l1.mean(), rel=1e-4)
        assert found["heads"][str(layer)] == pytest.approx(l1.tolist(), rel=1e-4)
        assert row["worst_head"] == {"head": int(l1.argmax()), "rel_l1": pytest.approx(l1.max(), rel=1e-4)}
        assert row["rmse"] == pytest.approx(np.sqrt((difference**2).mean((-2, -1))).mean(), rel=1e-4)
        kept = (dense * keep).sum(-1)
        assert row["recall"] == pytest.approx(kept.mean(), rel=1e-4)
        low = np.quantile(kept, 0.05, axis=-1).mean(0)
        assert row["recall_low"] == pytest.approx(low.min(), rel=1e-3)
        assert row["calls"] == 2
    assert found["densities"]["mask"] == pytest.approx(keep.mean())
    assert json.loads(json.dumps(found)) == found


def test_everything_kept_is_exact():
    found = collect(AllBlocksProcessor(block_size=16, schedule=Schedule.none()))
    assert found["mean"]["rel_l1"] < 1e-5
    assert found["mean"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert found["mean"]["recall"] == pytest.approx(1, abs=1e-5)
    assert found["densities"]["mask"] == 1
    assert found["flops"]["attention"] == found["flops"]["dense_attention"] > 0


def test_uniform_attention_keeps_the_kept_share():
    """Equal logits: the mass on m of K keys is m / K."""
    method = RandomBlocks(density=0.5, block_size=16)
    collector = Collector({"it": Processor(method, schedule=Schedule.none())}, rows=10_000)
    q, k, v = tensors()
    collector.observe(torch.zeros_like(q), k, v, Call(LAYOUT, state=State()))
    keep = method.plan(None, None, None, Call(LAYOUT)).token_mask()[0, 0].double()
    assert collector.result()["it"]["mean"]["recall"] == pytest.approx(float(keep.mean(-1).mean()), rel=1e-5)


def test_a_mean_over_heads_does_not_hide_a_broken_one():
    class OneHeadBlind(Method):
        """Head 1 sees the first block only."""

        static = False

        def plan(self, q, k, v, call):
            blocks = Blocks.uniform(call.layout.tokens, 16)
            mask = torch.ones(1, q.shape[1], blocks.count, blocks.count, dtype=torch.bool)
            mask[:, 1, :, 1:] = False
            return Plan(call.layout, blocks, blocks, BlockList.from_mask(mask))

    found = collect(Processor(OneHeadBlind(), schedule=Schedule.none()), heads=4)
    assert found["worst"]["head"] == 1
    assert found["worst"]["rel_l1"] > 3.9 * found["mean"]["rel_l1"] > 0.1


def test_the_schedule_counts_dense_calls_and_heat_maps_show_what_ran():
    processor = RandomBlocksProcessor(density=0.3, block_size=16, schedule=Schedule(first=2, layers={0}))
    found = collect(processor, steps=5)
    assert [row["layer"] for row in found["layers"]] == [1]
    (row,) = found["heat"]["rel_l1"]
    assert [x is None for x in row] == [True, True, False, False, False]
    assert [x is None for x in found["heat"]["density"][0]] == [x is None for x in row]
    mask = found["densities"]["mask"]
    assert found["densities"]["effective"] == pytest.approx((7 + 3 * mask) / 10)
    assert found["flops"]["attention"] == pytest.approx(found["flops"]["dense_attention"] * (7 + 3 * mask) / 10)


def test_a_schedule_without_sparse_calls_gives_no_numbers():
    found = collect(AllBlocksProcessor(schedule=Schedule(first=9)), steps=2)
    assert (found["mean"], found["worst"], found["layers"]) == ({}, None, [])
    assert found["densities"] == {"mask": None, "kernel": None, "effective": 1.0}


def test_fewer_steps_measured_and_state_that_sees_them_all():
    seen = []

    class Stateful(AllBlocks):
        static = False

        def plan(self, q, k, v, call):
            slot = call.state.slot(call.step, call.layer)
            slot["steps"] = slot.get("steps", 0) + 1
            seen.append((call.step.branch, call.layer, slot["steps"]))
            return super().plan(q, k, v, call)

    found = collect(Processor(Stateful(16), schedule=Schedule.none()), steps=6, **{"rows": 8})
    assert max(n for *_, n in seen) == 6
    collector = Collector({"it": Processor(Stateful(16), schedule=Schedule.none())}, rows=8, steps=2)
    seen.clear()
    for index in range(6):
        collector.observe(*tensors(), Call(LAYOUT, step=Step(index, 6), state=State()))
    (row,) = collector.result()["it"]["heat"]["rel_l1"]
    assert [x is not None for x in row] == [False, True, False, False, True, False]
    assert len(seen) == 6
    assert found["layers"][0]["calls"] == 12


def test_densities_weigh_blocks_by_their_size():
    """Queries in blocks of 2 and 6, keys of 1 and 3: (2 x 1 + 6 x 3) / 32, where counting blocks gives a half."""
    mask = torch.eye(2, dtype=torch.bool)[None, None]
    plan = Plan(
        Layout(grid=(1, 1, 8)), Blocks(torch.tensor([0, 2, 8])), Blocks(torch.tensor([0, 1, 4])),
        BlockList.from_mask(mask), kv_layout=Layout(grid=(1, 1, 4)),
    )  # fmt: skip
    assert plan.density == 0.625


def test_the_kernel_computes_whole_tiles():
    """109 tokens in tiles of 16 are 7 x 7 tiles of 256 pairs."""
    plan = AllBlocks(16).plan(None, None, None, Call(LAYOUT))
    assert LAYOUT.tokens == 109
    assert kernel_density(plan) == pytest.approx(7 * 7 * 256 / 109**2)


def test_limits_are_checked():
    with pytest.raises(UsageError, match="at least 1"):
        Collector({}, rows=0)
    with pytest.raises(UsageError, match="at least 1"):
        Collector({}, steps=0)


def test_on_a_pipeline(tiny_wan):
    info = inspect_model(str(tiny_wan))
    job = Job((Prompt("a red ball"),), Path("."), size=(48, 32), frames=9, steps=3, accel=Acceleration("dense"))
    shots = resolve(job, info)
    pipe = load(info, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    processors = {
        "all": AllBlocksProcessor(block_size=4, schedule=Schedule.none(), backend="gather"),
        "random": RandomBlocksProcessor(block_size=4, density=0.3, schedule=Schedule(first=1), backend="gather"),
    }
    found = measure(pipe, shots, processors, backend="gather")
    assert found["all"]["mean"]["rel_l1"] < 1e-4 < found["random"]["mean"]["rel_l1"]
    assert [row["calls"] for row in found["random"]["layers"]] == [4, 4, 4]  # two steps, two guidance branches
    per_layer = layer_errors(pipe, shots, processors["random"])
    assert per_layer == pytest.approx([row["rel_l1"] for row in found["random"]["layers"]])
    assert len(per_layer) == 3
