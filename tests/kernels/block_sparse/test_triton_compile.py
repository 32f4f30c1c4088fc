"""The Triton kernel compiled for real architectures, without a GPU: it must use their matrix instructions."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from offline import compiled

from dit_accel.kernels import Band, BlockList, Box, Disc, Gate, Group, Predicate, TilePlan, tuning

if importlib.util.find_spec("triton") is None and not os.environ.get("CI"):
    pytest.skip("Triton is not installed", allow_module_level=True)
tier = importlib.import_module("dit_accel.kernels.block_sparse.triton")
if tier.interpreted() and not os.environ.get("CI"):
    pytest.skip("the process was started with TRITON_INTERPRET=1", allow_module_level=True)

MATRIX = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB per block, CUDA C++ programming guide
N, HEADS = 256, 4


def plan(features: set[str], tile: int = 128, dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> TilePlan:
    slots = torch.arange(N, dtype=torch.int32)
    tiles = -(-N // tile)
    listed = BlockList.from_mask(torch.ones(1, 1, tiles, tiles, dtype=torch.bool))
    parts = {}
    if "box" in features:
        parts["box"] = Box((slots,) * 3, (slots,) * 3, (slots,) * 3)
    if "disc" in features:
        parts["disc"] = Disc((slots,) * 2, (slots,) * 2, slots)
    if "band" in features:
        parts["band"] = Band(slots, slots, slots, slots, torch.zeros(4, 4, dtype=torch.int32))
    if "always" in features:
        parts["always"] = slots > 3
    gate = Gate(torch.zeros(1, HEADS, 16, 16, dtype=torch.uint8), slots, slots) if "gate" in features else None
    order = torch.arange(N).expand(HEADS, N).contiguous() if "order" in features else None
    partial = BlockList.from_mask(torch.ones(1, 1, tiles, tiles, dtype=torch.bool)) if parts or gate else None
    predicate = Predicate(**parts) if parts else None
    more = {}
    if "reps" in features:
        pooled = torch.zeros(1, HEADS, tiles, dim, dtype=dtype)
        count = torch.full((1, 1, tiles), tile, dtype=torch.int32)
        more["reps"] = (Group(pooled, pooled, count, listed, torch.arange(0, N + 1, tile)),)
    if "first-order" in features:
        more["first_order"] = torch.zeros(1, HEADS, dim, dim)
    if "row-factors" in features:
        more["row_scale"], more["row_add"] = torch.zeros(1, HEADS, tiles), torch.zeros(1, HEADS, tiles, dim)
    return TilePlan(tile, tile, N, N, listed, partial, predicate, gate, order, order, **more)


@pytest.fixture
def build(tmp_path, monkeypatch):
    """``build(arch, dim, features)`` -> the compiled kernel and its tuning entry."""
    def make(arch, dim, features=(), dtype=torch.bfloat16):
        features = set(features)
        tiles = plan(features, dim=dim, dtype=dtype)
        q = torch.zeros(1, N, HEADS, dim, dtype=dtype).transpose(1, 2)
        lse = torch.zeros(1, HEADS, N) if "lse" in features else None
        kv_valid = torch.zeros(1, dtype=torch.int32) if "alive" in features else None
        entry = tuning.tuning(divmod(arch, 10), dim, dtype.itemsize, tiles.tile_q, tiles.tile_k)
        values = tier.arguments(q, q, q, q, lse, tiles, scale=1.0, kv_valid=kv_valid)
        fixed = tier.constants(q, q, q, q, tiles, entry, bounded=kv_valid is not None)
        return compiled(tier.forward, values, fixed, entry, arch, tmp_path, monkeypatch), entry

    return make


def test_the_signature_covers_every_argument():
    names = tier.forward.arg_names
    tiles = plan({"box"})
    q = torch.zeros(1, HEADS, N, 64)
    entry = tuning.tuning((9, 0), 64, 4, 128, 128)
    values = tier.arguments(q, q, q, q, None, tiles, scale=1.0, kv_valid=None)
    assert names[len(values) :] == list(tier.constants(q, q, q, q, tiles, entry, bounded=False))


@pytest.mark.parametrize("arch", MATRIX)
def test_matrix_instructions(build, arch):
    compiled, entry = build(arch, 128)
    ptx = compiled.asm["ptx"]
    assert MATRIX[arch] in ptx
    # Without asynchronous copies the loads would not overlap the arithmetic.
    assert "cp.async" in ptx
    assert compiled.metadata.num_warps == entry.warps
    assert compiled.metadata.shared <= SHARED_LIMIT[arch] * 1024


def test_every_feature_compiles_together_and_stays_pipelined(build):
    compiled, _ = build(90, 72, {"box", "always", "gate", "order", "alive", "lse"})
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "cp.async.cg.shared.global" in compiled.asm["ptx"]


FEATURES = {
    "bare": (), "box": ("box", "always"), "disc": ("disc",), "band": ("band",), "gate": ("gate",), "order": ("order",),
    "alive": ("alive",), "gate-box": ("gate", "box"), "reps": ("reps",), "first-order": ("reps", "first-order"),
    "row-factors": ("row-factors",),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dim", [64, 72, 128, 256])
@pytest.mark.parametrize("arch", MATRIX)
def test_registers_and_spills(build, tmp_path, arch, dim, name, record_property):
    """Few spilled bytes everywhere, none in the bare kernel. PTX itself says nothing of spills: ask ptxas."""
    compiled, _ = build(arch, dim, FEATURES[name])
    assert MATRIX[arch] in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_LIMIT[arch] * 1024
    registers, spilled = assembled(compiled.asm["ptx"], arch, tmp_path)
    record_property("registers", registers)
    record_property("spilled", spilled)
    print(f"sm{arch} D={dim} {name}: {registers} registers, {spilled} bytes spilled")
    assert spilled <= (0 if name == "bare" else 256)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_float32_compiles_without_spilling(build, tmp_path, dim):
    compiled, _ = build(80, dim, dtype=torch.float32)
    assert compiled.metadata.shared <= SHARED_LIMIT[89] * 1024
    assert assembled(compiled.asm["ptx"], 80, tmp_path)[1] <= 64


def assembled(ptx: str, arch: int, folder: Path) -> tuple[int, int]:
    """Registers per thread and bytes of spill stores. The plain ptxas beside it rejects Triton's PTX version."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
    if not ptxas.exists():
        pytest.skip("this Triton carries no ptxas")
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    command = [ptxas, "-v", f"-arch={name}", source, "-o", folder / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.search(r"Used (\d+) registers", done.stderr)[1]), int(re.search(r"(\d+) bytes spill", done.stderr)[1])
