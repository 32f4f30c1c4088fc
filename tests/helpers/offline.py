"""Triton kernels compiled for real architectures, without a GPU."""

from pathlib import Path

from dit_accel.eval import compiled as offline


def compiled(kernel, values, fixed, entry, arch, cache: Path, monkeypatch):
    """``eval.compiled.compiled`` with a cache of its own."""
    import triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(cache))
    return offline.compiled(kernel, values, fixed, entry, arch)
