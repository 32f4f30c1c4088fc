"""Symmetric integer quantisers of queries and keys (SageAttention, 2410.02367; SageAttention2, 2411.10958)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GRANULARITIES = ("block", "warp", "thread", "token")
QMAX = {8: 127, 4: 7}
EPSILON = 1e-7


def quantize(
    x: Tensor,
    *,
    bits: int,
    granularity: str,
    role: str,
    block: int,
    warp: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Integer codes and their scales, one scale per group of tokens; ``x ~ codes * scales[..., group, None]``.

    x: (B, H, N, D) float, quantised in float32. ``bits``: 8 (codes -127..127) or 4 (-7..7). ``granularity``,
    ``role`` (``"q"`` or ``"k"``), ``block`` and ``warp`` fix the groups, see :func:`groups`. With ``scale``, x is first
    multiplied by scale x log2(e), and the scales contain that factor: the products are then base-2 logits.

    Returns codes int8 (B, H, N, D), one per element for 4 bits too, and scales float32 (B, H, groups):
    amax/qmax + 1e-7, the quotient rounded half away from zero. Groups past the end hold 1e-7. A group with a value
    that is not finite gets a scale that is not, so the fault shows in every product. Raises ``ValueError`` for what
    is not served.
    """
    if bits not in QMAX:
        raise ValueError(f"bits {bits!r} is not served; choose 8 or 4")
    index, count = groups(x.shape[2], granularity, role, block=block, warp=warp, device=x.device)
    x = x.float()
    if scale is not None:
        x = x * (scale * math.log2(math.e))
    largest = x.new_zeros((*x.shape[:2], count))
    largest = largest.scatter_reduce(-1, index.expand(*x.shape[:2], -1), x.abs().amax(-1), "amax")
    scales = largest / QMAX[bits] + EPSILON
    ratio = x / scales[..., index, None]
    codes = (ratio + torch.where(ratio >= 0, 0.5, -0.5)).trunc()
    return codes.nan_to_num(0, 0, 0).to(torch.int8), scales


def groups(
    n: int, granularity: str, role: str, *, block: int, warp: int | None = None, device: torch.device | None = None
) -> tuple[Tensor, int]:
    """The group of each of ``n`` tokens, int64 (n,), and how many groups there are.

    ``block``: tokens per quantisation block; ``warp``: those of one warp, a divisor of ``block``, None for all of it.
    ``"block"`` and, for keys, ``"warp"``: one group per block. ``"warp"``: one per warp of queries. ``"thread"``: what
    one thread of an m16n8 matrix instruction holds: every eighth query of a warp, or every fourth pair of keys
    (SageAttention2, section 3.2). ``"token"``: one per token. A last, ragged block has as many groups as a whole one.
    """
    warp = block if warp is None else warp
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity {granularity!r} is unknown; choose one of {', '.join(GRANULARITIES)}")
    if role not in ("q", "k"):
        raise ValueError(f"role {role!r} is unknown; choose 'q' (queries) or 'k' (keys)")
    if block < 1 or warp < 1 or block % warp:
        raise ValueError(f"warp {warp} does not divide block {block}; for example block=128, warp=32")
    if granularity == "thread" and warp % 8:
        raise ValueError(f"granularity 'thread' needs warps of a multiple of 8 tokens; got {warp}")
    token = torch.arange(n, device=device)
    blocks = -(-n // block)
    if granularity == "token":
        return token, n
    if granularity == "block" or (granularity == "warp" and role == "k"):
        return token // block, blocks
    warps = blocks * (block // warp)
    if granularity == "warp":
        return token // warp, warps
    if role == "q":
        return 8 * (token // warp) + token % 8, 8 * warps
    return 4 * (token // warp) + token % 8 // 2, 4 * warps


def pack_int4(codes: Tensor) -> Tensor:
    """Two 4-bit codes per byte: int8 (..., D) in -8..7 -> uint8 (..., D / 2).

    Byte d holds element d in its low and element d + D/2 in its high half, so that unpacking interleaves nothing.
    Raises ``ValueError`` for an odd D.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"packing needs an even last dimension; got {codes.shape[-1]}")
    low, high = (half.to(torch.int8) for half in codes.chunk(2, -1))
    return ((low & 15) | (high << 4)).view(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_int4`: int8 (..., D)."""
    byte = packed.view(torch.int8)
    return torch.cat([(byte << 4) >> 4, byte >> 4], -1)
