"""Operands: q, k and v of one call, smoothed and quantised."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..block_sparse.order import repeat_heads
from ..tileplan import TilePlan
from . import smooth
from .quantisers import groups, quantize
from .recipe import BITS, Recipe
from .values import quantize_values


@dataclass(frozen=True)
class Operands:
    """What the attention kernels multiply, tokens in plan order.

    ``q`` (B, H, Nq, D), ``k`` (B, Hk, Nk, D): int8 codes, or the inputs where they are not quantised.
    ``q_scale`` (B, H, Nq), ``k_scale`` (B, Hk, Nk): float32, one per token whatever the groups were; ``q_scale``
    contains scale x log2(e), so that ``q . k * q_scale * k_scale`` is a base-2 logit. ``v`` (B, Hk, Nk, Dv): codes, or
    the input. ``v_scale`` (B, Hk, 1, Dv): float32 or None.

    ``k_mean`` (B, Hk, 1, D), ``v_mean`` (B, Hk, 1, Dv): float32, taken out of k and v, or None. ``q_mean``: float32
    (B, H, ceil(Nq / block_q), D), taken out of each block of queries, or None; its products with the smoothed keys
    ``k_smooth`` (B, Hk, Nk, D) belong to the logits.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor | None
    k_mean: Tensor | None
    v_mean: Tensor | None
    q_mean: Tensor | None
    k_smooth: Tensor | None


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
    """Quantise q (B, H, Nq, D), k (B, Hk, Nk, D) and v (B, Hk, Nk, Dv) for a softmax of ``scale * q . k``.

    ``live_q``, ``live_k``: bool (B or 1, H or 1, N), or None where all are. Dead tokens enter no mean and no scale, and
    their codes are 0 whatever they hold. The inputs are left as they are.
    """
    log2e = math.log2(math.e)
    k_mean = v_mean = q_mean = k_smooth = v_scale = None
    q, k, v = _blank(q, live_q), _blank(k, live_k), _blank(v, live_k)
    if recipe.qk is None:
        q_scale = torch.full(q.shape[:3], scale * log2e, dtype=torch.float32, device=q.device)
        k_scale = torch.ones(k.shape[:3], dtype=torch.float32, device=k.device)
    else:
        four_q, four_k = four_bits(recipe, q.shape[1], q.device), four_bits(recipe, k.shape[1], k.device)
        q, k = q.float(), k.float()
        if recipe.smooth_k:
            k_mean = smooth.mean(k, live_k)
            k = _blank(k - k_mean, live_k)
        if recipe.smooth_q:
            q_mean, k_smooth = smooth.block_mean(q, recipe.block_q, live_q), k
            rows = torch.arange(q.shape[2], device=q.device) // recipe.block_q
            q = _blank(q - q_mean[:, :, rows], live_q)
        q, q_scale = _by_token(q, recipe, four_q, role="q", block=recipe.block_q, warp=recipe.warp_q)
        k, k_scale = _by_token(k, recipe, four_k, role="k", block=recipe.block_k)
        q_scale = q_scale * (scale * log2e)
    if recipe.pv is not None:
        v = v.float()
        if recipe.smooth_v:
            v_mean = smooth.mean(v, live_k)
            v = _blank(v - v_mean, live_k)
        v, v_scale = quantize_values(v, recipe.pv, narrow=recipe.narrow)
    return Operands(q, k, v, q_scale, k_scale, v_scale, k_mean, v_mean, q_mean, k_smooth)


def smoothed(plan: TilePlan, x: Operands, q: Tensor) -> TilePlan:
    """``plan`` with representatives of the smoothed keys and values: all logits of a row then share one offset."""

    def less(pooled: Tensor, mean: Tensor | None) -> Tensor:
        if mean is None:
            return pooled
        heads = max(pooled.shape[1], mean.shape[1])
        pooled, mean = (repeat_heads(part, heads) for part in (pooled.float(), mean))
        return (pooled - mean).to(q.dtype)

    reps = (replace(group, key=less(group.key, x.k_mean), value=less(group.value, x.v_mean)) for group in plan.reps)
    return replace(plan, reps=tuple(reps))


def _by_token(x: Tensor, recipe: Recipe, four: Tensor | None, **group) -> tuple[Tensor, Tensor]:
    """Codes of x, and the scale of each token. ``four``: bool (H,), heads of 4 bits, the others have 8."""
    index, _ = groups(x.shape[2], recipe.granularity, **group, device=x.device)
    if four is None:
        codes, scales = quantize(x, bits=BITS[recipe.qk], granularity=recipe.granularity, **group)
    else:
        both = [quantize(x, bits=bits, granularity=recipe.granularity, **group) for bits in (4, 8)]
        codes, scales = (
            torch.where(four.view(1, -1, *(1,) * (few.ndim - 2)), few, many) for few, many in zip(*both, strict=True)
        )
    return codes, scales[..., index]


def four_bits(recipe: Recipe, heads: int, device: torch.device) -> Tensor | None:
    """bool (heads,): which of them have 4 bits; a key head only where all query heads that share it do."""
    if recipe.head_bits is None:
        return None
    return _four_bits(recipe.head_bits, heads, device)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _four_bits(head_bits: tuple[int, ...], heads: int, device: torch.device) -> Tensor:
    """Kept, since a list's copy to a GPU is waited for."""
    return (torch.tensor(head_bits) == 4).view(heads, -1).all(-1).to(device)


def _blank(x: Tensor, live: Tensor | None) -> Tensor:
    """x with zeros in the place of dead tokens."""
    return x if live is None else x.masked_fill(~live[..., None], 0)
