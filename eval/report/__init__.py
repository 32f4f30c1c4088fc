"""The report: one self-contained, offline HTML page from the JSON records of renders and measurements."""

from __future__ import annotations

from .page import LIMIT, report

__all__ = ["LIMIT", "report"]
