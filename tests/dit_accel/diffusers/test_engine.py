"""The engine's decisions, its counters, and the guard."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from dit_accel import (
    AllBlocksProcessor,
    Guard,
    PisaProcessor,
    Processor,
    QuantProcessor,
    RandomBlocksProcessor,
    Schedule,
    UnsupportedError,
    functional,
)
from dit_accel.diffusers import engine as engine_module
from dit_accel.diffusers import engines
from dit_accel.guard import Flags
from tiny_models import tiny_pipeline, tiny_run, tiny_transformer

SPARSE = {"backend": "gather", "schedule": Schedule.none(), "block_size": 16}


@pytest.fixture
def wan():
    model, call, _ = tiny_transformer("wan")
    with torch.no_grad():
        yield model, call, model(**call).sample


def poison(monkeypatch, layers, calls=None, times=10**9):
    """The sparse kernel answers NaN at ``layers``, for the first ``times`` calls there."""
    stock, left = engine_module.Engine._sparse, [times]

    def sparse(self, layer, call, *rest):
        with monkeypatch.context() as patch:
            if layer in layers and left[0] > 0:
                left[0] -= 1
                attend = engine_module.attend
                patch.setattr(engine_module, "attend", lambda *a, **k: attend(*a, **k).fill_(torch.nan))
            return stock(self, layer, call, *rest)

    monkeypatch.setattr(engine_module.Engine, "_sparse", sparse)


def test_a_faulty_layer_is_named_and_runs_dense(wan, monkeypatch):
    model, call, stock = wan
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    poison(monkeypatch, {1})
    (engine,) = engines(model)
    out = model(**call).sample
    assert (out - stock).abs().max() < 1e-5
    stats = engine.stats
    assert stats.guard_events == [{"layer": 1, "name": "blocks.1.attn1", "step": 0, "kind": "nonfinite"}]
    assert (stats.forwards, stats.repeats, stats.dense) == (1, 1, {"guard": 1})
    assert any("blocks.1.attn1" in warning for warning in stats.warnings)
    model(**{**call, "timestep": torch.full((2,), 400)})
    assert (stats.forwards, stats.repeats, len(stats.guard_events)) == (2, 1, 1), "dense for the rest of the run"
    assert engine.forward.step.index == 1, "a repeat is no step of its own"


def test_two_faulty_layers_are_both_named_by_one_repeat(wan, monkeypatch):
    model, call, stock = wan
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    poison(monkeypatch, {0, 2})
    assert (model(**call).sample - stock).abs().max() < 1e-5
    stats = engines(model)[0].stats
    assert [event["layer"] for event in stats.guard_events] == [0, 2]
    assert stats.repeats == 1


def test_a_transient_fault_is_repaired_and_told(wan, monkeypatch):
    model, call, stock = wan
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    poison(monkeypatch, {1}, times=1)
    assert (model(**call).sample - stock).abs().max() < 1e-5
    stats = engines(model)[0].stats
    assert (stats.repeats, stats.guard_events) == (1, [])
    assert "transient" in stats.warnings[-1]


def test_a_model_that_is_not_finite_by_itself_blames_no_layer(wan):
    model, call, _ = wan
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    model(**{**call, "hidden_states": call["hidden_states"] * torch.nan})
    stats = engines(model)[0].stats
    assert (stats.guard_events, stats.dense, stats.repeats) == ([], {}, 1)


def test_a_forward_that_ended_in_an_error_blames_no_layer(wan, monkeypatch):
    model, call, stock = wan
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    poison(monkeypatch, {0}, times=1)
    (engine,) = engines(model)
    hook = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**call)
    hook.remove()
    assert (model(**call).sample - stock).abs().max() < 1e-5
    assert engine.stats.guard_events == []
    assert (engine.stats.repeats, engine.stats.dense) == (0, {})
    assert not [warning for warning in engine.stats.warnings if "guard" in warning]


def test_a_new_run_trusts_the_layer_again(monkeypatch):
    pipe = tiny_pipeline()
    pipe.set_attn_processor(AllBlocksProcessor(**SPARSE))
    poison(monkeypatch, {1})
    for _ in range(2):
        assert tiny_run(pipe, steps=2, guidance_scale=1.0).isfinite().all()
    events = engines(pipe)[0].stats.guard_events
    assert [(event["layer"], event["step"]) for event in events] == [(1, 0), (1, 0)]


def test_the_guard_costs_one_read_per_forward_with_sparse_calls(wan, monkeypatch):
    model, call, _ = wan
    reads, read = [], Flags.read
    monkeypatch.setattr(Flags, "read", lambda self, *group: reads.append(1) or read(self, *group))
    model.set_attn_processor(AllBlocksProcessor(**{**SPARSE, "schedule": Schedule(first=1)}))
    for timestep in (900, 600, 300):
        model(**{**call, "timestep": torch.full((2,), timestep)})
    stats = engines(model)[0].stats
    assert (stats.forwards, stats.flag_reads, len(reads)) == (3, 2, 2)
    model.set_attn_processor(AllBlocksProcessor(guard=Guard.off(), **SPARSE))
    model(**call)
    assert engines(model)[0].stats.flag_reads == 0
    assert len(reads) == 2


def test_a_call_with_other_tokens_runs_stock(wan):
    model, call, stock = wan
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    engine = engines(model)[0]
    layout = engine.family.layout
    object.__setattr__(engine, "family", type(engine.family)(**{**vars(engine.family), "layout": lambda c, h: layout(
        c, h[:, :, 1:])}))  # fmt: skip
    assert torch.equal(model(**call).sample, stock)
    assert engine.stats.dense == {"layout": 3}
    (warning,) = engine.stats.warnings
    assert "family 'wan' expected 60 tokens (main 2x5x6); the call has 90" in warning


@pytest.mark.parametrize(("argument", "reason"), [({"is_causal": True}, "causal"), ({"dropout_p": 0.5}, "dropout")])
def test_what_the_engine_does_not_understand_gets_the_stock_arguments(wan, monkeypatch, argument, reason):
    model, call, _ = wan
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    seen = []
    import diffusers.models.transformers.transformer_wan as module

    stock = module.dispatch_attention_fn
    monkeypatch.setattr(module, "dispatch_attention_fn", lambda *a, **k: seen.append(k) or stock(*a, **k))
    processor = model.blocks[0].attn1.processor
    q = torch.randn(1, 90, 2, 12)
    model(**call)
    processor._attend_bshd(module.dispatch_attention_fn, q, q, q, backend=None, scale=0.3, **argument)
    assert engines(model)[0].stats.dense == {reason: 1}
    expected = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": 0.3, "backend": None, **argument}
    assert {name: seen[-1][name] for name in expected} == expected


def test_ring_attention_runs_stock_and_says_so(wan):
    model, call, _ = wan
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    model(**call)
    q, seen = torch.randn(1, 90, 2, 12), []

    def primitive(query, key, value, **arguments):
        seen.append(arguments["parallel_config"])
        return query

    degrees = SimpleNamespace(ring_degree=2, ulysses_degree=1)
    config = SimpleNamespace(context_parallel_config=degrees)
    assert model.blocks[0].attn1.processor._attend_bshd(primitive, q, q, q, parallel_config=config) is q
    assert seen == [config]
    stats = engines(model)[0].stats
    assert stats.dense == {"context-parallel": 1}
    assert "use ContextParallelConfig(ulysses_degree=2)" in stats.warnings[-1]


def test_on_unsupported_error_raises(wan):
    model, call, _ = wan
    model.set_attn_processor(AllBlocksProcessor(on_unsupported="error", **SPARSE))
    model(**call)
    q = torch.randn(1, 90, 2, 12)
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.attn1: causal attention"):
        model.blocks[0].attn1.processor._attend_bshd(None, q, q, q, is_causal=True)


def test_a_backend_set_meanwhile_reaches_the_dense_path_and_stays(wan):
    model, _, _ = wan
    before = model.blocks[0].attn1.processor
    model.set_attn_processor(AllBlocksProcessor(**{**SPARSE, "schedule": Schedule(first=5)}))
    model.blocks[0].attn1.set_attention_backend("_native_math")
    model.reset_attn_processor()
    assert model.blocks[0].attn1.processor is before
    assert before._attention_backend == "_native_math"


def test_gradients_flow_through_the_gather_tier():
    model, call, _ = tiny_transformer("wan")
    parameter = model.blocks[0].attn1.to_q.weight
    model(**call).sample.square().mean().backward()
    expected, parameter.grad = parameter.grad, None
    model.set_attn_processor(AllBlocksProcessor(schedule=Schedule.none(), block_size=16))
    model(**call).sample.square().mean().backward()
    (engine,) = engines(model)
    assert engine.stats.tiers == {"gather": 3}
    assert (parameter.grad - expected).abs().max() < 1e-6
    model.set_attn_processor(AllBlocksProcessor(schedule=Schedule.none(), backend="flex"))
    model(**call).sample.sum().backward()
    assert engines(model)[0].stats.dense == {"training": 3}


def test_gradient_checkpointing():
    model, call, _ = tiny_transformer("wan")
    model.train().enable_gradient_checkpointing()
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    model(**call).sample.sum().backward()
    assert model.blocks[0].attn1.to_q.weight.grad.isfinite().all()
    assert engines(model)[0].stats.sparse == 6


@pytest.mark.parametrize("processor", [AllBlocksProcessor(**SPARSE), QuantProcessor("sage1")], ids=["all", "quant"])
@pytest.mark.parametrize("family", ["wan", "hunyuan-video", "qwen-image"])
def test_autocast(family, processor):
    """Query and key come in float32 there, the value in bfloat16."""
    model, call, _ = tiny_transformer(family)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        stock = model(**call).sample
        model.set_attn_processor(processor)
        mine = model(**call).sample
    assert mine.dtype == stock.dtype
    assert (mine - stock).float().norm() < 0.05 * stock.float().norm()
    (engine,) = engines(model)
    assert all(layer.sparse for layer in engine.stats.layers)
    assert (engine.stats.dense, engine.stats.repeats) == ({}, 0)


def test_timing_covers_dense_and_sparse_attention():
    pipe = tiny_pipeline()
    stock = tiny_run(pipe)
    pipe.set_attn_processor(Processor(None))
    (engine,) = engines(pipe)
    assert engine.stats.attention_seconds is None
    engine.stats.timing = True
    assert torch.equal(tiny_run(pipe), stock)
    assert 0 < engine.stats.attention_seconds < 60
    assert engine.stats.dense == {"baseline": 24}
    assert (engine.stats.fallback, engine.stats.effective_density) == (0, 1.0)
    engine.reset_stats()
    assert engine.stats.attention_seconds == 0
    pipe.set_attn_processor(RandomBlocksProcessor(**SPARSE))
    (engine,) = engines(pipe)
    engine.stats.timing = True
    tiny_run(pipe)
    assert engine.stats.attention_seconds > engine.stats.planning_seconds > 0


def test_effective_density_weighs_dense_and_sparse_calls(wan):
    model, call, _ = wan
    schedule = Schedule(first=1, layers={2})
    model.set_attn_processor(RandomBlocksProcessor(density=0.3, **{**SPARSE, "schedule": schedule}))
    (engine,) = engines(model)
    for timestep in (900, 600):
        model(**{**call, "timestep": torch.full((2,), timestep)})
    density = engine.stats.layers[0].density
    assert 0.3 < density < 0.6
    assert engine.stats.layers[2].density is None
    assert engine.stats.density == pytest.approx(density)
    assert engine.stats.effective_density == pytest.approx((4 + 2 * density) / 6)
    assert engine.stats.to_dict()["tiers"] == {"gather": 2}


def test_the_flex_tier(wan):
    model, call, stock = wan
    model.set_attn_processor(AllBlocksProcessor(backend="flex", schedule=Schedule.none(), block_size=32))
    assert (model(**call).sample - stock).abs().max() < 1e-5
    assert engines(model)[0].stats.tiers == {"flex": 3}


def test_a_call_chooses_its_tier_once(wan, monkeypatch):
    model, call, _ = wan
    model.set_attn_processor(PisaProcessor(**SPARSE))
    asked, stock = [], functional.choose
    monkeypatch.setattr(functional, "choose", lambda *a, **k: asked.append(k["backend"]) or stock(*a, **k))
    model(**call)
    (engine,) = engines(model)
    assert engine.stats.tiers == {"gather": len(asked)}
    assert asked


@torch.no_grad()
def test_a_forward_that_fails_midway_lets_its_inputs_go():
    model, call, _ = tiny_transformer("hunyuan-video")
    expected = model(**call).sample
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))

    def fail(*_):
        raise MemoryError("no room")

    broken = model.norm_out.register_forward_pre_hook(fail)
    inputs = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    freed = []
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor):
            weakref.finalize(x, freed.append, name)
    wanted = [name for name, x in inputs.items() if isinstance(x, torch.Tensor)]
    x = None
    with pytest.raises(MemoryError):
        model(**inputs)
    inputs.clear()
    gc.collect()
    assert sorted(freed) == sorted(wanted)
    broken.remove()
    torch.testing.assert_close(model(**call).sample, expected, atol=1e-5, rtol=1e-5)
    assert engines(model)[0].stats.repeats == 0
