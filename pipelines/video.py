"""Write frames as H.264 video, GIF, PNG."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import UsageError

# Visually close to lossless for yuv420p; a comparison's numbers come from the raw frames, never from the file.
CRF = 16


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """uint8 frames from float ones in [0, 1], same shape, rounded to nearest."""
    if frames.dtype == np.uint8:
        return frames
    return (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)


def write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write (T, H, W, 3) frames, uint8 or float in [0, 1], as H.264 yuv420p at their own size.

    Raises ``UsageError`` for odd sides (4:2:0 colour needs even ones; rescaling would be silent) and ``OSError``
    where the file cannot be written whole.
    """
    import imageio_ffmpeg

    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise UsageError(f"H.264 video needs even sides; got {width}x{height} (WxH). Use --frames-dir, or an even size")
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=fps, codec="libx264", quality=None, macro_block_size=1, pix_fmt_in="rgb24",
        ffmpeg_log_level="error", output_params=["-crf", str(CRF), "-movflags", "+faststart", "-f", "mp4"],
    )  # fmt: skip
    try:
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(to_uint8(frame)))
    finally:
        writer.close()
    _check_whole(path, len(frames))


def write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write (T, H, W, 3) frames as an endless GIF. GIF counts in hundredths of a second, so fps is rounded to that."""
    from PIL import Image

    images = [Image.fromarray(to_uint8(f)) for f in frames]
    duration = max(round(100 / fps), 2) * 10
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0)


def write_png(path: Path, frame: np.ndarray) -> None:
    """Write one (H, W, 3) frame, losslessly."""
    from PIL import Image

    Image.fromarray(to_uint8(frame)).save(path, format="PNG")


def write_frames(folder: Path, frames: Iterable[np.ndarray]) -> None:
    """Write each (H, W, 3) frame to ``folder``/00000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames):
        write_png(folder / f"{number:05d}.png", frame)


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(T, H, 2 W, 3) from two (T, H, W, 3)."""
    return np.concatenate([to_uint8(left), to_uint8(right)], axis=2)


def _check_whole(path: Path, frames: int) -> None:
    """ffmpeg's exit status is not passed on, so a file cut short by a full disk must be found by counting."""
    import imageio_ffmpeg

    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)
    try:
        found, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    except Exception as error:
        raise OSError(errno.EIO, f"ffmpeg left no readable video ({type(error).__name__})", str(path)) from None
    if found != frames:
        raise OSError(errno.EIO, f"the video holds {found} of {frames} frames", str(path))
