"""A broken context ends the process, whatever kind of error told of it; any other error does not."""

import pytest
import torch

from dit_accel.kernels.faults import DeviceLost, check_device


@pytest.fixture
def broken(monkeypatch):
    def synchronize(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)


def test_errors_of_a_working_device_pass(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    check_device(RuntimeError("out of resource"))
    assert waited == [1]


def test_without_a_gpu_in_use_nothing_is_asked():
    check_device(RuntimeError("out of resource"))


def test_tritons_own_kind_of_error_is_seen(broken):
    with pytest.raises(DeviceLost, match=r"broken \(RuntimeError: Triton Error \[CUDA\]\).*Start the command again"):
        check_device(RuntimeError("Triton Error [CUDA]\nan illegal memory access"))


def test_torchs_kind_needs_no_wait():
    with pytest.raises(DeviceLost, match="AcceleratorError: illegal"):
        check_device(torch.AcceleratorError("illegal"))


def test_it_is_said_once(broken):
    first = DeviceLost("said")
    with pytest.raises(DeviceLost, match=r"^said$"):
        check_device(first)
