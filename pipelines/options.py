"""How a pipeline is loaded and run beside its attention: memory, compilation, caches, adapters, quantised weights."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..diffusers.api import denoisers
from ..errors import DitAccelError, UnsupportedError, UsageError

OFFLOADS = ("model", "sequential", "group")
CACHES = ("firstblock",)
# Name -> package, diffusers' quantisation backend, its arguments. Only the transformers are quantised.
QUANTIZERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bnb-8bit": ("bitsandbytes", "bitsandbytes_8bit", {"load_in_8bit": True}),
    "bnb-4bit": ("bitsandbytes", "bitsandbytes_4bit", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
}


@dataclass(frozen=True)
class LoadOptions:
    """``offload``: ``"model"`` keeps each part on the CPU until it runs, ``"group"`` each block, ``"sequential"`` each
    layer. ``compile``: the transformers' repeated blocks. ``vae_tiling``: decode in tiles. ``cache``: ``"firstblock"``
    or with its threshold, ``"firstblock=0.1"``. ``lora``: files, folders or hub ids, each with an optional ``=scale``.
    ``quantize``: the transformers' weights, a name of ``QUANTIZERS``. ``device_map``: as ``from_pretrained`` takes it.

    Raises ``UsageError`` for values that are not known or exclude one another.
    """

    offload: str | None = None
    compile: bool = False
    vae_tiling: bool = False
    cache: str | None = None
    lora: tuple[str, ...] = ()
    quantize: str | None = None
    device_map: str | None = None

    def __post_init__(self) -> None:
        if self.offload is not None and self.offload not in OFFLOADS:
            raise UsageError(f"--offload {self.offload!r} is unknown; use one of {', '.join(OFFLOADS)}")
        if self.offload and self.device_map:
            raise UsageError("--offload and --device-map both place the weights; give one of them")
        if self.offload == "sequential" and self.compile:
            raise UsageError("--compile cannot follow weights that move layer by layer; use --offload model or group")
        if self.quantize is not None:
            _check_quantizer(self.quantize)
        self._threshold()
        for text in self.lora:
            _split(text)

    def settings(self) -> dict[str, Any]:
        """What of this decides the pixels, as plain JSON values; empty for the defaults."""
        found: dict[str, Any] = {"cache": self.cache, "quantize": self.quantize, "vae_tiling": self.vae_tiling}
        found["lora"] = [[text, _digest(_split(text)[0])] for text in self.lora]
        return {name: value for name, value in found.items() if value}

    def arguments(self) -> dict[str, Any]:
        """What ``from_pretrained`` is given."""
        found: dict[str, Any] = {"device_map": self.device_map} if self.device_map else {}
        if self.quantize:
            from diffusers import PipelineQuantizationConfig

            _, backend, arguments = QUANTIZERS[self.quantize]
            found["quantization_config"] = PipelineQuantizationConfig(
                quant_backend=backend, quant_kwargs=arguments, components_to_quantize=["transformer", "transformer_2"]
            )
        return found

    def apply(self, pipe: Any, device: torch.device) -> None:
        """Put everything on a loaded pipeline, in the one order that works, and the pipeline on ``device``."""
        self._add_adapters(pipe)
        for model in denoisers(pipe):
            self._cache(model, pipe)
        if self.vae_tiling:
            _tile(pipe)
        if self.compile:
            for model in denoisers(pipe):
                (model.compile_repeated_blocks if getattr(model, "_repeated_blocks", None) else model.compile)()
        if self.device_map is None:
            self._place(pipe, device)

    def _add_adapters(self, pipe: Any) -> None:
        names, scales = [], []
        for number, text in enumerate(self.lora):
            source, scale = _split(text)
            if not hasattr(pipe, "load_lora_weights"):
                raise UnsupportedError(f"{type(pipe).__name__} takes no LoRA; leave out --lora {source}")
            try:
                pipe.load_lora_weights(source, adapter_name=f"lora{number}", use_safetensors=True)
            except Exception as error:
                raise DitAccelError(
                    f"--lora {source} could not be loaded into a {type(pipe).__name__}: {type(error).__name__}: {error}"
                ) from error
            names.append(f"lora{number}")
            scales.append(scale)
        if names:
            pipe.set_adapters(names, scales)

    def _cache(self, model: nn.Module, pipe: Any) -> None:
        if self.cache is None:
            return
        if not hasattr(model, "enable_cache"):
            raise UnsupportedError(f"diffusers has no caches for {type(model).__name__}; leave out --cache")
        from diffusers import FirstBlockCacheConfig

        try:
            model.enable_cache(FirstBlockCacheConfig(threshold=self._threshold()))
        except ValueError as error:
            raise UnsupportedError(f"--cache {self.cache} does not fit {type(pipe).__name__}: {error}") from None

    def _threshold(self) -> float:
        name, equals, value = (self.cache or CACHES[0]).partition("=")
        try:
            threshold = float(value) if equals else 0.05
        except ValueError:
            threshold = -1.0
        if name not in CACHES or not threshold > 0:
            raise UsageError(
                f"--cache {self.cache!r} is unknown; use firstblock, or with a threshold above 0: firstblock=0.1"
            )
        return threshold

    def _place(self, pipe: Any, device: torch.device) -> None:
        if self.offload is None or device.type == "cpu":
            pipe.to(device)
        elif self.offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif self.offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            pipe.enable_group_offload(onload_device=device, offload_type="block_level", num_blocks_per_group=1)


def _check_quantizer(name: str) -> None:
    if name not in QUANTIZERS:
        raise UsageError(
            f"--quantize {name!r} is unknown; use one of {', '.join(QUANTIZERS)}. Checkpoints that are quantised "
            "already need no flag"
        )
    package = QUANTIZERS[name][0]
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"--quantize {name} needs {package}, which is not installed; pip install {package}")


def _split(text: str) -> tuple[str, float]:
    """``"file.safetensors=0.8"`` as (source, scale)."""
    source, equals, value = text.rpartition("=")
    if not equals:
        source, value = text, "1"
    try:
        scale = float(value)
    except ValueError:
        raise UsageError(f"--lora is FILE, FOLDER or ID, with an optional =SCALE like =0.8; got {text!r}") from None
    path = Path(source)
    if path.suffix in (".bin", ".pt", ".ckpt", ".pth"):
        raise UsageError(f"--lora {source} is a pickle, which can run code; only .safetensors files are loaded")
    if (path.suffix == ".safetensors" or source.startswith((".", "/", "~"))) and not path.exists():
        raise UsageError(f"--lora {source}: there is no such file or folder")
    return source, scale


def _digest(source: str) -> str | None:
    """Of a file's content; None for a folder or hub id."""
    path = Path(source)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def _tile(pipe: Any) -> None:
    vae = getattr(pipe, "vae", None)
    if not hasattr(vae, "enable_tiling"):
        raise UnsupportedError(f"the VAE of {type(pipe).__name__} has no tiling; leave out --vae-tiling")
    vae.enable_tiling()
