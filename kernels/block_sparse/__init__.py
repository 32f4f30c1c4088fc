"""Block-sparse attention: one TilePlan, four tiers (reference, gather, flex, triton)."""

from .api import BACKENDS, block_sparse_attention, choose

__all__ = ["BACKENDS", "block_sparse_attention", "choose"]
