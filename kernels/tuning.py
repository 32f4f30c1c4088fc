"""The one tuning table: block sizes, warps and stages of the attention kernel per architecture and head dim.

Looked up, never searched: a call does not autotune. The register counts behind the entries come from compiling
each of them offline (``tests/kernels/block_sparse/test_triton_compile.py``); no entry has been timed on a GPU yet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tuning:
    """Queries per program, keys per step in full, tested and gathered tiles, warps, and pipeline stages.

    ``tested``: partial tiles whose predicate reads one value per row and column. ``gathered``: partial tiles whose
    test reads one value per pair (gate, band), which takes registers, so the step is shorter. ``described``: keys per
    step in full tiles that the copy engine fetches, which takes no registers for addresses; 0 where there is none.
    ``persistent``: programs per multiprocessor that take blocks in turn, or 0 for a program per block, which the
    hardware hands to whichever is free.
    """

    block_q: int
    full: int
    tested: int
    gathered: int
    warps: int
    stages: int
    described: int = 0
    persistent: int = 0


# The second key is the largest head dim of the class. "small" are the architectures with about 100 KB of shared memory
# (sm86, sm89, sm120). Of the sizes published for FlashAttention and SageAttention, the largest that spill no or next to
# no registers. "float32" multiplies without tensor cores, in straight-line code that grows with the block.
TABLE: dict[tuple[str, int], Tuning] = {
    ("sm80", 64): Tuning(128, 64, 32, 16, 4, 3),
    ("sm80", 128): Tuning(128, 64, 32, 16, 8, 3),
    ("sm80", 256): Tuning(64, 64, 32, 32, 8, 2),
    ("small", 64): Tuning(128, 64, 32, 16, 4, 3),
    ("small", 128): Tuning(128, 64, 32, 16, 8, 2),
    ("small", 256): Tuning(64, 32, 32, 32, 8, 2),
    ("sm90", 64): Tuning(128, 64, 64, 64, 8, 3, described=128),
    ("sm90", 128): Tuning(128, 64, 64, 16, 8, 3, described=128),
    ("sm90", 256): Tuning(128, 64, 32, 16, 8, 2, described=64),
    ("sm100", 64): Tuning(128, 64, 32, 32, 8, 3, described=64),
    ("sm100", 128): Tuning(128, 64, 32, 16, 8, 3, described=64),
    ("sm100", 256): Tuning(64, 64, 32, 16, 8, 2, described=64),
    ("float32", 64): Tuning(64, 32, 32, 32, 8, 2),
    ("float32", 128): Tuning(32, 32, 32, 16, 4, 2),
    ("float32", 256): Tuning(32, 16, 16, 16, 8, 2),
}
EMULATED = Tuning(128, 128, 128, 128, 4, 1)


def architecture(capability: tuple[int, int]) -> str:
    """The table's class of a CUDA compute capability."""
    if capability in ((8, 6), (8, 7), (8, 9)) or capability[0] == 12:
        return "small"
    return {8: "sm80", 9: "sm90"}.get(capability[0], "sm100")


def tuning(capability: tuple[int, int] | None, dim: int, itemsize: int, tile_q: int, tile_k: int) -> Tuning:
    """The entry for a head dim (the larger of D and Dv) and element size, its blocks fitted to the plan's tiles.

    ``capability`` None is the interpreter, where large blocks mean few emulated steps.
    """
    if capability is None:
        entry = EMULATED
    else:
        limit = next(limit for limit in (64, 128, 256) if dim <= limit)
        entry = TABLE["float32" if itemsize == 4 else architecture(capability), limit]
    return _fitted(entry, tile_q, tile_k)


@functools.cache
def _fitted(entry: Tuning, tile_q: int, tile_k: int) -> Tuning:
    block_q = fit(tile_q, entry.block_q)
    return replace(
        entry, block_q=block_q, full=fit(tile_k, entry.full), tested=fit(tile_k, entry.tested),
        gathered=fit(tile_k, entry.gathered), described=entry.described and fit(tile_k, entry.described),
        warps=max(4, entry.warps * block_q // entry.block_q),
    )  # fmt: skip


def fit(tile: int, best: int) -> int:
    """The block that cuts ``tile`` at the least cost: a power of two from 16 to ``best``.

    A block costs its padded length plus 24: short blocks read more and use the matrix units less. The 24 is a guess
    until it is timed; it makes a tile of 192 three blocks of 64, and one of 96 a single block of 128.
    """
    blocks = [block for block in (16, 32, 64, 128) if block <= best]
    return min(blocks, key=lambda block: -(-tile // block) * (block + 24))
