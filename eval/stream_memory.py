"""Memory of a stream against its length: bytes of the cache and of the whole process, at 5 s and at the end.

``python -m dit_accel.eval.stream_memory`` streams 60 s under every policy, each in a process of its own, and fails
where either has grown by more than 2 %. One denoising step per chunk: more of them use the same memory again.

Buffers go back to the system as they are freed: with glibc's own threshold, which adapts, its heap breathes by up to
5 % of the process (25 of 512 MiB) without anything being held.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..pipelines.outputs import write_json
from ..pipelines.streaming.job import StreamJob, plan_stream, run_stream
from .command import output_file, positive
from .environment import ALLOCATOR, versions
from .stream_policies import POLICIES, fixed_prompts

#: Seconds of video after which nothing may grow, and by how much it may all the same.
WARM, TOLERANCE = 5.0, 0.02


def measure(job: StreamJob) -> dict[str, Any]:
    """Stream the job's one prompt and policy in this process: bytes by :data:`WARM` seconds and by the end."""
    plan = plan_stream(job)
    seen: dict[str, dict[str, float]] = {}

    def listen(event: str, data: dict[str, Any]) -> None:
        if event == "chunk":
            stats = data["stats"]
            seen["end"] = {"seconds": stats.frames / plan.fps, "cache": stats.cache_bytes, "peak": _peak()}
            if seen["end"]["seconds"] <= WARM or "warm" not in seen:
                seen["warm"] = seen["end"]

    run_stream(plan, listen=listen)
    warm, end = seen["warm"], seen["end"]
    growth = {name: end[name] / warm[name] - 1 for name in ("cache", "peak")}
    return {"policy": plan.clips[0].policy, "warm": warm, "end": end, "growth": growth}


def _peak() -> int:
    """The largest memory this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dit_accel.eval.stream_memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--steps", type=positive, default=1, help="denoising steps per chunk (default: 1)")
    parser.add_argument("--model", help="default: the bundled one")
    parser.add_argument("-o", "--out", type=output_file, help="JSON file")
    args = parser.parse_args(argv)
    rows = []
    os.environ.update(ALLOCATOR)
    with tempfile.TemporaryDirectory() as folder:
        job = StreamJob(
            (fixed_prompts()[0],), Path(folder), seconds=args.seconds, model=args.model, steps=args.steps,
            overwrite=True,
        )  # fmt: skip
        for policy in args.policies.split(","):
            # A peak never falls: what an earlier policy needed would hide what a later one does.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, (replace(job, policies=(policy,)),)))
            print(line(rows[-1]), flush=True)
    if args.out:
        document = {"steps": args.steps, "allocator": ALLOCATOR, "rows": rows, "versions": versions()}
        write_json(args.out, document)
    grown = [row["policy"] for row in rows if max(row["growth"].values()) > TOLERANCE]
    if grown:
        print(f"grew by more than {TOLERANCE:.0%}: {', '.join(grown)}")
    return 1 if grown else 0


def line(row: dict[str, Any]) -> str:
    """One policy as text."""
    parts = [
        f"{name} {row['warm'][name] / 2**20:.2f} to {row['end'][name] / 2**20:.2f} MiB ({row['growth'][name]:+.2%})"
        for name in ("cache", "peak")
    ]
    return f"{row['policy']}: {row['warm']['seconds']:.1f} s to {row['end']['seconds']:.1f} s, {', '.join(parts)}"


if __name__ == "__main__":
    from .command import run as finish

    sys.exit(finish(main))
