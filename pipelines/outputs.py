"""Files that appear whole or not at all: written beside the target as ``.partial``, renamed together at the end."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DitAccelError, UsageError


class Outputs:
    """The files of one shot. Use as a context manager: leaving it by an exception removes everything unfinished.

    :meth:`add` gives the name to write to; :meth:`commit` renames all of them to their final names, in the order
    added. Final names may be folders.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Path, Path]] = []

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *exc: object) -> None:
        for partial, _ in self._pending:
            remove(partial)
        self._pending.clear()

    def add(self, final: Path) -> Path:
        """The partial name for ``final``, in the same folder so that renaming cannot cross file systems."""
        partial = final.with_name(final.name + ".partial")
        remove(partial)
        self._pending.append((partial, final))
        return partial

    def commit(self) -> list[Path]:
        """Rename everything. On failure what stood under the final names stands there again, and nothing else does.

        What is replaced is kept as ``.old.partial`` until all new files are in place.
        """
        done: list[Path] = []
        kept: list[tuple[Path, Path]] = []
        try:
            for partial, final in self._pending:
                if final.exists():
                    old = final.with_name(final.name + ".old.partial")
                    remove(old)
                    kept.append((old, final))
                    os.replace(final, old)
                done.append(final)
                os.replace(partial, final)
        except BaseException:
            replaced = {final: old for old, final in kept if old.exists()}
            stood = {final for _, final in kept}
            for final in done:
                if final not in stood:
                    remove(final)
            for final, old in replaced.items():
                remove(final)
                os.replace(old, final)
            raise
        self._pending.clear()
        for old, _ in kept:
            remove(old)
        return done


def remove(path: Path) -> None:
    """Delete a file or folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a file to a free name that ends in ``.damaged``; returns it."""
    aside, number = path.with_name(path.name + ".damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    return path.rename(aside)


def prepare_folder(path: Path, flag: str = "-o") -> Path:
    """Create ``path`` and prove that it can be written to. Raises ``UsageError`` otherwise."""
    probe = path / ".dit-accel.partial"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"{flag} {path} cannot be written to ({error.strerror or error}); give a folder that can"
        ) from None
    return path


@contextlib.contextmanager
def claim(path: Path) -> Iterator[None]:
    """Keep other runs from making the same output at the same time. Raises ``DitAccelError`` where one does.

    A lock of the operating system, so that none outlives its run; where there are none, this does nothing.
    """
    lock = path.with_name(f".{path.name}.lock")
    file = _locked(lock)
    if file is None:
        yield
        return
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


def _locked(lock: Path) -> int | None:
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        file = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that had it may have removed it in between, and then it keeps nobody out.
            if lock.exists() and os.path.samestat(os.fstat(file), lock.stat()):
                return file
        except BlockingIOError:
            os.close(file)
            raise DitAccelError(
                f"another run is making {lock.name[1:-5]} in {lock.parent}; nothing of it was touched. Give another "
                "-o, or run again with --resume when that run has ended"
            ) from None
        except OSError:
            lock.unlink(missing_ok=True)
            os.close(file)
            return None
        os.close(file)


def check_file(path: str | Path, flag: str = "-o") -> None:
    """Prove that a file can be written at ``path``, before the work whose result it is for. Leaves nothing behind.

    Folders on the way may be missing; that they can be made is proven by the first one that is there. Raises
    ``UsageError``.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; give the name of a file")
    folder = next(p for p in (path.parent, *path.parent.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=path.name[:40], suffix=".partial"):
            pass
    except OSError as error:
        raise UsageError(
            f"{flag} {path} cannot be written: {error.strerror or error}; give a file in a folder that can be written"
        ) from None


def write_json(path: Path, document: Any, indent: int | None = 1) -> None:
    """Write a document, whole or not at all, making the folders on the way. Raises ``DitAccelError``."""
    part = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(document, indent=indent) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise explain(error, path) from error


def read_json(path: Path) -> dict[str, Any]:
    """The document of a file that a measurement goes on with. Raises ``UsageError`` where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read as the JSON of a measurement ({error}); give another file or remove it"
        ) from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no measurement but a {type(found).__name__}; give another file or remove it")
    return found


def explain(error: OSError, path: Path) -> DitAccelError:
    """What to tell about a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        folder = next(p for p in (path.parent, *path.parent.parents) if p.exists())
        free = shutil.disk_usage(folder).free / 2**20
        return DitAccelError(
            f"the disk is full while writing {path.name}: {free:.0f} MiB free in {folder}; nothing was left under a "
            "final name. Free some space, or give another folder with -o, and run again with --resume"
        )
    return DitAccelError(f"{path} could not be written: {error.strerror or error}")
