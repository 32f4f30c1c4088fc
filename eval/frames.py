"""Read the frames of a clip back from what a render leaves: a folder of PNGs, an array file, or a video file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UsageError

VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".gif")
IMAGES = (".png",)
ARRAYS = (".npz", ".npy")


@dataclass(frozen=True, eq=False)
class Clip:
    """``frames``: uint8 or float in [0, 1], (T, H, W, 3). ``lossless``: no codec lies between them and the model."""

    frames: np.ndarray
    lossless: bool
    source: Path


def read_clip(path: str | Path) -> Clip:
    """The frames at ``path``: a folder of PNGs in order of their names, an ``.npy`` or ``.npz`` array, a PNG, a video.

    Raises ``UsageError`` where there is nothing to read. A video's codec costs fidelity, so ``lossless`` is False.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in IMAGES)
        if not files:
            raise UsageError(f"no PNG frames in {path}; render with --frames-dir writes them")
        return Clip(np.stack([_image(file) for file in files]), True, path)
    if not path.is_file():
        raise UsageError(f"there is no clip at {path}")
    try:
        if path.suffix in IMAGES:
            return Clip(_image(path)[None], True, path)
        if path.suffix in ARRAYS:
            return Clip(_array(path), True, path)
        if path.suffix in VIDEOS:
            return Clip(_video(path), False, path)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"cannot read frames from {path}: {error}") from None
    allowed = ", ".join((*VIDEOS, *IMAGES, *ARRAYS))
    raise UsageError(f"{path.name} is no clip; give a folder of PNGs or a file ending in {allowed}")


def _image(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _array(path: Path) -> np.ndarray:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    if len(loaded.files) != 1:
        raise ValueError(f"it holds the arrays {', '.join(loaded.files)}; one is expected")
    return loaded[loaded.files[0]]


def _video(path: Path) -> np.ndarray:
    import imageio.v3 as imageio

    if path.suffix == ".gif":
        return imageio.imread(path, plugin="pillow")[..., :3]
    try:
        return imageio.imread(path, plugin="FFMPEG")[..., :3]
    except (OSError, ValueError, RuntimeError):
        # What ffmpeg says is a page about its own build.
        size = path.stat().st_size
        raise ValueError(
            f"ffmpeg finds no frame in its {size:,} bytes, so it is damaged or no video; `dit-accel render ... "
            "--resume` renders damaged videos again"
        ) from None
