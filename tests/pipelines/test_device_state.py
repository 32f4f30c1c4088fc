"""The device around a timed run, with a stand-in for CUDA where there is none."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dit_accel.pipelines import device_state

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    """``torch.cuda`` with known answers, and what was asked of which device."""
    asked = []

    def put(name, value):
        monkeypatch.setattr(torch.cuda, name, lambda device: asked.append((name, device)) or value)

    put("reset_peak_memory_stats", None)
    put("max_memory_allocated", 3 * 2**30)
    put("max_memory_reserved", 5 * 2**30)
    put("clock_rate", 1755)
    put("temperature", 61)
    put("power_draw", 402_000)
    put("get_device_name", "NVIDIA Test")
    put("get_device_properties", SimpleNamespace(uuid="ab-12", major=9, minor=0, total_memory=80 * 2**30))
    return asked


@pytest.fixture
def nvml(monkeypatch):
    fake = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda text: {"GPU-ab-12": "handle"}[text],
        nvmlDeviceGetPerformanceState={"handle": 2}.__getitem__,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)


def test_a_cpu_has_neither_clock_nor_memory_of_its_own():
    device_state.reset_memory(CPU)
    assert device_state.peak_memory(CPU) is None
    assert device_state.clocks(CPU) is None
    assert device_state.describe(CPU).keys() == {"type", "name", "threads"}


def test_reserved_memory_stands_beside_allocated(cuda):
    device_state.reset_memory(GPU)
    assert cuda == [("reset_peak_memory_stats", GPU)]
    assert device_state.peak_memory(GPU) == {"allocated": 3 * 2**30, "reserved": 5 * 2**30}


def test_clocks(cuda, nvml):
    assert device_state.clocks(GPU) == {
        "sm_mhz": 1755, "power_state": 2, "temperature_c": 61, "power_mw": 402_000,
    }  # fmt: skip


def test_what_nobody_tells_is_none(cuda, monkeypatch):
    def missing(device):
        raise ModuleNotFoundError("pynvml does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "clock_rate", missing)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = device_state.clocks(GPU)
    assert (found["sm_mhz"], found["power_state"], found["temperature_c"]) == (None, None, 61)


def test_the_device_of_a_record(cuda):
    assert device_state.describe(GPU) == {
        "type": "cuda", "name": "NVIDIA Test", "architecture": "sm90", "memory_bytes": 80 * 2**30,
        "cuda": torch.version.cuda,
    }  # fmt: skip


@pytest.mark.parametrize("how", ["none", "whole", "block", "wrapped"])
def test_compiled_in_whole_or_in_part(how):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    if how == "whole":
        model.compile()
    elif how == "block":
        model[1][0].compile()
    elif how == "wrapped":
        model = torch.compile(model)
    pipe = SimpleNamespace(components={"transformer": model, "scheduler": object(), "vae": None})
    assert device_state.compiled(pipe) is (how != "none")
