"""VMoBA (arXiv 2506.23858): each query attends to the chunks of the video whose mean key is most like it.

Layers take turns with three partitions of the video: runs of frames, rectangles through all frames, boxes. A query
always sees its own chunk; further ones are chosen by similarity, a fixed number (``topk``) or until their weight makes
up a share of the total (``threshold``). The chunks: ``vmoba_chunks.py``, the choice: ``vmoba_select.py``.

Where the released code errs, this does what the paper says: ``k=1`` sees its own chunk only (released: dense), a
sample never depends on the others of its batch, ``tau=1`` sees everything, and a ``tau`` that own chunks already make
up adds nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import choice, number, plain
from ..errors import UnsupportedError, UsageError
from ..kernels import BlockList
from ..layout import Layout
from ..plans import Blocks, Plan
from ..schedule import Schedule
from .base import Call, Method, check_density
from .tiles import densities
from .vmoba_chunks import PARTITIONS, PUBLISHED, Chunk, Chunking, Chunks, rule
from .vmoba_select import SCOPES, threshold, topk

SELECTIONS = ("topk", "threshold")
GRANULARITIES = ("token", "block")
# Queries pooled at granularity "block".
QUERY_BLOCK = 64
# Similarities held at a time while heads do not compete: 32 MiB.
AT_ONCE = 1 << 23

# The paper keeps the first quarter of the steps dense; FastVideo's `first_full_step` is 12, of 50 steps.
_PAPER, _FASTVIDEO = Schedule(first=0.25), Schedule(first=12)


def _topk(chunks: Chunks, k: tuple[int, int, int], schedule: Schedule) -> tuple[dict[str, Any], Schedule]:
    return {"chunks": chunks, "select": "topk", "scope": "query_head", "k": k}, schedule


def _trained(chunks: Chunks) -> tuple[dict[str, Any], Schedule]:
    return {"chunks": chunks, "select": "threshold", "scope": "head_global", "tau": 0.25}, _PAPER


# Parameters, and what stays dense. "wan-*": paper, table 4 (Wan 2.1 1.3B). The first two without training, the others
# of trained models. "fastvideo-*": the configurations of FastVideo's port, for trained models.
PRESETS: dict[str, tuple[dict[str, Any], Schedule]] = {
    "wan-480p": _topk(PUBLISHED[21, 30, 52], (2, 6, 18), _PAPER),
    "wan-720p": _topk(PUBLISHED[21, 45, 80], (2, 10, 9), _PAPER),
    "wan-576p-trained": _trained(PUBLISHED[24, 36, 64]),
    "wan-480p-long-trained": _trained(PUBLISHED[36, 30, 52]),
    "fastvideo-480p": (
        {
            "chunks": (2, (3, 4), (4, 6, 4)), "select": "threshold", "scope": "query_head", "k": (3, 20, 15),
            "tau": 0.25,
        },
        _FASTVIDEO,
    ),
    "fastvideo-448p": _topk((2, (4, 13), (4, 4, 13)), (2, 6, 18), _FASTVIDEO),
}  # fmt: skip


@dataclass(frozen=True)
class VMoBA(Method):
    """VMoBA. Layer ``l`` takes partition ``l mod 3``: temporal, spatial, spatio-temporal.

    ``chunks``: sizes in tokens, (frames, (height, width), (frames, height, width)); the first may be a fraction of a
    frame. None is the published setting where there is one for the grid, else a rule with as many chunks.

    ``select``: ``"topk"`` takes ``k`` chunks per query, its own included; ``"threshold"`` adds the fewest similarities
    that make up ``tau`` of the total, after stretching them to 0..1. ``scope`` is what competes: ``"query_head"`` (one
    query, one head), ``"head_global"`` (all queries of a head), ``"overall"`` (a sample), ``"block"`` (all queries and
    heads of one chunk; threshold only). None is the published one: ``query_head`` for topk, ``head_global`` for
    threshold. ``k``: an int, a fraction of the chunks as a float, or one of these per partition. ``granularity``:
    ``"token"`` chooses for every query as published; ``"block"`` for runs of up to 64 queries inside a chunk by their
    mean, which lets whole blocks of keys be skipped.

    Text and other segments see all and are seen by all. Dead keys take no part in means, totals or budgets. Scopes over
    heads reach as far as the heads of one call.

    Defaults: the published setting without training (paper, table 4 and appendix A), whose k is a quarter of the
    chunks; there the first quarter of the steps ran dense. VMoBA is a method for training: without, the paper reports
    16 to 19 dB against dense attention on Wan 2.1.
    """

    name: ClassVar[str] = "vmoba"
    static: ClassVar[bool] = False

    chunks: Chunks | None = None
    select: str = "topk"
    scope: str | None = None
    k: int | float | tuple[int | float, ...] = 0.25
    tau: float = 0.25
    granularity: str = "token"

    def __post_init__(self) -> None:
        if self.scope is None:
            object.__setattr__(self, "scope", "head_global" if self.select == "threshold" else "query_head")
        for name, allowed in (("select", SELECTIONS), ("scope", SCOPES), ("granularity", GRANULARITIES)):
            choice(f"VMoBA.{name}", getattr(self, name), allowed)
        if self.select == "topk" and self.scope == "block":
            raise UsageError(
                "VMoBA.scope 'block' has no meaning for select='topk', which counts chunks per query; "
                "use select='threshold', or another scope"
            )
        if self.chunks is not None:
            object.__setattr__(self, "chunks", _chunks(self.chunks))
        object.__setattr__(self, "k", _counts(self.k))
        tau = number("VMoBA.tau", self.tau, "the share of the total weight to keep, 0 or more", 0)
        object.__setattr__(self, "tau", tau)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> VMoBA:
        """A published configuration by name, with single parameters replaced by ``changes``.

        Sources: ``wan-480p`` (81 frames 480 x 832) and ``wan-720p`` (81 x 720 x 1280), without training, and
        ``wan-576p-trained`` (93 x 576 x 1024) and ``wan-480p-long-trained`` (141 x 480 x 832): paper, table 4.
        ``fastvideo-480p`` (77 x 480 x 832) and ``fastvideo-448p`` (77 x 448 x 832): FastVideo's configurations. On
        other grids their chunks leave ragged ends. :meth:`preset_schedule` has the dense steps that go with it.
        """
        return cls(**{**_preset(name)[0], **changes})

    @classmethod
    def preset_schedule(cls, name: str) -> Schedule:
        """The dense steps that a configuration was published with: FastVideo's as a count, the paper's as a share."""
        return _preset(name)[1]

    def chunk(self, layout: Layout, layer: int) -> Chunk:
        """The chunk size of ``layer`` on ``layout``."""
        return (self.chunks or rule(layout.grid))[layer % len(PARTITIONS)]

    def budget(self, layer: int, chunks: int) -> int:
        """How many of so many ``chunks`` a query takes under ``topk`` in ``layer``, on average over its scope."""
        k = self.k[layer % len(PARTITIONS)] if isinstance(self.k, tuple) else self.k
        return min(max(round(k * chunks), 1) if isinstance(k, float) else k, chunks)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, call: Call) -> Plan:
        layout = call.layout
        if call.kv_layout is not None and call.kv_layout != layout:
            raise UnsupportedError(f"VMoBA needs keys in the queries' layout; got {layout} and {call.kv_layout}")
        chunk, device = self.chunk(layout, call.layer), q.device
        key = ("vmoba", layout, chunk, self.granularity, device)
        tables = call.state.plan(key, lambda: _Tables.make(layout, chunk, self.granularity, device))
        live = None if call.kv_valid is None else call.kv_valid.to(device)[:, None]
        mask = self._mask(q, k, tables, live, call.layer)
        return Plan(layout, tables.q_blocks, tables.k_blocks, _lists(mask), order=tables.chunking.order)

    def with_density(self, density: float, layout: Layout) -> tuple[VMoBA, float]:
        """Solve ``k`` for each partition, under ``topk``; the density reached is the mean over the three.

        On ragged chunks it is what chunks chosen regardless of their size give. The scope stays, unless ``topk`` has
        none such.
        """
        check_density(density)
        found = []
        for layer in range(len(PARTITIONS)):
            sizes = Chunking.make(layout, self.chunk(layout, layer), torch.device("cpu")).chunks.sizes.double()
            reached = [_density(sizes, k, layout) for k in range(1, len(sizes) + 1)]
            k = min(range(len(sizes)), key=lambda i, reached=reached: abs(reached[i] - density))
            found.append((k + 1, reached[k]))
        method = replace(
            self, select="topk", scope="query_head" if self.scope == "block" else self.scope,
            k=tuple(k for k, _ in found),
        )  # fmt: skip
        return method, sum(reached for _, reached in found) / len(found)

    def _mask(self, q: Tensor, k: Tensor, tables: _Tables, live: Tensor | None, layer: int) -> Tensor:
        """bool (B, H, query blocks, key blocks)."""
        (b, h), own = q.shape[:2], tables.own
        keys = torch.cat([_means(k[:, heads], tables.keys, live) for heads in _slices(k, tables.keys)], 1)
        keys = keys.repeat_interleave(h // k.shape[1], 1)
        valid = chunk_live = None
        if live is not None:
            query_live, chunk_live = _any(tables.queries, live), _any(tables.keys, live)
            valid = query_live[:, :, None] & chunk_live[:, None]
        slices = list(_slices(q, tables.queries, own.numel()))
        gates = (_means(q[:, heads], tables.queries, live) @ keys[:, heads].mT for heads in slices)
        if self.scope in ("block", "overall"):
            slices, gates = [slice(h)], [torch.cat(list(gates), 1)]
        mask = torch.ones((b, h, tables.q_blocks.count, tables.k_blocks.count), dtype=torch.bool, device=q.device)
        chosen = mask[:, :, : own.shape[0], : own.shape[1]]
        for heads, gate in zip(slices, gates, strict=True):
            chosen[:, heads] = self._choose(gate, own, valid, layer)
        if live is not None:
            # Padding rows keep their own chunk, so that no row is left without a key while its chunk has one.
            chosen |= (own & chunk_live[:, None])[:, None]
        return mask

    def _choose(self, gate: Tensor, own: Tensor, valid: Tensor | None, layer: int) -> Tensor:
        if self.select == "threshold":
            return threshold(gate, own, valid, self.scope, float(self.tau))
        return topk(gate, own, valid, self.scope, self.budget(layer, gate.shape[-1]))


@dataclass(frozen=True, eq=False)
class _Tables:
    """What follows from layout, chunk size and granularity alone.

    ``keys``: int64 (C, longest chunk) and ``queries``: int64 (S, longest unit), the tokens of each chunk and of each
    unit that chooses, padded with -1. ``own``: bool (S, C), the chunk that holds each unit.
    """

    chunking: Chunking
    q_blocks: Blocks
    k_blocks: Blocks
    keys: Tensor
    queries: Tensor
    own: Tensor

    @classmethod
    def make(cls, layout: Layout, chunk: Chunk, granularity: str, device: torch.device) -> _Tables:
        chunking = Chunking.make(layout, chunk, device)
        size = 1 if granularity == "token" else QUERY_BLOCK
        units = Blocks.uniform(chunking.chunks.n, 1) if size == 1 else chunking.pieces(size)
        owner = chunking.owner(units).to(device)
        return cls(
            chunking,
            chunking.with_outside(units, size),
            chunking.with_outside(chunking.chunks, max(chunking.outside, 1)),
            chunking.tokens(chunking.chunks),
            chunking.tokens(units),
            owner[:, None] == torch.arange(chunking.chunks.count, device=device),
        )


def _means(x: Tensor, table: Tensor, live: Tensor | None) -> Tensor:
    """float32 (B, H, blocks, D): means of x (B, H, N, D) over the live tokens of each row of ``table``; 0 for none."""
    b, h, _, d = x.shape
    taken = x.index_select(2, table.clamp_min(0).flatten()).float().view(b, h, *table.shape, d)
    if table.shape[1] == 1:
        return taken[..., 0, :]
    weight = _alive(table, live).float()
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1)
    return (weight[:, None, :, None] @ taken)[..., 0, :]


def _alive(table: Tensor, live: Tensor | None) -> Tensor:
    """bool (B or 1, blocks, longest): which entries of ``table`` are tokens, and live ones."""
    return (table >= 0)[None] if live is None else (table >= 0) & (table < live[..., None])


def _any(table: Tensor, live: Tensor) -> Tensor:
    """bool (B, blocks): rows of ``table`` with a live token."""
    return _alive(table, live).any(-1)


def _slices(x: Tensor, table: Tensor, beside: int = 0) -> Iterator[slice]:
    """Runs of the heads of x (B, H, N, D) that hold 32 MiB of float32: tokens of ``table``, or ``beside`` per head."""
    step = max(AT_ONCE // (x.shape[0] * max(table.numel() * x.shape[3], beside)), 1)
    return (slice(start, min(start + step, x.shape[1])) for start in range(0, x.shape[1], step))


def _lists(mask: Tensor) -> BlockList:
    """Index lists of a mask, some heads at a time: sorting takes eight bytes for each of its bits."""
    # Reading the widest count would wait for a GPU.
    width = int(mask.sum(-1).amax()) if mask.device.type == "cpu" else mask.shape[-1]
    step = max(AT_ONCE // mask[:, :1].numel(), 1)
    parts = [BlockList.from_mask(part, max(width, 1)) for part in mask.split(step, 1)]
    return BlockList(torch.cat([part.count for part in parts], 1), torch.cat([part.index for part in parts], 1))


def _density(sizes: Tensor, k: int, layout: Layout) -> float:
    """Density where each query of chunks of ``sizes`` sees its own and k - 1 others."""
    n = sizes.sum()
    others = (n - sizes) * (k - 1) / max(len(sizes) - 1, 1)
    return densities(layout, float((sizes * (sizes + others)).sum()))[0]


def _chunks(value: Any) -> Chunks:
    try:
        run, rectangle, box = value
        rectangle, box = (tuple(_index(n) for n in sides) for sides in (rectangle, box))
        run = float(run) if isinstance(run, float) else _index(run)
        good = (len(rectangle), len(box)) == (2, 3) and run > 0 and min(*rectangle, *box) >= 1
    except (TypeError, ValueError):
        good = False
    if not good:
        raise UsageError(
            f"VMoBA.chunks is (frames, (height, width), (frames, height, width)) in tokens, all positive, only the "
            f"first may be a fraction; got {value!r}. Example: chunks=(3, (5, 13), (7, 5, 13)), or None for a rule"
        )
    return run, rectangle, box


def _index(value: Any) -> int:
    """A whole number; True is none."""
    if isinstance(value, bool):
        raise TypeError("a bool is no number")
    return operator.index(value)


def _counts(value: Any) -> int | float | tuple[int | float, ...]:
    one = isinstance(value, str) or not isinstance(value, Iterable)
    many = tuple(plain(k) for k in ((value,) if one else value))
    for k in many:
        if k is None or len(many) not in (1, 3) or not (0 < k <= 1 if isinstance(k, float) else k >= 1):
            raise UsageError(
                f"VMoBA.k is a number of chunks (int, 1 or more), a share of them (float, up to 1.0), or three of "
                f"these for {', '.join(PARTITIONS)}; got {value!r}"
            )
    return many[0] if one else many


def _preset(name: str) -> tuple[dict[str, Any], Schedule]:
    if name not in PRESETS:
        raise UsageError(f"unknown VMoBA preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
