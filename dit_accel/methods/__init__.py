"""Sparse attention methods, one file each."""

from .base import REGISTRY, Call, Method, find
from .testing import AllBlocks, RandomBlocks

__all__ = ["REGISTRY", "AllBlocks", "Call", "Method", "RandomBlocks", "find"]
