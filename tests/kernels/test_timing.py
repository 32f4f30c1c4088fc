"""Device time on a simulated device: the host's share is not in it, a wait of the host is and says so."""

import pytest
from simulated import CYCLES, Simulated

from dit_accel.kernels import timing


@pytest.fixture
def device(monkeypatch):
    yield Simulated().install(monkeypatch, timing)
    timing.cycles_per_second.cache_clear()


def test_a_second_has_the_devices_cycles(device):
    assert timing.cycles_per_second(0) == pytest.approx(CYCLES)


@pytest.mark.parametrize("host", [1e-5, 4e-4, 2e-3])
def test_only_the_devices_work_is_timed(device, host):
    def call():
        device.work(host, 1e-4)

    took = timing.host_seconds(call)
    assert took == pytest.approx(host)
    seconds, late = timing.device_seconds(call, took)
    assert seconds == pytest.approx(1e-4)
    assert not late


def test_a_wait_in_the_call_shows(device):
    def call():
        device.work(1e-4, 1e-4, waits=True)
        device.work(3e-4, 1e-4)

    seconds, late = timing.device_seconds(call, timing.host_seconds(call))
    assert seconds == pytest.approx(5e-4)
    assert late


def test_a_host_that_outlasts_the_bound_is_late(device):
    call = lambda: device.work(2 * timing.MOST, 1e-4)  # noqa: E731
    seconds, late = timing.device_seconds(call, timing.host_seconds(call))
    assert late
    assert seconds > timing.MOST


def test_the_device_is_busy_for_twice_the_hosts_time_within_bounds(device):
    timing.cycles_per_second(0)
    device.asleep.clear()
    for host in (0, 2e-3, 1):
        timing.device_seconds(lambda: None, host)
    assert device.asleep == pytest.approx([timing.LEAST, 4e-3, timing.MOST])


def test_what_comes_before_is_not_in_the_time(device):
    seconds, late = timing.device_seconds(lambda: device.work(0, 1e-4), 0, lambda: device.work(0, 5e-3))
    assert seconds == pytest.approx(1e-4)
    assert not late
