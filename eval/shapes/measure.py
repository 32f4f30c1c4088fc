"""What a video shows, by classical vision: objects with colour, place, area and shape per frame, and the background."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dit_accel.errors import UnsupportedError
from dit_accel.pipelines.mini import world
from dit_accel.pipelines.mini.world import COLORS, PATTERNS, RADIUS, SHAPES, TONES, Scene, draw

#: Least difference between a pixel's largest and smallest channel (0..255) inside an object; no background exceeds 70.
CHROMA = 95
#: Smallest object in pixels, and smallest share of the largest object's area that still counts as an object.
MIN_AREA, MIN_SHARE = 24, 0.25


def need_opencv():
    """The cv2 module. Raises ``UnsupportedError`` that says what to install."""
    try:
        import cv2
    except ImportError as error:
        message = f'grading videos needs OpenCV ({error}); install it with: pip install "dit-accel[eval]"'
        raise UnsupportedError(message) from error
    return cv2


@dataclass(frozen=True)
class Blob:
    """One object in one frame: ``x``, ``y``, ``area`` in pixels, the nearest palette ``color``, its bool mask (H,
    W)."""

    x: float
    y: float
    area: float
    color: str
    mask: np.ndarray


def nearest_color(rgb: np.ndarray) -> str:
    """The palette entry nearest to ``rgb`` (3,) in 0..255."""
    names = tuple(COLORS)
    table = np.array([COLORS[n] for n in names], float)
    return names[int(np.square(table - rgb).sum(1).argmin())]


def find_blobs(frame: np.ndarray) -> list[Blob]:
    """Objects of ``frame``, uint8 (H, W, 3), largest first."""
    cv2 = need_opencv()
    pixels = frame.astype(np.int16)
    mask = (pixels.max(2) - pixels.min(2) > CHROMA).astype(np.uint8)
    number, labels, stats, centers = cv2.connectedComponentsWithStats(mask, connectivity=8)
    blobs = []
    for i in range(1, number):
        area = float(stats[i, cv2.CC_STAT_AREA])
        if area < MIN_AREA:
            continue
        inside = labels == i
        # A blended rim can look like another palette colour; the core of the object cannot.
        core = cv2.erode(inside.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
        color = nearest_color(np.median(frame[core if core.sum() >= 6 else inside], axis=0))
        blobs.append(Blob(float(centers[i, 0]) + 0.5, float(centers[i, 1]) + 0.5, area, color, inside))
    blobs.sort(key=lambda b: -b.area)
    return [b for b in blobs if b.area >= MIN_SHARE * blobs[0].area] if blobs else []


@lru_cache(maxsize=4096)
def _template(shape: str, radius: float, turn: float, size: int) -> np.ndarray:
    """Mask (size, size) of ``shape`` around the middle, ``turn`` in radians."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) + 0.5 - size / 2
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    return world.shape_distance(shape, x * cos + y * sin, y * cos - x * sin, np.float32(radius)) < 0


@lru_cache(maxsize=64)
def _unit_area(shape: str) -> tuple[float, float, float]:
    """Area of ``shape`` per squared radius, and its centroid's offset from the centre per radius."""
    mask = _template(shape, 80.0, 0.0, 200)
    y, x = np.nonzero(mask)
    return mask.sum() / 6400.0, (x.mean() + 0.5 - 100) / 80, (y.mean() + 0.5 - 100) / 80


def radius_of(shape: str, area: float) -> float:
    """Radius in pixels that a ``shape`` of ``area`` pixels was drawn with."""
    return float(np.sqrt(area / _unit_area(shape)[0]))


def shape_scores(blob: Blob, turns: int = 1) -> dict[str, float]:
    """Overlap (intersection over union) of ``blob`` with every shape of its area, over ``turns`` orientations."""
    size = 64
    ys, xs = np.nonzero(blob.mask)
    scores = {}
    for shape in SHAPES:
        radius = round(radius_of(shape, blob.area), 1)
        _, ox, oy = _unit_area(shape)
        best = 0.0
        for turn in np.arange(turns) * (2 * np.pi / turns):
            cos, sin = np.cos(turn), np.sin(turn)
            cx = blob.x - radius * (ox * cos - oy * sin)
            cy = blob.y - radius * (ox * sin + oy * cos)
            px, py = np.floor(xs + 0.5 - cx + size / 2).astype(int), np.floor(ys + 0.5 - cy + size / 2).astype(int)
            template = _template(shape, radius, float(turn), size)
            keep = (px >= 0) & (px < size) & (py >= 0) & (py < size)
            both = template[py[keep], px[keep]].sum()
            best = max(best, both / (template.sum() + len(xs) - both))
        scores[shape] = float(best)
    return scores


@dataclass(frozen=True)
class Observation:
    """All frames of a video: blobs per frame and the video itself, uint8 (T, H, W, 3)."""

    video: np.ndarray
    blobs: list[list[Blob]]

    @property
    def present(self) -> np.ndarray:
        """Whether a frame shows any object, bool (T,)."""
        return np.array([bool(b) for b in self.blobs])

    def center(self) -> np.ndarray:
        """Mean centre of the objects per frame, (T, 2) in pixels; frames without objects hold NaN."""
        rows = [np.mean([(b.x, b.y) for b in blobs], 0) if blobs else (np.nan, np.nan) for blobs in self.blobs]
        return np.array(rows, float)

    def count(self) -> np.ndarray:
        """Number of objects per frame, (T,)."""
        return np.array([len(b) for b in self.blobs])


def observe(video: np.ndarray) -> Observation:
    """Measures ``video``, uint8 (T, H, W, 3)."""
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"the video is {video.dtype} {video.shape}; expected uint8 (frames, height, width, 3)")
    return Observation(video, [find_blobs(frame) for frame in video])


@lru_cache(maxsize=4)
def _backdrops(frames: tuple[float, ...], height: int, width: int) -> list[tuple[str, str, bool, np.ndarray]]:
    result = []
    for tone in TONES:
        for pattern in PATTERNS:
            for panning in (False, True) if pattern in ("striped", "checkered") else (False,):
                scene = Scene("red", "circle", tone=tone, pattern=pattern, panning=panning)
                result.append((tone, pattern, panning, world.background(scene, np.array(frames), height, width)))
    return result


def background(seen: Observation, samples: int = 7) -> tuple[str, str, bool, float]:
    """Tone, pattern and panning whose drawing is nearest, and the mean absolute difference to it (0..255)."""
    cv2 = need_opencv()
    total, height, width, _ = seen.video.shape
    index = np.unique(np.linspace(0, total - 1, samples).round().astype(int))
    pixels = seen.video[index].astype(np.float32)
    clear = np.ones(pixels.shape[:3], bool)
    for row, i in enumerate(index):
        for blob in seen.blobs[i]:
            clear[row] &= ~cv2.dilate(blob.mask.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool)
    if not clear.any():
        return "", "", False, 255.0
    times = tuple(float(i) / max(total - 1, 1) for i in index)
    rows = []
    for tone, pattern, panning, backdrop in _backdrops(times, height, width):
        rows.append((float(np.abs(pixels - backdrop)[clear].mean()), tone, pattern, panning))
    error, tone, pattern, panning = min(rows)
    return tone, pattern, panning, error


def size_name(count: int, radius: float) -> str:
    """The size whose radius for ``count`` objects is nearest to ``radius`` pixels."""
    table = RADIUS[min(max(count, 1), 3)]
    return min(table, key=lambda name: abs(table[name] - radius))


def reference(scene: Scene, frames: int) -> Observation:
    """What the world itself shows for ``scene``."""
    return observe(draw(scene, frames))
