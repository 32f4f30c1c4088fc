"""The shape suite: videos of the bundled model graded exactly, because every caption is a list of facts.

Needs OpenCV (``pip install "dit-accel[eval]"``) when it grades; importing it does not.
"""

from __future__ import annotations

from .grade import DIMENSIONS, PASS, classify_motion, grade
from .measure import Observation, observe

__all__ = ["DIMENSIONS", "PASS", "Observation", "classify_motion", "grade", "observe"]
