"""Recipe: which operands of attention are quantised and how."""

from __future__ import annotations

from dataclasses import dataclass

BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Recipe:
    """``qk``: None, ``"int8"`` or ``"int4"``. ``pv``: None (as the inputs), ``"fp16"``, ``"fp8"`` or ``"int8"``.

    ``granularity``, ``block_q``, ``warp_q``, ``block_k``: groups of queries and keys that share a scale, see
    :func:`~dit_accel.kernels.quant.groups`. ``smooth_q``, ``smooth_k``, ``smooth_v``: means taken out first.
    ``head_bits``: 4 or 8 for each query head, in the place of ``qk``'s, or None.
    ``p_scale``: unit of the 8-bit attention weights, ``"static"`` (1), or the largest weight of each ``"tile"`` or of
    each ``"row"`` of a tile. ``accumulate``: ``"fp32"`` or ``"fp16"`` sums of up to 64 products of P and V; either is
    added up in FP32 from tile to tile.
    """

    qk: str | None = "int8"
    pv: str | None = None
    granularity: str = "token"
    smooth_q: bool | None = None
    smooth_k: bool = True
    smooth_v: bool = False
    block_q: int = 128
    warp_q: int = 32
    block_k: int = 64
    p_scale: str | None = None
    accumulate: str = "fp32"
    head_bits: tuple[int, ...] | None = None

    @property
    def narrow(self) -> bool:
        return self.accumulate == "fp16"
