"""How a model is run, copied and addressed: compilation, backends, copies, threads, modular pipelines."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from feature_trials import SPARSE, Clock, denoise, trial

from dit_accel import AllBlocksProcessor, RandomBlocksProcessor, Schedule
from dit_accel.diffusers import engines
from tiny_models import FAMILIES, tiny_pipeline, tiny_run, tiny_transformer

SLOW = pytest.mark.slow


class Graphs:
    """A compile backend that counts the graphs it is given and their calls, and runs them as they are."""

    def __init__(self):
        self.graphs = self.calls = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*args):
            self.calls += 1
            return graph.forward(*args)

        return run


@pytest.mark.parametrize("how", ["regional", "whole"])
@pytest.mark.parametrize("family", [FAMILIES[0], *(pytest.param(family, marks=SLOW) for family in FAMILIES[1:])])
@torch.no_grad()
def test_compile(family, how, record_feature):
    if how == "whole" and family == "wan":
        pytest.skip("test_compile.py has this one")
    if how == "regional" and family == "cogvideox":
        pytest.skip("diffusers names no repeated blocks for this model")
    torch._dynamo.reset()
    processor = RandomBlocksProcessor(density=0.4, **SPARSE)
    model, call, _ = tiny_transformer(family)
    model.set_attn_processor(processor)
    expected, graphs = denoise(model, call, Clock()), Graphs()
    engines(model)[0].reset_stats()
    if how == "regional":
        model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    else:
        model.compile(backend=graphs)
    out = denoise(model, call, Clock())
    torch._dynamo.reset()
    stats = engines(model)[0].stats
    assert (out - expected).abs().max() < 1e-5
    assert graphs.calls > 0
    assert stats.sparse == 6 * len(stats.layers)
    assert not stats.fallback
    what = "compile_repeated_blocks, fullgraph" if how == "regional" else "torch.compile of the model"
    record_feature(what, type(model).__name__, f"equal, {graphs.graphs} graph{'s' * (graphs.graphs > 1)}")


@pytest.mark.parametrize("enable_first", [True, False], ids=["backend-first", "processor-first"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_backend(family, enable_first, record_feature):
    """It stays the backend of the dense calls and never switches the method off."""
    active = _AttentionBackendRegistry.get_active_backend()[0]
    reached, registry = [], _AttentionBackendRegistry._backends
    stock = registry[AttentionBackendName._NATIVE_MATH]
    registry[AttentionBackendName._NATIVE_MATH] = lambda **call: reached.append(1) or stock(**call)
    try:
        found = trial(
            family, lambda model, clock: model.set_attention_backend("_native_math"), enable_first=enable_first
        )
        served = bool(reached)
        assert served == (family != "cogvideox"), "models that call SDPA themselves know no backends"
        if served:
            reached.clear()
            found.model.set_attn_processor(AllBlocksProcessor(**{**SPARSE, "schedule": Schedule(first=3)}))
            _, call, _ = tiny_transformer(family)
            denoise(found.model, call, Clock())
            stats = engines(found.model)[0].stats
            assert len(reached) >= stats.dense["schedule"] > 0
            assert stats.sparse > 0
    finally:
        registry[AttentionBackendName._NATIVE_MATH] = stock
        _AttentionBackendRegistry.set_active_backend(active)
    told = found.told() + "; dense calls take the backend" if served else "no backends on this model"
    record_feature("set_attention_backend", type(found.model).__name__, told)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save and reload"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_copies_are_stock_and_can_be_accelerated(family, how, tmp_path, record_feature):
    model, call, _ = tiny_transformer(family)
    expected = model(**call).sample
    model.set_attn_processor(RandomBlocksProcessor(density=0.3, **SPARSE))
    sparse = model(**call).sample
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        model.save_pretrained(tmp_path)
        twin = type(model).from_pretrained(tmp_path).eval()
    assert engines(twin) == []
    assert torch.allclose(twin(**call).sample, expected, atol=1e-5)
    twin.set_attn_processor(RandomBlocksProcessor(density=0.3, **SPARSE))
    assert torch.allclose(twin(**call).sample, sparse, atol=1e-5)
    assert engines(twin)[0].stats.sparse == engines(model)[0].stats.sparse > 0
    assert (sparse - expected).abs().max() > 1e-4
    record_feature(how, type(model).__name__, "the copy is stock and takes a processor of its own")


def test_two_threads_with_a_pipeline_each(record_feature):
    """Different sizes and seeds at once: nothing of one reaches the other. One pipeline serves one thread at a time."""
    jobs = [(tiny_pipeline(), 1, 9), (tiny_pipeline(), 2, 13)]
    for pipe, seed, _ in jobs:
        pipe.set_attn_processor(RandomBlocksProcessor(seed=seed, density=0.3, **SPARSE))
    alone = [tiny_run(pipe, num_frames=frames) for pipe, _, frames in jobs]
    for _ in range(3):
        with ThreadPoolExecutor(2) as threads:
            together = list(threads.map(lambda job: tiny_run(job[0], num_frames=job[2]), jobs))
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert all(engines(pipe)[0].stats.sparse == 4 * 24 for pipe, *_ in jobs)
    assert not any(engines(pipe)[0].stats.fallback for pipe, *_ in jobs)
    record_feature("two threads, a pipeline each", type(jobs[0][0].transformer).__name__, "equal to each alone")


def test_a_modular_pipeline(record_feature):
    from diffusers import WanBlocks

    parts = tiny_pipeline().components
    pipe = WanBlocks().init_pipeline()
    pipe.update_components(
        **{name: parts[name] for name in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")}
    )

    def run():
        return pipe(
            prompt="a red ball runs", negative_prompt="slow", num_inference_steps=3, height=32, width=48, num_frames=9,
            generator=torch.Generator().manual_seed(0), output="videos", output_type="pt", max_sequence_length=8,
        )  # fmt: skip

    stock = run()
    pipe.set_attn_processor(AllBlocksProcessor(**SPARSE))
    assert (run() - stock).abs().max() < 1e-4
    (engine,) = engines(pipe)
    assert (engine.stats.sparse, engine.stats.fallback) == (18, 0)
    assert (engine.forward.step.index, engine.forward.step.total) == (2, 3)
    pipe.set_attn_processor(RandomBlocksProcessor(density=0.2, **SPARSE))
    assert (run() - stock).abs().max() > 1e-4
    pipe.reset_attn_processor()
    assert torch.equal(run(), stock)
    record_feature("modular pipeline", type(parts["transformer"]).__name__, "equal, steps known")
