"""The quantised Triton kernel: its interpreter suite in a process of its own, and what it compiles to without a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from offline import compiled

from dit_accel.kernels import Band, BlockList, Gate, Predicate, TilePlan
from dit_accel.quant import PRESETS, Quant

SUITES = [Path(__file__).with_name(f"interpreter_{name}.py") for name in ("suite", "quantisers")]

if importlib.util.find_spec("triton") is None and not os.environ.get("CI"):
    pytest.skip("Triton is not installed", allow_module_level=True)
tier = importlib.import_module("dit_accel.kernels.quant.triton")
operands = importlib.import_module("dit_accel.kernels.quant.operands")
tuning = importlib.import_module("dit_accel.kernels.tuning")
if tier.plain.interpreted() and not os.environ.get("CI"):
    pytest.skip("the process was started with TRITON_INTERPRET=1", allow_module_level=True)

N, HEADS = 256, 2
SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB per block, CUDA C++ programming guide


@pytest.mark.parametrize(("marked", "least"), [("not slow", 80), pytest.param("slow", 60, marks=pytest.mark.slow)])
def test_interpreter_suite(marked, least):
    """Triton decides on import whether it interprets, so the suites run in a process with the variable set."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-m", marked, "-q", "-p", "no:cacheprovider", "-Werror::RuntimeWarning"]
    command = [sys.executable, "-m", "pytest", *map(str, SUITES), *options]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=SUITES[0].parents[3], timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > least
    assert "skipped" not in done.stdout


@pytest.fixture
def build(tmp_path, monkeypatch):
    """``build(arch, dim, recipe, tested)`` -> the compiled kernel."""

    def make(arch, dim, recipe, *, tested=False, dead=False):
        monkeypatch.setattr(tier.plain, "tuning_for", lambda plan, q, d, tile_q, tile_k: tuning.tuning(
            divmod(arch, 10), d, q.element_size(), tile_q, tile_k
        ))  # fmt: skip
        lists = BlockList.from_mask(torch.ones(1, 1, N // 128, N // 128, dtype=torch.bool))
        slots = torch.arange(N, dtype=torch.int32)
        extra = ()
        if tested:
            band = Band(slots, slots, slots, slots, torch.zeros(4, 4, dtype=torch.int32))
            extra = lists, Predicate(band=band), Gate(torch.zeros(1, HEADS, 16, 16, dtype=torch.uint8), slots, slots)
        plan = TilePlan(128, 128, N, N, lists, *extra)
        q = torch.zeros(1, HEADS, N, dim, dtype=torch.bfloat16)
        live = torch.ones(1, 1, N, dtype=torch.bool) if dead else None
        x = operands.prepare(q, q, q, recipe, scale=1.0, live_k=live)
        v = tier.values_for(x.v)
        entry = tier.tuned(q, x, plan, recipe)
        lse = torch.zeros(1, HEADS, N) if dead else None
        values = tier.arguments(q, x, v, q, lse, plan, scale=1.0, live=live)
        fixed = tier.constants(x, v, plan, recipe, entry, bounded=dead) | {"EMULATED": False}
        return compiled(tier.forward, values, fixed, entry, arch, tmp_path, monkeypatch)

    return make


# (architecture, preset) -> the instructions that multiply Q with K and P with V.
INSTRUCTIONS = {
    (80, "sage1"): (r"m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8", r"m16n8k16.*f16\.f16\.f16\.f16"),
    (89, "sage2"): (r"m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8", r"m16n8k32\.row\.col\.f32\.e4m3\.e4m3\.f32"),
    (89, "sage2pp"): (r"m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8", r"m16n8k32\.row\.col\.f16\.e4m3\.e4m3\.f16"),
    (90, "sage2"): (r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8", r"m64n\d+k32\.f32\.e4m3\.e4m3"),
    (90, "sage2-int4"): (r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8", r"m64n\d+k32\.f32\.e4m3\.e4m3"),
    (90, "sage2pp"): (r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8", r"m64n\d+k32\.f16\.e4m3\.e4m3"),
    (100, "sage2"): (r"tcgen05\.mma\S*kind::i8", r"tcgen05\.mma\S*kind::f8f6f4"),
}  # fmt: skip


@pytest.mark.parametrize(("arch", "name"), INSTRUCTIONS)
def test_matrix_instructions(build, arch, name):
    compiled = build(arch, 128, PRESETS[name]())
    for pattern in INSTRUCTIONS[arch, name]:
        assert re.search(pattern, compiled.asm["ptx"]), pattern
    assert "cp.async" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_LIMIT[arch] * 1024


def test_every_feature_compiles_together(build):
    recipe = Quant(qk="int4", pv="fp8", smooth_v=True, p_scale="row")
    ptx = build(90, 72, recipe, tested=True, dead=True).asm["ptx"]
    assert "wgmma.mma_async" in ptx


@pytest.mark.parametrize("arch", [89, 90])
def test_fp8_products_are_summed_in_two_levels(build, arch):
    """The sum over one block starts from zero and joins the float32 accumulator by an addition of its own."""
    text = build(arch, 64, Quant.sage2()).asm["ttgir"]
    zeros = set(re.findall(r"(%\S+) = arith.constant dense<0\.0+e\+00>", text))
    dots = [line for line in text.splitlines() if re.search(r"(tt\.dot|warp_group_dot)\b", line) and "f8E4M3FN" in line]
    assert dots
    for line in dots:
        assert re.search(r"dot %\S+, %\S+, (%\w+)", line)[1] in zeros
