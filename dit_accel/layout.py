"""Layout: what the tokens of one attention call are. Static, hashable, the key of every cache."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .checks import plain
from .errors import UsageError

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens.

    ``size`` is a token count, or a ``(T, H, W)`` grid whose tokens are row-major. ``kind`` is ``"main"`` for
    the one segment that methods work on; any other kind (``"text"``, ``"prefix"``, ``"reference"``, ...) is
    always visible as keys and dense as queries.
    """

    kind: str
    size: int | Grid

    def __post_init__(self) -> None:
        count = plain(self.size)
        if not isinstance(count, int):
            try:
                count = tuple(plain(side) for side in self.size)
            except TypeError:
                count = ()
            if len(count) != 3 or not all(isinstance(side, int) for side in count):
                raise UsageError(
                    f"a segment's size is a whole number of tokens or a grid of three, (T, H, W); got {self.size!r} "
                    f"for {self.kind!r}"
                )
        object.__setattr__(self, "size", count)

    @property
    def tokens(self) -> int:
        return self.size if isinstance(self.size, int) else math.prod(self.size)


@dataclass(frozen=True, init=False)
class Layout:
    """Static geometry of one forward: which tokens are video, which are text, in sequence order.

    ``Layout(grid=(T, H, W), text=0, text_first=False, prefix=0)`` is shorthand for the segments
    ``[text if text_first] [prefix] main [text otherwise]``; pass ``segments`` for anything else. A plain
    sequence of N tokens is ``Layout(grid=(1, 1, N))``. Valid lengths are data and never part of a layout.
    """

    segments: tuple[Segment, ...]

    def __init__(
        self,
        grid: Iterable[int] | None = None,
        text: int = 0,
        text_first: bool = False,
        prefix: int = 0,
        *,
        segments: Iterable[Segment] | None = None,
    ):
        if (grid is None) == (segments is None):
            raise UsageError("a Layout takes either grid=(T, H, W) or segments=(...), not both and not neither")
        if segments is None:
            words, before = ([Segment(*part)] if part[1] else [] for part in (("text", text), ("prefix", prefix)))
            main = [Segment("main", _as_grid(grid))]
            segments = words + before + main if text_first else before + main + words
        segments = tuple(segments)
        if not all(isinstance(segment, Segment) for segment in segments):
            raise UsageError(f'segments holds Segments, like Segment("text", 77); got {segments}')
        mains = [s for s in segments if s.kind == "main"]
        if len(mains) != 1 or isinstance(mains[0].size, int):
            raise UsageError(f"a Layout needs exactly one 'main' segment with a (T, H, W) grid; got {segments}")
        if any(s.tokens <= 0 for s in segments):
            raise UsageError(f"every segment needs at least one token; got {segments}")
        object.__setattr__(self, "segments", segments)

    @property
    def grid(self) -> Grid:
        """(T, H, W) of the main segment, in tokens."""
        return next(s.size for s in self.segments if s.kind == "main")

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence."""
        return sum(s.tokens for s in self.segments)

    @property
    def main(self) -> slice:
        """Where the main segment's tokens lie in the sequence."""
        start = 0
        for segment in self.segments:
            if segment.kind == "main":
                return slice(start, start + segment.tokens)
            start += segment.tokens
        raise AssertionError("unreachable: __init__ checked that there is one")

    @property
    def text(self) -> int:
        """Text tokens, all segments together."""
        return sum(s.tokens for s in self.segments if s.kind == "text")

    def with_text(self, tokens: int) -> Layout:
        """The same layout with ``tokens`` in its last text segment; none of them leaves the segment out."""
        at = max(i for i, s in enumerate(self.segments) if s.kind == "text")
        text = [Segment("text", tokens)] if tokens else []
        return Layout(segments=[*self.segments[:at], *text, *self.segments[at + 1 :]])

    def __str__(self) -> str:
        parts = []
        for s in self.segments:
            parts.append(f"{s.kind} {s.size}" if isinstance(s.size, int) else f"{s.kind} {'x'.join(map(str, s.size))}")
        return " + ".join(parts)


def _as_grid(grid: Iterable[int]) -> Grid:
    values = tuple(plain(v) for v in grid) if isinstance(grid, Iterable) and not isinstance(grid, str) else ()
    if len(values) != 3 or not all(isinstance(v, int) and v >= 1 for v in values):
        raise UsageError(
            f"grid must be three positive integers (T, H, W); got {grid!r}. Example: grid=(21, 30, 52); a plain "
            "sequence of N tokens is grid=(1, 1, N)"
        )
    return values
