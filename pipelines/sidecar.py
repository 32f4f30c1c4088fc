"""The JSON record beside every output: all settings, what attention did, where the time went, versions."""

from __future__ import annotations

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
