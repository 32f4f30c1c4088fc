"""The guard's sampled checks at work: broken kernels are caught, right ones are left alone, drift is measured."""

import warnings

import numpy as np
import pytest
import torch
from quantised import COMPUTE, LATE, make, tensors

from dit_accel import (
    AllBlocksProcessor,
    GNAProcessor,
    Guard,
    Layout,
    RadialProcessor,
    RandomBlocksProcessor,
    Schedule,
    VMoBAProcessor,
    attend,
)
from dit_accel import plan as plan_of
from dit_accel.diffusers import describe, engines
from dit_accel.diffusers import engine as engine_module
from dit_accel.diffusers.stats import Stats
from dit_accel.diffusers.watch import Ran, Watch
from dit_accel.errors import UnsupportedError
from dit_accel.eval.fidelity import psnr
from dit_accel.methods import REGISTRY, Radial
from dit_accel.step import Step
from tiny_models import tiny_pipeline, tiny_run

SPARSE = {"backend": "gather", "schedule": Schedule.none(), "block_size": 16}
METHODS = sorted(REGISTRY.keys() - {"observe"})


def _scaled(q, *rest, scale=None, **more):
    return attend(q, *rest, scale=4 * (scale or q.shape[-1] ** -0.5), **more)


def _without_tail(q, *rest, kv_valid=None, **more):
    short = torch.full((q.shape[0],), q.shape[2] - 7, dtype=torch.int32)
    return attend(q, *rest, kv_valid=short, **more)


def _one_head(*args, **more):
    out = attend(*args, **more)
    out[:, -1] = torch.nan
    return out


BROKEN = {"wrong scale": _scaled, "dropped tail": _without_tail, "NaN in one head": _one_head}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def dense(pipe):
    pipe.reset_attn_processor()
    return video(pipe)


def video(pipe):
    """Frames (T, H, W, 3) in [0, 1], the same for the same attention."""
    return pipe(
        prompt="a red ball runs", negative_prompt="slow", num_inference_steps=3, max_sequence_length=8, height=32,
        width=48, num_frames=9, guidance_scale=4.0, output_type="np", generator=torch.Generator().manual_seed(0),
    ).frames[0]  # fmt: skip


def ran(method, layout, quant=None, backend="gather", kernel=attend, seed=0):
    q, k, v = tensors(layout, seed=seed)
    plan = plan_of(q, k, v, method, layout=layout, step=LATE)
    out = kernel(q, k, v, plan=plan, layout=layout, backend=backend, quant=quant)
    return Ran(q, k, v, out, plan, None, None, quant)


def watch(**settings):
    return Watch(Guard(rate=1.0, **settings), Stats([("layer", "self")]), lambda text: None)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_kernel_is_caught_in_one_forward_and_the_video_is_the_dense_one(pipe, dense, broken, monkeypatch):
    monkeypatch.setattr(engine_module, "attend", BROKEN[broken])
    pipe.set_attn_processor(AllBlocksProcessor(guard=Guard.off(), **SPARSE))
    harmed = np.nan_to_num(video(pipe))
    assert psnr(harmed, dense) < 80
    pipe.set_attn_processor(AllBlocksProcessor(guard=Guard(nonfinite=False), **SPARSE))
    saved = video(pipe)
    stats = engines(pipe)[0].stats
    assert psnr(saved, dense) > 99, "within 1 dB of dense, whose PSNR to itself is capped at 100"
    assert [(e["kind"], e["step"]) for e in stats.guard_events] == [("fault", 0)] * len(stats.layers)
    assert stats.repeats == 1, "one forward found all of them"
    for event in stats.guard_events:
        assert event["limit"] == 0.01
        assert event["value"] > 0.01
    told = str(describe(pipe))
    assert "3 layers taken out of use" in told
    assert "the layer runs dense until the run ends" in told


def test_a_right_kernel_runs_on_and_its_drift_is_told(pipe):
    pipe.set_attn_processor(RandomBlocksProcessor(guard=Guard(drift=True, rate=0.5), **SPARSE))
    tiny_run(pipe, steps=3)
    stats = engines(pipe)[0].stats
    assert (stats.guard_events, stats.repeats) == ([], 0)
    assert 0 < stats.checks < stats.sparse
    drift = stats.to_dict()["drift"]
    assert 0.01 < drift["mean"] <= drift["max"]
    assert all(layer.checks and layer.drift for layer in stats.layers), "the first call of each layer is sampled"
    assert describe(pipe).to_dict()["models"][0]["layers"][0]["drift"]


def test_a_layer_over_its_own_drift_budget_runs_dense(pipe, dense):
    guard = Guard(drift=True, budget=(1e-4, 1e9))
    pipe.set_attn_processor(RandomBlocksProcessor(guard=guard, **SPARSE))
    tiny_run(pipe, steps=3)
    stats = engines(pipe)[0].stats
    (event,) = stats.guard_events
    assert (event["layer"], event["kind"], event["limit"]) == (0, "drift", 1e-4)
    assert stats.layers[0].sparse == 1, "that of the forward thrown away"
    assert stats.layers[1].fallback == 0
    pipe.set_attn_processor(RandomBlocksProcessor(guard=Guard(drift=True, budget=1e-4), **SPARSE))
    assert psnr(video(pipe), dense) > 99


def test_equal_runs_are_sampled_alike(pipe):
    found = []
    for _ in range(2):
        pipe.set_attn_processor(RadialProcessor(guard=Guard(drift=True, rate=0.5), **SPARSE))
        tiny_run(pipe, steps=2)
        found.append([(layer.checks, layer.drift) for layer in engines(pipe)[0].stats.layers])
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore:Clear is experimental")
@pytest.mark.parametrize("quant", [None, *COMPUTE])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_and_tier_passes_and_fails_as_it_should(name, quant, tmp_path):
    method, layout = make(name, tmp_path, Layout((3, 5, 6), text=5))
    recipe = COMPUTE[quant] if quant else None
    tiers = 0
    for backend in ("gather", "flash", "reference") if recipe is None else ("reference",):
        try:
            fine = ran(method, layout, recipe, backend)
        except UnsupportedError:
            continue
        tiers += 1
        one = watch()
        assert one.look(0, LATE, fine)
        assert one.read() == {}
        assert one.passes(0, LATE, fine)
        broken = ran(method, layout, recipe, backend, _scaled)
        worse = [ran(method, layout, recipe, backend, _one_head)]
        if quant != "int4":  # whose rounding is as large as what a wrong scale changes
            worse.append(broken)
        if quant is None:  # a few keys are within what rounding to 8 bits is allowed
            worse.append(ran(method, layout, recipe, backend, _without_tail))
        for bad in worse:
            assert one.look(0, LATE, bad)
            assert one.read()
            assert not one.passes(0, LATE, bad)
    assert tiers


def test_a_right_kernel_raises_no_flag_in_a_thousand_calls():
    method, layout = Radial(block_size=16), Layout((4, 3, 5), text=4)
    one = watch(drift=True, budget=1e3)
    plan = plan_of(None, None, None, method, layout=layout)
    g = torch.Generator().manual_seed(0)
    for i in range(1000):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        q, k, v = (torch.randn(3, 1, 2, layout.tokens, 16, generator=g) * (1 + i % 5)).to(dtype)
        out = attend(q, k, v, plan=plan, layout=layout, backend="gather")
        one.look(0, Step(i, 1000), Ran(q, k, v, out, plan, None, None, None))
    assert one.read() == {}
    assert one._stats.checks == 1000


def test_inputs_that_are_not_finite_blame_no_layer():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = ran(Radial(block_size=16), Layout((3, 4, 5)))
    bad = Ran(fine.q, fine.k * torch.nan, fine.v, fine.out * torch.nan, fine.plan, None, None, None)
    assert watch().passes(0, LATE, bad)


@pytest.mark.parametrize("processor", [GNAProcessor(window=(2, 2, 3), base_size=-1, schedule=Schedule.none()),
                                       VMoBAProcessor(schedule=Schedule.none())], ids=["gna", "vmoba"])  # fmt: skip
def test_a_weight_that_is_not_finite_is_told_whatever_tier_runs(processor):
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.transformer.blocks[0].attn1.norm_q.weight[0] = torch.nan
    pipe.set_attn_processor(processor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frames = video(pipe)
    (engine,) = engines(pipe)
    assert np.isnan(frames).all()
    assert engine.stats.repeats
    assert any("were not finite" in text or "non-finite" in text for text in engine.stats.warnings)
