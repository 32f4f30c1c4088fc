"""Statistics of blocks of tokens: what stands for many tokens where one is looked at."""

from .blocks import Statistics, block_counts, block_means, block_spreads, block_statistics
from .pyramid import Runs, pyramid_counts, pyramid_means, pyramid_similarity

__all__ = [
    "Runs",
    "Statistics",
    "block_counts",
    "block_means",
    "block_spreads",
    "block_statistics",
    "pyramid_counts",
    "pyramid_means",
    "pyramid_similarity",
]
