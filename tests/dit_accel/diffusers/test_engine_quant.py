"""Quantised attention through the engine: counted by tier, guarded, never in training."""

import pytest
import torch

from dit_accel import QuantProcessor, RandomBlocksProcessor, Schedule, UsageError
from dit_accel.diffusers import engines
from dit_accel.kernels.quant import reference
from tiny_models import tiny_transformer


@pytest.fixture
def wan():
    model, call, _ = tiny_transformer("wan")
    with torch.no_grad():
        yield model, call, model(**call).sample


@pytest.mark.parametrize("quant", ["sage1", "sage2", "sage2-int4", "sage2pp", "auto"])
def test_every_layer_is_quantised_and_counted(wan, quant):
    model, call, stock = wan
    model.set_attn_processor(QuantProcessor(quant))
    out = model(**call).sample
    stats = engines(model)[0].stats
    assert stats.tiers == {"quant-reference": len(stats.layers)}
    assert (stats.dense, stats.effective_density) == ({}, 1.0)
    assert 0 < (out - stock).abs().mean() < 0.05 * stock.abs().mean()


def test_a_method_and_a_schedule_with_it(wan):
    model, call, _ = wan
    model.set_attn_processor(RandomBlocksProcessor(block_size=16, quant="sage2", schedule=Schedule(first=0, layers=1)))
    model(**call)
    stats = engines(model)[0].stats
    assert stats.dense == {"schedule": 1}
    assert stats.tiers == {"quant-reference": len(stats.layers) - 1}


def test_a_fault_names_its_layer_which_then_runs_dense(wan, monkeypatch):
    model, call, stock = wan
    model.set_attn_processor(QuantProcessor("sage1"))
    attention, calls = reference.attention, []

    def faulty(*arguments, **settings):
        calls.append(1)
        out, lse = attention(*arguments, **settings)
        # The second layer, in the forward and in the guard's repeat of it.
        return (out * torch.inf if len(calls) % len(engines(model)[0].stats.layers) == 2 else out), lse

    monkeypatch.setattr(reference, "attention", faulty)
    out = model(**call).sample
    stats = engines(model)[0].stats
    assert stats.guard_events == [{"layer": 1, "name": "blocks.1.attn1", "step": 0, "kind": "nonfinite"}]
    assert stats.dense == {"guard": 1}
    assert out.isfinite().all()
    assert (out - stock).abs().mean() < 0.05 * stock.abs().mean()


def test_training_runs_stock():
    model, call, _ = tiny_transformer("wan")
    model.set_attn_processor(QuantProcessor("sage2"))
    model(**call).sample.sum().backward()
    stats = engines(model)[0].stats
    assert stats.dense == {"training": len(stats.layers)}
    assert any("no backward" in warning for warning in stats.warnings)


def test_a_backend_that_cannot_quantise_is_refused_at_once():
    with pytest.raises(UsageError, match=r"backend 'flex' cannot quantise; choose auto, triton or reference"):
        QuantProcessor("sage2", backend="flex")
