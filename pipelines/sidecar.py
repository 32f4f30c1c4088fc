"""The JSON record beside every output: all settings, what attention did, where the time went, versions."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__

SCHEMA = 1


def sidecar_path(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.json"


def write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any] | None:
    """The record at ``path``; None when there is none or it is not one of ours."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("schema") == SCHEMA else None


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """``"steps: 20 -> 30"`` for every setting that differs between two settings records."""
    new = json.loads(json.dumps(new))
    flat_old, flat_new = _flat(old), _flat(new)
    keys = [*flat_new, *(key for key in flat_old if key not in flat_new)]
    return [
        f"{key}: {json.dumps(flat_old.get(key))} -> {json.dumps(flat_new.get(key))}"
        for key in keys
        if flat_old.get(key) != flat_new.get(key)
    ]


def content(path: Path) -> dict[str, Any]:
    """``bytes`` and ``sha256`` (first 16 digits) of a file."""
    found, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
            size += len(part)
    return {"bytes": size, "sha256": found.hexdigest()[:16]}


def damaged(record: dict[str, Any], folder: Path) -> dict[str, str]:
    """Files of a record that are there and are no longer what was written, and how that shows.

    Files that are gone are not among them, nor are those of records that do not tell what was written.
    """
    found = {}
    for name, written in record.get("contents", {}).items():
        path = folder / name
        if not path.is_file():
            continue
        size = path.stat().st_size
        if size != written["bytes"]:
            found[name] = f"it has {size:,} bytes and was written with {written['bytes']:,}"
        elif content(path) != written:
            found[name] = f"its {size:,} bytes are not those written"
    return found


def versions() -> dict[str, str]:
    """Versions of what made the output."""
    found = {"dit_accel": __version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "numpy", "imageio-ffmpeg"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat
