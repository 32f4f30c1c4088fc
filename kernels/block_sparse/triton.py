"""Block-sparse attention on NVIDIA GPUs: launches the Triton kernel over a TilePlan. Inference only.

Reads q, k and v where they lie and in the caller's order: the plan's permutation happens while loading, and the
output scatters itself; keys that are read often are copied into plan order first (``triton_order.copies``). Import this
module only where Triton is installed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import autotune
from ..blocklist import BlockList
from ..predicate import Gate, Predicate
from ..representatives import Group
from ..tileplan import TilePlan
from ..tuning import Tuning, tuning
from . import triton_order
from .schedule import row_order
from .triton_kernel import forward

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_DIM = 256


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` was set when Triton was imported: the kernel then runs on CPU tensors."""
    return not isinstance(forward, triton.JITFunction)


def refuses(q: Tensor, plan: TilePlan) -> str | None:
    """Why this tier cannot take the call, or None."""
    if q.device.type != "cuda" and not interpreted():
        return f"q is on {q.device}; Triton needs a CUDA device, or TRITON_INTERPRET=1 in the environment to emulate"
    if torch.version.hip and not interpreted():
        return "this torch is built for ROCm, and the kernel was written and measured for NVIDIA only"
    if q.device.type == "cuda" and not interpreted():
        capability = torch.cuda.get_device_capability(q.device)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]}; the kernel needs 8.0 or newer"
    return unsuited(q.dtype, q.shape[-1])


def unsuited(dtype: torch.dtype, dim: int) -> str | None:
    """Why the kernel takes this dtype or head dimension on no device, or None."""
    if dtype not in _DTYPES:
        return f"dtype {dtype}; the kernel takes float32, float16 and bfloat16"
    if not 1 <= dim <= _MAX_DIM:
        return f"head dim {dim}; the kernel takes 1 to {_MAX_DIM}"
    return None


def tile_for(plan: TilePlan, q: Tensor) -> tuple[int, int]:
    """The tile sizes to lower ``plan`` to for this tier.

    Tiles of 32 and more stay as they are: the kernel cuts a tile into its own blocks while it runs, so full blocks
    stay full, lists stay short, and nothing is lowered twice. Smaller tiles are merged to the tuning table's size,
    unless what they see beside exact keys differs.
    """
    if not plan.plain:
        return plan.tile_q, plan.tile_k
    entry = tuning_for(plan, q, q.shape[-1], tile_q=128, tile_k=128)
    return (
        plan.tile_q if plan.tile_q >= min(32, plan.n_q) else entry.block_q,
        plan.tile_k if plan.tile_k >= min(32, plan.n_k) else entry.tested,
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TilePlan,
    *,
    scale: float,
    kv_valid: Tensor | None = None,
    return_lse: bool = False,
    entry: Tuning | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention over the plan's visible pairs.

    q (B, H, Nq, D), k (B, Hk, Nk, D), v (B, Hk, Nk, Dv) in the caller's order, any strides. ``kv_valid``: int32
    (B,), tokens from that index on are dead. Returns out (B, H, Nq, Dv) in q's dtype, laid out in memory as q is,
    and the natural-log LSE (B, H, Nq) float32 or None. A row without a visible key gives 0 and an LSE of -inf.
    ``entry``: other block sizes than the table's or those found for this GPU. Raises ``NotImplementedError`` for head
    dims above 256.
    """
    dim = max(q.shape[-1], v.shape[-1])
    if dim > _MAX_DIM:
        raise NotImplementedError(
            f"head dims {q.shape[-1]} (q, k) and {v.shape[-1]} (v); the Triton kernel takes up to {_MAX_DIM}. "
            "Use backend='flex'"
        )
    if not scale > 0:
        # The kernel scales after the maximum, which only a positive scale allows.
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = _empty_like(q, v.shape[-1], torch.float32 if interpreted() else q.dtype)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    if out.numel():
        entry = entry or tuned(plan, q, dim)
        keys = keys_for(k, v, plan, entry, kv_valid=kv_valid)
        with torch.cuda.device_of(q):
            forward[(programs(q, plan, entry),)](
                *arguments(q, keys, out, lse, plan, entry, scale=scale, kv_valid=kv_valid),
                **constants(q, keys, out, plan, entry, bounded=kv_valid is not None),
                num_warps=entry.warps,
                num_stages=entry.stages,
            )
    return out.to(q.dtype), lse


@dataclass(frozen=True)
class Keys:
    """Keys and values as the kernel reads them. ``in_order``: they lie in plan order, dead ones 0. ``described``: as
    blocks of ``steps`` (full, partial) keys that the copy engine fetches."""

    k: Tensor
    v: Tensor
    in_order: bool
    described: bool
    steps: tuple[int, int]

    def tiles(self, partial: bool) -> tuple[TensorDescriptor | None, ...]:
        """Descriptors of k and v in full and in partial blocks, in the kernel's order."""
        wanted = ((x, step, on) for step, on in zip(self.steps, (True, partial), strict=True) for x in (self.k, self.v))
        return tuple(_descriptor(x, step) if self.described and on else None for x, step, on in wanted)


def keys_for(k: Tensor, v: Tensor, plan: TilePlan, entry: Tuning, *, kv_valid: Tensor | None) -> Keys:
    """k and v where they lie, or copied into plan order where that pays, read by the copy engine where it can."""
    copied = triton_order.copies(plan, _heads_per_key(plan, k))
    if copied:
        k, v = triton_order.in_order(k, v, plan.kv_order, kv_valid)
    clean = kv_valid is None or copied
    if not clean and _fetches(k, v, plan, entry) and triton_order.cleans(plan):
        v, clean = triton_order.cleaned(v, kv_valid), True
    return lying(k, v, plan, entry, in_order=copied, dead=kv_valid is not None, clean=clean)


def lying(
    k: Tensor, v: Tensor, plan: TilePlan, entry: Tuning, *, in_order: bool, dead: bool, clean: bool = True
) -> Keys:  # fmt: skip
    """How k and v are read where they lie. ``dead``: some keys may be; ``clean``: their values are 0."""
    holes = plan.tokens_k is not None
    # Rows that the engine fetches are all read, dead ones too.
    placed = in_order or (plan.kv_order is None and clean and not holes)
    described = placed and _fetches(k, v, plan, entry)
    # Which slots of an order are live is read per key, in registers that the longer step needs.
    per_key = plan.kv_order is not None and (dead or holes)
    full = entry.full if not described else min(entry.described, entry.full) if per_key else entry.described
    return Keys(k, v, in_order, described, (full, entry.gathered if plan.gathers else entry.tested))


def _fetches(k: Tensor, v: Tensor, plan: TilePlan, entry: Tuning) -> bool:
    """Whether the copy engine can fetch blocks of k and v; none of them may reach into another tile."""
    tested = entry.gathered if plan.gathers else entry.tested
    whole = entry.described and not any(plan.tile_k % step for step in (entry.described, tested))
    return bool(whole and _describable(k, v))


def programs(q: Tensor, plan: TilePlan, entry: Tuning) -> int:
    """The grid: one program per block of queries, or as many as the chip holds at once (``entry.persistent``)."""
    items = _items(q, plan, entry)
    if not entry.persistent or interpreted():
        return items
    return min(items, entry.persistent * _processors(q.device))


def arguments(
    q: Tensor, keys: Keys, out: Tensor, lse: Tensor | None, plan: TilePlan, entry: Tuning, *, scale: float,
    kv_valid: Tensor | None,
) -> tuple:  # fmt: skip
    """The kernel's run-time arguments, in order."""
    predicate = plan.predicate if plan.partial is not None and plan.predicate is not None else Predicate()
    k, v = keys.k, keys.v
    unit = _unit(q, k, v, out)
    heads, groups = q.shape[1], q.shape[1] // k.shape[1]
    # Of keys in plan order, the order says which are live, where not all are.
    placed = keys.in_order and kv_valid is None and plan.tokens_k is None
    return (
        q, k, v, out, lse, *keys.tiles(plan.partial is not None),
        *(tuple(stride // unit for stride in x.stride()[:3]) for x in (q, k, v, out)),
        row_order(plan, q.shape[0], heads, groups),
        list_arguments(plan.full), list_arguments(plan.partial),
        _order(plan.order), None if placed else _order(plan.kv_order),
        *predicate_arguments(predicate), gate_arguments(plan.gate if plan.partial is not None else None),
        tuple(group_arguments(group, heads) for group in plan.reps) or None,
        matrix_arguments(plan.first_order, q),
        factor_arguments(plan, q.shape[0], heads),
        None if kv_valid is None else kv_valid.to(q.device).contiguous(),
        plan.n_q, plan.n_k, plan.queries, heads, groups, _items(q, plan, entry), scale * math.log2(math.e),
    )  # fmt: skip


def constants(q: Tensor, keys: Keys, out: Tensor, plan: TilePlan, entry: Tuning, *, bounded: bool) -> dict:
    """The kernel's compile-time arguments. ``bounded``: dead keys are possible."""
    dim, dim_v = q.shape[-1], keys.v.shape[-1]
    full, step = keys.steps
    blocks = [full] if plan.partial is None else [full, step]
    cut = any(plan.tile_k % block or plan.n_k % block for block in blocks)
    return {
        "TILE_Q": plan.tile_q, "TILE_K": plan.tile_k, "BLOCK_Q": entry.block_q, "FULL": full, "PARTIAL": step,
        "D": dim, "DV": dim_v, "WIDTHS": (*widths(dim), *widths(dim_v)), "UNIT": _unit(q, keys.k, keys.v, out),
        "REPS": tuple(group.width for group in plan.reps), "REP_BLOCK": entry.tested,
        "BOUNDED": bool(bounded or cut or plan.tokens_k is not None), "TESTED": plan.predicate is not None,
        "IN_ORDER": keys.in_order, "EMULATED": interpreted(),
    }  # fmt: skip


def _items(q: Tensor, plan: TilePlan, entry: Tuning) -> int:
    return plan.tiles_q * -(-plan.tile_q // entry.block_q) * q.shape[0] * q.shape[1]


def _heads_per_key(plan: TilePlan, k: Tensor) -> int:
    """Orders per head that share one key head."""
    order = plan.kv_order
    return order.shape[0] // k.shape[1] if order is not None and order.ndim == 2 else 1


def _describable(*tensors: Tensor) -> bool:
    """Whether the copy engine can fetch blocks of rows of these: powers of two, all strides whole 16 bytes."""
    return all(
        widths(x.shape[-1]) == (x.shape[-1], 0)
        and x.data_ptr() % 16 == 0
        and all(stride * x.element_size() % 16 == 0 and stride > 0 for stride in _apart(x))
        for x in tensors
    )


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), [*_apart(x), 1], [1, 1, rows, x.shape[-1]])


def _apart(x: Tensor) -> list[int]:
    """Strides of the first three dimensions; of one with a single entry any will do."""
    return [stride if size > 1 else x.shape[-1] for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def widths(dim: int) -> tuple[int, int]:
    """``dim`` as a power of two plus a smaller one or 0, rounded up: 72 -> (64, 16), 96 -> (64, 32)."""
    whole = 1 << (max(dim, 16) - 1).bit_length()
    half = whole // 2
    tail = max(16, 1 << (dim - half - 1).bit_length()) if dim > half else whole
    return (half, tail) if half >= 16 and tail < half else (whole, 0)


def _unit(*tensors: Tensor) -> int:
    """A common divisor of all strides, up to the 8 elements of one 16-byte load."""
    return math.gcd(8, *(stride for x in tensors for stride in x.stride()[:3]))


def tuning_for(plan: TilePlan, q: Tensor, dim: int, tile_q: int, tile_k: int) -> Tuning:
    capability = None if interpreted() else torch.cuda.get_device_capability(q.device)
    return tuning(capability, dim, q.element_size(), tile_q, tile_k)


def tuned(plan: TilePlan, q: Tensor, dim: int) -> Tuning:
    """What was found for this GPU and the plan's kind by ``kernels.autotune``, else the table's entry."""
    found = None if interpreted() else autotune.found(plan, q, dim)
    return found or tuning_for(plan, q, dim, plan.tile_q, plan.tile_k)


def _empty_like(q: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """(B, H, Nq, dim), tokens before heads in memory where q has them so: the caller then merges heads for free."""
    b, h, n = q.shape[:3]
    if q.stride(1) < q.stride(2):
        return q.new_empty((b, n, h, dim), dtype=dtype).transpose(1, 2)
    return q.new_empty((b, h, n, dim), dtype=dtype)


def list_arguments(entry: BlockList | None) -> tuple | None:
    if entry is None:
        return None
    index = entry.index if entry.index.stride(-1) == 1 else entry.index.contiguous()
    return entry.count, index, _strides(entry.count), _strides(index)


def group_arguments(group: Group, heads: int) -> tuple:
    key, value, bias = group.key.contiguous(), group.value.contiguous(), group.bias().contiguous()
    strides = (_strides(x)[:2] for x in (key, value, bias))
    return *list_arguments(group.seen), key, value, bias, heads // key.shape[1], *strides


def matrix_arguments(first_order: Tensor | None, q: Tensor) -> tuple | None:
    """With queries of 16 bits the matrix goes in two halves, which the matrix units take from shared memory; float32
    would be split in registers, of which the accumulator leaves too few."""
    if first_order is None:
        return None
    upper, lower = first_order.contiguous(), None
    if q.element_size() == 2:
        whole, upper = upper, upper.bfloat16()
        lower = (whole - upper).bfloat16()
    return upper, lower, _strides(upper)[:2], q.shape[1] // upper.shape[1]


def factor_arguments(plan: TilePlan, batch: int, heads: int) -> tuple | None:
    if plan.row_scale is None:
        return None
    return tuple(x.expand(batch, heads, *x.shape[2:]).contiguous() for x in (plan.row_scale, plan.row_add))


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of the first three dimensions, the first two of which broadcast."""
    return (x.stride(0) * (x.shape[0] > 1), x.stride(1) * (x.shape[1] > 1), x.stride(2))


def _order(order: Tensor | None) -> tuple | None:
    if order is None:
        return None
    order = order.contiguous()
    return order, order.stride(0) * (order.ndim == 2)


def predicate_arguments(p: Predicate) -> tuple:
    box = disc = band = None
    if p.box is not None:
        box = _flat(p.box.lo), _flat(p.box.hi), _flat(p.box.coord)
    if p.disc is not None:
        disc = _flat(p.disc.centre), _flat(p.disc.coord), p.disc.r2.contiguous()
    if p.band is not None:
        reach = p.band.reach.contiguous()
        band = (*_flat((p.band.q_pos, p.band.k_pos, p.band.q_row, p.band.k_col)), reach, reach.stride(0))
    return box, disc, band, None if p.always is None else p.always.contiguous().view(torch.uint8)


def gate_arguments(gate: Gate | None) -> tuple | None:
    if gate is None:
        return None
    table = gate.table if gate.table.stride(-1) == 1 else gate.table.contiguous()
    return table, gate.q_row.contiguous(), gate.k_col.contiguous(), _strides(table)


def _flat(tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(table.contiguous() for table in tables)
