"""What was read from a tensor is remembered as long as it is true."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny_families import tiny

from dit_accel import AllBlocksProcessor, Layout, Schedule
from dit_accel.diffusers import engine as engine_module
from dit_accel.diffusers import engines
from dit_accel.diffusers.engine import Forward
from dit_accel.diffusers.seen import Seen
from dit_accel.step import Step
from tiny_models import tiny_transformer


def reader(x, reads):
    return lambda: reads.append(1) or float(x.max())


def test_one_tensor_is_read_once_until_it_is_written_to():
    seen, reads, x = Seen(), [], torch.tensor([1.0, 2.0])
    assert [seen.read(x, reader(x, reads)) for _ in range(3)] == [2.0] * 3
    assert len(reads) == 1
    x += 1
    assert seen.read(x, reader(x, reads)) == 3.0
    assert seen.read(x, lambda: "another question", "another") == "another question"
    assert seen.read(x.clone(), reader(x, reads)) == 3.0
    assert len(reads) == 3


def test_more_tensors_than_there_is_room_for_are_read_again_and_none_is_kept_alive():
    seen, reads = Seen(room=2), []
    tensors = [torch.tensor([float(i)]) for i in range(3)]
    for _ in range(2):
        assert [seen.read(x, reader(x, reads)) for x in tensors] == [0.0, 1.0, 2.0]
    assert len(reads) == 6
    kept, freed = torch.ones(1), []
    weakref.finalize(kept, freed.append, 1)
    seen.read(kept, lambda: 0)
    del kept
    gc.collect()
    assert freed == [1]


def test_tensors_that_do_not_tell_of_writes_are_always_read():
    seen, reads = Seen(), []
    with torch.inference_mode():
        x = torch.zeros(1)
        for value in (1.0, 2.0):
            x.fill_(value)
            assert seen.read(x, reader(x, reads)) == value
    assert seen.read(3, lambda: "a number") == "a number"


@torch.no_grad()
def test_a_mask_that_comes_again_is_read_once_and_one_that_changed_again(monkeypatch):
    model, _, _ = tiny_transformer("wan")
    model.set_attn_processor(AllBlocksProcessor(backend="gather", schedule=Schedule.none()))
    (engine,), layout, reads = engines(model), Layout((1, 2, 3), text=3), []
    stock = engine_module.live_keys
    monkeypatch.setattr(engine_module, "live_keys", lambda *args: reads.append(1) or stock(*args))
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    mask[..., 7:] = False
    call = SimpleNamespace(attn_mask=mask, query=torch.zeros(1, 9, 2, 8))

    def live():
        engine.forward = Forward((layout,), Step())
        return engine._live_keys(call, layout).count.tolist()

    assert [live(), live()] == [[7], [7]]
    assert len(reads) == 1
    mask[..., 8:] = False
    mask[..., 7] = True
    assert live() == [8]
    assert len(reads) == 2


def test_sequences_are_known_by_all_that_they_hold():
    seen, reads, x, y = Seen(), [], torch.ones(1), torch.zeros(1)

    def asked(*parts):
        before = len(reads)
        seen.read(parts, reader(x, reads))
        return len(reads) > before

    assert asked(x, [y, 1], None)
    assert not asked(x, (y, 1), None)
    assert [asked(x, [y, 2], None), asked(x, y, 1, None), asked(y, [x, 1], None), asked(x, [y, 1])] == [True] * 4
    y += 1
    assert asked(x, [y, 1])
    assert [asked(x, object())] * 2 == [True] * 2


@torch.no_grad()
@pytest.mark.parametrize("inference", [False, True])
def test_position_ids_that_change_in_place_give_another_layout(inference):
    case = tiny("flux")
    case.model.set_attn_processor(AllBlocksProcessor(schedule=Schedule.none()))
    (engine,) = engines(case.model)
    with torch.inference_mode(inference):
        ids = case.call["img_ids"].clone()
        case.model(**{**case.call, "img_ids": ids})
        _, *before = engine.forward.layout.grid
        ids[:, 1:] = torch.cartesian_prod(*(torch.arange(float(n)) for n in reversed(before)))
        case.model(**{**case.call, "img_ids": ids})
    _, *after = engine.forward.layout.grid
    assert before != after
    assert after == before[::-1]
