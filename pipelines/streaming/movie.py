"""A video file that can be watched while it is being written, and after whatever ends its writing."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np

from ...errors import UsageError
from ..video import CRF, _failure, _ffmpeg, to_uint8


class MovieWriter:
    """Appends frames to an H.264 file of fragments, each playable by itself, one per second of video.

    ``size``: (width, height). The file has its final name from the start. When this process ends in whatever way, the
    encoder finishes the file; when the encoder is killed too, all but the last second is there. Use as a context
    manager. Raises ``UsageError`` for odd sides and ``OSError`` where the file cannot be written.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: float):
        width, height = size
        if height % 2 or width % 2:
            raise UsageError(f"H.264 video needs even sides; got {width}x{height} (WxH)")
        command = [
            _ffmpeg(), "-y", "-v", "error",
            "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-",
            # No look-ahead: frames are in the file as soon as their second is over.
            "-an", "-c:v", "libx264", "-tune", "zerolatency", "-g", str(max(round(fps), 1)), "-pix_fmt", "yuv420p",
            "-crf", str(CRF), "-movflags", "+frag_keyframe+empty_moov+default_base_moof", "-flush_packets", "1",
            "-f", "mp4", str(path),
        ]  # fmt: skip
        self.path, self.frames = path, 0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed with the encoder
        # A session of its own: Ctrl-C must reach this process only, which then ends the file properly.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=self._log, start_new_session=True)

    def write(self, frames: np.ndarray) -> None:
        """Append (T, H, W, 3) frames, uint8 or float in [0, 1]."""
        try:
            self.process.stdin.write(np.ascontiguousarray(to_uint8(frames)))
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            self.process.wait()
            raise self._failed() from error
        self.frames += len(frames)

    def close(self) -> None:
        """End the file. Raises ``OSError`` where it could not be written whole."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        status = self.process.wait()
        if self._log.closed:
            return
        try:
            if status:
                raise self._failed()
        finally:
            self._log.close()

    def __enter__(self) -> MovieWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(OSError):
                self.close()

    def _failed(self) -> OSError:
        self._log.seek(0)
        return _failure(self._log.read().decode(errors="replace"), self.path)
