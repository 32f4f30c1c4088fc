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
        self._expected = _objects_of(prompt)
        self._whole: list[bool] = []
        self._right: list[float] = []

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
            if self._expected:
                self._look(frame)

    def verdict(self) -> dict[str, Any]:
        """``drift``: distance of the last second's colours from the first's, mean and standard deviation per channel,
        in grey levels (0 is none). ``dynamic``: mean absolute change from frame to frame, in grey levels.
        ``persistence``: share of frames with as many objects as the caption tells, ``persistence_late`` of the second
        half alone. ``colour``: share of the caption's objects that are there in their colour, over all frames. The last
        three are None where the caption does not tell or OpenCV is missing.
        """
        half = self._whole[len(self._whole) // 2 :]
        return {
            "drift": float(np.linalg.norm(np.mean(self._last, 0) - np.mean(self._first, 0))),
            "dynamic": float(np.mean(self._changes)) if self._changes else 0.0,
            "persistence": float(np.mean(self._whole)) if self._whole else None,
            "persistence_late": float(np.mean(half)) if half else None,
            "colour": float(np.mean(self._right)) if self._right else None,
        }

    def _look(self, frame: np.ndarray) -> None:
        from .shapes.measure import find_blobs

        missing, blobs = list(self._expected), find_blobs(frame)
        self._whole.append(len(blobs) == len(missing))
        for blob in blobs:
            if blob.color in missing:
                missing.remove(blob.color)
        self._right.append(1 - len(missing) / len(self._expected))


def _objects_of(prompt: str) -> list[str]:
    """Colours of the caption's objects, one each; empty where they cannot be read or looked for."""
    from dit_accel.pipelines.mini.captions import parse

    from .shapes.measure import need_opencv

    try:
        need_opencv()
        scene = parse(prompt)
    except (ValueError, UnsupportedError):
        return []
    return [scene.color, scene.second[0]] if scene.second else [scene.color] * scene.count
