import json

import pytest
import torch

from dit_accel.cli.attention import chosen
from dit_accel.cli.parser import parse
from dit_accel.errors import UsageError
from dit_accel.guard import Flags, Guard
from dit_accel.step import Step


def test_flags_name_the_layer_and_nothing_else():
    flags = Flags(4, torch.device("cpu"))
    clean, nan, inf = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4).half()
    nan[0, 1, 7, 3] = torch.nan
    inf[0, 0, 0, 0] = torch.inf
    for layer, out in enumerate((clean, nan, clean, inf)):
        flags.check(layer, out)
    assert flags.read() == {1: "nonfinite", 3: "nonfinite"}
    flags.clear()
    assert flags.read() == {}


def test_flags_made_in_inference_mode_serve_forwards_that_are_not():
    with torch.inference_mode():
        flags = Flags(2, torch.device("cpu"))
        flags.check(0, torch.tensor([torch.nan]))
    with torch.no_grad():
        flags.check(1, torch.tensor([torch.inf]))
        assert flags.read() == {0: "nonfinite", 1: "nonfinite"}
        flags.clear()
    with torch.inference_mode():
        assert flags.read() == {}


def test_opposite_infinities_do_not_cancel():
    flags = Flags(1, torch.device("cpu"))
    flags.check(0, torch.tensor([torch.inf, -torch.inf]))
    assert flags.read() == {0: "nonfinite"}


def test_large_half_values_do_not_raise_a_flag():
    flags = Flags(1, torch.device("cpu"))
    flags.check(0, torch.full((4096,), 60000.0, dtype=torch.float16))
    assert flags.read() == {}


def test_off_is_off():
    assert Guard().active
    assert not Guard.off().active


def test_a_guard_survives_json_and_refuses_what_cannot_be():
    for guard in (Guard(), Guard.off(), Guard(drift=True, rate=0.5, rows=4, budget=[0.1, 0.2])):
        assert Guard.from_dict(json.loads(json.dumps(guard.to_dict()))) == guard
        hash(guard)
    assert Guard(drift=True, budget=(0.1, 0.2)).budget_of(7) == 0.2
    for bad, message in (
        ({"rate": 0}, r"rate is a share of the calls in \(0, 1\]; got 0"),
        ({"rows": 1}, "at least 2; got 1"),
        ({"budget": 0.1}, "set drift=True"),
        ({"drift": True, "budget": 0}, "a relative error above 0"),
    ):
        with pytest.raises(UsageError, match=message):
            Guard(**bad)
    with pytest.raises(UsageError, match="no field dirft"):
        Guard.from_dict({"dirft": True})


def test_calls_are_due_at_the_rate_and_evenly():
    guard, steps, layers = Guard(rate=1 / 8), 64, 30
    due = [[guard.due(Step(s, steps), layer) for layer in range(layers)] for s in range(steps)]
    assert sum(map(sum, due)) == steps * layers / 8
    assert {sum(row) for row in due} <= {3, 4}
    assert all(any(row[layer] for row in due) for layer in range(layers))
    assert all(Guard(rate=1.0).due(Step(s, 9), 3) for s in range(9))


def test_kinds_are_read_with_one_transfer():
    flags = Flags(3, torch.device("cpu"))
    flags.put("drift", 2, torch.tensor(True))
    flags.put("fault", 2, torch.tensor(True))
    flags.put("fault", 0, torch.tensor(False))
    flags.put("drift", 1, torch.tensor(True))
    assert flags.read() == {1: "drift", 2: "fault"}


def test_the_command_line():
    assert chosen(parse(["plan"])).guard is None
    for words, guard in (
        (["--guard", "off"], Guard.off()),
        (["--guard", "fault,drift"], Guard(nonfinite=False, drift=True)),
        (["--drift-budget", "0.4", "--guard-rate", "0.5"], Guard(drift=True, budget=0.4, rate=0.5)),
    ):
        assert chosen(parse(["plan", *words])).guard == guard
    with pytest.raises(UsageError, match="--guard knows nonfinite, fault, drift and off; got 'dirft'"):
        chosen(parse(["plan", "--guard", "dirft"]))
    for flag, value in (
        ("--guard-rate", "2"),
        ("--guard-rate", "0"),
        ("--drift-budget", "-1"),
        ("--drift-budget", "nan"),
    ):
        with pytest.raises(UsageError, match=f"{flag} is a .*for example 0.1; got {value}"):
            chosen(parse(["plan", flag, value]))
