"""Which blocks are taken: the largest of each row, and masks as index lists. Without a transfer to the host."""

from .api import compact, largest

__all__ = ["compact", "largest"]
