"""Statistics of blocks of tokens: what stands for many tokens where one is looked at."""

from .blocks import Statistics, block_counts, block_means, block_spreads, block_statistics

__all__ = ["Statistics", "block_counts", "block_means", "block_spreads", "block_statistics"]
