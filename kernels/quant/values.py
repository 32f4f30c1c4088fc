"""Values and attention weights in 16 and 8 bits: what P @ V multiplies.

Values get one scale per channel over the sequence, applied after the sum. Scales of 16-bit values are powers of two and
1 unless a product could overflow, so ordinary values are rounded only and large ones shifted, never lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
# SageAttention2++ (2505.21136, section 3.2): 64 products of 448 x 2.25 stay below the 65504 of an FP16 accumulator.
E4M3_NARROW = 2.25
FP16_CHAIN = 64
FP16_MAX = 65504.0
_SIGN_AND_CODE = 0x87F00000 - (1 << 32)
CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "fp16": torch.float16}
LIMIT = {"fp8": E4M3_MAX, "int8": 127.0}


def quantize_values(v: Tensor, kind: str, *, narrow: bool = False) -> tuple[Tensor, Tensor]:
    """Codes of v (B, H, N, D) and float32 scales (B, H, 1, D), ``v ~ codes * scales``.

    ``kind``: ``"fp8"`` (codes float8_e4m3fn), ``"int8"`` or ``"fp16"``. ``narrow``: sums of up to 64 products with
    weights must fit an FP16 accumulator. A channel with a value that is not finite gets a scale that is not.
    """
    v = v.float()
    largest = v.abs().amax(2, keepdim=True) if v.shape[2] else v.new_zeros((*v.shape[:2], 1, v.shape[3]))
    scales = value_scales(largest, kind, narrow=narrow)
    if kind == "fp16":
        return (v / scales).half(), scales
    if kind == "int8":
        return round_int8(v / scales).nan_to_num(0, 0, 0).to(torch.int8), scales
    # The smallest float32 where a channel is all zero; its codes are zero.
    ratio = v / scales.clamp_min(torch.finfo(torch.float32).tiny)
    return ratio.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


def value_scales(largest: Tensor, kind: str, *, narrow: bool = False) -> Tensor:
    """Scales of channels whose largest magnitude is ``largest``, float32."""
    if kind == "fp16":
        limit = FP16_MAX / FP16_CHAIN if narrow else FP16_MAX
        return torch.exp2((largest / limit).log2().ceil().clamp_min(0))
    if kind == "int8":
        return largest / LIMIT["int8"] + 1e-7
    return largest / (E4M3_NARROW if narrow else E4M3_MAX)


def round_int8(x: Tensor) -> Tensor:
    """x rounded half away from zero and clamped to -127..127, as floats; NaN stays NaN."""
    return (x + torch.where(x >= 0, 0.5, -0.5)).trunc().clamp(-127, 127)


def round_e4m3(x: Tensor) -> Tensor:
    """x on the grid of float8_e4m3fn, to nearest even with saturation, in x's dtype; NaN stays NaN."""
    codes = x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    # A code's bits are those of a float32 of another bias. torch's own cast back takes five times as long on CPU.
    bits = codes.view(torch.int8).to(torch.int32).bitwise_left_shift_(20).bitwise_and_(_SIGN_AND_CODE)
    rounded = bits.view(torch.float32).mul_(2.0**120)
    if x.sum().isnan():
        rounded.masked_fill_(x.isnan(), torch.nan)
    return rounded.to(x.dtype)


ROUND = {"fp8": round_e4m3, "int8": round_int8}
