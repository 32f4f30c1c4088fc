"""Block sizes of FlexAttention's GPU kernel that divide a plan's tiles.

torch has one size per GPU and head dim, up to 128 x 128, and raises where it does not divide the tiles. On CPU any tile
is served.
"""

from __future__ import annotations

import torch

# The matrix units' least.
LEAST = 16
# torch's own choice, whatever the GPU, divides tiles that this divides.
LARGEST = 128


def refuses(tile: tuple[int, int], dim: int) -> str | None:
    """Why the GPU kernel cannot take tiles (queries, keys) of such a size at head dim ``dim``, or None."""
    if any(size % LEAST for size in tile):
        return f"tiles of {tile[0]} x {tile[1]}; on a GPU FlexAttention takes multiples of {LEAST}"
    if dim < LEAST:
        return f"head dim {dim}; on a GPU FlexAttention takes {LEAST} and more"
    return None


def options(tile: tuple[int, int], dim: int, dtype: torch.dtype) -> dict[str, int | str]:
    """``kernel_options`` of a GPU call: for a side of the tile that torch's own size need not divide, the largest power
    of two that does, within what shared memory holds at a head dim and dtype."""
    # The kernel for few queries has block sizes of its own.
    found: dict[str, int | str] = {"BACKEND": "TRITON"}
    most = 32 if dtype == torch.float32 else 64 if dim <= 128 else 32
    for name, size in zip(("BLOCK_M", "BLOCK_N"), tile, strict=True):
        if size % LARGEST:
            found[name] = min(size & -size, most)
    return found
