"""Block-sparse attention through torch's compiled FlexAttention: the fast tier on CPU.

Uncompiled, FlexAttention ignores the block lists and is silently dense, and an exception inside a compiled
call turns every later call uncompiled. Hence ``fullgraph=True``, detached inputs, a self-check per process and a
check of the first call of every kind against the gather tier. Inference only.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._dynamo.decorators import maybe_mark_dynamic
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..blocklist import BlockList
from ..tileplan import TilePlan
from . import flex_options, flex_reps, gather
from .flex_tables import Cells, MaskKind, Tables

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FlexUnavailable(RuntimeError):
    """FlexAttention cannot serve here; the message says why."""


def refuses(q: Tensor, plan: TilePlan, *, return_lse: bool) -> str | None:
    """Why this tier cannot take the call, or None."""
    if (why := flex_reps.refuses(plan)) is not None:
        return why
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}; FlexAttention takes float32, float16 and bfloat16"
    if return_lse and q.device.type == "cpu":
        return "an LSE was asked for; FlexAttention returns none on CPU"
    if q.device.type != "cpu" and (why := flex_options.refuses((plan.tile_q, plan.tile_k), q.shape[-1])) is not None:
        return why
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
    """As ``reference.attention`` without the LSE. q (B, H, Nq, D), k and v (B, Hk, Nk, D), in plan order.

    The first call of every kind compiles for some seconds. Raises ``FlexUnavailable`` when that call's answer is
    not the plan's. On a CPU, queries or keys that are not finite go to the gather tier, whose answer to them is the
    reference's.
    """
    b, h = q.shape[:2]
    key = ("flex", b, h)
    if key not in plan._memo:
        plan._memo[key] = Tables.of(flex_reps.joined(plan) if plan.reps else plan, b, h)
    tables = plan._memo[key]
    bias = flex_reps.bias(plan, alive) if plan.reps or alive is not None else None
    inputs = q, k, v
    if plan.reps:
        k, v = flex_reps.strips(k, v, plan)
    q, k, v = (_dense(x.detach()) for x in (q, k, v))
    if q.device.type == "cpu" and not (_finite(q) and _finite(k)):
        # The compiled exponential takes a NaN for a number and hides it; the output would look sound.
        return gather.attention(*(x.detach() for x in inputs), plan, scale=scale, alive=alive)[0], None
    kind = Kind(
        dtype=q.dtype,
        shape=(*q.shape[:2], k.shape[1], q.shape[3], v.shape[3]),
        bshd=tuple(x.stride(1) < x.stride(2) for x in (q, k, v)),
        table=tuple(tables.lists[0].shape[:2]),
        tile=(plan.tile_q, plan.tile_k),
        scale=float(scale),
        tests=tables.tests,
        biased=bias is not None,
        options=_options(q.device.type, (plan.tile_q, plan.tile_k), max(q.shape[-1], v.shape[-1]), q.dtype),
    )
    run = _compiled(kind)
    out = run(q, k, v, tables, None if bias is None else Cells.of(bias, b, h))
    out = flex_reps.finish(out, q, plan, scale)
    run.verify(out, *inputs, plan, scale, alive)
    return out, None


@dataclass(frozen=True)
class Kind:
    """What one compiled function is for. Token counts and everything else about a plan are data.

    ``shape``: B, H, Hk, D, Dv. ``bshd``: whether q, k, v have tokens before heads in memory. ``table``: B1, H1 of
    the lists. ``tests``: None without partial tiles. ``options``: of the GPU's kernel, None on CPU.
    """

    dtype: torch.dtype
    shape: tuple[int, int, int, int, int]
    bshd: tuple[bool, bool, bool]
    table: tuple[int, int]
    tile: tuple[int, int]
    scale: float
    tests: MaskKind | None
    biased: bool
    options: tuple[tuple[str, int | str], ...] | None = None


def _dense(x: Tensor) -> Tensor:
    """x (B, H, N, D) with its strides following from its shape, so that they need no symbols; tokens are dynamic."""
    x = x if x.is_contiguous() or x.transpose(1, 2).is_contiguous() else x.contiguous()
    maybe_mark_dynamic(x, 2)
    return x


def _options(
    device: str, tile: tuple[int, int], dim: int, dtype: torch.dtype
) -> tuple[tuple[str, int | str], ...] | None:
    return None if device == "cpu" else tuple(flex_options.options(tile, dim, dtype).items())


def _finite(x: Tensor) -> bool:
    """Whether x, on a CPU, holds no NaN and no Inf. One sum, which is not finite where an element is not."""
    total = x.sum(dtype=torch.float32 if x.dtype == torch.float16 else None)
    return bool(total.isfinite()) or bool(x.isfinite().all())


class _Run:
    """One compiled function, checked against the gather tier the first time it runs."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._call = _compile(kind)
        self._lock = threading.Lock()
        self._verified = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, tables: Tables, bias: Cells | None) -> Tensor:
        # A grad mode that differs from call to call would compile the same thing twice.
        with torch.no_grad():
            if self._verified:
                return self._call(q, k, v, *tables.lists, tables.predicate, tables.gate, bias)
            with self._lock:
                return self._call(q, k, v, *tables.lists, tables.predicate, tables.gate, bias)

    def verify(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, scale: float, alive: Tensor | None
    ) -> None:
        """Compare the query tile that visits the fewest keys, once. Raises ``FlexUnavailable``."""
        if self._verified:
            return
        visited = plan.full.count.sum((0, 1)) + (0 if plan.partial is None else plan.partial.count.sum((0, 1)))
        tile = int(visited.argmin())
        rows = slice(tile * plan.tile_q, (tile + 1) * plan.tile_q)
        expected, _ = gather.rows(q, k, v, plan, tile, scale=scale, alive=alive)
        error = (out[:, :, rows].float() - expected.float()).abs().max()
        limit = (0.05 if q.element_size() == 2 else 1e-3) * v.float().abs().max()
        if not (limit.isfinite() and expected.isfinite().all()):
            return  # tells nothing; the next call is looked at
        if not error <= limit:
            raise FlexUnavailable(
                f"FlexAttention is off by {error.item():.1e} from the plan (at most {limit.item():.1e} is rounding) "
                f"for {self._kind}; use backend='gather' and report this"
            )
        self._verified = True


@functools.lru_cache(maxsize=256)
def _compiled(kind: Kind) -> _Run:
    return _Run(kind)


def _compile(kind: Kind):
    tested = kind.tests is not None
    gated, ruled = tested and kind.tests.gate, tested and kind.tests.predicate
    tile, scale, scored, gqa = kind.tile, kind.scale, kind.biased, kind.shape[1] != kind.shape[2]
    options = None if kind.options is None else dict(kind.options)

    def run(q, k, v, part_count, part_index, full_count, full_index, predicate, gate, bias):
        def mask_mod(b, h, qi, ki):
            if not gated:
                return predicate.visible(qi, ki)
            cell = gate.cells[gate.batch[b] + gate.head[h] + gate.q_base[qi] + gate.k_col[ki]]
            return (cell == 2) | ((cell == 1) & predicate.visible(qi, ki)) if ruled else cell == 2

        def everything(b, h, qi, ki):
            return qi >= 0

        def score_mod(score, b, h, qi, ki):
            return score + bias.cells[bias.batch[b] + bias.head[h] + ki]

        mask = BlockMask.from_kv_blocks(
            part_count,
            part_index,
            full_count,
            full_index,
            BLOCK_SIZE=tile,
            mask_mod=mask_mod if tested else everything,
            seq_lengths=(q.shape[2], k.shape[2]),
            compute_q_blocks=False,
        )
        score = score_mod if scored else None
        return flex_attention(
            q, k, v, score_mod=score, block_mask=mask, scale=scale, enable_gqa=gqa, kernel_options=options
        )

    # The recompile limit is shared by all wrappers of one code object, so each kind gets its own.
    run.__code__ = run.__code__.replace(co_name=f"flex_block_sparse_{abs(hash(kind)) % 10**8}")
    return torch.compile(run, fullgraph=True, dynamic=False)


def _self_check(device: str) -> None:
    """Two key tiles, one listed: the answer must be the sparse one."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 256, 16, generator=generator).to(device) for _ in range(3))
    count = torch.ones((1, 1, 2), dtype=torch.int32)
    plan = TilePlan(128, 128, 256, 256, BlockList(count, torch.zeros((1, 1, 2, 1), dtype=torch.int32))).to(device)
    out, _ = attention(q, k, v, plan, scale=0.25)
    sparse = torch.softmax(q @ k[:, :, :128].mT * 0.25, -1) @ v[:, :, :128]
    error = (out - sparse).abs().max().item()
    if not error < 1e-3:
        raise FlexUnavailable(f"the self-check found an error of {error:.1e}: the block lists were not honoured")
