"""Quantised block-sparse attention on NVIDIA GPUs: launches the Triton kernel. Import it only where Triton is."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..block_sparse import triton as plain
from ..block_sparse.order import repeat_heads
from ..block_sparse.schedule import row_order
from ..predicate import Predicate
from ..tileplan import TilePlan
from ..tuning import Tuning
from .operands import Operands, smoothed
from .recipe import Recipe
from .triton_kernel import forward
from .values import FP16_CHAIN, LIMIT

# The contraction of an 8-bit matrix instruction.
SHORTEST = 32


def refuses(q: Tensor, plan: TilePlan, recipe: Recipe) -> str | None:
    """Why this tier cannot take the call, or None."""
    why = plain.refuses(q, None)
    if why is not None:
        return why
    if recipe.qk is None:
        return "qk=None; the kernel multiplies integer codes"
    return None


def attention(
    q: Tensor, x: Operands, plan: TilePlan, recipe: Recipe, *, scale: float, live: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As ``reference.attention``; ``live``: bool (B or 1, 1 or H, Nk), keys that exist and are not dead, or None."""
    out = q.new_empty((*q.shape[:3], x.v.shape[-1]), dtype=torch.float32 if plain.interpreted() else q.dtype)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    v = values_for(x.v)
    plan = smoothed(plan, x, q)
    if out.numel():
        entry = tuned(q, x, plan, recipe)
        blocks = plan.tiles_q * -(-plan.tile_q // entry.block_q)
        with torch.cuda.device_of(q):
            forward[(blocks * q.shape[0] * q.shape[1],)](
                *arguments(q, x, v, out, lse, plan, scale=scale, live=live),
                **constants(x, v, plan, recipe, entry, bounded=live is not None),
                num_warps=entry.warps,
                num_stages=entry.stages,
            )
    if lse is not None and x.k_mean is not None:
        means = repeat_heads(x.k_mean, q.shape[1])
        lse += scale * (q.float() @ means.mT)[..., 0]
    return out.to(q.dtype), lse


def values_for(v: Tensor) -> Tensor:
    """8-bit values with the tokens of a channel side by side, as 8-bit matrix instructions read them."""
    if v.element_size() > 1:
        return v.contiguous()
    if v.stride(2) == 1 and v.stride(3) % 16 == 0:
        return v
    b, h, n, d = v.shape
    lying = v.new_empty((b, h, d, -(-n // 16) * 16))[..., :n]
    return lying.copy_(v.mT).mT


def tuned(q: Tensor, x: Operands, plan: TilePlan, recipe: Recipe) -> Tuning:
    """The tuning entry of the 16-bit kernel, its blocks of keys long enough and, for FP16 sums, short enough."""
    entry = plain.tuning_for(plan, q.half() if q.dtype == torch.float32 else q, q.shape[-1], plan.tile_q, plan.tile_k)
    full = entry.described or entry.full  # 8-bit keys take half the registers of what the table is for
    blocks = {"full": full, "tested": entry.tested, "gathered": entry.gathered}
    blocks = {name: max(SHORTEST, block) for name, block in blocks.items()}
    if recipe.narrow:
        blocks = {name: min(FP16_CHAIN, block) for name, block in blocks.items()}
    return replace(entry, **blocks)


def arguments(
    q: Tensor, x: Operands, v: Tensor, out: Tensor, lse: Tensor | None, plan: TilePlan, *, scale: float,
    live: Tensor | None,
) -> tuple:  # fmt: skip
    """The kernel's run-time arguments, in order."""
    predicate = plan.predicate if plan.partial is not None and plan.predicate is not None else Predicate()
    codes, k, raw = x.q.contiguous(), x.k.contiguous(), None
    if plan.reps or plan.first_order is not None:
        q = q if q.stride(-1) == 1 else q.contiguous()
        raw = q, q.stride()[:3]
    return (
        codes, k, v, out, lse, x.q_scale.contiguous(), x.k_scale.contiguous(), _flat(x.v_scale), _flat(x.v_mean),
        _delta(x, scale), alive_arguments(live), raw,
        codes.stride()[:3], k.stride()[:3], v.stride(), out.stride()[:3],
        row_order(plan, len(q), q.shape[1], q.shape[1] // k.shape[1]),
        plain.list_arguments(plan.full), plain.list_arguments(plan.partial), *plain.predicate_arguments(predicate),
        plain.gate_arguments(plan.gate if plan.partial is not None else None),
        tuple(plain.group_arguments(group, q.shape[1]) for group in plan.reps) or None,
        plain.matrix_arguments(plan.first_order, q),
        plain.factor_arguments(plan, len(q), q.shape[1]),
        plan.n_q, plan.n_k, q.shape[1], q.shape[1] // k.shape[1], scale * math.log2(math.e),
    )  # fmt: skip


def constants(x: Operands, v: Tensor, plan: TilePlan, recipe: Recipe, entry: Tuning, *, bounded: bool) -> dict:
    """The kernel's compile-time arguments. ``bounded``: some keys are dead."""
    step = entry.gathered if plan.gathers else entry.tested
    blocks = [entry.full] if plan.partial is None else [entry.full, step]
    cut = any(plan.tile_k % block or plan.n_k % block for block in blocks)
    dim, dim_v = x.q.shape[-1], v.shape[-1]
    return {
        "TILE_Q": plan.tile_q, "TILE_K": plan.tile_k, "BLOCK_Q": entry.block_q, "FULL": entry.full, "PARTIAL": step,
        "D": dim, "DV": dim_v, "WIDTHS": (*widths(dim), *widths(dim_v)), "SMOOTH": recipe.block_q,
        "PV": recipe.pv or "", "UNIT": recipe.p_scale or "static", "LIMIT": LIMIT.get(recipe.pv, 1.0),
        "NARROW": recipe.narrow, "REPS": tuple(group.width for group in plan.reps), "REP_BLOCK": entry.tested,
        "BOUNDED": bool(bounded or cut), "TESTED": plan.predicate is not None,
        "EMULATED": plain.interpreted(),
    }  # fmt: skip


def widths(dim: int) -> tuple[int, int]:
    """``dim`` as a power of two plus a smaller one or 0, rounded up, none below 32: 72 -> (64, 32)."""
    whole, tail = plain.widths(max(dim, SHORTEST))
    if not tail:
        return whole, 0
    tail = max(tail, SHORTEST)
    return (whole, tail) if tail < whole else (2 * whole, 0)


def _delta(x: Operands, scale: float) -> tuple | None:
    """What smoothed queries add to the base-2 logits: float32 (B, H, blocks, Nk) and its strides."""
    if x.q_mean is None:
        return None
    keys = repeat_heads(x.k_smooth, x.q.shape[1])
    table = (x.q_mean * (scale * math.log2(math.e))) @ keys.mT
    return table.contiguous(), table.stride()[:2]


def alive_arguments(live: Tensor | None) -> tuple | None:
    """A mask (B or 1, H or 1, N) as kernels take it: bytes, and strides (batch, head) that are 0 where it is shared."""
    if live is None:
        return None
    live = live.contiguous().view(torch.uint8)
    return live, (live.stride(0) * (live.shape[0] > 1), live.stride(1) * (live.shape[1] > 1))


def _flat(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()
