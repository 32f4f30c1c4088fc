"""Guard bands around every buffer of whole calls, in the interpreter. Run by block_sparse/test_triton.py."""

import banded_calls
import guard_bands
import pytest
import torch

from dit_accel.kernels.pooling import blocks
from dit_accel.kernels.select import api
from dit_accel.methods import adaspa_search, pyramid_levels

# Between them they call every kernel.
FAST = {"rectified", "vmoba-blocks", "pyramid", "adaspa", "pisa+sage2"}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in banded_calls.CASES]
)
def test_nothing_beside_a_buffer_is_written_and_nothing_unwritten_read(name, monkeypatch):
    for module in (api, blocks, adaspa_search, pyramid_levels):
        monkeypatch.setattr(module, "on_gpu", lambda device: True)
    banded_calls.check(name, "cpu")


@pytest.mark.parametrize("at", [-1, 8])
def test_a_write_beside_a_buffer_is_noticed(at):
    with pytest.raises(AssertionError, match="beside a buffer of 32 bytes"), guard_bands.banded("cpu"):
        torch.empty(8, dtype=torch.float32, device="cpu").as_strided((1,), (1,), 1024 + at)[0] = 0.0
