"""Sparse attention methods, one file each."""

from .adaspa import AdaSpa
from .base import REGISTRY, Call, Method, ModelFacts, find
from .clear import Clear
from .gna import GNA
from .paro import Paro
from .pisa import Pisa
from .pyramid import Pyramid
from .radial import Radial
from .rectified import Rectified
from .testing import AllBlocks, RandomBlocks
from .vmoba import VMoBA

__all__ = [
    "GNA",
    "REGISTRY",
    "AdaSpa",
    "AllBlocks",
    "Call",
    "Clear",
    "Method",
    "ModelFacts",
    "Paro",
    "Pisa",
    "Pyramid",
    "Radial",
    "RandomBlocks",
    "Rectified",
    "VMoBA",
    "find",
]
