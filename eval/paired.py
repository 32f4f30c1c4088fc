"""Fidelity of whole folders: every clip against its dense partner, the same prompt and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..pipelines import sidecar
from .fidelity import PSNR_VARIANT, fidelity, ssim_variant
from .frames import IMAGES, VIDEOS, read_clip
from .intervals import interval
from .lpips import Lpips


@dataclass(frozen=True)
class Output:
    """One clip of a folder. ``key``: what pairs it. ``frames``: where its frames are best read from."""

    key: tuple[str, int]
    frames: Path
    settings: dict[str, Any]


def outputs(folder: str | Path, frames_dir: str | Path | None = None) -> dict[tuple[str, int], Output]:
    """The clips of a folder by (prompt, seed), as the records beside them tell; clips without one by their name.

    ``frames_dir``: a folder with a folder of PNG frames per clip, preferred where it has one. Raises ``UsageError``
    where there is no clip, or two have the same key.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    found: dict[tuple[str, int], Output] = {}
    for file in sorted(p for p in folder.iterdir() if p.suffix in (*VIDEOS, *IMAGES)):
        record = sidecar.read(file.with_suffix(".json"))
        if record is None and (folder / f"{file.name.split('-dense-vs-')[0]}.json").exists():
            continue  # the side-by-side picture of a comparison
        if file.suffix == ".gif" and file.with_suffix(".mp4").exists():
            continue
        settings = record["settings"] if record else {}
        key = (settings["prompt"], settings["seed"]) if record else (file.stem, 0)
        if key in found:
            raise UsageError(f"{file} and {found[key].frames} in {folder} have the same prompt and seed: {key}")
        raw = Path(frames_dir) / file.stem if frames_dir else file
        found[key] = Output(key, raw if raw.exists() else file, settings)
    if not found:
        raise UsageError(f"no clip in {folder}; give the folder that render -o wrote")
    return found


def compare_folders(
    dense: str | Path,
    fast: str | Path,
    *,
    dense_frames: str | Path | None = None,
    fast_frames: str | Path | None = None,
    border: str = "valid",
    lpips: str | None = None,
) -> dict[str, Any]:
    """Rows and their summary, as plain JSON values, for every clip of ``fast`` and its partner in ``dense``.

    Raises ``UsageError`` where nothing pairs and where partners differ in shape; clips without a partner are named.
    ``lpips``: a network's name, or None to leave it out.
    """
    left, right = outputs(dense, dense_frames), outputs(fast, fast_frames)
    keys = [key for key in right if key in left]
    if not keys:
        raise UsageError(f"no clip of {fast} has a partner of the same prompt and seed in {dense}")
    metric = Lpips(lpips) if lpips else None
    rows = []
    for key in keys:
        a, b = read_clip(left[key].frames), read_clip(right[key].frames)
        found = fidelity(a.frames, b.frames, border)
        row = {"prompt": key[0], "seed": key[1], "lossless": a.lossless and b.lossless, **found.to_dict()}
        rows.append(row | ({"lpips": metric.score(a.frames, b.frames)} if metric else {}))
    unpaired = {"dense": [k[0] for k in left if k not in right], "fast": [k[0] for k in right if k not in left]}
    conventions = {"psnr": PSNR_VARIANT, "ssim": ssim_variant(border)}
    names = ("psnr", "psnr_global", "ssim")
    if metric:
        conventions["lpips"], names = metric.variant, (*names, "lpips")
    return {
        "conventions": conventions,
        "rows": rows,
        "unpaired": unpaired,
        "lossless": all(row["lossless"] for row in rows),
        "summary": {name: summarise([r[name] for r in rows], rows, lowest=name != "lpips") for name in names},
    }


def summarise(values: Sequence[float | None], rows: Sequence[dict[str, Any]], lowest: bool = True) -> dict[str, Any]:
    """Mean with its 95 % bootstrap interval over prompts, the worst clip, and how many clips there are.

    Below five prompts the values stand alone, without an interval. ``lowest``: the worst value is the lowest.
    """
    pairs = [(v, row) for v, row in zip(values, rows, strict=True) if v is not None]
    if not pairs:
        return {"mean": None, "clips": 0}
    value, row = (min if lowest else max)(pairs, key=lambda pair: pair[0])
    return {
        **interval([v for v, _ in pairs], [row["prompt"] for _, row in pairs]),
        "clips": len(pairs),
        "worst": {"value": value, "prompt": row["prompt"], "seed": row["seed"]},
    }
