"""What frames show without weights, by OpenCV and arithmetic: motion, persistence of appearance, sharpness, damage.

Clips are uint8 (T, H, W, 3). None of this is a VBench score: :mod:`dit_accel.eval.proxies` names and pairs it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from .shapes.measure import need_opencv

SMALL = 32  # least side that the flow's pyramid works on
EDGE = 8  # pixels cut off a warped frame, whose border is made up


@dataclass(frozen=True)
class DynamicRule:
    """VBench's arithmetic of dynamic degree: every ``interval``-th frame, ``needed`` pairs above ``threshold`` pixels.

    ``sampled``: frames that remain.
    """

    interval: int
    sampled: int
    threshold: float
    needed: int

    @classmethod
    def of(cls, frames: int, fps: float, height: int, width: int) -> DynamicRule:
        interval = max(1, round(fps / 8))
        sampled = len(range(0, frames, interval))
        return cls(interval, sampled, 6.0 * min(height, width) / 256, round(4 * sampled / 16))

    def moves(self, magnitudes: list[float]) -> bool:
        return bool(magnitudes) and sum(m > self.threshold for m in magnitudes) >= self.needed


def flow(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 (H, W, 2): where pixels of ``a`` lie in ``b``, x first, by DIS (Kroeger 2016), preset medium."""
    cv2 = need_opencv()
    gray = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in (a, b)]
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*gray, None)


def warp(image: np.ndarray, by: np.ndarray) -> np.ndarray:
    """``image`` read at x + ``by``, bilinear, the border repeated."""
    cv2 = need_opencv()
    height, width = by.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(image, x + by[..., 0], y + by[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def smoothness(frames: np.ndarray) -> float:
    """1 - MAE / 255 of each frame against the middle of its neighbours, each carried half way along the flow."""
    errors = []
    for before, middle, after in zip(frames, frames[1:], frames[2:], strict=False):
        halves = [warp(x, -0.5 * flow(x, y)).astype(np.float32) for x, y in ((before, after), (after, before))]
        inside = np.s_[EDGE:-EDGE, EDGE:-EDGE] if min(middle.shape[:2]) > 4 * EDGE else np.s_[:, :]
        errors.append(np.abs((halves[0] + halves[1]) / 2 - middle)[inside].mean())
    return float(1 - np.mean(errors) / 255)


def motion(frames: np.ndarray, fps: float) -> tuple[float, float, float]:
    """Mean largest motion in units of min(H, W) / 256, 1.0 where the clip moves by VBench's rule, flow consistency.

    Per pair the mean of the top 5 % magnitudes; consistency is the share of pixels that come back within a pixel.
    """
    height, width = frames.shape[1:3]
    rule = DynamicRule.of(len(frames), fps, height, width)
    largest, consistent = [], []
    for a, b in itertools.pairwise(frames[:: rule.interval]):
        there, back = flow(a, b), flow(b, a)
        size = np.sort(np.hypot(there[..., 0], there[..., 1]).ravel())[::-1]
        largest.append(float(size[: max(1, int(height * width * 0.05))].mean()))
        away = there + warp(back, there)
        consistent.append(float((np.hypot(away[..., 0], away[..., 1]) < 1).mean()))
    return (
        float(np.mean(largest)) / (min(height, width) / 256),
        float(rule.moves(largest)),
        float(np.mean(consistent)),
    )


def persistence(frames: np.ndarray, where: str) -> float:
    """Mean over frames of the likeness to the one before and to the first, as VBench averages its consistencies.

    ``where``: ``"center"``, gradient orientations and Lab colours around the middle, or ``"global"``, the coarse
    layout and the colours of the border.
    """
    describe = {"center": _center, "global": _global}[where]
    known = [describe(frame) for frame in frames]
    pairs = [(max(0.0, a @ b) + max(0.0, known[0] @ b)) / 2 for a, b in itertools.pairwise(known)]
    return float(np.mean(pairs))


def _center(frame: np.ndarray) -> np.ndarray:
    cv2 = need_opencv()
    side = min(frame.shape[:2])
    top, left = ((n - side) // 2 for n in frame.shape[:2])
    crop = cv2.resize(frame[top : top + side, left : left + side], (224, 224), interpolation=cv2.INTER_AREA)
    gray = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY).astype(np.float32)
    gx, gy = cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1)
    bins = np.minimum((np.arctan2(gy, gx) % np.pi) / np.pi * 9, 8).astype(int)
    window = cv2.getGaussianKernel(224, 56)
    weight = window @ window.T
    cell = np.arange(224) // 28
    index = (cell[:, None] * 8 + cell[None]) * 9 + bins
    gradients = np.bincount(index.ravel(), (np.hypot(gx, gy) * weight).ravel(), 8 * 8 * 9)
    return _joined(gradients, _colors(crop, weight))


def _global(frame: np.ndarray) -> np.ndarray:
    cv2 = need_opencv()
    lab = cv2.cvtColor(cv2.resize(frame, (32, 32), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2LAB)
    coarse = [cv2.dct(lab[..., c].astype(np.float32))[:8, :8].ravel() for c in range(3)]
    window = cv2.getGaussianKernel(32, 8)
    inner = window @ window.T
    return _joined(np.concatenate(coarse), _colors(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), inner.max() - inner))


def _colors(frame: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted 8 x 8 x 8 histogram in Lab."""
    cv2 = need_opencv()
    parts = cv2.cvtColor(frame, cv2.COLOR_RGB2LAB).astype(int) // 32
    index = (parts[..., 0] * 8 + parts[..., 1]) * 8 + parts[..., 2]
    return np.bincount(index.ravel(), weight.ravel(), 512)


def _joined(*parts: np.ndarray) -> np.ndarray:
    """Parts of equal weight, each around its mean: histograms have no negative entry, so all would be alike."""
    centred = [part - part.mean() for part in parts]
    joined = np.concatenate([part / (np.linalg.norm(part) or 1) for part in centred])
    return joined / (np.linalg.norm(joined) or 1)


def image_figures(frames: np.ndarray) -> dict[str, float]:
    """Means over frames of what one picture shows: sharpness, noise, blocks of 8 and 16, clipping, dead frames."""
    cv2 = need_opencv()
    rows = []
    for frame in frames:
        luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float64)
        # Immerkaer (1996): a mask that cancels every plane leaves the noise.
        noise = cv2.filter2D(luma, -1, np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float64))[1:-1, 1:-1]
        rows.append({
            "sharpness": float(cv2.Laplacian(luma, cv2.CV_64F).var()),
            "gradient_energy": float(sum((np.diff(luma, axis=axis) ** 2).mean() for axis in (0, 1))),
            "noise_sigma": float(np.sqrt(np.pi / 2) / 6 * np.abs(noise).mean()),
            "blockiness_8": _blockiness(luma, 8),
            "blockiness_16": _blockiness(luma, 16),
            "clip_fraction": float(((frame == 0) | (frame == 255)).mean()),
            "dead_frames": float(frame.min() == frame.max()),
        })  # fmt: skip
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _blockiness(luma: np.ndarray, period: int) -> float:
    """Mean step across the lines of a grid over the mean step elsewhere; 1 where no grid shows."""
    at, elsewhere = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(luma, axis=axis))
        line = (np.arange(steps.shape[axis]) + 1) % period == 0
        at.append(steps.compress(line, axis).ravel())
        elsewhere.append(steps.compress(~line, axis).ravel())
    at, elsewhere = np.concatenate(at), np.concatenate(elsewhere)
    return float((at.mean() + 1e-6) / (elsewhere.mean() + 1e-6)) if len(at) else 1.0
