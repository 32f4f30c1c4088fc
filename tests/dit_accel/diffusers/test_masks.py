"""What a mask means: nothing, live key counts, or a reason to run stock."""

import pytest
import torch

from dit_accel import AllBlocksProcessor, Schedule
from dit_accel.diffusers import engines
from dit_accel.diffusers.masks import Unreadable, kv_valid
from tiny_models import tiny_transformer


def prefix(*counts, keys=6):
    return (torch.arange(keys) < torch.tensor(counts)[:, None])[:, None, None, :]


def test_no_mask_and_an_all_true_mask_are_none():
    assert kv_valid(None, 2, 6) is None
    assert kv_valid(prefix(6, 6), 2, 6) is None


def test_padding_becomes_live_counts_per_sample():
    counts = kv_valid(prefix(4, 6), 2, 6)
    assert counts.dtype == torch.int32
    assert counts.tolist() == [4, 6]
    assert kv_valid(prefix(4), 3, 6).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    "mask",
    [
        prefix(4, 6).flip(-1),
        prefix(0, 6),
        prefix(4, 6).float(),
        prefix(4, 6).expand(2, 1, 6, 6),
        prefix(4, 6)[:, 0, 0],
        prefix(4, 6).expand(2, 2, 1, 6),
    ],
    ids=["in front", "no key at all", "additive", "per query", "without axes", "per head"],
)
def test_anything_else_is_unreadable(mask):
    with pytest.raises(Unreadable):
        kv_valid(mask, 2, 6)


@torch.no_grad()
def test_padded_text_stays_out_and_the_mask_is_read_once_per_forward(monkeypatch):
    model, call, _ = tiny_transformer("hunyuan-video")
    stock = model(**call).sample
    reads = []
    monkeypatch.setattr("dit_accel.diffusers.engine.kv_valid", lambda *args: reads.append(1) or kv_valid(*args))
    model.set_attn_processor(AllBlocksProcessor(backend="gather", schedule=Schedule.none(), block_size=16))
    out = model(**call).sample
    assert (out - stock).abs().max() < 1e-5
    assert engines(model)[0].stats.sparse == 4
    assert len(reads) == 1
    louder = {**call, "encoder_hidden_states": call["encoder_hidden_states"].clone()}
    louder["encoder_hidden_states"][0, 5:] += 100  # the padded positions
    assert (model(**louder).sample - out).abs().max() < 1e-5


@torch.no_grad()
def test_an_unreadable_mask_runs_stock_and_is_counted_and_told_once():
    model, call, _ = tiny_transformer("qwen-image")
    call["encoder_hidden_states_mask"] = torch.ones(2, 6, dtype=torch.bool)
    call["encoder_hidden_states_mask"][0, 4:] = False  # text comes first: the dead keys are in the middle
    stock = model(**call).sample
    model.set_attn_processor(AllBlocksProcessor(backend="gather", schedule=Schedule.none()))
    assert torch.equal(model(**call).sample, stock)
    assert torch.equal(model(**call).sample, stock)
    stats = engines(model)[0].stats
    assert (stats.sparse, stats.dense, stats.fallback) == (0, {"mask": 6}, 6)
    assert len(stats.warnings) == 1
