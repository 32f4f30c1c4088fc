"""Seconds of device work alone, and how long the host takes to ask for it.

Between two events around a call lies whatever the device waits for, so on an idle device they time Python too: with
kernels of 0.1 ms mostly that. Here the device is kept busy until the call is queued.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

# Seconds that the device is kept busy: no less, since a host may be interrupted, and no more, since a call that waits
# for the device takes as long on the host as the device takes.
LEAST, MOST = 1e-3, 20e-3
_CYCLES = 10_000_000

Call = Callable[[], object]


def host_seconds(call: Call) -> float:
    """Seconds until ``call`` returned, begun on an idle device. One that waits for the device is charged for that."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken


def device_seconds(call: Call, host: float, before: Call | None = None) -> tuple[float, bool]:
    """Seconds of the device's work in ``call``, and whether the host was late.

    ``host``: what :func:`host_seconds` gave; the device is kept busy for twice that, within bounds. ``before``: device
    work outside the time. Late: the device had begun before everything was queued, as it is in every call that waits
    for the device; then the time holds the host's as well.
    """
    cycles = int(min(max(2 * host, LEAST), MOST) * cycles_per_second(torch.cuda.current_device()))
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if before is not None:
        before()
    torch.cuda._sleep(cycles)
    start.record()
    call()
    late = start.query()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3, late


@functools.cache
def cycles_per_second(device: int) -> float:
    """Cycles of ``torch.cuda._sleep`` in a second on a device, measured once."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(2):  # the first loads the kernel and wakes the clock
        start.record()
        torch.cuda._sleep(_CYCLES)
        stop.record()
        stop.synchronize()
    return _CYCLES / (start.elapsed_time(stop) / 1e3)
