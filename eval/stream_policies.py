"""Cache policies on the same prompts and seeds: how well long clips hold up, with paired intervals, and at what memory.

``python -m dit_accel.eval.stream_policies`` streams 20 fixed prompts x 2 seeds of the bundled world for 30 s under
every policy (hours on a CPU; ``--seconds``, ``--prompts`` and ``--seeds`` make it shorter).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..pipelines.prompts import Prompt, read_prompts
from ..pipelines.streaming.job import Clip, StreamJob, plan_stream, run_stream
from .shapes.suite import bootstrap
from .streaming import StreamJudge

MEASURES = ("drift", "dynamic", "persistence", "persistence_late")
BASE = "window"
POLICIES = ("window", "sink", "deep_sink", "deep_sink+pc", "ema_sink")
# Seconds of video after which memory must not grow any more.
WARM = 5.0


def fixed_prompts() -> list[Prompt]:
    """The prompts of the published comparison."""
    return read_prompts(Path(str(resources.files("dit_accel.assets") / "prompts" / "stream-20.txt")))


def measure(job: StreamJob, seeds: Sequence[int], say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Rows and their comparison, as plain JSON values. The prompts and policies are the job's, each with every seed."""
    prompts = tuple(replace(prompt, seed=seed) for prompt in job.prompts for seed in seeds)
    plan = plan_stream(replace(job, prompts=prompts))
    resident: dict[Path, dict[str, int]] = {}

    def listen(event: str, data: dict[str, Any]) -> None:
        if event == "chunk" and data["stats"].frames >= WARM * plan.fps:
            found = _resident()
            resident.setdefault(data["clip"].file, {"warm": found, "end": found})["end"] = found
        if event == "end":
            say(data["clip"].file.name)

    run_stream(plan, judge=lambda prompt: StreamJudge(prompt, plan.fps), listen=listen)
    rows = [_row(clip, resident.get(clip.file)) for clip in plan.clips]
    return {"seconds": job.seconds, "model": plan.info.name, "rows": rows, "policies": compare(rows)}


def compare(rows: Sequence[dict[str, Any]], base: str = BASE) -> dict[str, dict[str, Any]]:
    """Per policy and measure: the mean, and the mean difference to ``base`` over the same prompts and seeds with its
    95 % bootstrap interval (None for ``base`` itself, or where fewer than five pairs are known)."""
    by_policy: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for row in rows:
        by_policy.setdefault(row["policy"], {})[row["prompt"], row["seed"]] = row
    found: dict[str, dict[str, Any]] = {}
    for policy, clips in by_policy.items():
        found[policy] = {}
        for name in MEASURES:
            known = [row[name] for row in clips.values() if row[name] is not None]
            partners = by_policy.get(base, {}) if policy != base else {}
            pairs = [(row[name], partners[key][name]) for key, row in clips.items() if key in partners]
            change = [a - b for a, b in pairs if a is not None and b is not None]
            entry: dict[str, Any] = {"mean": float(np.mean(known)) if known else None, "clips": len(known)}
            if len(change) >= 5:
                low, high = bootstrap(change)
                entry["change"] = {"mean": float(np.mean(change)), "low": low, "high": high}
            found[policy][name] = entry
    return found


def report(found: dict[str, Any]) -> list[str]:
    """The comparison as lines of text."""
    lines = []
    for policy, measures in found["policies"].items():
        parts = []
        for name, entry in measures.items():
            text = "-" if entry["mean"] is None else f"{entry['mean']:.3g}"
            change = entry.get("change")
            parts.append(f"{name} {text}" + (f" ({change['low']:+.2g} .. {change['high']:+.2g})" if change else ""))
        lines.append(f"{policy}: {', '.join(parts)}")
    grown = [row["resident_growth"] for row in found["rows"] if row["resident_growth"] is not None]
    if grown:
        lines.append(f"resident memory from {WARM:g} s to the end: at most {max(grown):+.1%}")
    return lines


def _row(clip: Clip, resident: dict[str, int] | None) -> dict[str, Any]:
    growth = resident["end"] / resident["warm"] - 1 if resident and resident["warm"] else None
    return {
        "policy": clip.policy, "prompt": clip.prompt.text, "seed": clip.prompt.seed, "file": clip.file.name,
        "cache_bytes": clip.stats["cache_bytes"], "fps_made": clip.stats["fps_made"], "resident_growth": growth,
        **{name: clip.judged[name] for name in MEASURES},
    }  # fmt: skip


def _resident() -> int:
    """Pages of this process in memory; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_accel.eval.stream_policies", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--prompts", type=int, default=20, help="the first so many of the fixed ones")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--model", help="default: the bundled one")
    parser.add_argument("-o", "--out", default="stream-policies")
    args = parser.parse_args(argv)
    job = StreamJob(
        tuple(fixed_prompts()[: args.prompts]), Path(args.out), seconds=args.seconds, model=args.model,
        policies=tuple(args.policies.split(",")), overwrite=True,
    )  # fmt: skip
    found = measure(job, range(1, args.seeds + 1), say=lambda text: print(text, file=sys.stderr, flush=True))
    (job.out / "policies.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("\n".join(report(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
