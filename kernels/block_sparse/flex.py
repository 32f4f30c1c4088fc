"""Block-sparse attention through torch's compiled FlexAttention: the fast tier on CPU.

Uncompiled, FlexAttention ignores the block lists and is silently dense, and an exception inside a compiled
call turns every later call uncompiled. Hence ``fullgraph=True``, detached inputs, and a self-check per process
that a plan which hides half of the keys really hides them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..blocklist import BlockList
from ..tileplan import TilePlan

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FlexUnavailable(RuntimeError):
    """FlexAttention cannot serve here; the message says why."""


def refuses(q: Tensor, *, return_lse: bool) -> str | None:
    """Why this tier cannot take the call, or None."""
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}; FlexAttention takes float32, float16 and bfloat16"
    if return_lse and q.device.type == "cpu":
        return "an LSE was asked for; FlexAttention returns none on CPU"
    return unavailable(q.device.type)


@functools.lru_cache(maxsize=4)
def unavailable(device: str) -> str | None:
    """Why compiled FlexAttention does not work on ``device``, or None. Runs the self-check once per process."""
    if device == "cpu":
        if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
            return "the CPU lacks AVX2"
        import torch._inductor.exc as exc
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except (exc.InvalidCxxCompiler, RuntimeError) as error:
            return f"no C++ compiler ({type(error).__name__}); install g++ or set CXX"
    try:
        _self_check(device)
    except FlexUnavailable as error:
        return str(error)
    except Exception as error:
        return f"the self-check failed to compile: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, *, scale: float, alive: Tensor | None = None
) -> tuple[Tensor, None]:
    """As ``reference.attention`` without the LSE. q (B, H, Nq, D), k and v (B, Hk, Nk, D), in plan order."""
    full, partial = _lists(plan)
    tables = _tables(plan)
    run = _compiled(_kind(plan, alive))
    out = run(
        q.detach(), k.detach(), v.detach(), partial.count, partial.index, full.count, full.index, tables, alive,
        plan.tile_q, plan.tile_k, scale,
    )  # fmt: skip
    return out, None


def _lists(plan: TilePlan) -> tuple[BlockList, BlockList]:
    """Full and partial lists of equal (B1, H1), contiguous, the partial one wide enough for the template's check."""
    full, part = plan.full, plan.partial
    b1, h1 = full.count.shape[:2]
    if part is not None:
        b1, h1 = max(b1, part.count.shape[0]), max(h1, part.count.shape[1])
    shape = (b1, h1, plan.tiles_q)
    if part is None:
        # Only the partial table's width is checked, so a stride-0 view of one column serves when it is empty.
        count = torch.zeros(shape, dtype=torch.int32, device=plan.device)
        index = torch.zeros((*shape, 1), dtype=torch.int32, device=plan.device).expand(*shape, plan.tiles_k)
        part = BlockList(count, index)
    else:
        pad = plan.tiles_k - part.width
        index = torch.nn.functional.pad(part.index, (0, max(pad, 0))).expand(*shape, -1).contiguous()
        part = BlockList(part.count.expand(shape).contiguous(), index)
    index = full.index.expand(*shape, -1).contiguous()
    return BlockList(full.count.expand(shape).contiguous(), index), part


def _kind(plan: TilePlan, alive: Tensor | None) -> tuple:
    """The shape class: which tests the mask runs. Everything else about a plan is data."""
    p = plan.predicate
    tests = () if p is None else (
        len(p.box.coord) if p.box else 0, len(p.disc.coord) if p.disc else 0, p.band is not None, p.always is not None
    )  # fmt: skip
    gate = None if plan.gate is None else tuple(size > 1 for size in plan.gate.table.shape[:2])
    return (plan.partial is not None, tests, gate, None if alive is None else alive.shape[1] > 1)


def _tables(plan: TilePlan) -> tuple:
    return plan.predicate, plan.gate


@functools.lru_cache(maxsize=64)
def _compiled(kind: tuple):
    """One compiled function per shape class; shapes are dynamic, tables are arguments."""
    has_partial, tests, gate_heads, alive_heads = kind

    def run(q, k, v, part_count, part_index, full_count, full_index, tables, alive, tile_q, tile_k, scale):
        predicate, gate = tables

        def mask_mod(b, h, qi, ki):
            if gate_heads is None:
                return predicate.visible(qi, ki)
            batch, head = b if gate_heads[0] else 0, h if gate_heads[1] else 0
            cell = gate.table[batch, head, gate.q_row[qi], gate.k_col[ki]]
            return cell == 2 if predicate is None else (cell == 2) | ((cell == 1) & predicate.visible(qi, ki))

        def everything(b, h, qi, ki):
            return qi >= 0

        def score_mod(score, b, h, qi, ki):
            return torch.where(alive[b, h if alive_heads else 0, ki], score, -float("inf"))

        mask = BlockMask.from_kv_blocks(
            part_count,
            part_index,
            full_count,
            full_index,
            BLOCK_SIZE=(tile_q, tile_k),
            mask_mod=mask_mod if has_partial else everything,
            seq_lengths=(q.shape[2], k.shape[2]),
            compute_q_blocks=False,
        )
        return flex_attention(
            q, k, v, score_mod=None if alive is None else score_mod, block_mask=mask, scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip

    # The recompile limit is shared by all wrappers of one code object, so each kind gets its own.
    run.__code__ = run.__code__.replace(co_name=f"flex_block_sparse_{abs(hash(kind)) % 10**8}")
    return torch.compile(run, fullgraph=True, dynamic=True)


def _self_check(device: str) -> None:
    """Two key tiles, one listed: the answer must be the sparse one."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 32, 16, generator=generator).to(device) for _ in range(3))
    count = torch.ones((1, 1, 2), dtype=torch.int32)
    plan = TilePlan(16, 16, 32, 32, BlockList(count, torch.zeros((1, 1, 2, 1), dtype=torch.int32))).to(device)
    out, _ = attention(q, k, v, plan, scale=0.25)
    sparse = torch.softmax(q @ k[:, :, :16].mT * 0.25, -1) @ v[:, :, :16]
    error = (out - sparse).abs().max().item()
    if not error < 1e-3:
        raise FlexUnavailable(f"the self-check found an error of {error:.1e}: the block lists were not honoured")
