"""Load a diffusers pipeline from a folder or the hub onto a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import DitAccelError, UsageError
from .model import ModelInfo, inspect_model
from .options import LoadOptions

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
    options: LoadOptions | None = None,
    transformer: str | None = None,
) -> Any:
    """The pipeline of ``model`` (folder, hub id, ``ModelInfo``, or None for the bundled one) on ``device``.

    ``image`` picks the family's image-to-video class. ``options``: memory, compilation, caches, adapters.
    ``transformer``: a folder whose model takes the place of the pipeline's own. Wan's VAE stays
    in float32, as its published examples have it. Only safetensors are read. Raises ``UsageError`` and
    ``UnsupportedError`` as :func:`~dit_accel.pipelines.model.inspect_model` and ``LoadOptions`` do, ``DitAccelError``
    where weights are gated, missing or broken.
    """
    where = pick_device(device)
    kind = dtype if isinstance(dtype, torch.dtype) else pick_dtype(dtype, where)
    info = model if isinstance(model, ModelInfo) else inspect_model(model, image=image)
    options = options or LoadOptions()
    parts: dict[str, Any] = {}
    dtypes = {"default": kind, "vae": torch.float32} if info.pipeline_class.__name__.startswith("Wan") else kind
    try:
        if transformer is not None:
            from diffusers import AutoModel

            parts["transformer"] = AutoModel.from_pretrained(transformer, torch_dtype=kind, use_safetensors=True)
        pipe = info.pipeline_class.from_pretrained(
            info.source, dtype=dtypes, revision=info.revision, use_safetensors=True, **parts, **options.arguments()
        )
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise DitAccelError(_why(info, error)) from error
    options.apply(pipe, where)
    return pipe


def _why(info: ModelInfo, error: Exception) -> str:
    """What is wrong with a model that does not load, and what to do."""
    head = f"{info.name} could not be loaded as a {info.pipeline_class.__name__}"
    kinds = {cls.__name__ for cls in type(error).__mro__}
    if "GatedRepoError" in kinds or "gated repo" in str(error).lower():
        return (
            f"{head}: its weights are gated. Accept the licence at https://huggingface.co/{info.name}, "
            "log in with `hf auth login`, and run again"
        )
    damaged = _damaged(Path(info.source))
    if damaged:
        return f"{head}: {damaged}"
    return f"{head}: {type(error).__name__}: {error}"


def _damaged(folder: Path) -> str | None:
    """The first part of a local model whose weights are missing, pickled or cut short; None where all can be read."""
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        return None
    for part in sorted(path.parent for path in folder.glob("*/config.json")):
        weights = sorted(part.glob("*.safetensors"))
        if not weights:
            pickled = next((path.name for suffix in ("bin", "pt", "ckpt") for path in part.glob(f"*.{suffix}")), None)
            if pickled:
                return f"{part.name} has only pickled weights ({pickled}), which can run code; convert to safetensors"
            return f"{part.name} has no weights (*.safetensors in {part}); download the model again"
        for path in weights:
            try:
                with safe_open(path, framework="pt") as file:
                    file.keys()
            except (SafetensorError, OSError) as error:
                return f"{part.name}/{path.name} is damaged ({error}); download it again"
    return None
