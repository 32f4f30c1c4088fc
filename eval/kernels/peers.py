"""Other packages' block-sparse kernels on the very plan that ours runs. Detected, never required.

They take whole blocks in the tokens' own order. What they need beside the call (a mask, contiguous tensors,
FlashInfer's plan) is made ahead of it, so that nothing but their kernels is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels import TilePlan

Call = Callable[[], Tensor]
# SpargeAttn's blocks (queries, keys), the other way round on Hopper.
_SPARGE, _SPARGE_HOPPER = (128, 64), (64, 128)
_WORKSPACE = 128 << 20


def block_sparse(tiles: TilePlan, q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, Call], dict[str, str]]:
    """What is installed and can run ``tiles``, by name, and why others do not."""
    calls: dict[str, Call] = {}
    why: dict[str, str] = {}
    for module, (name, made) in _PEERS.items():
        if importlib.util.find_spec(module) is None:
            why[name] = "not installed"
        elif reason := unsuited(tiles, q, k):
            why[name] = reason
        else:
            found = made(tiles, q, k, v)
            if isinstance(found, str):
                why[name] = found
            else:
                calls[name] = found
    return calls, why


def unsuited(tiles: TilePlan, q: Tensor, k: Tensor) -> str | None:
    """Why the plan is none of whole blocks alone in the tokens' own order, or None."""
    if not _on_gpu(q):
        return "its kernel needs a GPU"
    if not tiles.plain or tiles.partial is not None:
        return "it takes whole blocks of exact keys alone"
    if tiles.order is not None or tiles.kv_order is not None:
        return "it takes tokens in their own order"
    if len(q) != 1 or q.shape[1] != k.shape[1]:
        return "called here for one sample with as many key heads as query heads"
    return None


def _on_gpu(q: Tensor) -> bool:
    return q.device.type == "cuda"


def mask_of(tiles: TilePlan, heads: int) -> Tensor:
    """bool (heads, tiles_q, tiles_k): the tiles that each head visits."""
    return tiles.full.mask(tiles.tiles_k)[0].expand(heads, -1, -1)


def _sparge(tiles: TilePlan, q: Tensor, k: Tensor, v: Tensor) -> Call | str:
    hopper = torch.cuda.get_device_capability(q.device)[0] == 9
    block_q, block_k = _SPARGE_HOPPER if hopper else _SPARGE
    if tiles.tile_q % block_q or tiles.tile_k % block_k or q.shape[-1] not in (64, 128):
        return f"it takes blocks of {block_q} x {block_k} and head dims 64 and 128"
    parts = [x.contiguous() for x in (q, k, v)]
    mask = mask_of(tiles, q.shape[1])[None]
    mask = mask.repeat_interleave(tiles.tile_q // block_q, 2).repeat_interleave(tiles.tile_k // block_k, 3)
    # A ragged end has fewer blocks than its last tile could hold.
    mask = mask[:, :, : -(-tiles.n_q // block_q), : -(-tiles.n_k // block_k)].to(torch.int8).contiguous()

    def run() -> Tensor:
        from spas_sage_attn import block_sparse_sage2_attn_cuda

        return block_sparse_sage2_attn_cuda(*parts, mask_id=mask)

    return run


def _flashinfer(tiles: TilePlan, q: Tensor, k: Tensor, v: Tensor) -> Call:
    heads, dim = q.shape[1], q.shape[-1]
    parts = [x[0].contiguous() for x in (q, k, v)]
    mask = mask_of(tiles, heads).contiguous()
    planned: list = []

    def plan():
        import flashinfer

        def empty(size: int) -> Tensor:
            return torch.empty(size, dtype=torch.uint8, device=q.device)

        wrapper = flashinfer.sparse.VariableBlockSparseAttentionWrapper(empty(_WORKSPACE))
        # It lists single keys: an int32 for each that a block of queries visits.
        needed = 4 * tiles.tile_k * int(mask.sum())
        if needed > _WORKSPACE:
            wrapper.reset_workspace_buffer(
                empty(_WORKSPACE), wrapper._int_workspace_buffer, vector_sparse_indices_buffer=empty(needed)
            )
        sizes = (_sizes(tiles.n_q, tiles.tile_q, heads, q.device), _sizes(tiles.n_k, tiles.tile_k, heads, q.device))
        wrapper.plan(mask, *sizes, heads, heads, dim, q_data_type=q.dtype)
        return wrapper

    def run() -> Tensor:
        if not planned:
            planned.append(plan())
        return planned[0].run(*parts)[None]

    return run


def _sizes(tokens: int, tile: int, heads: int, device: torch.device) -> Tensor:
    """int32 (heads, tiles): how many tokens each tile holds."""
    starts = torch.arange(0, tokens, tile, dtype=torch.int32, device=device)
    return (tokens - starts).clamp_max(tile).expand(heads, -1).contiguous()


_PEERS = {"spas_sage_attn": ("SpargeAttn (quantised)", _sparge), "flashinfer": ("flashinfer", _flashinfer)}
