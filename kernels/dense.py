"""Dense attention by whichever kernel is installed and proven: flash-attn 3 and 2, SageAttention, torch's own.

A package counts only after a self-check against float32 on this device: an installed build that was compiled for
another architecture returns noise, not an error.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Run = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Backend:
    """``run(q, k, v, scale)`` on (B, H, N, D), GQA by fewer key heads. ``exact``: not quantised.

    ``module``: what must be importable, ``since``: the least compute capability, ``largest``: the largest head dim.
    """

    name: str
    module: str
    run: Run
    exact: bool
    since: tuple[int, int]
    largest: int


def _flash3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale)
    # Some releases return the LSE beside the output.
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _flash2(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale).transpose(1, 2)


def _sage(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from sageattention import sageattn

    # Some releases subtract the mean from the caller's keys, in place.
    return sageattn(q.contiguous(), k.clone(memory_format=torch.contiguous_format), v.contiguous(),
                    tensor_layout="HND", is_causal=False, sm_scale=scale)  # fmt: skip


def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


# In order of preference.
DENSE = {
    backend.name: backend
    for backend in (
        Backend("flash-attn-3", "flash_attn_interface", _flash3, True, (9, 0), 256),
        Backend("flash-attn", "flash_attn", _flash2, True, (8, 0), 256),
        Backend("sageattention", "sageattention", _sage, False, (8, 0), 128),
        Backend("torch", "torch", _torch, True, (0, 0), 1 << 30),
    )
}


def choose_dense(q: Tensor, v: Tensor, *, exact: bool = True) -> tuple[Backend, str]:
    """The dense kernel that serves ``q`` and ``v`` and why no better one does. ``exact``: nothing quantised."""
    reasons = []
    for backend in DENSE.values():
        if backend.exact != exact and backend.name != "torch":
            continue
        why = refusal(backend, q, v)
        if why is None:
            return backend, "; ".join(reasons) or "first choice on this device"
        reasons.append(f"{backend.name}: {why}")
    raise AssertionError("torch serves every call")


def refusal(backend: Backend, q: Tensor, v: Tensor) -> str | None:
    """Why ``backend`` does not serve a call, or None."""
    if backend.name == "torch":
        return None
    if torch.is_grad_enabled() and (q.requires_grad or v.requires_grad):
        return "a gradient is asked for"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {q.dtype}; it takes float16 and bfloat16"
    if q.shape[-1] > backend.largest or q.shape[-1] != v.shape[-1]:
        return f"head dims {q.shape[-1]} (q, k) and {v.shape[-1]} (v); it takes equal ones up to {backend.largest}"
    return unusable(backend.name, q.device)


@functools.cache
def unusable(name: str, device: torch.device) -> str | None:
    """Why a dense kernel is not used on ``device``, or None. Runs its self-check once per process and device."""
    backend = DENSE[name]
    if name == "torch":
        return None
    if importlib.util.find_spec(backend.module) is None:
        return "not installed"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs a CUDA device; this is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < backend.since:
        least = ".".join(map(str, backend.since))
        return f"it needs compute capability {least}; this is {capability[0]}.{capability[1]}"
    return self_check(backend.run, device, exact=backend.exact)


def self_check(run: Run, device: torch.device, *, exact: bool) -> str | None:
    """What is wrong with a kernel, or None: two head dims, ragged lengths, shared key heads, a scale of its own.

    Exact kernels may lose twice what torch loses in bfloat16, quantised ones 3 % of the mean magnitude.
    """
    generator = torch.Generator().manual_seed(0)
    for dim in (64, 128):
        q, k, v = (
            (torch.randn(2, heads, n, dim, generator=generator) + 1).to(device, torch.bfloat16)
            for heads, n in ((4, 150), (2, 203), (2, 203))
        )
        kept = [x.clone() for x in (q, k, v)]
        truth = _torch(*(x.float() for x in kept), 0.07)
        try:
            out = run(q, k, v, 0.07)
        except Exception as error:
            return f"its self-check raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if out.shape != truth.shape:
            return f"its self-check gave shape {tuple(out.shape)} for {tuple(truth.shape)}"
        if not all(torch.equal(a, b) for a, b in zip((q, k, v), kept, strict=True)):
            return "its self-check found its inputs changed"
        lost, plain = (float((x.float() - truth).abs().mean() / truth.abs().mean()) for x in (out, _torch(*kept, 0.07)))
        allowed = 2 * plain if exact else 0.03
        if not lost <= allowed:
            return f"its self-check is off by {lost:.2g} at head dim {dim}; allowed {allowed:.2g}"
    return None
