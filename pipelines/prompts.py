"""Prompt files: one prompt per line, or JSONL with settings of its own per prompt."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError


@dataclass(frozen=True)
class Prompt:
    """One prompt and the settings that its line fixed; ``None`` takes the job's own. ``line`` is 1-based."""

    text: str
    line: int = 1
    negative: str | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    image: str | None = None


def parse_size(text: str) -> tuple[int, int]:
    """``"WxH"`` in pixels as (width, height)."""
    match = re.fullmatch(r"\s*(\d+)\s*[xX×*]\s*(\d+)\s*", str(text))
    if not match or min(int(n) for n in match.groups()) < 1:
        raise UsageError(f"a size is WIDTHxHEIGHT in pixels, like 832x480; got {text!r}")
    return int(match.group(1)), int(match.group(2))


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a text or JSONL file, in order. Raises ``UsageError`` naming the file and line at fault.

    Text: one prompt per line, ``#`` starts a comment line, blank lines are skipped, a UTF-8 byte order mark is
    tolerated. A line that is a JSON object sets more: ``{"prompt": ..., "seed": 7, "size": "832x480", "frames":
    81, "negative": ..., "steps": 30, "guidance": 5.0, "image": "first.png"}``; lines of both kinds may mix.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"no prompt file at {path}; write one prompt per line into a text file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"cannot read the prompt file {path}: {error.strerror}") from None
    prompts = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            prompts.append(_from_json(line, number, path) if line.startswith("{") else Prompt(line, number))
    if not prompts:
        raise UsageError(f"no prompts in {path}: every line is blank or a # comment; write one prompt per line")
    return prompts


def slug(text: str, limit: int = 48) -> str:
    """A file-name part for a prompt: lower case, letters and digits of any script, joined by hyphens."""
    plain = unicodedata.normalize("NFKC", text).lower()
    words = re.sub(r"[\W_]+", "-", plain).strip("-")
    short = words[:limit]
    # Byte length, not characters, is what file systems limit.
    while len(short.encode()) > 3 * limit:
        short = short[:-1]
    if len(words) > len(short) and "-" in short and words[len(short)] != "-":
        short = short.rsplit("-", 1)[0]
    return short.strip("-") or "prompt"


_ALIASES = {"negative_prompt": "negative", "num_frames": "frames", "num_inference_steps": "steps"}
_ALIASES |= {"guidance_scale": "guidance"}
_KINDS = {
    "prompt": str, "negative": str, "image": str, "seed": int, "frames": int, "steps": int, "width": int, "height": int,
    "guidance": float, "size": str,
}  # fmt: skip


def _from_json(line: str, number: int, path: Path) -> Prompt:
    where = f"{path}, line {number}"
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} starts like JSON but is not: {error.msg} at column {error.colno}") from None
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = _ALIASES.get(key, key)
        if name not in _KINDS:
            raise UsageError(f"{where}: unknown key {key!r}; allowed: {', '.join(_KINDS)}")
        values[name] = _typed(value, _KINDS[name], f"{where}: {key}")
    text = values.pop("prompt", "").strip()
    if not text:
        raise UsageError(f'{where}: a JSON line needs a "prompt" that is not empty')
    if ("width" in values) != ("height" in values):
        raise UsageError(f'{where}: give "width" and "height" together, or "size": "832x480"')
    if "size" in values:
        values["size"] = parse_size(values["size"])
    if "width" in values:
        values["size"] = (values.pop("width"), values.pop("height"))
    return Prompt(text, number, **values)


def _typed(value: Any, kind: type, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is float and not math.isfinite(value)):
        raise UsageError(f"{where} must be {'text' if kind is str else kind.__name__}; got {json.dumps(value)}")
    return value
