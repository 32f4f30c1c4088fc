"""What the Triton quantisers compile to, without a GPU. Their suite in the interpreter is run by ``test_triton.py``."""

import importlib
import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch
from offline import compiled

from dit_accel.quant import Quant

if importlib.util.find_spec("triton") is None and not os.environ.get("CI"):
    pytest.skip("Triton is not installed", allow_module_level=True)
tier = importlib.import_module("dit_accel.kernels.quant.triton_quantisers")
if tier.plain.interpreted() and not os.environ.get("CI"):
    pytest.skip("the process was started with TRITON_INTERPRET=1", allow_module_level=True)

ARCHITECTURES = (80, 89, 90, 100)
ENTRY = SimpleNamespace(warps=4, stages=1)
SHAPE = (1, 2, 256, 128)


def x():
    return torch.zeros(SHAPE, dtype=torch.bfloat16)


@pytest.mark.parametrize(("arch", "role", "packed"), [*((arch, "q", False) for arch in ARCHITECTURES), (90, "k", True)])
def test_codes_are_divided_as_ieee_asks(arch, role, packed, tmp_path, monkeypatch):
    """An approximate quotient would move codes at rounding boundaries."""
    recipe = Quant(qk="int4", granularity="thread")
    out = tier._outputs(x(), recipe, role, smooth=role == "q", keep=role == "k", packed=packed)
    mean = None if role == "q" else torch.zeros(1, 2, 1, 128)
    live = torch.ones(1, 1, 256, dtype=torch.bool)
    values = tier.token_arguments(x(), live, mean, out, torch.tensor([True, False]))
    fixed = tier.token_constants(128, recipe, role, packed=packed)
    ptx = compiled(tier.kernel.tokens, values, fixed, ENTRY, arch, tmp_path, monkeypatch).asm["ptx"]
    assert "div.rn.f32" in ptx
    assert "div.full" not in ptx
    assert "div.approx" not in ptx


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_values(arch, tmp_path, monkeypatch):
    kind = "fp8" if arch >= 89 else "int8"
    codes = torch.zeros(1, 2, 128, 256, dtype=tier.CODES[kind]).mT
    values = tier.value_arguments(x(), None, torch.zeros(1, 2, 1, 128), torch.ones(1, 2, 1, 128), codes)
    fixed = {"BLOCK": tier.STEP, "WIDTH": tier.WIDEST, "D": 128, "KIND": kind, "EMULATED": False}
    ptx = compiled(tier.kernel.values, values, fixed, ENTRY, arch, tmp_path, monkeypatch).asm["ptx"]
    assert "div.rn.f32" in ptx
    assert kind == "int8" or "satfinite.e4m3x2.f32" in ptx


@pytest.mark.parametrize("arch", [80, 100])
def test_statistics(arch, tmp_path, monkeypatch):
    table = {name: torch.zeros(1, 2, 1, 128) for name in ("sums", "low", "high")} | {"peak": None}
    values = tier.statistics_arguments(x(), None, table)
    fixed = {"CHUNK": tier.CHUNK, "BLOCK": tier.STEP, "WIDTH": tier.WIDEST, "D": 128}
    ptx = compiled(tier.kernel.statistics, values, fixed, ENTRY, arch, tmp_path, monkeypatch).asm["ptx"]
    assert ptx.count("ld.global") <= 16  # what a program reads at a time, once
