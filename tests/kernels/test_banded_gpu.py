"""Guard bands around every buffer of whole calls on a real GPU: ``pytest -m gpu``."""

import banded_calls
import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", banded_calls.CASES)
def test_nothing_beside_a_buffer_is_written_and_nothing_unwritten_read(name, dtype):
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu was asked for and torch sees no CUDA device")
    banded_calls.check(name, "cuda", dtype)
