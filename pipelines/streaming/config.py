"""What a stream remembers: the published cache policies, their settings, and what cannot work."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...checks import choice, number, whole
from ...errors import UsageError

_FRAMES = ("chunk_frames", "window_frames", "sink_frames", "sink_gap", "max_frames", "pc_budget", "pc_recent")
POLICIES = ("window", "sink", "deep_sink", "deep_sink+pc", "ema_sink")


@dataclass(frozen=True)
class CacheConfig:
    """A cache policy. Every size is in latent frames; the window counts the sinks and the chunk being made.

    ``policy``: ``"window"`` keeps the latest frames (Self-Forcing, arXiv 2506.08009). ``"sink"`` also the first
    ``sink_frames`` for ever (StreamingLLM, 2309.17453; LongLive, 2509.22622). ``"deep_sink"`` the same with many
    sinks that follow the window in time (Deep Forcing, 2512.05081, eq. 5-6), ``"deep_sink+pc"`` with its participative
    compression instead of eviction (section 4 there). ``"ema_sink"`` averages what leaves the window into the sinks
    (Reward Forcing, 2512.04678).

    ``positions``: where the sinks are in time once frames between them and the window are gone: ``"window"`` puts the
    last one ``sink_gap`` frames before the oldest frame of the window (1 is contiguous, 0 the paper's literal text,
    1 + ``chunk_frames`` its released code); ``"absolute"`` leaves them where they were made.
    ``key_storage``: ``"raw"`` keys are rotated when read; ``"roped"`` ones were rotated once at their absolute frame,
    as the first releases had it, which ends at ``max_frames``.
    ``pc_budget``: frames left by a compression, of which the last ``pc_recent`` stay whole. ``pc_rope``: kept tokens
    stay at their time (``"keep"``, what the released code does) or are moved next to the recent ones (``"compact"``,
    what the paper says). ``ema_alpha``: the share of the old sink in every average.

    Raises ``UsageError`` with the numbers for settings that contradict each other.
    """

    policy: str = "window"
    window_frames: int = 21
    sink_frames: int = 0
    chunk_frames: int = 3
    positions: str = "window"
    sink_gap: int = 1
    key_storage: str = "raw"
    max_frames: int = 1024
    pc_budget: int = 16
    pc_recent: int = 4
    pc_rope: str = "keep"
    ema_alpha: float = 0.999

    def __post_init__(self) -> None:
        choice("policy", self.policy, POLICIES)
        choice("positions", self.positions, ("window", "absolute"))
        choice("key_storage", self.key_storage, ("raw", "roped"))
        choice("pc_rope", self.pc_rope, ("keep", "compact"))
        for name in _FRAMES:
            least = 0 if name in ("sink_frames", "sink_gap") else 1
            value = whole(name, getattr(self, name), "a whole number of latent frames", least)
            object.__setattr__(self, name, value)
        alpha = number("ema_alpha", self.ema_alpha, "the share of the old sink, 0 to 1", 0, 1)
        object.__setattr__(self, "ema_alpha", alpha)
        self._check_sizes()
        self._check_positions()
        if self.compresses:
            self._check_compression()
        if self.policy == "ema_sink":
            self._check_average()

    @property
    def compresses(self) -> bool:
        """Whether participative compression takes the place of eviction."""
        return self.policy == "deep_sink+pc"

    @property
    def capacity_frames(self) -> int:
        """Frames that a cache allocates: the window, and one chunk more, so that a chunk can be abandoned."""
        return self.window_frames + self.chunk_frames

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _check_sizes(self) -> None:
        s, f, w = self.sink_frames, self.chunk_frames, self.window_frames
        if self.policy == "window" and s:
            raise UsageError(f"policy 'window' has no sinks; got sink_frames={s}. Use policy='sink', or sink_frames=0")
        if self.policy != "window" and not s:
            raise UsageError(f"policy {self.policy!r} needs sinks; got sink_frames=0. Give 1 or more, or 'window'")
        if w < s + f:
            raise UsageError(
                f"the window must hold the sinks and a chunk: window_frames={w} is less than sink_frames={s} + "
                f"chunk_frames={f}; give window_frames={s + f} or more, or fewer sinks"
            )

    def _check_positions(self) -> None:
        follows = self.policy in ("deep_sink", "deep_sink+pc")
        if self.sink_gap != 1 and not follows:
            raise UsageError(f"sink_gap={self.sink_gap} is a setting of deep_sink; policy {self.policy!r} takes 1")
        if self.positions == "absolute" and (follows or self.policy == "ema_sink"):
            raise UsageError(
                f"policy {self.policy!r} moves its sinks along with the window, so positions='absolute' contradicts "
                "it; use positions='window', or policy='sink'"
            )
        if self.key_storage == "roped" and (self.positions, self.policy in ("window", "sink")) != ("absolute", True):
            raise UsageError(
                f"roped keys stay at the frame they were made at, and cannot be averaged or moved: they need "
                f"positions='absolute' and policy 'window' or 'sink'; got positions={self.positions!r}, "
                f"policy={self.policy!r}. Use key_storage='raw'"
            )

    def _check_compression(self) -> None:
        s, r, n, w, f = self.sink_frames, self.pc_recent, self.pc_budget, self.window_frames, self.chunk_frames
        if r < f:
            raise UsageError(f"pc_recent={r} must hold the chunk being made: give chunk_frames={f} or more")
        if not s + r <= n <= w:
            raise UsageError(
                f"pc_budget={n} must hold sinks and recent frames and fit the window: "
                f"{s} + {r} = {s + r} <= pc_budget <= {w}"
            )
        if n + f > w:
            raise UsageError(
                f"pc_budget={n} would fire at every chunk: {n} + chunk_frames={f} = {n + f} is more than "
                f"window_frames={w}; give pc_budget={w - f} or less"
            )

    def _check_average(self) -> None:
        if self.sink_frames != self.chunk_frames:
            raise UsageError(
                f"ema_sink averages a chunk into the sinks, frame by frame: sink_frames={self.sink_frames} must equal "
                f"chunk_frames={self.chunk_frames}"
            )


# Settings by published name.
PRESETS: dict[str, CacheConfig] = {
    "self_forcing": CacheConfig("window", window_frames=21),
    "longlive": CacheConfig("sink", window_frames=12, sink_frames=3, positions="absolute"),
    "deep_sink": CacheConfig("deep_sink", window_frames=21, sink_frames=10),
    "deep_forcing": CacheConfig("deep_sink+pc", window_frames=21, sink_frames=10, pc_budget=16, pc_recent=4),
    "reward_forcing": CacheConfig("ema_sink", window_frames=9, sink_frames=3, ema_alpha=0.999),
    "anti_drift": CacheConfig("sink", window_frames=12, sink_frames=5),
}
# What a policy's bare name stands for.
_OF_POLICY = {
    "window": "self_forcing", "sink": "longlive", "deep_sink": "deep_sink", "deep_sink+pc": "deep_forcing",
    "ema_sink": "reward_forcing",
}  # fmt: skip


def preset(name: str, **changes: Any) -> CacheConfig:
    """The settings published under ``name``, or those that ``name`` as a policy stands for, with ``changes``.

    Raises ``UsageError`` for a name that is neither, and for changes that contradict the rest.
    """
    found = PRESETS.get(_OF_POLICY.get(name, name))
    if found is None:
        known = [*_OF_POLICY, *(key for key in PRESETS if key not in _OF_POLICY)]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"unknown cache policy {name!r}{hint} (known: {', '.join(known)})")
    return replace(found, **changes)
