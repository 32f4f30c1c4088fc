"""Random sizes, texts, batches, methods and schedules through the seam: an exact result, or an error of ours."""

import functools

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from dit_accel import Processor, Schedule, UnsupportedError
from dit_accel.diffusers import engines
from dit_accel.errors import DitAccelError
from dit_accel.methods import GNA, AdaSpa, AllBlocks, Clear, Radial, RandomBlocks, VMoBA
from tiny_models import randn, tiny_transformer

METHODS = {
    "all-blocks": lambda block: AllBlocks(block_size=block),
    "random-blocks": lambda block: RandomBlocks(density=0.3, block_size=block),
    "radial": lambda block: Radial(block_size=block),
    "gna": lambda block: GNA(window=(3, 3, 3)),
    "clear": lambda block: Clear(radius=2),
    "adaspa": lambda block: AdaSpa(density=0.4, search_steps=(0,), block_size=block),
    "vmoba": lambda block: VMoBA(),
}
CASES = st.fixed_dictionaries({
    "family": st.sampled_from(["wan", "flux", "hunyuan-video", "cogvideox", "qwen-image"]),
    "grid": st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(1, 8)),
    "text": st.integers(1, 12),
    "batch": st.integers(1, 2),
    "method": st.sampled_from(sorted(METHODS)),
    "block": st.sampled_from([4, 16, 64]),
    "first": st.integers(0, 1),
})  # fmt: skip


@functools.cache
def model_of(family):
    model, _, _ = tiny_transformer(family)
    for name in ("blocks", "transformer_blocks", "single_transformer_blocks"):
        if hasattr(model, name):
            setattr(model, name, getattr(model, name)[:1])
    return model


def arguments(family, grid, text, batch):
    """Keyword arguments of ``forward`` for a token grid; image families have one frame."""
    _, call, _ = tiny_transformer(family, batch)
    frames, height, width = grid
    if family == "wan":
        call["hidden_states"] = randn(batch, 4, frames, 2 * height, 2 * width)
    elif family == "hunyuan-video":
        call["hidden_states"] = randn(batch, 4, *grid)
        call["encoder_hidden_states"] = randn(batch, text, 16)
        call["encoder_attention_mask"] = torch.ones(batch, text)
        call["encoder_attention_mask"][0, (text + 1) // 2 :] = 0
    elif family == "cogvideox":
        call["hidden_states"] = randn(batch, frames, 4, 2 * height, 2 * width)
        call["encoder_hidden_states"] = randn(batch, 8, 8)  # its position table has one text length
    else:
        call["hidden_states"] = randn(batch, height * width, call["hidden_states"].shape[-1])
        call["encoder_hidden_states"] = randn(batch, text, 16)
    if family == "flux":
        call["img_ids"] = torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
        call["txt_ids"] = torch.zeros(text, 3)
    if family == "qwen-image":
        call["img_shapes"] = [[(1, height, width)]] * batch
    return call


def check(case):
    case = dict(case)
    block, first, method = case.pop("block"), case.pop("first"), case.pop("method")
    torch.manual_seed(0)
    model, call = model_of(case["family"]), arguments(**case)
    model.reset_attn_processor()
    stock = model(**call).sample
    options = {"backend": "gather", "schedule": Schedule(first=first), "on_unsupported": "error"}
    processor = Processor(METHODS[method](block), **options)
    try:
        model.set_attn_processor(processor)
        for timestep in (1.0, 0.5):
            out = model(**{**call, "timestep": call["timestep"] * timestep}).sample
    except DitAccelError:
        event(f"refused: {method}")
        return
    finally:
        engine = next(iter(engines(model)), None)
        model.reset_attn_processor()
    event(f"ran: {method}")
    assert out.shape == stock.shape
    assert out.isfinite().all()
    stats = engine.stats
    assert not stats.fallback
    assert not stats.guard_events
    assert stats.sparse + sum(stats.dense.values()) == 2 * len(stats.layers)
    assert 0 < stats.effective_density <= 1 + 1e-6
    assert torch.equal(model(**call).sample, stock)
    if method == "all-blocks":
        model_out = model(**{**call, "timestep": call["timestep"] * 0.5}).sample
        assert (out - model_out).abs().max() < 1e-4


@given(CASES)
@settings(max_examples=300, deadline=None, derandomize=True)
@torch.no_grad()
def test_300_layouts(case):
    check(case)


@pytest.mark.nightly
@given(CASES)
@settings(max_examples=5000, deadline=None)
@torch.no_grad()
def test_5000_layouts(case):
    check(case)


def test_the_cases_reach_both_ends():
    """The fuzz would pass on nothing but refusals."""
    for method, refused in (("random-blocks", False), ("radial", True)):
        model = model_of("flux")
        try:
            model.set_attn_processor(Processor(METHODS[method](16)))
            assert not refused
        except UnsupportedError:
            assert refused
        model.reset_attn_processor()
