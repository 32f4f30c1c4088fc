"""The score kernels compiled for real architectures, without a GPU: matrix instructions, no spills in their loops."""

import importlib
import importlib.util
import os

import pytest
import torch

from dit_accel.eval import compiled as offline
from dit_accel.kernels.tuning import Tuning

if importlib.util.find_spec("triton") is None and not os.environ.get("CI"):
    pytest.skip("Triton is not installed", allow_module_level=True)
scores = importlib.import_module("dit_accel.kernels.scores.triton")
if scores.interpreted() and not os.environ.get("CI"):
    pytest.skip("the process was started with TRITON_INTERPRET=1", allow_module_level=True)

MATRIX = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def launched(monkeypatch, kernel, call):
    """The arguments with which ``call`` would launch ``kernel``: run-time ones, compile-time ones, and options."""
    seen = {}

    class Launch:
        def __getitem__(self, grid):
            def run(*values, num_warps, num_stages):
                fixed = len([p for p in real.params if p.is_constexpr])
                names = real.arg_names[-fixed:]
                seen["given"] = values[:-fixed], dict(zip(names, values[-fixed:], strict=True)), num_warps, num_stages

            return run

    real = getattr(scores, kernel)
    monkeypatch.setattr(scores, kernel, Launch())
    monkeypatch.setattr(scores, "_programs", lambda device: 264)
    call()
    return real, *seen["given"]


def row(monkeypatch, arch, dim, kernel, known=False):
    q = torch.zeros(1, 300, 4, dim, dtype=torch.bfloat16).transpose(1, 2)
    if kernel == "_mass":
        lse = torch.zeros(1, 4, 300) if known else None
        call = lambda: scores.block_mass(q, q, 64, scale=1.0, lse=lse, kv_valid=None)  # noqa: E731
    else:
        call = lambda: scores.peaks(q[0], q[0], 32, 16, scale=1.0, dead=None)  # noqa: E731
    real, values, fixed, warps, stages = launched(monkeypatch, kernel, call)
    entry = Tuning(scores.ROWS, scores.STEP, 0, 0, warps, stages)
    made = offline.compiled(real, values, fixed, entry, arch)
    return offline.inspected(made.asm["cubin"], made.metadata.shared)


def check(found, arch, dim):
    assert found["matrix"] == MATRIX[arch]
    # Rows of 72 begin anywhere, and copies of less than 16 bytes are made in registers.
    assert dim == 72 or found["copies"] == "cp.async"
    # Nothing has been tuned for Blackwell.
    assert found["loop_spills"] <= (2 if arch == 100 else 0)
    assert found["stack"] <= 64
    assert found["shared_kib"] <= offline.SHARED_LIMIT[arch]


@pytest.mark.parametrize("kernel", ["_mass", "_peaks"])
def test_on_hopper(kernel, monkeypatch):
    check(row(monkeypatch, 90, 128, kernel), 90, 128)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "known"), [("_mass", False), ("_mass", True), ("_peaks", False)])
@pytest.mark.parametrize("dim", [64, 72, 96, 128, 256])
@pytest.mark.parametrize("arch", MATRIX)
def test_everywhere(arch, dim, kernel, known, monkeypatch):
    check(row(monkeypatch, arch, dim, kernel, known), arch, dim)
