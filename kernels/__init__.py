"""The arithmetic: block-sparse attention and what it is made of. Knows tensors, not models or methods."""

from .blocklist import BlockList
from .predicate import Band, Box, Disc, Gate, Predicate
from .representatives import Group
from .tileplan import TilePlan

__all__ = ["Band", "BlockList", "Box", "Disc", "Gate", "Group", "Predicate", "TilePlan"]
