"""Times of several sides: turns, contexts outside the time, and on a simulated GPU the device's time apart."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from simulated import Simulated
from torch.nn.attention import SDPBackend

from dit_accel.eval.kernels import clock, rivals
from dit_accel.eval.kernels.clock import in_turn
from dit_accel.kernels import timing


@pytest.fixture
def device(monkeypatch):
    made = Simulated().install(monkeypatch, timing)
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: made.host))
    yield made
    timing.cycles_per_second.cache_clear()


def test_sides_take_turns():
    order = []
    times = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", seconds=0)
    assert order == ["a", "b"] * 4
    assert times["a"]["runs"] == 3
    assert set(times["a"]) == {"median", "min", "iqr", "runs"}


def test_the_host_is_told_apart(device):
    calls = {
        "quick": lambda: device.work(4e-4, 1e-4),
        "waits": lambda: device.work(4e-4, 1e-3, waits=True),
    }
    times = in_turn(calls, "cuda", seconds=0)
    assert times["quick"]["median"] == pytest.approx(1e-4)
    assert times["quick"]["host"]["median"] == pytest.approx(4e-4)
    assert times["quick"]["late"] == 0
    assert times["waits"]["host"]["median"] == pytest.approx(1.4e-3)
    assert times["waits"]["late"] == times["waits"]["runs"] == 3


def test_rounds_follow_the_seconds_given(device):
    times = in_turn({"one": lambda: device.work(0, 0.05), "two": lambda: device.work(0, 0.05)}, "cuda", seconds=0.6)
    # A round of the two takes 0.1 s and what keeps the device busy before each.
    assert times["one"]["runs"] == 11


class Entered:
    def __init__(self, device):
        self.device, self.open, self.seen = device, False, []

    @contextlib.contextmanager
    def context(self):
        self.device.work(0, 5e-3)
        self.open = True
        yield
        self.open = False

    def inside(self):
        self.seen.append(self.open)
        self.device.work(0, 1e-4)

    def __call__(self):
        raise AssertionError("the plain call is not what is timed")


def test_a_context_is_entered_outside_the_time(device):
    side = Entered(device)
    times = in_turn({"side": side}, "cuda", seconds=0)
    assert times["side"]["median"] == pytest.approx(1e-4)
    assert len(side.seen) == 1 + 3 + 3
    assert all(side.seen)


def test_a_cold_cache_is_made_outside_the_time(device, monkeypatch):
    flushed = []

    def flush():
        flushed.append(1)
        device.work(0, 2e-3)

    monkeypatch.setattr(clock, "_flush", lambda: flush)
    call = {"a": lambda: device.work(0, 1e-4)}
    assert in_turn(call, "cuda", seconds=0, cold=True)["a"]["median"] == pytest.approx(1e-4)
    assert len(flushed) == 3
    in_turn(call, "cuda", seconds=0)
    assert len(flushed) == 3


def test_a_forced_kernel_is_forced_however_it_is_called():
    asked = []

    class Noted(rivals.Forced):
        def inside(self):
            asked.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
            return super().inside()

    x = torch.randn(1, 1, 4, 8)
    side = Noted(SDPBackend.MATH, x, x, x)
    side()
    in_turn({"dense": side}, "cpu", seconds=0)
    assert asked == [(False, True)] * 5
