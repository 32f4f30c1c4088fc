"""The Triton tier: its interpreter suite in a process of its own, and what needs no kernel."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit_accel.kernels import BlockList, TilePlan, tuning
from dit_accel.kernels.block_sparse import choose

HERE = Path(__file__).parent
SUITES = [HERE.parent / name / "interpreter_suite.py" for name in ("block_sparse", "select", "pooling", "scores")]
SUITES.append(HERE.parent / "banded_suite.py")

if importlib.util.find_spec("triton") is None and not os.environ.get("CI"):
    pytest.skip("Triton is not installed", allow_module_level=True)
tier = importlib.import_module("dit_accel.kernels.block_sparse.triton")


def plan(tile_q=64, tile_k=64, n=256):
    return TilePlan(tile_q, tile_k, n, n, BlockList.from_mask(torch.ones(1, 1, n // tile_q, n // tile_k).bool()))


def query(dtype=torch.bfloat16, dim=64, n=256):
    return torch.zeros(1, 1, n, dim, dtype=dtype)


@pytest.fixture
def on_gpu(monkeypatch):
    """A tensor that says it is on a GPU of the given compute capability."""

    def make(capability, **kwargs):
        monkeypatch.setattr(tier, "interpreted", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        real = query(**kwargs)

        class Fake:
            device = torch.device("cuda:0")
            dtype, shape = real.dtype, real.shape
            element_size = real.element_size

        return Fake()

    return make


@pytest.mark.parametrize(("marked", "least"), [("not slow", 160), pytest.param("slow", 39, marks=pytest.mark.slow)])
def test_interpreter_suite(marked, least):
    """Triton decides on import whether it interprets, so the suite runs in a process with the variable set."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    suites = [str(suite) for suite in SUITES]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *suites,
        "-m",
        marked,
        "-q",
        "-p",
        "no:cacheprovider",
        "-Werror::RuntimeWarning",
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=HERE.parents[2], timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > least
    assert "skipped" not in done.stdout


@pytest.mark.skipif(tier.interpreted(), reason="the process was started with TRITON_INTERPRET=1")
def test_refuses_a_cpu_tensor_and_says_what_to_type():
    assert "TRITON_INTERPRET=1" in tier.refuses(query(), plan())
    with pytest.raises(NotImplementedError, match=r"q is on cpu.*use backend='auto'"):
        choose(query(), plan(), backend="triton")


def test_refuses_what_the_kernel_cannot_serve(on_gpu):
    assert "compute capability 7.5" in tier.refuses(on_gpu((7, 5)), plan())
    assert "torch.float64" in tier.refuses(on_gpu((9, 0), dtype=torch.float64), plan())
    assert "head dim 264" in tier.refuses(on_gpu((9, 0), dim=264), plan())
    for dim in (16, 72, 256):
        assert tier.refuses(on_gpu((8, 0), dim=dim), plan()) is None


def test_a_wide_value_dim_is_refused():
    with pytest.raises(NotImplementedError, match=r"head dims 64 \(q, k\) and 300 \(v\)"):
        tier.attention(query(), query(), query(dim=300), plan(), scale=1.0)


def test_auto_on_cpu_skips_the_emulated_tier():
    assert choose(query(torch.float64), plan())[1].startswith("triton: q is on cpu")


@pytest.mark.parametrize(
    ("tile", "expected"),
    [((64, 64), (64, 64)), ((128, 64), (128, 64)), ((256, 128), (256, 128)), ((8, 16), (128, 64))],
)
def test_tiles_the_kernel_can_cut_itself_are_kept(on_gpu, tile, expected):
    assert tier.tile_for(plan(*tile), on_gpu((9, 0), dim=128)) == expected


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dim", [16, 64, 72, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_divide_the_tiles_that_they_can_divide(capability, dim, itemsize):
    for tile in (32, 64, 128, 192, 256):
        entry = tuning.tuning(capability, dim, itemsize, tile, tile)
        assert tile % entry.block_q == 0
        for block in (entry.full, entry.tested, entry.gathered):
            assert tile % block == 0
            assert block >= 16


@pytest.mark.parametrize(
    ("tile", "best", "block"), [(100, 128, 128), (48, 128, 64), (8, 128, 16), (160, 128, 64), (455, 128, 128)]
)
def test_fit(tile, best, block):
    assert tuning.fit(tile, best) == block


def test_widths_cover_the_head_dim():
    for dim in range(1, 257):
        whole, tail = tier.widths(dim)
        assert dim <= whole + tail <= max(16, 1.5 * dim + 16)
        assert all(width >= 16 and width & (width - 1) == 0 for width in (whole, tail or 16))
