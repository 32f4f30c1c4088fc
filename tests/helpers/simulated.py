"""A device with a queue and a host with a clock, in place of ``torch.cuda``: what events would say, without a GPU."""

from types import SimpleNamespace

import torch

CYCLES = 2e9  # per second


class Simulated:
    """``host``: the host's clock. ``free``: when the device has done all that is queued. Seconds.

    ``install(monkeypatch, module)`` replaces the clock of ``module`` and the functions of ``torch.cuda`` it calls.
    """

    def __init__(self):
        self.host = self.free = 0.0
        self.asleep = []

    def work(self, host: float, device: float, waits: bool = False):
        """A call that takes ``host`` seconds of Python and then queues ``device`` seconds of work."""
        self.host += host
        self.free = max(self.host, self.free) + device
        if waits:
            self.synchronize()

    def synchronize(self, *_):
        self.host = max(self.host, self.free)

    def _sleep(self, cycles):
        self.asleep.append(cycles / CYCLES)
        self.free = max(self.host, self.free) + cycles / CYCLES

    def install(self, monkeypatch, module):
        outer = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = outer.free = max(outer.host, outer.free)

            def query(self):
                return outer.host >= self.at

            def synchronize(self):
                outer.host = max(outer.host, self.at)

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.host))
        for name, value in {"Event": Event, "synchronize": self.synchronize, "_sleep": self._sleep}.items():
            monkeypatch.setattr(torch.cuda, name, value, raising=False)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        module.cycles_per_second.cache_clear()
        return self
