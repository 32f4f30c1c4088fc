"""Presets: a tuned configuration in a file, with what it was tuned for and what was measured.

    pipe.set_attn_processor(load_preset("preset.json"))

A preset is JSON. Calibrated plans that its method or its quantisation names lie beside it and are copied with it: they
are named by file, and the recorded digest refuses another.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UsageError
from .processors import Processor

SCHEMA, KIND = 1, "preset"
_PARTS = ("method", "quant")
_FILE = "plan_file"


@dataclass(frozen=True)
class Preset:
    """``processor``: what runs. ``made_for``: ``model``, ``weights``, ``width``, ``height``, ``frames``, ``steps`` it
    was tuned for. ``provenance``: budget, measured figures, prompts, seeds, environment and command; plain JSON values.
    """

    processor: Processor
    made_for: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def differences(self, here: dict[str, Any]) -> list[str]:
        """Where a run differs from what the preset was tuned for: ``"30 steps there and 20 here"``. What one of both
        does not tell is left out."""
        pairs = {key: (self.made_for[key], here[key]) for key in self.made_for.keys() & here.keys()}
        other = {key: pair for key, pair in sorted(pairs.items()) if None not in pair and pair[0] != pair[1]}
        return [f"{key} {there} there and {now} here" for key, (there, now) in other.items()]


def load_preset(path: str | Path) -> Processor:
    """The processor of a preset, for ``set_attn_processor``. Raises ``UsageError`` as :func:`read_preset`."""
    return read_preset(path).processor


def read_preset(path: str | Path) -> Preset:
    """A preset with its provenance. Raises ``UsageError`` where the file is missing, damaged, of another version, or
    names a plan that is not there or is another one."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f'no preset at {path}; make one with `dit-accel tune --budget "psnr>=28" -o {path}`') from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no readable preset: {error}; copy it again, or tune again") from None
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise UsageError(f"{path} is JSON but no preset of `dit-accel tune`; give the file that its -o wrote")
    if document.get("schema") != SCHEMA:
        raise UsageError(
            f"{path} is version {document.get('schema')} of the preset format and this library reads version {SCHEMA}; "
            "tune again"
        )
    try:
        data = document["processor"]
        for part, name in _files(data):
            data[part] = {**data[part], _FILE: str(path.parent / name)}
        processor = Processor.from_dict(data)
    except UsageError as error:
        raise UsageError(f"{path} is damaged, or what it names is not there: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is damaged: its processor cannot be made ({type(error).__name__}: {error}); copy it again, or "
            "tune again"
        ) from None
    return Preset(processor, document.get("made_for", {}), document.get("provenance", {}))


def write_preset(path: str | Path, preset: Preset) -> list[Path]:
    """Write a preset and copies of the plans it names beside it; returns all files. The preset itself is written last
    and whole or not at all. Raises ``UsageError`` where it cannot be written."""
    path = Path(path)
    data, written = preset.processor.to_dict(), []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for part, name in _files(data):
            copy = path.with_name(f"{path.stem}.{part}{Path(name).suffix}")
            if not (copy.exists() and copy.samefile(name)):
                shutil.copyfile(name, copy)
            data[part] = {**data[part], _FILE: copy.name}
            written.append(copy)
        document = {
            "schema": SCHEMA,
            "kind": KIND,
            "processor": data,
            "made_for": preset.made_for,
            "provenance": preset.provenance,
        }
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"cannot write the preset {path}: {error.strerror or error}; give another -o") from None
    return [*written, path]


def _files(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The parts of a processor's record that name a plan file, and the file."""
    for part in _PARTS:
        value = data.get(part)
        if isinstance(value, dict) and value.get(_FILE):
            yield part, value[_FILE]
