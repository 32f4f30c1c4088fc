"""Times of several callables in turn, and which tiers a call went through."""

from __future__ import annotations

import contextlib
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from ...kernels import timing
from ..speed import summary

# Tier as reported -> module whose ``attention`` is that tier.
_TIERS = {
    "reference": "block_sparse.reference", "gather": "block_sparse.gather", "flash": "block_sparse.flash",
    "flex": "block_sparse.flex", "triton": "block_sparse.triton", "quant-reference": "quant.reference",
    "quant-triton": "quant.triton",
}  # fmt: skip


# Larger than the L2 cache of any GPU so far.
FLUSH_BYTES = 256 << 20
# Calls of each side whose time on the host is taken.
_HOST_CALLS = 3


def in_turn(
    calls: Mapping[str, Callable[[], object]], device: str, *, seconds: float = 1.0, most: int = 20, cold: bool = False
) -> dict[str, dict[str, Any]]:
    """:func:`~dit_accel.eval.speed.summary` of seconds per name, A B A B, after one untimed call of each.

    As many rounds, 3 to ``most``, as end within ``seconds`` per callable. A callable may have ``context()``, which is
    entered outside the time, and ``inside()``, which is then timed in its place.

    On a GPU the device's time alone, which stays busy until a call is queued (:mod:`dit_accel.kernels.timing`). Beside
    it ``host``: a summary of seconds until the call returned, on an idle device, and ``late``: the runs whose time
    holds some of the host's. ``cold``: its L2 cache is overwritten before every timed call.
    """
    cuda = device == "cuda"
    sides = {name: (getattr(call, "inside", call), _context(call)) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    hosts: dict[str, list[float]] = {name: [] for name in calls}
    late = dict.fromkeys(calls, 0)
    flush = _flush() if cuda and cold else None
    if cuda:
        timing.cycles_per_second(torch.cuda.current_device())  # not in the first round, which says how many fit
    for name, (run, context) in sides.items():
        with context():
            run()
            if cuda:
                hosts[name] = [timing.host_seconds(run) for _ in range(_HOST_CALLS)]
    rounds = most
    for number in range(most):
        if number >= rounds:
            break
        began = time.perf_counter()
        for name, (run, context) in sides.items():
            with context():
                if cuda:
                    spent, behind = timing.device_seconds(run, statistics.median(hosts[name]), flush)
                    late[name] += behind
                else:
                    spent = _host(run)
            taken[name].append(spent)
        if number == 0:
            rounds = min(most, max(3, int(seconds * len(calls) / max(time.perf_counter() - began, 1e-9))))
    beside = {name: {"host": summary(hosts[name]), "late": late[name]} if cuda else {} for name in calls}
    return {name: {**summary(times), **beside[name]} for name, times in taken.items()}


def _context(call: Callable[[], object]) -> Callable[[], contextlib.AbstractContextManager]:
    return getattr(call, "context", contextlib.nullcontext)


def _flush() -> Callable[[], object]:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_


def _host(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextlib.contextmanager
def observed() -> Iterator[list[str]]:
    """The tiers whose kernels run while this is open, in order of their first call. Not for timed calls."""
    seen: list[str] = []
    with contextlib.ExitStack() as stack:
        for tier, name in _TIERS.items():
            try:
                module = importlib.import_module(f"...kernels.{name}", __package__)
            except ImportError:
                continue
            stack.enter_context(mock.patch.object(module, "attention", _noted(module.attention, tier, seen)))
        yield seen


def _noted(run: Callable, tier: str, seen: list[str]) -> Callable:
    def noted(*args, **how):
        if tier not in seen:
            seen.append(tier)
        return run(*args, **how)

    return noted
