"""The bundled mini text-to-video model: where it lies and how it wants to be called."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any


def path() -> Path:
    """Folder of the bundled pipeline, for ``WanPipeline.from_pretrained``."""
    folder = Path(str(resources.files("dit_accel.assets") / "mini"))
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the bundled model is not at {folder} (no model_index.json). Reinstall dit-accel, or train it with "
            "`python -m dit_accel.pipelines.mini.train --config cpu --out FOLDER --export`"
        )
    return folder


def defaults() -> dict[str, Any]:
    """Default render settings: the arguments of ``WanPipeline.__call__`` and ``fps`` (frames per second of the saved
    clip)."""
    return json.loads((path() / "mini.json").read_text())
