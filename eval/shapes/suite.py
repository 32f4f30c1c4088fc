"""The shape suite: fixed prompts and seeds, scores per dimension, their mean and its bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.errors import UsageError
from dit_accel.pipelines.prompts import Prompt, read_prompts

from ..intervals import interval, spread
from .grade import DIMENSIONS, PASS


@dataclass(frozen=True)
class Suite:
    """What to grade: prompts, seeds, dimensions; ``compare`` renders every video dense as well, from the same noise."""

    texts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    dimensions: tuple[str, ...] = DIMENSIONS
    compare: bool = False


def prompts(name: str = "shapes-120") -> list[str]:
    """A bundled prompt list: ``mini-12`` (quick look at colour and motion), ``shapes-120`` (the suite) or a text
    file, as for rendering but without settings of its own. Raises ``UsageError``."""
    folder = resources.files("dit_accel.assets") / "prompts"
    source: Any = folder / f"{name}.txt"
    if not source.is_file():
        source = Path(name)
    if not source.is_file():
        known = sorted(p.name.removesuffix(".txt") for p in folder.iterdir() if p.name.endswith(".txt"))
        raise UsageError(f"no prompt list {name!r}; bundled are {', '.join(known)}, or give the path of a text file")
    found = read_prompts(str(source))
    own = next((prompt for prompt in found if prompt != Prompt(prompt.text, prompt.line)), None)
    if own is not None:
        raise UsageError(
            f"{source}, line {own.line} sets more than the prompt, which all prompts here share; keep its text alone "
            "and give the rest as options"
        )
    return [prompt.text for prompt in found]


def summarize(rows: Sequence[dict[str, Any]], dimensions: Sequence[str] = DIMENSIONS) -> dict[str, Any]:
    """Means, 95 % intervals over prompts and pass rates per dimension of graded ``rows``, and the mean over dimensions.

    Fewer than five prompts have their values in place of an interval.
    """
    result: dict[str, Any] = {"dimensions": {}, "videos": len(rows)}
    for name in dimensions:
        known = [row for row in rows if row["scores"].get(name) is not None]
        values = [row["scores"][name] for row in known]
        if values:
            result["dimensions"][name] = {
                **interval(values, [row["prompt"] for row in known]),
                "passed": float(np.mean(np.array(values) >= PASS)),
                "videos": len(values),
            }
    per_video = [np.mean([v for v in row["scores"].values() if v is not None]) for row in rows]
    result |= interval(per_video, [row["prompt"] for row in rows]) if rows else {"mean": 0.0, "values": []}
    both = [row for row in rows if {"color", "motion"} <= row["scores"].keys()]
    result["color_and_motion"] = sum(min(row["scores"]["color"], row["scores"]["motion"]) >= PASS for row in both)
    return result


def table(summary: dict[str, Any]) -> str:
    """``summary`` as a Markdown table."""
    lines = ["| dimension | mean | 95 % interval | passed | videos |", "|---|---|---|---|---|"]
    for name, row in summary["dimensions"].items():
        lines.append(f"| {name} | {row['mean']:.3f} | {spread(row)} | {row['passed']:.0%} | {row['videos']} |")
    lines.append(f"| mean | {summary['mean']:.3f} | {spread(summary)} | | {summary['videos']} |")
    return "\n".join(lines)


def difference_table(paired: dict[str, Any]) -> str:
    """Paired differences (and PSNR, where it was measured) as a Markdown table."""
    lines = ["| dimension | difference | 95 % interval | videos |", "|---|---|---|---|"]
    for name, row in paired.items():
        if name == "psnr":
            continue
        lines.append(f"| {name} | {row['mean']:+.3f} | {spread(row, '+.3f')} | {row['videos']} |")
    if "psnr" in paired:
        row = paired["psnr"]
        lines.append(f"| PSNR, dB | {row['mean']:.2f} | {spread(row, '.2f')} | {row['videos']} |")
    return "\n".join(lines)
