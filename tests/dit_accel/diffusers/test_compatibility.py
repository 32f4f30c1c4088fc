"""Beside other features of diffusers: the same as that feature alone, and proof that it was active."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

from dit_accel import AllBlocksProcessor, Schedule
from dit_accel.diffusers import engines
from tiny_models import tiny_pipeline, tiny_run, tiny_transformer

SPARSE = {"backend": "gather", "schedule": Schedule.none(), "block_size": 16}


def first_block(pipe):
    return FirstBlockCacheConfig(threshold=0.3)


def broadcast(pipe):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=("blocks",), current_timestep_callback=lambda: pipe.current_timestep,
    )  # fmt: skip


@pytest.mark.parametrize("cache", [first_block, broadcast])
@pytest.mark.parametrize("cache_first", [True, False])
def test_caches(cache, cache_first):
    plain = tiny_pipeline()
    without = tiny_run(plain)
    plain.transformer.enable_cache(cache(plain))
    expected = tiny_run(plain)
    pipe = tiny_pipeline()
    steps = [
        lambda: pipe.transformer.enable_cache(cache(pipe)),
        lambda: pipe.set_attn_processor(AllBlocksProcessor(**SPARSE)),
    ]
    for step in steps if cache_first else reversed(steps):
        step()
    assert (tiny_run(pipe) - expected).abs().max() < 1e-4
    (engine,) = engines(pipe)
    assert 0 < engine.stats.sparse < 24, "some attention calls are skipped by the cache"
    assert not engine.stats.fallback
    pipe.transformer.disable_cache()
    pipe.reset_attn_processor()
    assert torch.equal(tiny_run(pipe), without)


def test_a_guarded_repeat_leaves_the_cache_as_it_was(monkeypatch):
    """A cache that kept the faulty forward's residuals would hand them to the repeat."""
    plain = tiny_pipeline()
    plain.transformer.enable_cache(first_block(plain))
    expected = tiny_run(plain)
    pipe = tiny_pipeline()
    pipe.transformer.enable_cache(first_block(pipe))
    pipe.set_attn_processor(AllBlocksProcessor(**SPARSE))
    from dit_accel.diffusers import engine as module

    attend, calls = module.attend, []

    def faulty(*args, **kwargs):
        calls.append(1)
        return attend(*args, **kwargs) * (torch.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(module, "attend", faulty)
    out = tiny_run(pipe)
    assert engines(pipe)[0].stats.repeats == 1
    assert (out - expected).abs().max() < 1e-4


@pytest.mark.parametrize("fuse_first", [True, False])
@torch.no_grad()
def test_fused_projections(fuse_first):
    model, call, _ = tiny_transformer("wan")
    stock = model(**call).sample
    if fuse_first:
        model.fuse_qkv_projections()
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    if not fuse_first:
        model.fuse_qkv_projections()
    assert model.blocks[0].attn1.fused_projections
    assert (model(**call).sample - stock).abs().max() < 1e-5
    assert engines(model)[0].stats.sparse == 3


def test_a_processor_rebuilt_by_upstream_code_is_stock():
    """IP-adapter unloading and the like rebuild processors as ``type(processor)()``."""
    model, _, _ = tiny_transformer("flux")
    stock = type(model.transformer_blocks[0].attn.processor)
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    processor = model.transformer_blocks[0].attn.processor
    assert isinstance(processor, stock)
    assert type(type(processor)()) is stock


def test_layer_skipping_finds_the_derived_class():
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    model, _, _ = tiny_transformer("flux")
    stock = type(model.transformer_blocks[0].attn.processor)
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    derived = type(model.transformer_blocks[0].attn.processor)
    assert AttentionProcessorRegistry.get(derived) is AttentionProcessorRegistry.get(stock)


@torch.no_grad()
def test_the_dispatcher_s_active_backend_leaves_sparse_attention_on():
    from diffusers.models.attention_dispatch import attention_backend

    model, call, _ = tiny_transformer("wan")
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    with attention_backend("_native_math"):
        model(**call)
    assert engines(model)[0].stats.sparse == 3


@torch.no_grad()
def test_lora_and_offloading():
    """Projections stay upstream's modules, so adapters and offload hooks on them keep working."""
    from accelerate import cpu_offload
    from peft import LoraConfig

    model, call, _ = tiny_transformer("wan")
    plain = model(**call).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    adapted = model(**call).sample
    assert (adapted - plain).abs().max() > 1e-3, "the adapter must matter"
    model.set_attn_processor(AllBlocksProcessor(**SPARSE))
    assert (model(**call).sample - adapted).abs().max() < 1e-5
    model.disable_adapters()
    assert (model(**call).sample - plain).abs().max() < 1e-5
    cpu_offload(model, execution_device="cpu")
    assert (model(**call).sample - plain).abs().max() < 1e-5
    assert engines(model)[0].stats.sparse == 9
    model.reset_attn_processor()
    assert torch.equal(model(**call).sample, plain)
