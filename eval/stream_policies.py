"""Cache policies on the same prompts and seeds: how well long clips hold up, with paired intervals, and at what memory.

``python -m dit_accel.eval.stream_policies -o FILE`` streams 20 fixed prompts x 2 seeds of the bundled world for 30 s
under every policy (hours on a CPU; ``--seconds``, ``--prompts`` and ``--seeds`` make it shorter). The file is written
after every clip, and the same command continues an interrupted one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..pipelines.model import fingerprint
from ..pipelines.outputs import read_json, write_json
from ..pipelines.prompts import Prompt, read_prompts
from ..pipelines.streaming.job import Clip, StreamJob, StreamPlan, plan_stream, run_stream
from .command import output_file, positive
from .intervals import ENOUGH, interval
from .streaming import StreamJudge

MEASURES = ("drift", "dynamic", "persistence", "persistence_late", "colour")
BASE = "window"
POLICIES = ("window", "sink", "deep_sink", "deep_sink+pc", "ema_sink")
SCHEMA = 1


def fixed_prompts() -> list[Prompt]:
    """The prompts of the published comparison."""
    return read_prompts(Path(str(resources.files("dit_accel.assets") / "prompts" / "stream-20.txt")))


def measure(
    job: StreamJob, seeds: Sequence[int], out: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Rows and their comparison, as plain JSON values, written to ``out`` after every clip.

    The prompts and policies are the job's, each prompt with every seed; all policies of a prompt and seed come before
    the next. Raises ``UsageError`` where ``out`` holds rows of other settings.
    """
    prompts = tuple(replace(prompt, seed=seed) for seed in seeds for prompt in job.prompts)
    plan = plan_stream(replace(job, prompts=prompts))
    wanted = [_key(clip) for clip in plan.clips]
    document = _continued(out, _described(plan))
    done = {(row["policy"], row["prompt"], row["seed"]) for row in document["rows"]}
    plan.clips = [clip for clip in plan.clips if _key(clip) not in done]

    def listen(event: str, data: dict[str, Any]) -> None:
        if event == "end":
            document["rows"].append(_row(data["clip"]))
            _summarise(document, wanted)
            _save(out, document)
            say(f"{len(document['rows'])} of {len(wanted)}: {data['clip'].file.name}")

    _summarise(document, wanted)
    if plan.clips:
        run_stream(plan, judge=lambda prompt: StreamJudge(prompt, plan.fps), listen=listen)
    return document


def compare(rows: Sequence[dict[str, Any]], base: str = BASE) -> dict[str, dict[str, Any]]:
    """Per policy and measure: the mean, and the mean difference to ``base`` over the same prompts and seeds with its
    95 % bootstrap interval over prompts (None for ``base`` itself, or where fewer than five prompts are known)."""
    by_policy: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for row in rows:
        by_policy.setdefault(row["policy"], {})[row["prompt"], row["seed"]] = row
    found: dict[str, dict[str, Any]] = {}
    for policy, clips in by_policy.items():
        found[policy] = {}
        for name in MEASURES:
            known = [row[name] for row in clips.values() if row[name] is not None]
            partners = by_policy.get(base, {}) if policy != base else {}
            pairs = [(key[0], row[name], partners[key][name]) for key, row in clips.items() if key in partners]
            change = [(prompt, a - b) for prompt, a, b in pairs if a is not None and b is not None]
            entry: dict[str, Any] = {"mean": float(np.mean(known)) if known else None, "clips": len(known)}
            if len({prompt for prompt, _ in change}) >= ENOUGH:
                entry["change"] = interval([value for _, value in change], [prompt for prompt, _ in change])
            found[policy][name] = entry
    return found


def report(found: dict[str, Any]) -> list[str]:
    """The comparison as lines of text."""
    covered = found["covered"]
    lines = [f"{covered['pairs']} of {covered['wanted']} prompts x seeds, {found['settings']['seconds']:g} s each"]
    for policy, measures in found["policies"].items():
        parts = []
        for name, entry in measures.items():
            text = "-" if entry["mean"] is None else f"{entry['mean']:.3g}"
            change = entry.get("change")
            parts.append(f"{name} {text}" + (f" ({change['low']:+.2g} .. {change['high']:+.2g})" if change else ""))
        lines.append(f"{policy}: {', '.join(parts)}")
    return lines


def _summarise(document: dict[str, Any], wanted: list[tuple[str, str, int]]) -> None:
    """Compare what has been rendered under every policy; a prompt under way counts for none."""
    policies = list(dict.fromkeys(policy for policy, *_ in wanted))
    done = {(row["policy"], row["prompt"], row["seed"]) for row in document["rows"]}
    pairs = list(dict.fromkeys((prompt, seed) for _, prompt, seed in wanted))
    whole = [pair for pair in pairs if all((policy, *pair) in done for policy in policies)]
    rows = [row for row in document["rows"] if (row["prompt"], row["seed"]) in whole]
    document["covered"] = {"pairs": len(whole), "wanted": len(pairs)}
    document["policies"] = compare(rows)


def _described(plan: StreamPlan) -> dict[str, Any]:
    """What makes rows comparable: another value is another run. Prompts and seeds may be added."""
    caches = {clip.policy: clip.config.to_dict() for clip in plan.clips}
    weights = fingerprint(Path(plan.transformer)) if plan.transformer else plan.info.revision or plan.info.fingerprint()
    return {
        "model": plan.info.name, "weights": weights, "seconds": plan.job.seconds, "fps": plan.fps,
        "steps": json.loads(json.dumps(asdict(plan.steps))), "guidance": plan.guidance, "caches": caches,
    }  # fmt: skip


def _continued(out: Path | None, described: dict[str, Any]) -> dict[str, Any]:
    empty = {"schema": SCHEMA, "settings": described, "rows": []}
    if out is None or not out.is_file():
        return empty
    old = read_json(out)
    if old.get("settings") != described:
        raise UsageError(f"{out} holds rows made with other settings; give another file or remove it")
    return old


def _save(out: Path | None, document: dict[str, Any]) -> None:
    if out is not None:
        write_json(out, document)


def _key(clip: Clip) -> tuple[str, str, int]:
    return clip.policy, clip.prompt.text, clip.prompt.seed


def _row(clip: Clip) -> dict[str, Any]:
    return {
        "policy": clip.policy, "prompt": clip.prompt.text, "seed": clip.prompt.seed,
        "cache_bytes": clip.stats["cache_bytes"], "fps_made": clip.stats["fps_made"],
        **{name: clip.judged[name] for name in MEASURES},
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.eval.stream_policies", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--prompts", type=positive, default=20, help="the first so many of the fixed ones")
    parser.add_argument("--seeds", type=positive, default=2)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--model", help="default: the bundled one")
    parser.add_argument("--clips", default="stream-policies", help="folder for the videos (default: stream-policies)")
    parser.add_argument("-o", "--out", type=output_file, default="stream-policies.json")
    args = parser.parse_args(argv)
    job = StreamJob(
        tuple(fixed_prompts()[: args.prompts]), Path(args.clips), seconds=args.seconds, model=args.model,
        policies=tuple(args.policies.split(",")), overwrite=True,
    )  # fmt: skip
    found = measure(job, range(1, args.seeds + 1), args.out, lambda text: print(text, file=sys.stderr, flush=True))
    print("\n".join(report(found)))
    return 0


if __name__ == "__main__":
    from .command import run as finish

    sys.exit(finish(main))
