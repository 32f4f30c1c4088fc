"""Masks: what an attention mask means for a sparse call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout

# Additive masks hide a key by this or less: its weight is exactly zero in every precision beside any live key.
HIDDEN = -1e4


class Unreadable(ValueError):
    """The mask is not key padding that a sparse call can honour; the message says what it is."""


@dataclass(frozen=True)
class Live:
    """The live keys of a call: ``count`` int32 (batch,), the first so many keys of each sample.

    ``turn``: tokens that first move from the front of the sequence to its end. Padded text in front of the video leaves
    dead keys in the middle; behind the video they are a tail. ``layout``: of the tokens after the turn.
    """

    count: Tensor
    layout: Layout
    turn: int = 0


def live_keys(mask: Any, batch: int, layout: Layout) -> Live | None:
    """The live keys that ``mask`` leaves, or None where every key is live. One host sync.

    ``mask``: what ``scaled_dot_product_attention`` takes, over the tokens N of ``layout``, the same for every head:
    (1 or batch, heads, 1, N) by key, or (.., N, N) where a pair is live when both its tokens are. Boolean, true where
    live; or added to the logits, zero where live and at most ``HIDDEN`` where dead. Rows of dead queries see nothing in
    the stock call; here they see the live keys, which nothing live ever reads.

    Raises :class:`Unreadable` for any other mask, such as one by frame, and for dead keys inside the grid.
    """
    if mask is None:
        return None
    keys = layout.tokens
    if not isinstance(mask, Tensor):
        raise Unreadable(f"a {type(mask).__name__}; only tensors are read")
    shape = tuple(mask.shape)
    if mask.ndim != 4 or shape[2] not in (1, keys) or shape[3] != keys or shape[0] not in (1, batch):
        raise Unreadable(f"a mask of shape {shape}; only (batch, heads, 1 or {keys}, {keys}) are read")
    seen = mask if mask.dtype == torch.bool else mask == 0
    live, told_by_key = _live(seen[:, 0])
    checks = [told_by_key]
    if shape[1] > 1:
        checks.append((mask[:, :1] == mask).all())
    if mask.dtype != torch.bool:
        checks.append((seen | (mask <= HIDDEN)).all())
    lead = _leading_text(layout)
    count = live.sum(-1, dtype=torch.int32)
    head = torch.arange(keys, device=mask.device) < count[:, None]
    turns = [0, lead] if lead else [0]
    fits = [(live.roll(-turn, -1) == head).all() for turn in turns]
    flags = torch.stack([torch.stack(checks).all(), *fits]).to(torch.int32)
    told = torch.cat([flags, count.min()[None]]).tolist()
    readable, fewest = told[0], told[-1]
    if not readable:
        raise Unreadable(f"a {mask.dtype} mask of shape {shape} that is more than a choice of live keys")
    if fewest == keys:
        return None
    turn = next((turn for turn, fit in zip(turns, told[1:-1], strict=True) if fit), None)
    if turn is None:
        raise Unreadable("a key mask whose dead keys are not all at the end of the sequence or of the text in front")
    turned = layout if not turn else Layout(segments=_turned(layout))
    if fewest < turned.main.stop:
        raise Unreadable("a key mask with dead keys in the token grid, or with no live key at all")
    return Live(count.expand(batch), turned, turn)


def _live(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Live keys (batch, N) of the pairs ``seen`` (batch, 1 or N, N), and whether they tell all of ``seen``."""
    if seen.shape[1] == 1:
        return seen[:, 0], torch.ones((), dtype=torch.bool, device=seen.device)
    rows, columns = seen.sum(-1), seen.sum(-2)
    live = columns > 0
    count = live.sum(-1, keepdim=True)
    # Pairs lie in live columns only; rows of as many pairs as there are live columns are therefore full.
    both = (rows == count * live).all()
    keys_only = (rows == count).all()
    return live, both | keys_only


def _leading_text(layout: Layout) -> int:
    """Tokens in front of the grid where all of them are text."""
    before = layout.segments[: _main(layout)]
    return sum(s.tokens for s in before) if all(s.kind == "text" for s in before) else 0


def _turned(layout: Layout) -> tuple:
    at = _main(layout)
    return (*layout.segments[at:], *layout.segments[:at])


def _main(layout: Layout) -> int:
    return next(i for i, segment in enumerate(layout.segments) if segment.kind == "main")
