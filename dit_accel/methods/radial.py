"""Radial Attention (arXiv 2506.19852): a static mask whose spatial band narrows with the distance between frames.

Three rules. ``"upstream"`` is the released block mask, bit for bit (mit-han-lab/radial-attention 72788d4).
``"safe"``, the default, keeps what it keeps and closes its gaps: every block that touches a query's own frame, a
neighbouring frame or a sink frame is kept, the last partial block is one like any other, text may come first.
``"paper"`` is the token mask printed in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import choice, number, whole
from ..errors import UnsupportedError, UsageError
from ..kernels import Band, BlockList, Predicate
from ..layout import Layout
from ..plans import Blocks, Plan
from .base import Call, Method, check_density
from .testing import outside_main

RULES = ("safe", "upstream", "paper")
VARIANTS = ("wan", "hunyuan")
# Frame pairs whose nominal width falls below this many tokens are decimated (a literal in the released code).
DECIMATE_BELOW = 128
BLOCK_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class Radial(Method):
    """Radial Attention.

    ``decay`` (lambda) scales the band between frames two or more apart. ``block_size`` in tokens.
    ``sink_frames``: leading frames whose keys every query sees. ``rule``: see the module. ``variant`` belongs to
    the upstream rule: ``"wan"`` has one sink frame, ``"hunyuan"`` none.

    Defaults: decay 0.2 and block 128 from the released Wan 2.1 script, one sink frame as in its Wan rule.
    """

    name: ClassVar[str] = "radial"

    decay: float = 0.2
    block_size: int = 128
    sink_frames: int = 1
    rule: str = "safe"
    variant: str | None = None

    def __post_init__(self) -> None:
        choice("Radial.rule", self.rule, RULES)
        if self.rule == "upstream" and self.variant is None:
            object.__setattr__(self, "variant", "wan")
        if self.variant is not None and (self.rule != "upstream" or self.variant not in VARIANTS):
            raise UsageError(
                f"Radial.variant is {self.variant!r} under rule {self.rule!r}; it belongs to rule='upstream' and is "
                f"one of {', '.join(VARIANTS)}"
            )
        for name, value in (
            ("decay", number("Radial.decay", self.decay, "a factor of the band and must be positive", 0, above=True)),
            ("block_size", whole("Radial.block_size", self.block_size, "a number of tokens")),
            ("sink_frames", whole("Radial.sink_frames", self.sink_frames, "a number of frames", 0)),
        ):
            object.__setattr__(self, name, value)

    def check(self, layout: Layout) -> None:
        if layout.grid[0] < 2:
            raise UnsupportedError(
                "Radial thins attention between frames and needs more than one; an image has one frame. For images use "
                "GNA or Pisa, or method='dense'."
            )

    def plan(self, q: Tensor | None, k: Tensor | None, v: Tensor | None, call: Call) -> Plan:
        if call.kv_layout is not None and call.kv_layout != call.layout:
            raise UnsupportedError(f"Radial needs keys in the queries' layout; got {call.layout} and {call.kv_layout}")
        self.check(call.layout)
        if self.rule == "paper":
            return _paper_plan(self, call.layout)
        safe = self.rule == "safe"
        if not safe and call.layout.main.start != 0:
            raise UnsupportedError(f"rule='upstream' knows text after the video only; got {call.layout}. Use 'safe'.")
        sinks = self.sink_frames if safe else int(self.variant == "wan")
        mask = _block_mask(call.layout, self.decay, self.block_size, sinks, safe)
        blocks = Blocks.uniform(call.layout.tokens, self.block_size)
        return Plan(call.layout, blocks, blocks, BlockList.from_mask(mask[None, None]))

    def with_density(self, density: float, layout: Layout) -> tuple[Radial, float]:
        """Solve ``decay``, then ``block_size`` where decay alone misses by more than 20 %.

        Small frames leave decay nothing to do: their bands are never narrower than a block.
        """
        check_density(density)
        self.check(layout)
        best = None
        for block in (self.block_size, *sorted(BLOCK_SIZES, key=lambda b: abs(b - self.block_size))):
            found = _solve_decay(replace(self, block_size=block), density, layout)
            if best is None or abs(found[1] - density) < abs(best[1] - density):
                best = found
            if abs(best[1] - density) <= 0.2 * density:
                break
        return best


def _solve_decay(method: Radial, density: float, layout: Layout) -> tuple[Radial, float]:
    """The decay whose density is nearest: density never falls as decay grows, so bisect the exponent."""

    def reached(decay: float) -> float:
        return replace(method, decay=decay).plan(None, None, None, Call(layout)).density

    low, high = 2.0**-8, 2.0**8
    ends = {decay: reached(decay) for decay in (low, method.decay, high)}
    if method.rule == "paper" or not ends[low] < density < ends[high]:
        decay = min((method.decay, low, high), key=lambda d: abs(ends[d] - density))
        return replace(method, decay=decay), ends[decay]
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        if reached(middle) < density:
            low = middle
        else:
            high = middle
    decay = min((low, high), key=lambda d: abs(reached(d) - density))
    return replace(method, decay=decay), reached(decay)


def nominal_width(distance: int, frame_tokens: int) -> float:
    """rho(d): tokens of band that frames ``distance`` apart keep before decay, halved per doubling of the distance.

    Less than one token, and still a width, from the first power of two above ``frame_tokens`` on.
    """
    return 2.0 ** (frame_tokens.bit_length() - distance.bit_length())


def half_width(distance: int, frame_tokens: int, decay: float, block: int) -> float:
    """omega(d): band half-width in tokens; whole frames up to distance 1, never below a block."""
    return frame_tokens if distance <= 1 else max(block, decay * nominal_width(distance, frame_tokens))


def kept(distance: int, frame_tokens: int) -> bool:
    """Whether frames ``distance`` apart see each other at all: narrow bands survive at every 2^i-th distance only."""
    width = nominal_width(distance, frame_tokens)
    return width >= DECIMATE_BELOW or distance % int(DECIMATE_BELOW / width) == 0


@dataclass(frozen=True)
class _Pairs:
    """The blocks that query frame i shares with each key frame j: rows (1, span, 1), cols (J, 1, span), in blocks.

    ``touch``: bool (J, span, span), blocks that hold tokens of both. ``row0``, ``col0``: where the frames start.
    """

    row0: int
    col0: Tensor
    rows: Tensor
    cols: Tensor
    touch: Tensor

    def write(self, mask: Tensor, tiles: Tensor, value: bool) -> None:
        rows, cols = self.rows.expand_as(tiles), self.cols.expand_as(tiles)
        mask[rows[tiles], cols[tiles]] = value


def _pairs(layout: Layout, b: int, i: int) -> _Pairs:
    frames, tokens = layout.grid[0], layout.grid[1] * layout.grid[2]
    row0 = layout.main.start + i * tokens
    col0 = layout.main.start + torch.arange(frames) * tokens
    span = torch.arange((tokens + b - 2) // b + 1)
    rows, cols = (row0 // b + span)[None, :, None], (col0 // b)[:, None, None] + span[None, None, :]
    touch = (rows * b < row0 + tokens) & (cols * b < (col0 + tokens)[:, None, None])
    return _Pairs(row0, col0, rows, cols, touch)


def _block_mask(layout: Layout, decay: float, b: int, sinks: int, safe: bool) -> Tensor:
    """bool (nb, nb): the released mask, or with ``safe`` the same one without its gaps."""
    frames, tokens = layout.grid[0], layout.grid[1] * layout.grid[2]
    blocks = Blocks.uniform(layout.tokens, b)
    mask = torch.zeros((blocks.count, blocks.count), dtype=torch.bool)
    omega = torch.tensor([int(half_width(d, tokens, decay, b)) for d in range(frames)])
    keep = torch.tensor([kept(d, tokens) or (safe and d <= 1) for d in range(frames)])
    key = torch.arange(frames)
    sink = key < sinks
    # The released code looks at the first ceil(s / b) blocks of a frame, which misses the last one it straddles into.
    seen = torch.arange((tokens + b - 2) // b + 1) < (-(-tokens // b) if not safe else tokens)
    for i in range(frames):
        pairs, distance = _pairs(layout, b, i), (key - i).abs()
        width = omega[distance].masked_fill(sink, tokens)
        tiles = _shrink(pairs, width, tokens, b) & seen[:, None] & seen
        if safe:
            tiles |= pairs.touch & (sink | (distance <= 1))[:, None, None]
        pairs.write(mask, tiles & (keep[distance] | sink)[:, None, None], True)
    dense = outside_main(blocks, layout)
    if not safe:
        dense[layout.main.stop // b :] = True
    mask[dense] = True
    mask[:, dense] = True
    return mask


def _shrink(pairs: _Pairs, width: Tensor, tokens: int, b: int) -> Tensor:
    """bool (J, span, span): the released reduction of a token band between two frames to blocks, in closed form.

    The rows of a block that one of its columns sees form an interval, so the columns seen by more than a third of
    the b rows, and those seen at all, are intervals too; the block is kept iff the former exceed 0.6 of the latter.
    """
    p, q, col0 = pairs.rows * b, pairs.cols * b, pairs.col0[:, None, None]
    top, bottom = p.clamp_min(pairs.row0), (p + b).clamp_max(pairs.row0 + tokens) - 1
    left, right = torch.maximum(q, col0), torch.minimum(q + b, col0 + tokens) - 1
    shift, width = pairs.row0 - col0, width[:, None, None]

    def columns(rows: int) -> Tensor:
        """How many columns see at least ``rows`` rows."""
        first = torch.maximum(left, top + rows - 1 - shift - width)
        last = torch.minimum(right, bottom + 1 - rows - shift + width)
        return (last - first + 1).clamp_min(0) * ((bottom - top + 1 >= rows) & (2 * width + 1 >= rows))

    dense, touched = columns(b // 3 + 1), columns(1)
    return (touched > 0) & (dense * 5 > touched * 3)


def paper_reach(distance: int, tokens: int) -> int:
    """The paper's band between frames ``distance`` apart: largest visible in-frame offset, -1 for none."""
    power = 1 << (max(distance, 1).bit_length() - 1)
    if power <= tokens:
        return tokens // power - 1
    return 0 if distance % -(-power // tokens) == 0 else -1


def _paper_plan(method: Radial, layout: Layout) -> Plan:
    """The token mask of the paper's section 4, as a band whose reach depends on the pair of frames."""
    (frames, tokens), b = (layout.grid[0], layout.grid[1] * layout.grid[2]), method.block_size
    blocks = Blocks.uniform(layout.tokens, b)
    by_distance = torch.tensor([paper_reach(d, tokens) for d in range(frames)])
    key = torch.arange(frames)
    # One more row and column stands for every token outside the video: always seen, and seeing all.
    reach = torch.full((frames + 1, frames + 1), layout.tokens, dtype=torch.int32)
    reach[:frames, :frames] = by_distance[(key[:, None] - key[None, :]).abs()]
    reach[:frames, : min(method.sink_frames, frames)] = layout.tokens
    some = torch.zeros((blocks.count, blocks.count), dtype=torch.bool)
    less = torch.zeros_like(some)
    for i in range(frames):
        pairs = _pairs(layout, b, i)
        p, q, col0 = pairs.rows * b, pairs.cols * b, pairs.col0[:, None, None]
        top, bottom = p.clamp_min(pairs.row0) - pairs.row0, (p + b).clamp_max(pairs.row0 + tokens) - 1 - pairs.row0
        left, right = torch.maximum(q, col0) - col0, torch.minimum(q + b, col0 + tokens) - 1 - col0
        limit = reach[i, :frames, None, None]
        pairs.write(some, pairs.touch & (torch.maximum(top - right, left - bottom).clamp_min(0) <= limit), True)
        pairs.write(less, pairs.touch & (torch.maximum(bottom - left, right - top) > limit), True)
    outside = outside_main(blocks, layout)
    some |= outside[:, None] | outside[None, :]
    frame = torch.full((layout.tokens,), frames, dtype=torch.int32)
    frame[layout.main] = torch.arange(frames, dtype=torch.int32).repeat_interleave(tokens)
    offset = torch.zeros(layout.tokens, dtype=torch.int32)
    offset[layout.main] = torch.arange(tokens, dtype=torch.int32).repeat(frames)
    band = Band(q_pos=offset, k_pos=offset, q_row=frame, k_col=frame, reach=reach)
    return Plan(
        layout, blocks, blocks, BlockList.from_mask((some & ~less)[None, None]),
        BlockList.from_mask((some & less)[None, None]), Predicate(band=band),
    )  # fmt: skip
