"""Families: one declarative row per transformer architecture. The only place that knows how models differ.

``row.py`` is the vocabulary, ``registry.py`` finds the row of a model, ``video.py`` and ``image.py`` hold the rows.
"""

from .registry import ENTRY_POINTS, family_of, is_known, known_families, register_family
from .row import Family

__all__ = ["ENTRY_POINTS", "Family", "family_of", "is_known", "known_families", "register_family"]
