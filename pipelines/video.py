"""Write frames as H.264 video, GIF, PNG."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import tempfile
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
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise UsageError(f"H.264 video needs even sides; got {width}x{height} (WxH). Use --frames-dir, or an even size")
    command = [
        _ffmpeg(), "-y", "-v", "error",
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-",
        "-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(CRF), "-movflags", "+faststart",
        "-f", "mp4", str(path),
    ]  # fmt: skip
    with tempfile.TemporaryFile() as log:
        # A session of its own: Ctrl-C must reach this process only, which then ends ffmpeg itself.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, start_new_session=True)
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                for frame in frames:
                    pipe.write(np.ascontiguousarray(to_uint8(frame)))
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if status:
            log.seek(0)
            raise _failure(log.read().decode(errors="replace"), path)


def _ffmpeg() -> str:
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def _failure(log: str, path: Path) -> OSError:
    if os.strerror(errno.ENOSPC) in log:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    last = next((line for line in reversed(log.splitlines()) if line.strip()), "no message")
    return OSError(errno.EIO, f"ffmpeg failed: {last.strip()}", str(path))


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
