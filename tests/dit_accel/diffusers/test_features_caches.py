"""diffusers' caches: accelerated equals the cache alone, and the cache really skipped attention."""

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from feature_trials import SPARSE, STEPS, Clock, denoise, trial

from dit_accel import AllBlocksProcessor
from dit_accel.diffusers import engines
from tiny_models import FAMILIES, tiny_transformer

BLOCKS = ("blocks",)


def first_block(clock):
    return FirstBlockCacheConfig(threshold=0.5)


def broadcast(clock):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=BLOCKS, current_timestep_callback=lambda: clock.now,
    )  # fmt: skip


def faster(clock, **settings):
    return FasterCacheConfig(**{
        "spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 800),
        "spatial_attention_block_identifiers": BLOCKS, "current_timestep_callback": lambda: clock.now,
        "attention_weight_callback": lambda module: 0.5, "is_guidance_distilled": True, **settings,
    })  # fmt: skip


def magnitude(clock):
    return MagCacheConfig(threshold=1.0, max_skip_steps=1, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS)


def taylor(clock):
    return TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"(single_)?(transformer_)?blocks\.\d+\.attn1?"],
    )  # fmt: skip


def spectral(clock):
    return SeaCacheConfig(threshold=10.0, raw_vision_callback=video_latents)


def video_latents(module, args, kwargs):
    """Per sample (C, T, H, W); latents that arrive as tokens are given their grid."""
    latents = kwargs["hidden_states"]
    return [x.T[:, None, :, None] if x.ndim == 2 else x for x in latents]


CACHES = {
    "FirstBlockCache": first_block,
    "PyramidAttentionBroadcast": broadcast,
    "FasterCache": faster,
    "MagCache": magnitude,
    "TaylorSeer": taylor,
    "SeaCache": spectral,
}
ORDERS = [
    (family, first, () if first or family == "wan" else (pytest.mark.slow,))
    for family in FAMILIES
    for first in (True, False)
]


@pytest.mark.parametrize(
    ("family", "cache_first"), [pytest.param(family, first, marks=marks) for family, first, marks in ORDERS]
)
@pytest.mark.parametrize("cache", CACHES)
@torch.no_grad()
def test_a_cache_skips_the_same_calls(cache, family, cache_first, record_feature):
    found = trial(family, lambda model, clock: model.enable_cache(CACHES[cache](clock)), enable_first=cache_first)
    assert found.featured_calls < found.calls, "the cache must be active"
    assert not torch.equal(found.plain, found.featured)
    record_feature(cache, type(found.model).__name__, found.told())


@torch.no_grad()
def test_faster_cache_drops_the_unconditional_half(record_feature):
    """Guidance as one batch of two: the attention sees batch 1 wherever that half is approximated."""
    batches = []

    def run(accelerated):
        model, call, _ = tiny_transformer("wan")
        clock = Clock()
        settings = {
            "is_guidance_distilled": False,
            "unconditional_batch_skip_range": 2,
            "spatial_attention_block_skip_range": 3,
        }
        settings["unconditional_batch_timestep_skip_range"] = (-1, 800)
        model.enable_cache(faster(clock, **settings))
        if accelerated:
            model.set_attn_processor(AllBlocksProcessor(**SPARSE))
        hook = model.blocks[0].attn1.to_q.register_forward_hook(lambda m, args, out: batches.append(out.shape[0]))
        out = denoise(model, call, clock)
        hook.remove()
        return out, model

    expected, _ = run(accelerated=False)
    assert set(batches) == {1, 2}, "the cache must drop a half at some steps and keep it at others"
    stock_batches = batches.copy()
    batches.clear()
    out, model = run(accelerated=True)
    assert batches == stock_batches
    assert (out - expected).abs().max() < 1e-4
    stats = engines(model)[0].stats
    assert stats.sparse == 3 * len(batches)
    assert not stats.fallback
    record_feature("FasterCache, guidance in one batch", type(model).__name__, "equal, half the batch dropped")
