"""Times of several callables in turn, and which tiers a call went through."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

import torch

from ..speed import summary

# Tier as reported -> module whose ``attention`` is that tier.
_TIERS = {
    "reference": "block_sparse.reference", "gather": "block_sparse.gather", "flash": "block_sparse.flash",
    "flex": "block_sparse.flex", "triton": "block_sparse.triton", "quant-reference": "quant.reference",
    "quant-triton": "quant.triton",
}  # fmt: skip


def in_turn(
    calls: Mapping[str, Callable[[], object]], device: str, *, seconds: float = 1.0, most: int = 20
) -> dict[str, dict[str, float | int]]:
    """:func:`~dit_accel.eval.speed.summary` of seconds per name, A B A B, after one untimed call of each.

    CUDA events on a GPU, ``perf_counter`` else. As many rounds, 3 to ``most``, as end within ``seconds`` per callable.
    """
    one = _event if device == "cuda" else _host
    taken: dict[str, list[float]] = {name: [] for name in calls}
    rounds = most
    for call in calls.values():
        call()
    for number in range(most):
        if number >= rounds:
            break
        for name, call in calls.items():
            taken[name].append(one(call))
        if number == 0:
            rounds = min(most, max(3, int(seconds * len(calls) / max(sum(t[0] for t in taken.values()), 1e-9))))
    return {name: summary(times) for name, times in taken.items()}


def _event(call: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


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
