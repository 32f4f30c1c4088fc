"""Streaming: video without an end on a cache of constant size."""

from .attention import Dense, Pass, WindowAttention
from .cache import StreamCache
from .config import PRESETS, CacheConfig, preset
from .decode import StreamingDecoder
from .host import Host
from .pipeline import Stream, StreamingPipeline, StreamStats
from .reuse import FlashBlock, Similarity, merge
from .rollout import Rollout
from .rotation import Rotary
from .sparse import Sparse
from .steps import Steps, noise_of
from .weights import LoadReport, load_checkpoint

__all__ = [
    "PRESETS",
    "CacheConfig",
    "Dense",
    "FlashBlock",
    "Host",
    "LoadReport",
    "Pass",
    "Rollout",
    "Rotary",
    "Similarity",
    "Sparse",
    "Steps",
    "Stream",
    "StreamCache",
    "StreamStats",
    "StreamingDecoder",
    "StreamingPipeline",
    "WindowAttention",
    "load_checkpoint",
    "merge",
    "noise_of",
    "preset",
]
