"""Counters that outlive a forward, and time on a GPU that is not the current one."""

import contextlib

import pytest
import torch

from dit_accel import Layout, Pisa, plan
from dit_accel.diffusers.stats import Stats

LAYOUT = Layout(grid=(4, 4, 8))


def dynamic():
    q, k, v = torch.randn(3, 1, 2, LAYOUT.tokens, 16, generator=torch.Generator().manual_seed(0))
    return plan(q, k, v, Pisa(density=0.25, block_size=8, tile=None), layout=LAYOUT)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_what_inference_mode_began_goes_on_without_it(first):
    stats, expected = Stats([("blocks.0", "self")]), dynamic().density
    for mode in (first, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            stats.count_sparse(0, dynamic(), False, "gather", "", 100, 3)
            stats.count_check(0, torch.tensor(0.25), 3)
    assert stats.effective_density == pytest.approx(expected)
    assert stats.drift == {"mean": pytest.approx(0.25), "max": pytest.approx(0.25)}
    assert stats.layers[0].steps[3].drift == pytest.approx(0.25)


def test_time_is_taken_on_the_device_of_the_call(monkeypatch):
    current, told = [0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.waited = False

        def record(self):
            self.on = current[-1]

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, end):
            assert end.waited
            told.append((self.on, end.on))
            return 250.0

    @contextlib.contextmanager
    def device(which):
        current.append(which.index)
        yield
        current.pop()

    def synchronize(*args):
        raise AssertionError("waits for whatever device is current")

    for name, play in (("Event", Event), ("device", device), ("synchronize", synchronize)):
        monkeypatch.setattr(torch.cuda, name, play)
    stats = Stats([("blocks.0", "self")])
    stats.timing = True
    with stats.timed("attention", torch.device("cuda:1")):
        assert current == [0]
    with stats.timed("attention", torch.device("cuda:0")):
        pass
    assert stats.attention_seconds == pytest.approx(0.5)
    assert told == [(1, 1), (0, 0)]
    assert stats.attention_seconds == pytest.approx(0.5)
