"""Context parallelism in diffusers' Ulysses form: whole sequences of a share of the heads, and back.

Outside attention each rank holds a slice of the tokens and all heads (arXiv:2309.14509). One all-to-all per tensor
gives it all tokens of its share of the heads, which is what a sparse plan needs; another one takes the result back.
Every decision follows from what all ranks know alike, so no rank waits for a collective that another one skips.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout import Layout
from ..state import State
from . import ops


class Refused(Exception):
    """This form of context parallelism is not served; the message says why and what is."""


@dataclass(frozen=True)
class Ulysses:
    """The ranks that share one sequence. ``anything``: their slices may differ by a token."""

    group: Any
    rank: int
    ranks: int
    anything: bool

    @classmethod
    def of(cls, call: ops.Primitive) -> Ulysses | None:
        """What a call's ``parallel_config`` asks for; None without context parallelism.

        Raises :class:`Refused` for ring attention, heads that do not divide, training, and masks that cannot be
        gathered. All of it is the same on every rank.
        """
        config = getattr(call.extra.get("parallel_config"), "context_parallel_config", None)
        if config is None:
            return None
        if config.ring_degree > 1:
            raise Refused(
                f"ring attention (ring_degree={config.ring_degree}) hands the keys round in parts, and a sparse plan "
                f"needs all keys of a head at once; use ContextParallelConfig(ulysses_degree={config.ring_degree})"
            )
        ranks, heads = config.ulysses_degree, (call.query.shape[2], call.key.shape[2])
        if any(count % ranks for count in heads):
            raise Refused(f"{heads[0]} query and {heads[1]} key heads do not divide among {ranks} ranks")
        if torch.is_grad_enabled() and call.query.requires_grad:
            raise Refused("sparse attention under context parallelism has no backward; run under torch.no_grad()")
        mask = call.attn_mask
        if mask is not None and (mask.ndim != 4 or mask.shape[1:] != (1, 1, call.key.shape[1])):
            raise Refused(
                f"a mask of shape {tuple(mask.shape)}; only a rank's own key mask (batch, 1, 1, keys) is read"
            )
        group = config._ulysses_mesh.get_group()
        return cls(group, dist.get_rank(group), ranks, config.ulysses_anything)

    def sizes(self, call: ops.Primitive) -> tuple[int, ...]:
        """Tokens of every rank's slice of ``call``. A collective where slices may differ."""
        own = call.query.shape[1]
        if not self.anything:
            return (own,) * self.ranks
        sizes = torch.empty(self.ranks, dtype=torch.int64, device=call.query.device)
        dist.all_gather_into_tensor(sizes, torch.tensor([own], device=sizes.device), group=self.group)
        return tuple(sizes.tolist())

    def share(self, sizes: tuple[int, ...], layout: Layout, state: State, device: torch.device) -> Share:
        """How slices of ``sizes`` tokens relate to the whole sequence. Raises :class:`Refused` when they cannot."""
        parts = _parts(layout, self.ranks)
        if tuple(sum(part) for part in zip(*parts, strict=True)) != sizes:
            raise Refused(f"the ranks hold {sizes} tokens of {layout}; expected text and video each split evenly")
        order = state.plan(("gathered order", layout, self.ranks, device), lambda: _order(parts, device))
        return Share(self, sizes, *order)

    def agree(self, fine: bool, device: torch.device) -> bool:
        """Whether every rank says so. A collective and a host sync."""
        answer = torch.tensor([int(fine)], device=device)
        dist.all_reduce(answer, dist.ReduceOp.MIN, group=self.group)
        return bool(answer)


@dataclass(frozen=True)
class Share:
    """A rank's slice. ``sizes``: tokens per rank. ``order``: place in the sequence of every gathered token.

    Ranks hold a slice of the text and a slice of the video each, so the gathered tokens of joint models are
    interleaved: [text 0, video 0, text 1, video 1, ...]. Dense attention does not care; a sparse plan does.
    ``back`` is its inverse; both are None where the tokens come in sequence.
    """

    ulysses: Ulysses
    sizes: tuple[int, ...]
    order: Tensor | None
    back: Tensor | None

    def whole(self, call: ops.Primitive) -> ops.Primitive:
        """The call over all tokens in sequence, for this rank's share of the heads."""
        query, key, value = (self._in_sequence(self._gather(x)) for x in (call.query, call.key, call.value))
        mask = call.attn_mask
        if mask is not None:
            mask = self._in_sequence(self._gather_mask(mask), axis=-1)
        extra = {name: value for name, value in call.extra.items() if name != "parallel_config"}
        offset = self.ulysses.rank * query.shape[2]
        return replace(
            call, query=query, key=key, value=value, attn_mask=mask, extra=extra, head_offset=offset
        )  # fmt: skip

    def part(self, out: Tensor) -> Tensor:
        """(B, N, H / ranks, D) of all tokens in sequence as (B, n, H, D) of this rank's own."""
        ranks, own = self.ulysses.ranks, self.sizes[self.ulysses.rank]
        if self.order is not None:
            out = out[:, self.order]
        batch, _, heads, width = out.shape
        received = out.new_empty(ranks * own, batch, heads, width)
        dist.all_to_all_single(
            received, out.transpose(0, 1).contiguous(), [own] * ranks, list(self.sizes), group=self.ulysses.group
        )  # fmt: skip
        return received.reshape(ranks, own, batch, heads, width).permute(2, 1, 0, 3, 4).reshape(batch, own, -1, width)

    def _gather(self, x: Tensor) -> Tensor:
        """(B, n, H, D) as (B, N, H / ranks, D), in gathered order."""
        ranks, (batch, own, heads, width) = self.ulysses.ranks, x.shape
        sent = x.reshape(batch, own, ranks, heads // ranks, width).permute(2, 1, 0, 3, 4).contiguous()
        received = x.new_empty(sum(self.sizes), batch, heads // ranks, width)
        dist.all_to_all_single(
            received, sent.flatten(0, 1), list(self.sizes), [own] * ranks, group=self.ulysses.group
        )  # fmt: skip
        return received.transpose(0, 1)

    def _gather_mask(self, mask: Tensor) -> Tensor:
        """(B, 1, 1, n) of every rank, side by side. Slices are padded to the longest: gathering wants equal ones."""
        longest = max(self.sizes)
        own = torch.nn.functional.pad(mask, (0, longest - mask.shape[-1])).contiguous()
        gathered = [torch.empty_like(own) for _ in self.sizes]
        dist.all_gather(gathered, own, group=self.ulysses.group)
        return torch.cat([part[..., :size] for part, size in zip(gathered, self.sizes, strict=True)], -1)

    def _in_sequence(self, x: Tensor, axis: int = 1) -> Tensor:
        return x if self.back is None else x.index_select(axis, self.back)


def _parts(layout: Layout, ranks: int) -> list[list[int]]:
    """Per tensor that is split among the ranks, text or not, the tokens that each rank gets."""
    lengths: list[tuple[bool, int]] = []
    for segment in layout.segments:
        kind = segment.kind == "text"
        before = lengths.pop()[1] if lengths and lengths[-1][0] == kind else 0
        lengths.append((kind, before + segment.tokens))
    return [[total // ranks + (rank < total % ranks) for rank in range(ranks)] for _, total in lengths]


def _order(parts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Place in the sequence of every gathered token, and the inverse."""
    starts = [sum(map(sum, parts[:i])) for i in range(len(parts))]
    slices = [
        torch.arange(start + sum(part[:rank]), start + sum(part[: rank + 1]), device=device)
        for rank in range(len(parts[0]))
        for start, part in zip(starts, parts, strict=True)
    ]
    return (None, None) if len(parts) == 1 else (torch.cat(slices), torch.cat(slices).argsort())
