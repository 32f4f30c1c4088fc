"""Every metric of this package: what it needs, which way is better, whether it can be had here and why not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .proxies import MEANING, name_of
from .shapes.grade import DIMENSIONS as SHAPES
from .vbench import DIMENSIONS, FLICKER

SPEED, FIDELITY, ATTENTION, QUALITY = "speed", "fidelity", "attention", "quality"


@dataclass(frozen=True)
class Metric:
    """``family``: figures of different families are never mixed. ``reference``: needs the dense output or tensors.

    ``needs``: what must be there, in words. ``is_vbench``: may be part of a VBench total. ``missing``: why it cannot be
    had here, or None.
    """

    name: str
    family: str
    meaning: str
    higher_is_better: bool = True
    reference: bool = False
    needs: tuple[str, ...] = ()
    is_vbench: bool = False
    missing: Callable[[], str | None] = lambda: None

    def to_dict(self) -> dict[str, Any]:
        why = self.missing()
        return {
            "name": self.name, "family": self.family, "meaning": self.meaning, "reference": self.reference,
            "higher_is_better": self.higher_is_better, "needs": list(self.needs), "is_vbench": self.is_vbench,
            "available": why is None, "why_not": why,
        }  # fmt: skip


def _opencv() -> str | None:
    found = importlib.util.find_spec("cv2") is not None
    return None if found else 'OpenCV is not installed; pip install "dit-accel[eval]"'


def _lpips() -> str | None:
    found = importlib.util.find_spec("lpips") is not None
    return None if found else "the lpips package is not installed; pip install lpips torchvision"


def _elsewhere() -> str:
    return "runs in an environment of its own: dit-accel eval vbench doctor --python FILE"


METRICS: tuple[Metric, ...] = (
    Metric("loop", SPEED, "speed-up of the denoising loop, medians of runs in turn", reference=True),
    Metric("end_to_end", SPEED, "speed-up of the whole pipeline call", reference=True),
    Metric("psnr", FIDELITY, "mean of per-frame PSNR in dB, capped at 100", reference=True),
    Metric("psnr_global", FIDELITY, "PSNR in dB of the error pooled over frames", reference=True),
    Metric("ssim", FIDELITY, "Gaussian SSIM, border convention named", reference=True),
    Metric("lpips", FIDELITY, "learned perceptual distance, net named", False, True, ("lpips", "ImageNet weights"),
           missing=_lpips),
    Metric("rel_l1", ATTENTION, "relative L1 error of attention outputs", False, True),
    Metric("cosine", ATTENTION, "cosine of attention outputs", reference=True),
    Metric("rmse", ATTENTION, "root mean square error of attention outputs", False, True),
    Metric("recall", ATTENTION, "dense softmax mass on the kept pairs", reference=True),
    *(Metric(f"shapes.{name}", QUALITY, "graded exactly from the caption of a drawn world", needs=("opencv",),
             missing=_opencv) for name in SHAPES),
    *(Metric(f"vbench.{name}", QUALITY, "official package and weights", needs=("vbench", "its weights", "GPU"),
             is_vbench=True, missing=_elsewhere) for name in DIMENSIONS),
    *(Metric(name_of(name), QUALITY, f"{text}; difference to dense only", reference=True, needs=("opencv",),
             missing=_opencv) for name, text in MEANING.items()),
    Metric(FLICKER, QUALITY, "VBench's formula without its prompts and static filter; compare with dense only",
           reference=True),
)  # fmt: skip
