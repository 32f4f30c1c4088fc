"""Triton kernels compiled for real architectures, without a GPU."""

from pathlib import Path

import pytest
import torch

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


def compiled(kernel, values, fixed, entry, arch, cache: Path, monkeypatch):
    """``kernel`` for sm``arch``. ``values``: its run-time arguments in order; ``fixed``: compile-time ones by name;
    ``entry``: its tuning."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setattr(triton.knobs.cache, "dir", str(cache))
    signature, constants, attributes = described(values)
    names = kernel.arg_names
    if names[len(values) :] != list(fixed):
        pytest.fail(f"the kernel's compile-time arguments are {names[len(values) :]}, given were {list(fixed)}")
    source = ASTSource(
        kernel,
        dict(zip(names, signature, strict=False)) | dict.fromkeys(fixed, "constexpr"),
        constants | {(names.index(name),): value for name, value in fixed.items()},
        attributes,
    )
    options = {"num_warps": entry.warps, "num_stages": entry.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def described(values, path=()):
    """Signature, constants and divisibility of run-time arguments, as a launch would specialise them."""
    signature, constants, attributes = [], {}, {}
    for index, value in enumerate(values):
        at = (*path, index)
        if isinstance(value, tuple):
            inner, more_constants, more_attributes = described(value, at)
            signature.append(tuple(inner))
            constants |= more_constants
            attributes |= more_attributes
        elif value is None or (isinstance(value, int) and value == 1):
            signature.append("constexpr")
            constants[at] = value
        elif isinstance(value, float):
            signature.append("fp32")
        else:
            tensor = isinstance(value, torch.Tensor)
            signature.append(f"*{TYPES[value.dtype]}" if tensor else "i32")
            if tensor or value % 16 == 0:
                attributes[at] = [["tt.divisibility", 16]]
    return signature, constants, attributes
