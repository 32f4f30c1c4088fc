"""VBench 1.0 scores: the official formula, results made elsewhere, names of videos; one dimension computed here.

Huang et al., VBench (CVPR 2024). A total stands for the official package with its weights and for all 16 dimensions;
:func:`totals` refuses anything less, where the published script counts a missing dimension as zero. The one dimension
that needs no weights is computed here under a name of its own.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..checks import plain
from ..errors import UsageError

QUALITY, SEMANTIC = "quality", "semantic"
#: The dimension that this module computes, under its own name: it is no VBench score.
FLICKER = "vbench_formula.temporal_flickering"


@dataclass(frozen=True)
class Dimension:
    """``low``, ``high``: what normalises to 0 and 1. ``prompts``: of the standard suite. ``videos``: per prompt."""

    group: str
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    prompts: int = 0
    videos: int = 5

    @property
    def expected(self) -> int:
        """Videos of the standard suite."""
        return self.prompts * self.videos


# Vchitect/VBench 45e79ec, scripts/constant.py; prompts as counted in VBench_full_info.json.
DIMENSIONS = {
    "subject_consistency": Dimension(QUALITY, 0.1462, 1.0, prompts=72),
    "background_consistency": Dimension(QUALITY, 0.2615, 1.0, prompts=86),
    "temporal_flickering": Dimension(QUALITY, 0.6293, 1.0, prompts=75, videos=25),
    "motion_smoothness": Dimension(QUALITY, 0.706, 0.9975, prompts=72),
    "dynamic_degree": Dimension(QUALITY, weight=0.5, prompts=72),
    "aesthetic_quality": Dimension(QUALITY, prompts=93),
    "imaging_quality": Dimension(QUALITY, prompts=93),
    "object_class": Dimension(SEMANTIC, prompts=79),
    "multiple_objects": Dimension(SEMANTIC, prompts=82),
    "human_action": Dimension(SEMANTIC, prompts=100),
    "color": Dimension(SEMANTIC, prompts=85),
    "spatial_relationship": Dimension(SEMANTIC, prompts=84),
    "scene": Dimension(SEMANTIC, 0.0, 0.8222, prompts=86),
    "appearance_style": Dimension(SEMANTIC, 0.0009, 0.2855, prompts=90),
    "temporal_style": Dimension(SEMANTIC, 0.0, 0.364, prompts=100),
    "overall_consistency": Dimension(SEMANTIC, 0.0, 0.364, prompts=93),
}
# Dimensions scored on the same prompts share them; each group is a suite of its own.
SUITES = (
    ("human_action",), ("temporal_style",), ("overall_consistency", "aesthetic_quality", "imaging_quality"),
    ("appearance_style",), ("scene", "background_consistency"), ("color",), ("spatial_relationship",),
    ("multiple_objects",), ("object_class",), ("temporal_flickering",),
    ("subject_consistency", "motion_smoothness", "dynamic_degree"),
)  # fmt: skip
#: The six dimensions that the package promises for videos of one's own prompts.
CUSTOM = (
    "subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality",
    "imaging_quality",
)  # fmt: skip


def totals(scores: Mapping[str, float]) -> dict[str, float]:
    """``quality``, ``semantic`` and ``total`` of the official leaderboard, from all 16 dimension scores.

    ``scores``: in [0, 1] as the package writes them, keys with underscores or spaces. Nothing is clipped: a total may
    leave [0, 1], as upstream. Raises ``UsageError`` for a missing, unknown or doubled dimension, for percentages, and
    for scores that are not VBench's (``proxy.*``, ``vbench_formula.*``).
    """
    given = _checked(scores)
    missing = [name for name in DIMENSIONS if name not in given]
    if missing:
        raise UsageError(
            f"a VBench total needs all {len(DIMENSIONS)} dimensions; missing: {', '.join(missing)}. Score them, or "
            "quote a mean of what there is under its own name (mean_of)"
        )
    result = {group: _group(given, group) for group in (QUALITY, SEMANTIC)}
    return result | {"total": (4 * result[QUALITY] + result[SEMANTIC]) / 5}


def normalised(name: str, score: float) -> float:
    """``score`` between the dimension's low and high; not clipped."""
    dimension = DIMENSIONS[name]
    return (score - dimension.low) / (dimension.high - dimension.low)


def mean_of(scores: Mapping[str, float]) -> dict[str, Any]:
    """The plain mean of some dimensions, which is no VBench total: ``{"label": "mean of ...", "value": ...}``."""
    given = _checked(scores)
    if not given:
        raise UsageError("nothing to take the mean of: no dimension was given")
    return {"label": f"mean of {', '.join(given)}", "value": sum(given.values()) / len(given)}


def _checked(scores: Mapping[str, float]) -> dict[str, float]:
    given: dict[str, float] = {}
    for key, value in scores.items():
        name = key.strip().replace(" ", "_")
        if "." in name:
            raise UsageError(f"{key!r} is no VBench score and never part of a total; leave it out")
        if name not in DIMENSIONS:
            raise UsageError(f"unknown VBench dimension {key!r}; known: {', '.join(DIMENSIONS)}")
        if name in given:
            raise UsageError(f"dimension {name!r} is given twice")
        score = plain(value)
        if score is None or not math.isfinite(score) or not -1 <= score <= 1:
            raise UsageError(
                f"{name} must be the package's own score, at most 1; got {value!r}. Divide percents by 100"
            )
        given[name] = float(score)
    return given


def _group(scores: Mapping[str, float], group: str) -> float:
    own = {name: d for name, d in DIMENSIONS.items() if d.group == group}
    return sum(d.weight * normalised(name, scores[name]) for name, d in own.items()) / sum(
        d.weight for d in own.values()
    )


def read_results(path: str | Path) -> dict[str, dict[str, Any]]:
    """Per dimension ``score`` and ``videos``, from the ``*_eval_results.json`` of a folder or zip.

    Raises ``UsageError`` where there are none, one cannot be read, or two disagree.
    """
    found: dict[str, dict[str, Any]] = {}
    origin: dict[str, str] = {}
    for file, text in _result_files(Path(path)):
        try:
            data = json.loads(text)
            entries = {key.replace(" ", "_"): (float(value[0]), len(value[1])) for key, value in data.items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise UsageError(
                f"{file} is not a VBench result ({type(error).__name__}: {error}); expected "
                '{"dimension": [score, [one entry per video]]}'
            ) from None
        for name, (score, videos) in entries.items():
            if name not in DIMENSIONS:
                raise UsageError(f"{file} holds the unknown dimension {name!r}; known: {', '.join(DIMENSIONS)}")
            if name in found and found[name] != {"score": score, "videos": videos}:
                raise UsageError(f"{origin[name]} and {file} disagree on {name}; keep the results of one run")
            found[name], origin[name] = {"score": score, "videos": videos}, file
    if not found:
        raise UsageError(f"no *_eval_results.json in {path}; give the folder or zip that VBench wrote its results to")
    return found


def _result_files(path: Path) -> Iterable[tuple[str, str]]:
    ending = "_eval_results.json"
    try:
        if path.is_dir():
            for file in sorted(path.rglob(f"*{ending}")):
                yield str(file), file.read_text(encoding="utf-8")
        elif path.is_file() and path.suffix != ".json":
            with zipfile.ZipFile(path) as archive:
                for name in sorted(n for n in archive.namelist() if PurePosixPath(n).name.endswith(ending)):
                    yield f"{path}:{name}", archive.read(name).decode("utf-8")
        elif path.is_file():
            yield str(path), path.read_text(encoding="utf-8")
        else:
            raise UsageError(f"there is nothing at {path}; give a folder, a zip or a *{ending}")
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None


def judge_results(found: Mapping[str, Mapping[str, Any]], mode: str = "vbench_standard") -> dict[str, Any]:
    """Totals where they mean something: all dimensions, the standard prompts, every video. Else what is lacking.

    ``found`` as :func:`read_results` gives it. After the static filter at least one of temporal flickering's videos
    must be left; five per prompt are kept at most.
    """
    lacking = [f"{name}: not scored" for name in DIMENSIONS if name not in found]
    for name, row in found.items():
        filtered = name == "temporal_flickering"
        least = 1 if filtered else DIMENSIONS[name].expected
        if row["videos"] < least:
            lacking.append(f"{name}: {row['videos']} of {DIMENSIONS[name].expected} videos")
    if mode != "vbench_standard":
        lacking.append(f"mode {mode} scores videos of one's own prompts")
    scores = {name: float(row["score"]) for name, row in found.items()}
    result: dict[str, Any] = {
        "is_vbench": True,
        "mode": mode,
        "complete": not lacking,
        "lacking": lacking,
        "dimensions": {f"vbench.{name}": dict(row) for name, row in found.items()},
        "mean": mean_of(scores),
    }
    return result | ({} if lacking else {"totals": totals(scores)})


def video_name(prompt: str, index: int, suffix: str = ".mp4") -> str:
    """The file name that VBench looks for. Raises ``UsageError`` for a prompt that cannot be a file name."""
    if "/" in prompt or "\0" in prompt or not prompt.strip():
        raise UsageError(f"{prompt!r} cannot be part of a file name; VBench names videos by their prompt")
    return f"{prompt}-{index}{suffix}"


def prompt_of(name: str) -> str:
    """The prompt that a file is named after: ``"a-b-3.mp4"`` -> ``"a-b"``, ``"x.mp4"`` -> ``"x"``."""
    return re.sub(r"-\d+$", "", name.rpartition(".")[0] or name)


def suite(path: str | Path, dimensions: Iterable[str] = DIMENSIONS) -> dict[str, int]:
    """Prompt -> videos wanted, for ``dimensions`` of the package's ``VBench_full_info.json``, in its order."""
    wanted = set(dimensions)
    unknown = wanted - DIMENSIONS.keys()
    if unknown:
        raise UsageError(f"unknown VBench dimension {', '.join(sorted(unknown))}; known: {', '.join(DIMENSIONS)}")
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        result: dict[str, int] = {}
        for entry in entries:
            own = [name for name in entry["dimension"] if name in wanted]
            if own:
                videos = max(DIMENSIONS[name].videos for name in own)
                result[entry["prompt_en"]] = max(videos, result.get(entry["prompt_en"], 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no VBench_full_info.json ({type(error).__name__}: {error})") from None
    return result


def missing_videos(folder: str | Path, wanted: Mapping[str, int]) -> list[str]:
    """Names of the videos that ``folder`` lacks, where the package would only leave them out of its means."""
    folder = Path(folder)
    present = {p.stem for p in folder.iterdir() if p.suffix in (".mp4", ".gif")} if folder.is_dir() else set()
    return [
        video_name(prompt, index)
        for prompt, count in wanted.items()
        for index in range(count)
        if f"{prompt}-{index}" not in present
    ]


def temporal_flickering(frames: np.ndarray) -> dict[str, Any]:
    """VBench's formula for temporal flickering on frames at hand: 1 - mean |x(i+1) - x(i)| / 255.

    ``frames``: uint8 (T, H, W, 3), at least two. Comparable with VBench only on its 75 prompts, behind its static
    filter and through mp4; a moving camera lowers it. Named ``vbench_formula.temporal_flickering`` for that reason.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or len(frames) < 2:
        raise UsageError(f"frames must be uint8 (T, H, W, 3) with T >= 2; got {frames.dtype} {frames.shape}")
    steps = [np.abs(b.astype(np.int16) - a.astype(np.int16)).mean() for a, b in itertools.pairwise(frames)]
    return {
        "name": FLICKER,
        "score": float(1 - np.mean(steps) / 255),
        "is_vbench": False,
        "static_filter": False,
        "meaning": "mean likeness of adjacent frames; only its difference to the dense run of the same prompt and seed "
        "says something",
    }


if __name__ == "__main__":
    from ..cli import main

    sys.exit(main(["eval", "vbench", *sys.argv[1:]]))
