"""Load a diffusers pipeline from a folder or the hub onto a device."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import DitAccelError, UsageError
from .model import ModelInfo, inspect_model

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHORT = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


def pick_device(device: str = "auto") -> torch.device:
    """The device of that name; ``"auto"`` is the first GPU, else the CPU. Raises ``UsageError`` where it is absent."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:0") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {device!r} is not here ({torch.cuda.device_count()} CUDA devices); use --device cpu")
    return found


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``"auto"`` is bfloat16 on a GPU and float32 elsewhere; else the dtype of that name."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    name = _SHORT.get(dtype, dtype)
    if name not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load(
    model: str | ModelInfo | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    image: bool = False,
    offload: bool = False,
) -> Any:
    """The pipeline of ``model`` (folder, hub id, ``ModelInfo``, or None for the bundled one) on ``device``.

    ``image`` picks the family's image-to-video class. ``offload`` keeps each part on the CPU until it runs. Wan's
    VAE stays in float32, as its published examples have it. Raises ``UsageError`` and ``UnsupportedError`` as
    :func:`~dit_accel.pipelines.model.inspect_model` does, ``DitAccelError`` where weights are missing or broken.
    """
    where = pick_device(device)
    kind = dtype if isinstance(dtype, torch.dtype) else pick_dtype(dtype, where)
    info = model if isinstance(model, ModelInfo) else inspect_model(model, image=image)
    dtypes = {"default": kind, "vae": torch.float32} if info.pipeline_class.__name__.startswith("Wan") else kind
    try:
        pipe = info.pipeline_class.from_pretrained(info.source, dtype=dtypes, revision=info.revision)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise DitAccelError(
            f"{info.name} could not be loaded as a {info.pipeline_class.__name__}: {type(error).__name__}: {error}"
        ) from error
    if offload and where.type != "cpu":
        pipe.enable_model_cpu_offload(device=where)
    else:
        pipe.to(where)
    return pipe
