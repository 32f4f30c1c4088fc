"""Streaming: video without an end on a cache of constant size."""

from .cache import StreamCache
from .config import PRESETS, CacheConfig, preset
from .rotation import Rotary

__all__ = ["PRESETS", "CacheConfig", "Rotary", "StreamCache", "preset"]
