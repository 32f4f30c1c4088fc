"""Sparse attention methods, one file each."""

from .base import REGISTRY, Call, Method, find
from .radial import Radial
from .testing import AllBlocks, RandomBlocks

__all__ = ["REGISTRY", "AllBlocks", "Call", "Method", "Radial", "RandomBlocks", "find"]
