"""What a mask means: nothing, live key counts, or a reason to run stock."""

import pytest
import torch

from dit_accel import AllBlocksProcessor, Layout, RandomBlocksProcessor, Schedule
from dit_accel.diffusers import engines
from dit_accel.diffusers.masks import Unreadable, live_keys
from tiny_models import tiny_transformer

LAST = Layout(grid=(1, 1, 3), text=3)
FIRST = Layout(grid=(1, 1, 3), text=3, text_first=True)


def prefix(*counts, keys=6):
    return (torch.arange(keys) < torch.tensor(counts)[:, None])[:, None, None, :]


def pairs(mask):
    """(B, 1, N, N): both tokens live."""
    return mask & mask.transpose(-1, -2)


def additive(mask, low=-10000.0):
    return torch.zeros(mask.shape).masked_fill(~mask, low)


def test_no_mask_and_masks_that_hide_nothing_are_none():
    assert live_keys(None, 2, LAST) is None
    for mask in (prefix(6, 6), pairs(prefix(6, 6)), additive(prefix(6, 6)), prefix(6).expand(2, 4, 6, 6)):
        assert live_keys(mask, 2, LAST) is None


FORMS = {
    "by key": lambda mask: mask,
    "per head": lambda mask: mask.expand(-1, 4, -1, -1),
    "by pair": pairs,
    "every query": lambda mask: mask.expand(-1, -1, 6, -1),
    "additive": additive,
    "infinite": lambda mask: additive(mask, -torch.inf).bfloat16(),
    "additive by pair": lambda mask: additive(pairs(mask)).half(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_padding_becomes_live_counts_per_sample(form):
    live = live_keys(form(prefix(4, 6)), 2, LAST)
    assert live.count.dtype == torch.int32
    assert (live.count.tolist(), live.turn, live.layout) == ([4, 6], 0, LAST)
    assert live_keys(form(prefix(4)), 3, LAST).count.tolist() == [4, 4, 4]
    middle = form(prefix(4, 6).roll(3, -1))  # live keys 0 and 3 to 5 in the first sample
    live = live_keys(middle, 2, FIRST)
    assert (live.count.tolist(), live.turn, live.layout) == ([4, 6], 3, LAST)
    with pytest.raises(Unreadable, match="not all at the end"):
        live_keys(middle, 2, LAST)


WRONG = {
    "in front": prefix(4, 6).flip(-1),
    "in the grid": prefix(2, 6),
    "no key at all": prefix(0, 6),
    "a bias": prefix(4, 6).float(),
    "per query": pairs(prefix(4, 6)) | torch.eye(6, dtype=torch.bool),
    "causal": torch.ones(6, 6, dtype=torch.bool).tril()[None, None],
    "without axes": prefix(4, 6)[:, 0, 0],
    "by head": torch.cat([prefix(4, 6), prefix(5, 6)], 1),
    "no tensor": object(),
}


@pytest.mark.parametrize("mask", WRONG.values(), ids=WRONG)
def test_anything_else_is_unreadable(mask):
    with pytest.raises(Unreadable):
        live_keys(mask, 2, LAST)


@pytest.mark.parametrize("layout", [LAST, FIRST], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_choice_of_live_keys_is_told_as_it_is_or_not_at_all(layout, form):
    grid = range(layout.main.start, layout.main.stop)
    for code in range(2**6):
        live = torch.tensor([bool(code >> i & 1) for i in range(6)])
        words = [bool(live[i]) for i in range(6) if i not in grid]
        served = all(live[i] for i in grid) and words == sorted(words, reverse=True)
        try:
            found = live_keys(form(live[None, None, None]), 1, layout)
        except Unreadable:
            assert not served
            continue
        assert served
        turned = torch.arange(6) < (6 if found is None else int(found.count))
        assert torch.equal(turned.roll(found.turn if found else 0), live)


@torch.no_grad()
def test_padded_text_stays_out_and_the_mask_is_read_once_per_forward(monkeypatch):
    model, call, _ = tiny_transformer("hunyuan-video")
    stock = model(**call).sample
    reads = []
    monkeypatch.setattr("dit_accel.diffusers.engine.live_keys", lambda *args: reads.append(1) or live_keys(*args))
    model.set_attn_processor(AllBlocksProcessor(backend="gather", schedule=Schedule.none(), block_size=16))
    out = model(**call).sample
    assert (out - stock).abs().max() < 1e-5
    assert engines(model)[0].stats.sparse == 4
    assert len(reads) == 1
    louder = {**call, "encoder_hidden_states": call["encoder_hidden_states"].clone()}
    louder["encoder_hidden_states"][0, 5:] += 100  # the padded positions
    assert (model(**louder).sample - out).abs().max() < 1e-5


@torch.no_grad()
def test_padded_text_in_front_of_the_video_is_turned_behind_it(monkeypatch):
    model, call, layout = tiny_transformer("qwen-image")
    call["encoder_hidden_states_mask"] = torch.ones(2, 6, dtype=torch.bool)
    call["encoder_hidden_states_mask"][0, 4:] = False  # the dead keys are in the middle
    stock = model(**call).sample
    reads = []
    monkeypatch.setattr("dit_accel.diffusers.engine.live_keys", lambda *args: reads.append(1) or live_keys(*args))
    settings = {"backend": "gather", "schedule": Schedule.none(), "block_size": 16}
    model.set_attn_processor(AllBlocksProcessor(**settings))
    assert (model(**call).sample - stock).abs().max() < 1e-5
    assert (engines(model)[0].stats.sparse, len(reads)) == (3, 1)
    model.set_attn_processor(RandomBlocksProcessor(density=0.4, **settings))
    out = model(**call).sample
    louder = {**call, "encoder_hidden_states": call["encoder_hidden_states"].clone()}
    louder["encoder_hidden_states"][0, 4:] += 100  # the padded positions
    assert (model(**louder).sample - out).abs().max() < 1e-5
    assert (out - stock).abs().max() > 1e-3
    assert engines(model)[0].forward.layout == layout


@torch.no_grad()
def test_an_unreadable_mask_runs_stock_and_is_counted_and_told_once():
    model, call, _ = tiny_transformer("qwen-image")
    call["encoder_hidden_states_mask"] = torch.ones(2, 6, dtype=torch.bool)
    call["encoder_hidden_states_mask"][0, 2:4] = False  # no padding: live text on both sides
    stock = model(**call).sample
    model.set_attn_processor(AllBlocksProcessor(backend="gather", schedule=Schedule.none()))
    assert torch.equal(model(**call).sample, stock)
    assert torch.equal(model(**call).sample, stock)
    stats = engines(model)[0].stats
    assert (stats.sparse, stats.dense, stats.fallback) == (0, {"mask": 6}, 6)
    assert len(stats.warnings) == 1
