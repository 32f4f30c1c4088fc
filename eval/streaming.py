"""How a long clip holds up, from its frames as they come: colour drift, change, and the objects of the caption."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from ..errors import UnsupportedError


class StreamJudge:
    """Takes uint8 frames (T, H, W, 3) in portions and keeps a few numbers per frame.

    ``prompt``: where it follows the bundled world's grammar, and OpenCV is there, its objects are looked for.
    ``fps``: frames per second of the clip.
    """

    def __init__(self, prompt: str, fps: float = 16):
        self._second = max(round(fps), 1)
        self._first: list[np.ndarray] = []
        self._last: deque[np.ndarray] = deque(maxlen=self._second)
        self._changes: list[float] = []
        self._previous: np.ndarray | None = None
        self._colors = _colors_of(prompt)
        self._shown: list[bool] = []

    def add(self, frames: np.ndarray) -> None:
        """The next frames of the clip."""
        for frame in frames:
            pixels = frame.reshape(-1, 3).astype(np.float64)
            tone = np.concatenate([pixels.mean(0), pixels.std(0)])
            if len(self._first) < self._second:
                self._first.append(tone)
            self._last.append(tone)
            if self._previous is not None:
                self._changes.append(float(np.abs(frame.astype(np.int16) - self._previous).mean()))
            self._previous = frame.astype(np.int16)
            if self._colors:
                from .shapes.measure import find_blobs

                self._shown.append(self._colors <= {blob.color for blob in find_blobs(frame)})

    def verdict(self) -> dict[str, Any]:
        """``drift``: distance of the last second's colours from the first's, mean and standard deviation per channel,
        in grey levels (0 is none). ``dynamic``: mean absolute change from frame to frame, in grey levels.
        ``persistence``: share of frames that show every colour of the caption's objects, ``persistence_late`` of the
        second half alone; None where the caption does not tell or OpenCV is missing.
        """
        half = self._shown[len(self._shown) // 2 :]
        return {
            "drift": float(np.linalg.norm(np.mean(self._last, 0) - np.mean(self._first, 0))),
            "dynamic": float(np.mean(self._changes)) if self._changes else 0.0,
            "persistence": float(np.mean(self._shown)) if self._shown else None,
            "persistence_late": float(np.mean(half)) if half else None,
        }


def _colors_of(prompt: str) -> set[str]:
    """Colours of the caption's objects; empty where they cannot be read or looked for."""
    from dit_accel.pipelines.mini.captions import parse

    from .shapes.measure import need_opencv

    try:
        need_opencv()
        scene = parse(prompt)
    except (ValueError, UnsupportedError):
        return set()
    return {scene.color, *([scene.second[0]] if scene.second else [])}
