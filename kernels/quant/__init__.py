"""Quantised attention: quantisers, smoothing, and block-sparse attention on what they produce."""

from .quantisers import groups, pack_int4, quantize, unpack_int4

__all__ = ["groups", "pack_int4", "quantize", "unpack_int4"]
