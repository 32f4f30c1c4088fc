"""torch.compile: one graph, no recompilation over steps, loud where it cannot serve."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from dit_accel import RandomBlocksProcessor, Schedule
from dit_accel.diffusers import engines, ops
from tiny_models import WAN, tiny_pipeline, tiny_run, tiny_transformer

TIMESTEPS = (900, 700, 500, 300)
PROCESSOR = RandomBlocksProcessor(backend="gather", block_size=16, schedule=Schedule(first=1, steps={2}))


class Graphs:
    """A compile backend that runs graphs as they are and keeps them."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph, inputs):
        self.seen.append(graph)
        return graph.forward

    def operators(self):
        return [str(node.target) for graph in self.seen for node in graph.graph.nodes]


@pytest.fixture
def wan():
    torch._dynamo.reset()
    _, call, _ = tiny_transformer("wan")
    with torch.no_grad():
        yield small(layers=2), call
    torch._dynamo.reset()


def small(layers):
    torch.manual_seed(0)
    return WanTransformer3DModel(**{**WAN, "num_layers": layers}).eval()


def run(model, call):
    return [model(**{**call, "timestep": torch.full((2,), timestep)}).sample for timestep in TIMESTEPS]


def whole(model, graphs):
    return torch.compile(model, fullgraph=True, backend=graphs)


def in_place(model, graphs):
    model.compile(fullgraph=True, backend=graphs)
    return model


def regional(model, graphs):
    model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    return model


def inlined(model, graphs):
    return torch.compile(lambda **call: model(**call), fullgraph=True, backend=graphs)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("how", [whole, pytest.param(in_place, marks=SLOW), regional, inlined])
def test_one_graph_serves_every_step(wan, how):
    model, call = wan
    model.set_attn_processor(PROCESSOR)
    (engine,) = engines(model)
    eager = run(model, call)
    engine.reset_stats()
    graphs = Graphs()
    outputs = run(how(model, graphs), call)
    assert all(torch.equal(a, b) for a, b in zip(outputs, eager, strict=True))
    assert len(graphs.seen) == 1
    assert graphs.operators().count("dit_accel.attend.default") == (1 if how is regional else 2)
    assert (engine.stats.sparse, engine.stats.dense) == (4, {"schedule": 4})
    assert engine.forward.step.index == 3


@pytest.mark.parametrize("how", [whole, pytest.param(inlined, marks=SLOW)])
def test_a_second_resolution_compiles_once_more_at_most(wan, how):
    model, call = small(layers=1), wan[1]
    model.set_attn_processor(PROCESSOR)
    graphs = Graphs()
    compiled = how(model, graphs)
    for frames, height in ((3, 10), (2, 14), (4, 6)):
        compiled(**{**call, "hidden_states": torch.randn(2, 4, frames, height, 12)})
        assert engines(model)[0].forward.layout.grid == (frames, height // 2, 6)
    assert len(graphs.seen) <= 2
    assert not engines(model)[0].stats.fallback


def test_many_layers_share_one_regional_graph(wan):
    model = small(layers=12)
    model.set_attn_processor(PROCESSOR)
    graphs = Graphs()
    run(regional(model, graphs), wan[1])
    assert len(graphs.seen) == 1, "a layer identity that is a guard would recompile and hit the limit of 8"
    assert all(entry.sparse == 2 for entry in engines(model)[0].stats.layers)


@SLOW
def test_a_compiled_transformer_in_a_pipeline():
    torch._dynamo.reset()
    pipe = tiny_pipeline()
    pipe.set_attn_processor(PROCESSOR)
    eager = tiny_run(pipe)
    graphs = Graphs()
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=graphs)
    assert len(engines(pipe)) == 1
    assert torch.equal(tiny_run(pipe), eager)
    assert len(graphs.seen) == 1
    pipe.reset_attn_processor()
    assert engines(pipe) == []


@pytest.mark.parametrize("how", [pytest.param(whole, marks=SLOW), regional])
def test_the_guard_repairs_a_compiled_forward(wan, how, monkeypatch):
    model, call = wan
    stock = model(**call).sample
    model.set_attn_processor(RandomBlocksProcessor(density=1.0, backend="gather", schedule=Schedule.none()))
    (engine,) = engines(model)
    break_layer(monkeypatch, 1)
    out = how(model, Graphs())(**call).sample
    assert (out - stock).abs().max() < 1e-5
    assert [event["layer"] for event in engine.stats.guard_events] == [1]


@SLOW
def test_a_fault_inside_a_larger_graph_is_told_at_the_next_forward(wan, monkeypatch):
    model, call = wan
    model.set_attn_processor(RandomBlocksProcessor(density=1.0, backend="gather", schedule=Schedule.none()))
    (engine,) = engines(model)
    break_layer(monkeypatch, 1)
    compiled = inlined(model, Graphs())
    assert not compiled(**call).sample.isfinite().all()
    assert compiled(**{**call, "timestep": torch.full((2,), 400)}).sample.isfinite().all()
    assert engine.stats.guard_events == [{"layer": 1, "name": "blocks.1.attn1", "step": 0, "kind": "nonfinite"}]
    assert "compile the transformer itself" in engine.stats.warnings[-1]


def break_layer(monkeypatch, layer):
    from dit_accel.diffusers import engine as module

    attend = module.attend
    current = []
    stock = module.Engine._sparse
    monkeypatch.setattr(module.Engine, "_sparse", lambda self, i, *a: current.append(i) or stock(self, i, *a))
    monkeypatch.setattr(module, "attend", lambda *a, **k: attend(*a, **k) * (torch.nan if current[-1] == layer else 1))


def test_compiled_training_is_refused(wan):
    model, call = small(layers=1), wan[1]
    model.set_attn_processor(PROCESSOR)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.enable_grad(), pytest.raises(RuntimeError, match="compiled training"):
        compiled(**call).sample.sum().backward()


@pytest.mark.parametrize("form", ["BSHD", "BHSD"])
def test_the_operators_are_well_formed(wan, form):
    model, call = wan
    model.set_attn_processor(PROCESSOR)
    model(**call)
    handle = model.blocks[1].attn1.processor._handle
    q = torch.randn((1, 90, 2, 12) if form == "BSHD" else (1, 2, 90, 12))
    checks = ("test_schema", "test_faketensor")
    arguments = (q, q.clone(), q.clone(), None, handle, form, 0.0, False, None, False, None)
    torch.library.opcheck(ops.attend, arguments, test_utils=checks)
    packed = ops.pack((torch.randn(1, 4, 3, 10, 12),))
    torch.library.opcheck(ops.begin_forward, (torch.tensor([5]), handle, *packed), test_utils=checks)


def test_what_an_operator_is_told_survives_packing():
    tensor = torch.zeros(2)
    value = (None, 3, tensor, ((1, (8, 11)), None), ())
    form, tensors, numbers = ops.pack(value)
    assert ops.unpack(form, tensors, numbers)[3:] == value[3:]
    assert ops.unpack(form, tensors, numbers)[2] is tensor
    assert ops.unpack(form, tensors, numbers)[:2] == value[:2]


@SLOW
def test_inductor(wan):
    model, call = wan
    model.set_attn_processor(PROCESSOR)
    eager = run(model, call)
    outputs = run(torch.compile(model, fullgraph=True), call)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs, eager, strict=True))
