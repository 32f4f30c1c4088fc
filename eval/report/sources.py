"""What a report is made from: the JSON records of renders and measurements in some files and folders."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...guard import KINDS, Guard
from ...quant import Quant, quant_name

SCHEMA = 1
RENDER, SHAPES = "render", "shapes"
_TYPES = {".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png"}


@dataclass(frozen=True)
class Source:
    """One JSON document. ``kind``: ``"render"``, ``"shapes"`` or what the document says it is."""

    path: Path
    kind: str
    data: dict[str, Any]


@dataclass
class Gathered:
    """All documents found, in order of their paths. ``skipped``: JSON files that are none of ours, with the reason."""

    sources: list[Source] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Source]:
        return [source for source in self.sources if source.kind in kinds]


def gather(paths: Iterable[str | Path]) -> Gathered:
    """Read every JSON file named or below the folders named. Raises ``UsageError`` where nothing of ours is found."""
    found, files = Gathered(), []
    paths = [Path(p) for p in paths]
    for path in paths:
        if path.is_dir():
            files += sorted(path.rglob("*.json"))
        elif path.is_file():
            files.append(path)
        else:
            raise UsageError(f"there is nothing at {path}; give a folder of renders or a JSON file of a measurement")
    for path in dict.fromkeys(files):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            found.skipped.append((path, f"not readable: {error}"))
            continue
        kind = _kind(data)
        if kind is None:
            found.skipped.append((path, "no record of this tool, or of another schema"))
        else:
            found.sources.append(Source(path, kind, data))
    if not found.sources:
        told = ", ".join(map(str, paths[:4])) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
        seen = "".join(f"; {path} is {why}" for path, why in found.skipped[:3])
        raise UsageError(
            f"no record of a render or measurement in {told}{seen}; render --compare and eval -o write them"
        )
    return found


def _kind(data: Any) -> str | None:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        return None
    if isinstance(data.get("kind"), str):
        return data["kind"]
    if "settings" in data and "files" in data and "seconds" in data:
        return RENDER
    return SHAPES if {"summary", "rows", "settings"} <= data.keys() else None


@dataclass(frozen=True)
class Media:
    """A video or image to show. ``address``: a data address, or a relative path where it was too large to carry."""

    address: str
    image: bool
    embedded: bool


class Shelf:
    """Embeds media up to a total size; what does not fit is linked relative to ``page``."""

    def __init__(self, limit: int, page: Path):
        self._left, self._page = limit, page
        self.linked: list[Path] = []

    def take(self, path: Path) -> Media | None:
        """The media at ``path``, or None where there is none of a known type."""
        kind = _TYPES.get(path.suffix.lower())
        if kind is None or not path.is_file():
            return None
        size = path.stat().st_size
        if size <= self._left:
            self._left -= size
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            return Media(f"data:{kind};base64,{data}", kind.startswith("image"), True)
        self.linked.append(path)
        return Media(_relative(path, self._page), kind.startswith("image"), False)


def _relative(path: Path, page: Path) -> str:
    import os
    from urllib.parse import quote

    return quote(os.path.relpath(path.resolve(), page.resolve().parent).replace(os.sep, "/"))


def render_command(settings: dict[str, Any], compare: bool, *, repeats: int = 1, compiled: bool = False) -> str:
    """A command that renders the same again; its prompt file holds the one prompt.

    An image is named by the digest that the record holds of it. ``repeats``: timed runs per side of a comparison.
    """
    prompt = {"prompt": settings["prompt"], "seed": settings["seed"]}
    if settings.get("negative_prompt") is not None:
        prompt["negative"] = settings["negative_prompt"]
    if settings.get("image"):
        prompt["image"] = f"{settings['image']}.png"
    words = ["dit-accel", "render", "prompt.jsonl"]
    if settings.get("model") not in (None, "bundled"):
        words += ["--model", str(settings["model"])]
    if settings.get("width"):
        words += ["--size", f"{settings['width']}x{settings['height']}"]
    words += ["--frames", str(settings["frames"]), "--steps", str(settings["steps"])]
    if settings.get("guidance_scale") is not None:
        words += ["--guidance", str(settings["guidance_scale"])]
    words += _attention(settings.get("attention")) + _loading(settings) + (["--compile"] if compiled else [])
    if compare:
        words += ["--compare"] + (["--repeats", str(repeats)] if repeats > 1 else [])
    return f"echo {shlex.quote(json.dumps(prompt, ensure_ascii=False))} > prompt.jsonl && {shlex.join(words)}"


def _loading(settings: dict[str, Any]) -> list[str]:
    """Flags of how the model was loaded and its file written, as far as they show in the pixels or the file."""
    words = ["--dtype", settings["dtype"]] if settings.get("dtype") else []
    words += [word for text, _ in settings.get("lora", []) for word in ("--lora", text)]
    for name in ("cache", "quantize"):
        words += [f"--{name}", settings[name]] if settings.get(name) else []
    words += ["--vae-tiling"] if settings.get("vae_tiling") else []
    if settings["frames"] > 1 and settings.get("fps"):
        words += ["--fps", str(settings["fps"])]
    return words + (["--gif"] if settings.get("gif") else [])


def _attention(attention: dict[str, Any] | None) -> list[str]:
    if attention is None:
        return ["--method", "dense"]
    own = {key: value for key, value in (attention["method"] or {"method": "dense"}).items() if value is not None}
    words = ["--method", own.pop("method")]
    for key, value in own.items():
        words += ["--param", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    quant = attention.get("quant")
    if quant:
        words += ["--quant", quant if isinstance(quant, str) else quant_name(Quant(**quant))]
    schedule = attention.get("schedule", {})
    words += ["--dense-steps", str(schedule.get("first", 0))]
    layers = schedule.get("layers")
    if layers:
        words += ["--dense-layers", str(layers) if isinstance(layers, int) else ",".join(map(str, layers)) + ","]
    words += _guard(attention.get("guard") or {})
    return words if attention.get("backend", "auto") == "auto" else [*words, "--backend", attention["backend"]]


def _guard(guard: dict[str, Any]) -> list[str]:
    """Flags of a guard that is not the default one. A budget by layer has none; the record holds it."""
    words, default = [], Guard()
    checks = [kind for kind in KINDS if guard.get(kind, getattr(default, kind))]
    if checks != [kind for kind in KINDS if getattr(default, kind)]:
        words += ["--guard", ",".join(checks) or "off"]
    if isinstance(guard.get("budget"), (int, float)):
        words += ["--drift-budget", str(guard["budget"])]
    if guard.get("rate", default.rate) != default.rate:
        words += ["--guard-rate", str(guard["rate"])]
    return words
