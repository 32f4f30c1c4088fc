"""Proxies: weight-free figures of a clip under names of their own, told as differences to the dense run.

None is a VBench score and none enters a total. Their level depends on what the video shows, so only the difference to
the dense run of the same prompt and seed is read, and an unchanged figure is a lower bound on usefulness: it does not
say that a video is good. ``python -m dit_accel.eval.proxies DENSE FAST`` compares two folders of renders.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..pipelines.video import to_uint8
from . import proxy_frames as see
from .frames import read_clip
from .paired import outputs, summarise

# Name without prefix and version -> what it says.
MEANING = {
    "flow_interp_smoothness": "likeness of a frame to the middle of its neighbours along the flow",
    "flow_magnitude_top5": "largest motion between sampled frames, in units of min(H, W) / 256",
    "dynamic_fraction": "share of clips that move by VBench's rule, with another flow",
    "flow_consistency": "share of pixels whose flow comes back; below one half the flow figures are unreliable",
    "appearance_persistence_center": "likeness of gradients and colours around the middle over time",
    "appearance_persistence_global": "likeness of the coarse layout and the border's colours over time",
    "sharpness": "variance of the Laplacian of luma",
    "gradient_energy": "mean squared step between neighbours in luma",
    "noise_sigma": "standard deviation of noise after Immerkaer, in grey levels",
    "blockiness_8": "steps across an 8 pixel grid over steps elsewhere",
    "blockiness_16": "steps across a 16 pixel grid over steps elsewhere",
    "clip_fraction": "share of channel values at 0 or 255",
    "dead_frames": "share of frames of one colour",
}
NOTE = "no VBench score; only the difference to the dense run counts, and no difference is no proof of quality"
RELIABLE = 0.5
FROZEN = 0.5  # grey levels: largest difference of any two adjacent frames


def name_of(key: str) -> str:
    """``"sharpness"`` -> ``"proxy.sharpness.v1"``."""
    return f"proxy.{key}.v1"


def measure(frames: Any, fps: float = 16) -> dict[str, float | None]:
    """Every proxy of a clip, by full name. ``frames``: uint8, or float in [0, 1], (T, H, W, 3).

    None where the clip is too short or too small to tell. Raises ``UnsupportedError`` without OpenCV.
    """
    frames = np.ascontiguousarray(to_uint8(np.asarray(frames)))
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise UsageError(f"frames must be (T, H, W, 3); got shape {frames.shape}")
    found: dict[str, float | None] = dict.fromkeys(MEANING)
    large = min(frames.shape[1:3]) >= see.SMALL
    if large and len(frames) >= 3:
        found["flow_interp_smoothness"] = see.smoothness(frames)
    if large and see.DynamicRule.of(len(frames), fps, *frames.shape[1:3]).sampled >= 2:
        moved = see.motion(frames, fps)
        found |= zip(("flow_magnitude_top5", "dynamic_fraction", "flow_consistency"), moved, strict=True)
    if len(frames) >= 2:
        found |= {f"appearance_persistence_{where}": see.persistence(frames, where) for where in ("center", "global")}
    found |= see.image_figures(frames)
    return {name_of(key): value for key, value in found.items()}


def sanity(frames: np.ndarray, dense: np.ndarray) -> list[str]:
    """What is plainly wrong with a clip beside its dense run, uint8 both; empty where nothing is."""
    if frames.shape != dense.shape:
        return [f"frames and sizes differ: {frames.shape} and {dense.shape} (T, H, W, 3)"]
    found = []
    dead = [t for t, frame in enumerate(frames) if frame.min() == frame.max()]
    if dead:
        found.append(f"{len(dead)} of {len(frames)} frames are of one colour, the first is {dead[0]}")
    if _frozen(frames) and not _frozen(dense):
        found.append("the video stands still, the dense one does not")
    shift = np.abs(frames.mean((0, 1, 2)) - dense.mean((0, 1, 2))).max()
    if shift > 10:
        found.append(f"the mean colour is {shift:.1f} of 255 off the dense one")
    return found


def _frozen(frames: np.ndarray) -> bool:
    return len(frames) > 1 and np.abs(np.diff(frames.astype(np.int16), axis=0)).max() < FROZEN


def compare_folders(
    dense: str | Path, fast: str | Path, *, dense_frames: str | Path | None = None,
    fast_frames: str | Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Proxies of every clip of ``fast`` beside its dense partner, and their differences, as plain JSON values.

    ``summary``: per proxy the mean difference with its 95 % bootstrap interval over prompts. Raises ``UsageError``
    where nothing pairs.
    """
    left, right = outputs(dense, dense_frames), outputs(fast, fast_frames)
    keys = [key for key in right if key in left]
    if not keys:
        raise UsageError(f"no clip of {fast} has a partner of the same prompt and seed in {dense}")
    rows = []
    for key in keys:
        clips = [read_clip(side[key].frames) for side in (left, right)]
        a, b = (to_uint8(clip.frames) for clip in clips)
        fps = right[key].settings.get("fps") or 16
        one, other = measure(a, fps), measure(b, fps)
        rows.append({
            "prompt": key[0], "seed": key[1], "lossless": all(clip.lossless for clip in clips),
            "dense": one, "fast": other, "sanity": sanity(b, a), "reliable": _reliable(one, other),
            "difference": {name: None if None in (v, other[name]) else other[name] - v for name, v in one.items()},
        })  # fmt: skip
    return {
        "is_vbench": False,
        "note": NOTE,
        "meaning": {name_of(key): text for key, text in MEANING.items()},
        "rows": rows,
        "summary": {name: summarise([r["difference"][name] for r in rows], rows) for name in map(name_of, MEANING)},
    }


def _reliable(*sides: dict[str, float | None]) -> bool:
    shares = [side[name_of("flow_consistency")] for side in sides]
    return all(share is not None and share >= RELIABLE for share in shares)


if __name__ == "__main__":
    from ..cli import main

    sys.exit(main(["eval", "proxies", *sys.argv[1:]]))
