"""Adaptive precision: the rule, its file, and calls that follow it."""

import pytest
import torch

from dit_accel import Layout, Quant, QuantProcessor, Step, UsageError, attend
from dit_accel.diffusers import engines
from dit_accel.methods import Call
from dit_accel.precision import Measured, Precision, adapted, read_precision
from tiny_models import tiny_transformer

LAYOUT = Layout((4, 8, 8))


def measured(bins=2, layers=2, heads=3, steps=4, outlier=False):
    """Random calls; head 0 of layer 1 has logits that 4 bits cannot serve, all of bin 1 there are quiet."""
    found = Measured(Quant(qk="int4"), bins=bins)
    g = torch.Generator().manual_seed(0)
    for index in range(steps):
        for layer in range(layers):
            q, k, v = torch.randn(3, 1, heads, LAYOUT.tokens, 32, generator=g)
            q = q / 4
            if layer == 1 and index < steps // 2:
                q[:, 0] *= 8
                if outlier:  # in a channel that the queries do not look at
                    k[:, 0, :, 0] *= 500
                    q[:, 0, :, 0] = 0
            found.observe(q, k, v, Call(LAYOUT, layer=layer, step=Step(index, steps)))
    return found


def test_bounds_then_the_worst_until_the_budget():
    found = measured()
    cosine, lost = found.errors()
    assert cosine.shape == (2, 2, 2, 3)
    assert (lost[1] < lost[0]).all()
    bad = (cosine[0] < 0.998) | (lost[0] > 0.05)
    assert bad.nonzero().tolist() == [[0, 1, 0]]
    least = torch.tensor(found.assign(0.0).bits)
    assert torch.equal(least >= 8, bad)
    half = torch.tensor(found.assign(0.5).bits)
    assert (half >= 8).sum() == 6
    worst = (1 - cosine[0] * (1 - lost[0])).flatten()
    assert worst[half.flatten() >= 8].min() >= worst[half.flatten() < 8].max()
    assert found.assign(1.0).share[4] == 0


def test_a_layer_that_8_bits_cannot_serve_takes_16():
    table = measured(outlier=True).assign(0.0)
    assert table.bits[0][1] == (16, 16, 16)
    assert set(table.bits[1][1]) == {4}


def test_first_and_last_steps_are_protected():
    table = Precision((((4, 8),), ((4, 4),)))
    assert table.of(0, Step(0, 10), slice(0, 2)) == (8, 8)
    assert table.of(0, Step(9, 10), slice(0, 2)) == (8, 8)
    assert table.of(0, Step(3, 10), slice(0, 2)) == (4, 8)
    assert table.of(0, Step(5, 10), slice(1, 2)) == (4,)
    with pytest.raises(UsageError, match="1 layers of 2 heads; this call is layer 1"):
        table.of(1, Step(3, 10), slice(0, 2))


def test_files(tmp_path):
    table = Precision((((4, 8), (16, 16)),))
    table.write(tmp_path / "bits.json")
    assert read_precision(tmp_path / "bits.json") == table
    with pytest.raises(UsageError, match="no precision file"):
        read_precision(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"bits": [[[5]]], "format": "dit-accel precision 1"}')
    with pytest.raises(UsageError, match="no precision file of this version"):
        read_precision(tmp_path / "other.json")
    with pytest.raises(UsageError, match="qk='int4'"):
        Quant(plan_file="bits.json")


def test_each_head_runs_in_its_bits(tmp_path):
    Precision((((4, 8, 8, 4), (16,) * 4),)).write(tmp_path / "bits.json")
    quant = Quant(qk="int4", plan_file=str(tmp_path / "bits.json"))
    q, k, v = torch.randn(3, 1, 4, LAYOUT.tokens, 32, generator=torch.Generator().manual_seed(0))
    out = attend(q, k, v, layout=LAYOUT, quant=quant, layer=0, step=Step(3, 10))
    four, eight = (attend(q, k, v, layout=LAYOUT, quant=Quant(qk=qk, smooth_q=True)) for qk in ("int4", "int8"))
    assert torch.equal(out[:, [0, 3]], four[:, [0, 3]])
    assert torch.equal(out[:, 1:3], eight[:, 1:3])
    assert adapted(quant, 1, Step(3, 10), slice(0, 4)) is None
    exact = attend(q, k, v, layout=LAYOUT)
    assert torch.equal(attend(q, k, v, layout=LAYOUT, quant=quant, layer=1, step=Step(3, 10)), exact)
    shared = attend(q, k[:, :2], v[:, :2], layout=LAYOUT, quant=quant, layer=0, step=Step(3, 10))
    assert shared.isfinite().all()


def test_the_engine_follows_the_file(tmp_path):
    model, call, _ = tiny_transformer("wan")
    layers = len(model.blocks)
    heads = model.config.num_attention_heads
    Precision((((8,) * heads, *((16,) * heads,) * (layers - 1)),)).write(tmp_path / "bits.json")
    model.set_attn_processor(QuantProcessor(Quant(qk="int4", plan_file=str(tmp_path / "bits.json"))))
    with torch.no_grad():
        model(**call)
    stats = engines(model)[0].stats
    assert stats.tiers == {"quant-reference": 1}
    assert stats.dense == {"schedule": layers - 1}


def test_a_table_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*p\.json: .*; give another -o"):
        Precision((((4,),),)).write(tmp_path / "file" / "p.json")
