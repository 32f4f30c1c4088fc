"""The quantisers on NVIDIA GPUs: launches the Triton kernels. Import it only where Triton is.

Queries are read once, keys once for their mean and once for their codes, values likewise; what is quantised is written
once, as the attention kernel reads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import triton_quantisers_kernel as kernel
from .operands import Operands, four_bits
from .quantisers import QMAX, groups
from .recipe import BITS, Recipe
from .triton import alive_arguments, plain
from .values import CODES, value_scales

# Tokens whose statistics one program sums up, and how many it holds at a time.
CHUNK, STEP = 512, 64
WIDEST = 64


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recipe: Recipe,
    *,
    scale: float,
    live_q: Tensor | None = None,
    live_k: Tensor | None = None,
) -> Operands:
    """As ``operands.prepare``; means differ in the order of their sums alone. 8-bit values lie channel by channel, the
    tokens of a channel side by side. ``recipe.qk`` is not None."""
    k_mean = v_mean = v_scale = None
    if recipe.smooth_k:
        k_mean = moments(k, live_k, sums=True).mean
    four_q, four_k = (four_bits(recipe, x.shape[1], x.device) for x in (q, k))
    of_q = tokens(q, recipe, "q", live_q, four=four_q, smooth=recipe.smooth_q)
    of_k = tokens(k, recipe, "k", live_k, four=four_k, mean=k_mean, keep=recipe.smooth_q)
    if recipe.pv is not None:
        found = moments(v, live_k, sums=recipe.smooth_v, extremes=recipe.smooth_v, peak=not recipe.smooth_v)
        v_mean = found.mean
        v_scale = value_scales(found.largest, recipe.pv, narrow=recipe.narrow)
        v = values(v, v_scale, recipe.pv, live_k, mean=v_mean)
    elif live_k is not None:
        v = v.masked_fill(~live_k[..., None], 0)
    return Operands(
        of_q.codes, of_k.codes, v, of_q.token_scales * (scale * math.log2(math.e)), of_k.token_scales, v_scale,
        k_mean, v_mean, of_q.block_mean, of_k.smooth,
    )  # fmt: skip


@dataclass(frozen=True)
class Moments:
    """``mean`` (B, H, 1, D) over live tokens, and ``largest`` (B, H, 1, D), the largest magnitude of what is left once
    the mean is taken out. float32, or None where they were not asked for."""

    mean: Tensor | None
    largest: Tensor | None


def moments(
    x: Tensor, live: Tensor | None, *, sums: bool = False, extremes: bool = False, peak: bool = False
) -> Moments:
    """Statistics of x (B, H, N, D) per channel, read once. ``peak``: the largest magnitude without a mean taken out."""
    b, h, n, d = x.shape
    chunks = max(1, -(-n // CHUNK))
    asked = {"sums": sums, "low": extremes, "high": extremes, "peak": peak}
    table = {
        name: torch.empty((b, h, chunks, d), dtype=torch.float32, device=x.device) if wanted else None
        for name, wanted in asked.items()
    }
    width = min(WIDEST, _power(d))
    if x.numel():
        with torch.cuda.device_of(x):
            kernel.statistics[(chunks, b * h, -(-d // width))](
                *statistics_arguments(x, live, table), CHUNK=CHUNK, BLOCK=STEP, WIDTH=width, D=d, num_warps=4
            )
    else:
        table = {name: one if one is None else one.zero_() for name, one in table.items()}
    mean = largest = None
    if sums:
        count = max(n, 1) if live is None else live.sum(2).clamp_min(1)[..., None, None]
        mean = table["sums"].sum(2, keepdim=True) / count
    if peak:
        largest = table["peak"].amax(2, keepdim=True)
    if extremes:
        # Subtraction is monotonic in float32 too, so the extremes stay the extremes.
        ends = (table["low"].amin(2, keepdim=True) - mean).abs(), (table["high"].amax(2, keepdim=True) - mean).abs()
        largest = torch.maximum(*ends)
        if live is not None:
            largest = largest.masked_fill(~live.any(2)[..., None, None], 0)
    return Moments(mean, largest)


@dataclass(frozen=True)
class Quantised:
    """``codes`` int8 (B, H, N, D), or uint8 (B, H, N, D / 2) where packed; ``scales`` (B, H, groups) and
    ``token_scales`` (B, H, N). ``block_mean`` (B, H, blocks, D), ``smooth`` (B, H, N, D): as in ``Operands``."""

    codes: Tensor
    scales: Tensor
    token_scales: Tensor
    block_mean: Tensor | None
    smooth: Tensor | None


def tokens(
    x: Tensor,
    recipe: Recipe,
    role: str,
    live: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    four: Tensor | None = None,
    smooth: bool = False,
    keep: bool = False,
    packed: bool = False,
) -> Quantised:
    """Codes and scales of queries or keys x (B, H, N, D), each block read once.

    ``live``: bool (B or 1, H or 1, N) or None. ``mean``: float32 (B, H, 1, D), taken out first. ``four``: bool (H,),
    heads of 4 bits, the others have 8; None gives all those of the recipe. ``smooth``: take out each block's mean.
    ``keep``: return what was quantised too. ``packed``: two 4-bit codes a byte, as ``pack_int4`` lays them.
    """
    b, h, n, d = x.shape
    out = _outputs(x, recipe, role, smooth=smooth, keep=keep, packed=packed)
    if x.numel():
        blocks = -(-n // (recipe.block_q if role == "q" else recipe.block_k))
        with torch.cuda.device_of(x):
            kernel.tokens[(blocks, b * h)](
                *token_arguments(x, live, mean, out, four),
                **token_constants(d, recipe, role, packed=packed),
                num_warps=4 if d <= 64 else 8,
            )
    return out


def values(v: Tensor, scales: Tensor, kind: str, live: Tensor | None = None, *, mean: Tensor | None = None) -> Tensor:
    """Codes (B, H, N, D) of v (B, H, N, D) at ``scales`` (B, H, 1, D), 8-bit ones with stride 1 along the tokens."""
    b, h, n, d = v.shape
    dtype = CODES[kind]
    if dtype.itemsize > 1:
        codes = torch.empty((b, h, n, d), dtype=dtype, device=v.device)
    else:
        codes = torch.empty((b, h, d, -(-n // 16) * 16), dtype=dtype, device=v.device)[..., :n].mT
    width = min(WIDEST, _power(d))
    if v.numel():
        with torch.cuda.device_of(v):
            kernel.values[(-(-n // STEP), b * h, -(-d // width))](
                *value_arguments(v, live, mean, scales, codes),
                BLOCK=STEP, WIDTH=width, D=d, KIND=kind, EMULATED=plain.interpreted(), num_warps=4,
            )  # fmt: skip
    return codes


def statistics_arguments(x: Tensor, live: Tensor | None, table: dict[str, Tensor | None]) -> tuple:
    return (x, alive_arguments(live), *table.values(), x.stride(), x.shape[2], x.shape[1])


def token_arguments(x: Tensor, live: Tensor | None, mean: Tensor | None, out: Quantised, four: Tensor | None) -> tuple:
    """The run-time arguments of ``kernel.tokens``, in order."""
    limits = None if four is None else torch.where(four, float(QMAX[4]), float(QMAX[8]))
    return (
        x, alive_arguments(live), mean, out.block_mean, out.smooth, out.codes.view(torch.int8), out.scales,
        out.token_scales, limits, x.stride(), x.shape[2], x.shape[1], out.scales.shape[-1],
    )  # fmt: skip


def token_constants(d: int, recipe: Recipe, role: str, *, packed: bool = False) -> dict:
    """The compile-time arguments of ``kernel.tokens``: the groups of :func:`quantisers.groups` within one block."""
    block, warp = (recipe.block_q, recipe.warp_q) if role == "q" else (recipe.block_k, recipe.block_k)
    _, count = groups(block, recipe.granularity, role, block=block, warp=warp)
    lanes, pair = {"q": (8, 1), "k": (4, 2)}[role] if recipe.granularity == "thread" else (0, 1)
    half = -(-d // 2)
    return {
        "BLOCK": block, "ROWS": _power(block), "HALF": half, "WIDTH": _power(half), "D": d, "GROUPS": count,
        "SLOTS": _power(count), "SPAN": block if recipe.granularity == "block" else warp, "LANES": lanes, "PAIR": pair,
        "QMAX": float(QMAX[BITS[recipe.qk]]), "PACKED": packed,
    }  # fmt: skip


def value_arguments(v: Tensor, live: Tensor | None, mean: Tensor | None, scales: Tensor, codes: Tensor) -> tuple:
    strides = v.stride(), codes.stride()
    return (v, alive_arguments(live), mean, scales.contiguous(), codes, *strides, v.shape[2], v.shape[1])


def _outputs(x: Tensor, recipe: Recipe, role: str, *, smooth: bool, keep: bool, packed: bool) -> Quantised:
    b, h, n, d = x.shape
    block, warp = (recipe.block_q, recipe.warp_q) if role == "q" else (recipe.block_k, None)
    if packed and (d % 2 or recipe.qk != "int4"):
        raise ValueError(f"packing takes 4-bit codes of an even head dim; got {recipe.qk} and {d}")
    _, count = groups(n, recipe.granularity, role, block=block, warp=warp)

    def floats(*shape: int) -> Tensor:
        return torch.empty((b, h, *shape), dtype=torch.float32, device=x.device)

    kind, width = (torch.uint8, d // 2) if packed else (torch.int8, d)
    codes = torch.empty((b, h, n, width), dtype=kind, device=x.device)
    return Quantised(
        codes, floats(count), floats(n), floats(-(-n // block), d) if smooth else None, floats(n, d) if keep else None
    )


def _power(n: int) -> int:
    return max(1, 1 << (n - 1).bit_length())
