"""Block-sparse attention: one TilePlan, five tiers (reference, gather, flash, flex, triton)."""

from .api import BACKENDS, block_sparse_attention, choose

__all__ = ["BACKENDS", "block_sparse_attention", "choose"]
