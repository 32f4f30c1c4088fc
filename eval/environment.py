"""What this machine offers: versions, devices, tiers and why some do not work, optional packages."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib import metadata
from typing import Any

import torch

from .. import __version__

# Name as users know it -> module that proves it is there, whichever build provides it.
OPTIONAL = {
    "triton": "triton", "flash-attn": "flash_attn", "flash-attn-3": "flash_attn_interface",
    "sageattention": "sageattention", "natten": "natten", "flashinfer": "flashinfer", "opencv": "cv2",
    "matplotlib": "matplotlib",
}  # fmt: skip
_REQUIRED = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "imageio", "imageio-ffmpeg", "ftfy",
)  # fmt: skip
# MPS, XPU and ROCm have what the gather tier needs, plain torch operations. Nobody here has measured them.
_GATHER = "no kernel of ours; the gather tier, or flex where its self-check passes; not tested by this project"
#: Read by glibc as a process starts: bytes from which a buffer is mapped on its own, and given back when it is freed.
#: Given, it no longer adapts, so that the memory of a process is what it holds.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
# The allocator's weigh on a CPU: memory given back between two calls is faulted in again, a tenth of some calls.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TRITON_INTERPRET", "CXX", "LD_PRELOAD",
    "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_",
)  # fmt: skip


def environment() -> dict[str, dict[str, Any]]:
    """Sections versions, cpu, gpus, tiers, dense_kernels, optional_packages, model, variables; plain JSON values.

    Runs the self-check of the flex tier, which compiles once per machine and may take some seconds.
    """
    return {
        "versions": versions(),
        "cpu": cpu(),
        "gpus": gpus(),
        "tiers": tiers(),
        "dense_kernels": dense_kernels(),
        "optional_packages": {name: _optional(module) for name, module in OPTIONAL.items()},
        "model": {"bundled": _bundled()},
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """In what two environments differ that times depend on: ``"cpu.threads (2 there, 1 here)"``. Empty: one machine."""
    found = []
    for section in ("versions", "cpu", "gpus", "tiers", "dense_kernels"):
        old, new = there.get(section, {}), here.get(section, {})
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                found.append(f"{section}.{name} ({old.get(name)} there, {new.get(name)} here)")
    return found


def versions() -> dict[str, str | None]:
    """Versions of this package, Python, the operating system and the required packages."""
    found = {"dit-accel": __version__, "python": platform.python_version(), "system": platform.platform()}
    return {**found, **{name: _version(name) for name in _REQUIRED}}


def cpu() -> dict[str, Any]:
    """Name, cores this process may use, threads torch uses, vector capability, C++ compiler."""
    return {
        "name": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "C++ compiler": compiler(),
    }


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def compiler() -> str | None:
    """The C++ compiler that torch would use, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        name = get_cpp_compiler()
    except Exception:
        return None
    return shutil.which(name) or name


def gpus() -> dict[str, str]:
    """``cuda:0`` -> name, architecture, memory; for other accelerators what this library runs on them."""
    found = {}
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        # On ROCm torch calls the device cuda too; our Triton kernels are written and tested for NVIDIA.
        arch = f"{p.gcnArchName}, ROCm: {_GATHER}" if torch.version.hip else f"sm{p.major}{p.minor}"
        found[f"cuda:{i}"] = f"{p.name}, {arch}, {p.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = f"Apple GPU: {_GATHER}"
    for i in range(torch.xpu.device_count()):
        found[f"xpu:{i}"] = f"{torch.xpu.get_device_name(i)}: {_GATHER}"
    return found or {"cuda": "none" if torch.version.cuda else "none (this torch is built for CPU)"}


def tiers() -> dict[str, dict[str, Any]]:
    """For each execution tier whether it works here, and why not."""
    return {
        "triton": _verdict(_triton()),
        "flash": _verdict(None),
        "flex": _verdict(_flex()),
        "gather": _verdict(None),
        "reference": _verdict(None),
    }


def dense_kernels() -> dict[str, dict[str, Any]]:
    """For each kernel of dense attention whether it is used on this device, and why not. Runs their self-checks."""
    from ..kernels.dense import DENSE, unusable

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: _verdict(unusable(name, device)) for name in DENSE}


def _verdict(why: str | None) -> dict[str, Any]:
    return {"usable": why is None} | ({"why": why} if why else {})


def _flex() -> str | None:
    from ..kernels.block_sparse import flex

    return flex.unavailable("cuda" if torch.cuda.is_available() else "cpu")


def _triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'dit-accel[triton]' (Linux)"
    try:
        from ..kernels.block_sparse import triton as tier
    except ImportError as error:
        return f"not importable ({error})"
    # The tier's own verdict, on the smallest call there is; it reads nothing but the query.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tier.refuses(torch.empty((1, 1, 1, 64), dtype=torch.float16, device=device), None)


def _optional(module: str) -> str | None:
    """The version of an optional package, ``"present"`` without one, None when absent. Nothing is imported."""
    if importlib.util.find_spec(module) is None:
        return None
    for distribution in metadata.packages_distributions().get(module, ()):
        version = _version(distribution)
        if version:
            return version
    return "present"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _bundled() -> str:
    try:
        from ..pipelines import mini

        folder = mini.path()
    except (ImportError, AttributeError, OSError) as error:
        return f"missing ({error})"
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return f"present, {size / 2**20:.1f} MiB"
