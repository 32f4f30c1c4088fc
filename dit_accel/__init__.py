"""dit-accel: sparse, quantised and streaming attention for diffusers diffusion transformers.

    from dit_accel import RadialProcessor
    pipe.set_attn_processor(RadialProcessor())

Names resolve lazily: importing this package imports neither torch nor diffusers. The first access of a public
name adds ``set_attn_processor`` and ``reset_attn_processor`` to diffusers pipelines.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "attend": "functional",
    "plan": "functional",
    "Layout": "layout",
    "Segment": "layout",
    "Step": "step",
    "State": "state",
    "Schedule": "schedule",
    "Guard": "guard",
    "Quant": "quant",
    "quantize": "quant",
    "Plan": "plans",
    "recall": "drift",
    "Method": "methods",
    "Radial": "methods",
    "GNA": "methods",
    "Clear": "methods",
    "Paro": "methods",
    "Pisa": "methods",
    "AdaSpa": "methods",
    "VMoBA": "methods",
    "Rectified": "methods",
    "Pyramid": "methods",
    "AllBlocks": "methods",
    "RandomBlocks": "methods",
    "Processor": "processors",
    "RadialProcessor": "processors",
    "GNAProcessor": "processors",
    "ClearProcessor": "processors",
    "ParoProcessor": "processors",
    "PisaProcessor": "processors",
    "AdaSpaProcessor": "processors",
    "VMoBAProcessor": "processors",
    "RectifiedProcessor": "processors",
    "PyramidProcessor": "processors",
    "QuantProcessor": "processors",
    "AllBlocksProcessor": "processors",
    "RandomBlocksProcessor": "processors",
    "load_preset": "preset",
    "set_attn_processor": "diffusers",
    "reset_attn_processor": "diffusers",
    "describe": "diffusers",
    "DitAccelError": "errors",
    "UsageError": "errors",
    "UnsupportedError": "errors",
}

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(".diffusers", __name__).install()
    value = getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from .diffusers import describe, reset_attn_processor, set_attn_processor
    from .drift import recall
    from .errors import DitAccelError, UnsupportedError, UsageError
    from .functional import attend, plan
    from .guard import Guard
    from .layout import Layout, Segment
    from .methods import (
        GNA,
        AdaSpa,
        AllBlocks,
        Clear,
        Method,
        Paro,
        Pisa,
        Pyramid,
        Radial,
        RandomBlocks,
        Rectified,
        VMoBA,
    )
    from .plans import Plan
    from .preset import load_preset
    from .processors import (
        AdaSpaProcessor,
        AllBlocksProcessor,
        ClearProcessor,
        GNAProcessor,
        ParoProcessor,
        PisaProcessor,
        Processor,
        PyramidProcessor,
        QuantProcessor,
        RadialProcessor,
        RandomBlocksProcessor,
        RectifiedProcessor,
        VMoBAProcessor,
    )
    from .quant import Quant, quantize
    from .schedule import Schedule
    from .state import State
    from .step import Step
