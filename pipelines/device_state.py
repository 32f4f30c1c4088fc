"""The state of the device around a timed run: peak memory, clocks, what was compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def reset_memory(device: torch.device) -> None:
    """Start a new peak; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int] | None:
    """Bytes since :func:`reset_memory`: ``allocated`` by tensors, ``reserved`` from the GPU. None on a CPU.

    A card must hold what is reserved; what is allocated tells methods apart.
    """
    if device.type != "cuda":
        return None
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }


def clocks(device: torch.device) -> dict[str, int | None] | None:
    """``sm_mhz``, ``power_state`` (0 is full speed), ``temperature_c``, ``power_mw`` at this moment; None on a CPU.

    A value is None where the driver or the package nvidia-ml-py (``pynvml``) does not tell it.
    """
    if device.type != "cuda":
        return None
    return {
        "sm_mhz": _told(lambda: torch.cuda.clock_rate(device)),
        "power_state": _told(lambda: _power_state(device)),
        "temperature_c": _told(lambda: torch.cuda.temperature(device)),
        "power_mw": _told(lambda: torch.cuda.power_draw(device)),
    }


def compiled(pipe: Any) -> bool:
    """Whether ``torch.compile`` took any module of the pipeline, whole or in part."""
    models = [part for part in getattr(pipe, "components", {}).values() if isinstance(part, nn.Module)]
    return any(_is_compiled(module) for model in models for module in model.modules())


def describe(device: torch.device) -> dict[str, Any]:
    """``type``, ``name``, and what else timings depend on: ``threads`` of a CPU; architecture, bytes, CUDA of a GPU."""
    told: dict[str, Any] = {"type": device.type, "name": device_name(device)}
    if device.type == "cuda":
        own = torch.cuda.get_device_properties(device)
        return told | {
            "architecture": f"sm{own.major}{own.minor}", "memory_bytes": own.total_memory, "cuda": torch.version.cuda,
        }  # fmt: skip
    return told | ({"threads": torch.get_num_threads()} if device.type == "cpu" else {})


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()


def _is_compiled(module: nn.Module) -> bool:
    # Set by Module.compile(); torch.compile(module) makes a module that holds the original one.
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def _told(ask: Callable[[], int]) -> int | None:
    """What the driver says; None where it, or the package that asks it, is missing or says nothing."""
    # NVML's errors have a class of their own, in a package that may be absent.
    with contextlib.suppress(Exception):
        return int(ask())
    return None


def _power_state(device: torch.device) -> int:
    import pynvml

    pynvml.nvmlInit()
    # By its UUID, since NVML does not know CUDA_VISIBLE_DEVICES.
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return pynvml.nvmlDeviceGetPerformanceState(handle)
