"""The Triton kernel compiled for real architectures, without a GPU: it must use their matrix instructions."""

import importlib
import importlib.util
import os

import pytest
import torch

from dit_accel.eval import compiled as offline
from dit_accel.kernels import tuning

if importlib.util.find_spec("triton") is None and not os.environ.get("CI"):
    pytest.skip("Triton is not installed", allow_module_level=True)
tier = importlib.import_module("dit_accel.kernels.block_sparse.triton")
if tier.interpreted() and not os.environ.get("CI"):
    pytest.skip("the process was started with TRITON_INTERPRET=1", allow_module_level=True)

MATRIX = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def made(arch, dim, features, dtype=torch.bfloat16):
    """The compiled kernel with ``features`` in addresses of rows."""
    tiles = offline.plan(set(features), dim, dtype=dtype)
    q = torch.zeros(1, offline.TOKENS, offline.HEADS, dim, dtype=dtype).transpose(1, 2)
    entry = tuning.tuning(divmod(arch, 10), dim, dtype.itemsize, tiles.tile_q, tiles.tile_k)
    kv_valid = torch.zeros(1, dtype=torch.int32) if "alive" in features else None
    lse = torch.zeros(1, offline.HEADS, offline.TOKENS) if "lse" in features else None
    keys = tier.Keys(q, q, False, False, (entry.full, entry.gathered))
    values = tier.arguments(q, keys, q, lse, tiles, entry, scale=1.0, kv_valid=kv_valid)
    fixed = tier.constants(q, keys, q, tiles, entry, bounded=kv_valid is not None)
    return offline.compiled(tier.forward, values, fixed, entry, arch)


@pytest.mark.parametrize("arch", MATRIX)
def test_whole_blocks(arch):
    """Matrix instructions, copies that overlap them, nothing spilled in the loop, and shared memory that is there."""
    row = offline.measured(arch, 128, "full")
    assert row["matrix"] == MATRIX[arch]
    assert row["copies"] == ("tma" if arch >= 90 else "cp.async")
    assert row["loops"] > 0
    assert row["loop_spills"] == 0
    assert row["shared_kib"] <= offline.SHARED_LIMIT[arch]


def test_every_feature_compiles_together_and_stays_pipelined():
    ptx = made(90, 72, {"box", "always", "gate", "order", "alive", "lse"}).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.cg.shared.global" in ptx


@pytest.mark.slow
@pytest.mark.parametrize("name", offline.VARIANTS)
@pytest.mark.parametrize("dim", [64, 72, 128, 256])
@pytest.mark.parametrize("arch", MATRIX)
def test_registers_and_spills(arch, dim, name, record_property):
    row = offline.measured(arch, dim, name)
    for key in ("registers", "stack", "loop_spills"):
        record_property(key, row[key])
    assert row["matrix"] == MATRIX[arch]
    assert row["shared_kib"] <= offline.SHARED_LIMIT[arch]
    # Nothing has been tuned for Blackwell, whose accumulators pass through registers on their way to tensor memory.
    assert row["stack"] <= (560 if arch == 100 else 256)
    if name == "full":
        assert row["loop_spills"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_float32_compiles_without_spilling(dim):
    kernel = made(80, dim, (), torch.float32)
    assert kernel.metadata.shared <= offline.SHARED_LIMIT[89] * 1024
    assert offline.inspected(kernel.asm["cubin"], kernel.metadata.shared)["stack"] <= 64
