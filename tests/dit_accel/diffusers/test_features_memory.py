"""Features that move or store weights differently: offloading in its forms, layerwise casting."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, CpuOffload
from diffusers.hooks.group_offloading import ModuleGroup
from feature_trials import SPARSE, trial

from dit_accel import AllBlocksProcessor
from dit_accel.diffusers import engines
from tiny_models import FAMILIES, tiny_pipeline, tiny_run

ORDERS = pytest.mark.parametrize("enable_first", [True, False], ids=["feature-first", "processor-first"])


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_group_offload_to_disk(family, kind, tmp_path, monkeypatch, record_feature):
    """On a CPU, moving between memories moves nothing, and to disk and back really does."""
    loads, onload = [], ModuleGroup._onload_from_disk
    monkeypatch.setattr(ModuleGroup, "_onload_from_disk", lambda self: loads.append(self) or onload(self))
    folders = iter(tmp_path / str(i) for i in range(9))

    def enable(model, clock):
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type=kind, offload_to_disk_path=str(next(folders)), **blocks
        )

    found = trial(family, enable, enable_first=family == "wan")
    assert loads, "the groups must have been read back from disk"
    assert torch.equal(found.plain, found.featured)
    record_feature(f"group offload, {kind.replace('_', ' ')}", type(found.model).__name__, found.told())


@ORDERS
@pytest.mark.parametrize("family", ["wan", "flux", "hunyuan-video"])
@torch.no_grad()
def test_sequential_offload(family, enable_first, record_feature):
    """What ``enable_sequential_cpu_offload`` does to each model; the weights lie on the meta device between calls."""
    found = trial(family, lambda model, clock: cpu_offload(model, execution_device="cpu"), enable_first=enable_first)
    assert {p.device.type for p in found.model.parameters()} == {"meta"}
    assert any(isinstance(getattr(m, "_hf_hook", None), AlignDevicesHook) for m in found.model.modules())
    record_feature("sequential CPU offload", type(found.model).__name__, found.told())


@ORDERS
@pytest.mark.parametrize("family", ["wan", "flux", "hunyuan-video"])
@torch.no_grad()
def test_model_offload_places_its_hook_around_ours(family, enable_first, monkeypatch, record_feature):
    """What ``enable_model_cpu_offload`` does to each model. The CPU is both memories: placement is what is shown."""
    moves, pre_forward = [], CpuOffload.pre_forward
    monkeypatch.setattr(
        CpuOffload, "pre_forward", lambda self, *a, **k: moves.append(self) or pre_forward(self, *a, **k)
    )
    found = trial(family, lambda model, clock: cpu_offload_with_hook(model, "cpu"), enable_first=enable_first)
    assert isinstance(found.model._hf_hook, CpuOffload)
    assert len(moves) == 3 * 6, "once per forward, featured stock, accelerated and after the reset"
    record_feature("model CPU offload (hook placement)", type(found.model).__name__, found.told())


@ORDERS
def test_model_offload_of_a_pipeline(enable_first, record_feature):
    """The pipeline's method, with the CPU named as the accelerator."""
    expected = tiny_run(tiny_pipeline())
    pipe = tiny_pipeline()
    if enable_first:
        pipe.enable_model_cpu_offload(device="cpu")
    pipe.set_attn_processor(AllBlocksProcessor(**SPARSE))
    if not enable_first:
        pipe.enable_model_cpu_offload(device="cpu")
    assert isinstance(pipe.transformer._hf_hook, CpuOffload)
    for _ in range(2):
        assert (tiny_run(pipe) - expected).abs().max() < 1e-4
    (engine,) = engines(pipe)
    assert engine.stats.sparse == 2 * 4 * 2 * 3
    assert engine.forward.step.run == 1, "ending a run re-installs the hooks and must leave the engine in its place"
    pipe.reset_attn_processor()
    assert torch.equal(tiny_run(pipe), expected)
    record_feature("enable_model_cpu_offload of the pipeline", type(pipe.transformer).__name__, "equal, two runs")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layerwise_casting(family, record_feature):
    def enable(model, clock):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    found = trial(family, enable, enable_first=family in ("wan", "flux"))
    assert torch.float8_e4m3fn in {p.dtype for p in found.model.parameters()}
    assert not torch.allclose(found.plain, found.featured, atol=1e-4), "eight bits must be seen in the output"
    record_feature("layerwise casting to float8", type(found.model).__name__, found.told())
