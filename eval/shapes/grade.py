"""Grades a video against the facts of its caption: one score in 0..1 per dimension."""

from __future__ import annotations

import numpy as np

from dit_accel.pipelines.mini.captions import parse
from dit_accel.pipelines.mini.world import DIAGONALS, DIRECTION, RELATIONS, Scene

from . import measure
from .measure import Observation, observe

#: What is graded. ``None`` stands for "the caption says nothing about it" (a relation without a second object).
DIMENSIONS = (
    "color",
    "motion",
    "shape",
    "size",
    "count",
    "relation",
    "background",
    "persistence",
    "flicker",
    "smoothness",
)
#: A dimension counts as passed from this score on.
PASS = 0.75
_SECTORS = ("right", "lower right", "down", "lower left", "left", "upper left", "up", "upper right")


def classify_motion(seen: Observation) -> str | None:
    """The motion that ``seen`` shows, one of ``MOTIONS``; None when there are too few frames with objects to tell."""
    path = seen.center()
    times = np.nonzero(~np.isnan(path[:, 0]))[0]
    if len(times) < max(0.5 * len(path), 4):
        return None
    path = path[times]
    edge = max(len(path) // 10, 1)
    scale = min(seen.video.shape[1] / 64, seen.video.shape[2] / 80)
    moved = np.median(path[-edge:], 0) - np.median(path[:edge], 0)
    if _orbits(path, scale):
        return "circling"
    # The centre of a turning triangle's mask swings by up to 8 pixels; the shortest drawn translation is 11.
    if np.hypot(*moved) > 9 * scale:
        # A path that wanders off and comes back is no translation, however far its ends lie apart.
        length = np.abs(np.diff(_smooth(path), axis=0)).sum(0)
        straight = np.hypot(*moved) / max(np.hypot(*length), 1e-6)
        if straight < 0.6:
            return None
        angle = np.degrees(np.arctan2(moved[1], moved[0]))
        return _SECTORS[int(np.round(angle / 45)) % 8]
    areas = np.array([sum(b.area for b in seen.blobs[t]) for t in times])
    growth = np.median(areas[-edge:]) / max(np.median(areas[:edge]), 1)
    if growth > 1.8:
        return "grow"
    if np.ptp(path, axis=0).max() > 12 * scale or growth < 0.5:
        return None
    return "rotate" if _turning(seen, times) else "still"


def _smooth(path: np.ndarray, width: int = 5) -> np.ndarray:
    if len(path) < width:
        return path
    return np.stack([np.convolve(c, np.ones(width) / width, mode="valid") for c in path.T], 1)


def _orbits(path: np.ndarray, scale: float) -> bool:
    """Whether ``path`` (T, 2) runs along a good part of one circle (least-squares fit after Kasa)."""
    path = _smooth(path)
    if len(path) < 6:
        return False
    matrix = np.column_stack([2 * path, np.ones(len(path))])
    solution, *_ = np.linalg.lstsq(matrix, np.square(path).sum(1), rcond=None)
    center = solution[:2]
    radius = np.sqrt(max(solution[2] + np.square(center).sum(), 0.0))
    if not 3.5 * scale < radius < 32 * scale:
        return False
    arms = path - center
    error = np.abs(np.hypot(*arms.T) - radius).mean()
    angle = np.unwrap(np.arctan2(arms[:, 1], arms[:, 0]))
    return bool(error < 0.25 * radius and abs(angle[-1] - angle[0]) > 0.7 * np.pi)


def _turning(seen: Observation, times: np.ndarray) -> bool:
    """Whether the largest object changes its outline over time although it stays in place."""
    first = None
    overlaps = []
    for t in times:
        blob = seen.blobs[t][0]
        patch = _centered(blob)
        if first is None:
            first = patch
        overlaps.append((first & patch).sum() / max((first | patch).sum(), 1))
    return float(np.percentile(overlaps, 10)) < 0.84


def _centered(blob: measure.Blob, half: int = 24) -> np.ndarray:
    ys, xs = np.nonzero(blob.mask)
    patch = np.zeros((2 * half, 2 * half), bool)
    py, px = np.round(ys + 0.5 - blob.y + half).astype(int), np.round(xs + 0.5 - blob.x + half).astype(int)
    keep = (py >= 0) & (py < 2 * half) & (px >= 0) & (px < 2 * half)
    patch[py[keep], px[keep]] = True
    return patch


def _motion(scene: Scene, seen: Observation) -> float:
    found = classify_motion(seen)
    if found == scene.motion:
        return 1.0
    neighbours = {d: d.split(" ") for d in DIAGONALS}
    vertical = {"upper": "up", "lower": "down"}
    if scene.motion in neighbours and found in DIRECTION:
        a, b = neighbours[scene.motion]
        return 0.5 if found in (vertical[a], b) else 0.0
    return 0.0


def _expected_colors(scene: Scene) -> list[str]:
    return [scene.color, scene.second[0]] if scene.second else [scene.color] * scene.count


def _color(scene: Scene, seen: Observation) -> float:
    wanted = set(_expected_colors(scene))
    return float(np.mean([bool(blobs) and {b.color for b in blobs} == wanted for blobs in seen.blobs]))


def _count(scene: Scene, seen: Observation) -> float:
    wanted = sorted(_expected_colors(scene))
    return float(np.mean([sorted(b.color for b in blobs) == wanted for blobs in seen.blobs]))


def _shape(scene: Scene, seen: Observation, samples: int = 9) -> float:
    wanted = {scene.color: scene.shape}
    if scene.second:
        wanted[scene.second[0]] = scene.second[1]
    hits, turns = [], 24 if scene.motion == "rotate" else 1
    for t in np.unique(np.linspace(0, len(seen.blobs) - 1, samples).round().astype(int)):
        blobs = [b for b in seen.blobs[t] if b.color in wanted]
        if not blobs:
            hits.append(0.0)
        for blob in blobs:
            scores = measure.shape_scores(blob, turns)
            hits.append(float(max(scores, key=scores.get) == wanted[blob.color]))
    return float(np.mean(hits))


def _size(scene: Scene, seen: Observation) -> float | None:
    if scene.motion == "grow" or scene.second:
        return None
    hits = []
    for blobs in seen.blobs:
        if not blobs:
            hits.append(0.0)
            continue
        radius = np.mean([measure.radius_of(scene.shape, b.area) for b in blobs])
        hits.append(float(measure.size_name(scene.count, radius) == scene.size))
    return float(np.mean(hits))


def _relation(scene: Scene, seen: Observation) -> float | None:
    if scene.second is None:
        return None
    hits = []
    for blobs in seen.blobs:
        ones = [b for b in blobs if b.color == scene.color]
        others = [b for b in blobs if b.color == scene.second[0]]
        if not ones or not others:
            hits.append(0.0)
            continue
        dx, dy = others[0].x - ones[0].x, others[0].y - ones[0].y
        ahead, aside = (dx, dy) if scene.relation == RELATIONS[0] else (dy, dx)
        hits.append(float(ahead > abs(aside)))
    return float(np.mean(hits))


def _background(scene: Scene, seen: Observation) -> float:
    tone, pattern, panning, error = measure.background(seen)
    if error > 25:
        return 0.0
    return 0.5 * (tone == scene.tone) + 0.5 * (
        tone == scene.tone and (pattern, panning) == (scene.pattern, scene.panning)
    )


def _persistence(scene: Scene, seen: Observation) -> float:
    wanted = set(_expected_colors(scene))
    return float(np.mean([wanted <= {b.color for b in blobs} for blobs in seen.blobs]))


def _flicker(scene: Scene, seen: Observation) -> float:
    """1 for a calm background, 0 from a mean change of 8 grey levels per frame beyond the drawn one's."""
    frames = seen.video.astype(np.int16)
    clear = np.ones(frames.shape[:3], bool)
    cv2 = measure.need_opencv()
    for t, blobs in enumerate(seen.blobs):
        for blob in blobs:
            clear[t] &= ~cv2.dilate(blob.mask.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool)
    both = clear[1:] & clear[:-1]
    if not both.any():
        return 0.0
    change = float(np.abs(np.diff(frames, axis=0)).mean(3)[both].mean())
    return float(np.clip(1 - max(change - (3.0 if scene.panning else 0.0), 0) / 8, 0, 1))


def _smoothness(scene: Scene, seen: Observation) -> float:
    """Share of frames that show the expected colours and in which their centre keeps its velocity within 1.5 pixels."""
    path, wanted = seen.center(), set(_expected_colors(scene))
    bend = np.hypot(*(path[2:] - 2 * path[1:-1] + path[:-2]).T)
    shown = np.array([wanted <= {b.color for b in blobs} for blobs in seen.blobs[1:-1]])
    return float(np.mean((np.nan_to_num(bend, nan=1e9) < 1.5) & shown))


_GRADERS = {
    "color": _color,
    "motion": _motion,
    "shape": _shape,
    "size": _size,
    "count": _count,
    "relation": _relation,
    "background": _background,
    "persistence": _persistence,
    "flicker": _flicker,
    "smoothness": _smoothness,
}


def grade(video: np.ndarray, prompt: str | Scene, dimensions: tuple[str, ...] = DIMENSIONS) -> dict[str, float | None]:
    """Scores of ``video``, uint8 (T, H, W, 3), for a caption of the bundled grammar or its scene; None: not stated."""
    unknown = [d for d in dimensions if d not in _GRADERS]
    if unknown:
        raise ValueError(f"unknown dimension {unknown[0]!r}; choose among {', '.join(DIMENSIONS)}")
    scene = parse(prompt) if isinstance(prompt, str) else prompt
    seen = observe(video)
    return {name: _GRADERS[name](scene, seen) for name in dimensions}
