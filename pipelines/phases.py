"""Where the time of a pipeline call goes: text, denoising loop, VAE, rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

TEXT, LOOP, VAE = "text", "loop", "vae"


class Clock:
    """Seconds by phase. On a GPU every reading waits for the device, so that queued work counts where it was queued."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.add(phase, self.now() - start)


@contextmanager
def timed(pipe: Any, clock: Clock) -> Iterator[None]:
    """While open, calls of ``pipe`` add their phases to ``clock``.

    The loop is what runs inside the pipeline's own progress bar; text is ``encode_prompt``; VAE is its ``encode``
    and ``decode``. Nothing of the pipeline's class or of its modules is changed, and the instance is restored.
    """
    undo: list[Callable[[], None]] = []
    try:
        for owner, name, phase in _PLACES:
            target = pipe if owner is None else getattr(pipe, owner, None)
            if callable(getattr(target, name, None)):
                undo.append(_wrap(target, name, _timing(getattr(target, name), clock, phase)))
        undo.append(_wrap(pipe, "progress_bar", _bar(pipe.progress_bar, clock)))
        yield
    finally:
        for restore in reversed(undo):
            restore()


_PLACES = ((None, "encode_prompt", TEXT), ("vae", "encode", VAE), ("vae", "decode", VAE))


def _timing(call: Callable, clock: Clock, phase: str) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        with clock.measure(phase):
            return call(*args, **kwargs)

    return run


def _bar(make: Callable, clock: Clock) -> Callable:
    class Timed:
        """A progress bar that measures from entry to exit, or over its iteration."""

        def __init__(self, *args: Any, **kwargs: Any):
            self._bar = make(*args, **kwargs)

        def __enter__(self) -> Any:
            self._start = clock.now()
            return self._bar.__enter__()

        def __exit__(self, *exc: Any) -> Any:
            clock.add(LOOP, clock.now() - self._start)
            return self._bar.__exit__(*exc)

        def __iter__(self) -> Iterator[Any]:
            with clock.measure(LOOP):
                yield from self._bar

        def __getattr__(self, name: str) -> Any:
            return getattr(self._bar, name)

    return Timed


def _wrap(target: Any, name: str, replacement: Callable) -> Callable[[], None]:
    """Set an attribute on the instance; returns what restores it."""
    own = vars(target).get(name)
    object.__setattr__(target, name, replacement)

    def restore() -> None:
        if own is None:
            object.__delattr__(target, name)
        else:
            object.__setattr__(target, name, own)

    return restore
