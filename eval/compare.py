"""Judge a pair of renders: speed-ups of equal scope, the bound, fidelity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..pipelines.compare import Pair
from ..pipelines.generate import Result
from .fidelity import fidelity
from .speed import EMULATED, amdahl, effective_density, summary

# A process that gets less of its threads' cores than this was waiting for other work.
STARVED = 0.6
# Sides whose GPU clocks differ by more than this share did not run on the same machine, so to speak.
DRIFTED = 0.05


def judge(pair: Pair) -> dict[str, Any]:
    """Numbers of one comparison, as plain JSON values.

    ``seconds``: medians by side and phase. ``loop_spread``: median, least and IQR of the loop's seconds by side.
    ``speedup``: dense over accelerated, same phase. ``attention_share``: attention's part of the dense loop. ``bound``:
    what that share and the effective density allow. ``fidelity``: PSNR and SSIM of the raw frames. ``doubts``: reasons
    to distrust the timings. ``speedup`` is None, with ``refused`` saying why, where only emulation ran. ``memory``: the
    peak of each side in bytes, allocated and reserved, and ``clocks``: the GPU's as each run ended, None on a CPU.
    ``compiled``: whether ``torch.compile`` took part in a side.
    """
    dense, fast = _medians(pair.dense), _medians(pair.fast)
    attention = pair.fast[-1].attention
    effective = attention.get("effective_density")
    if effective is None and pair.shot.choice.density is not None:
        dense_steps = len(pair.shot.choice.processor.dense_steps(pair.shot.steps))
        effective = effective_density(pair.shot.choice.density, dense_steps, pair.shot.steps)
    share = min(dense["attention"] / dense["loop"], 1.0) if dense.get("loop") and dense.get("attention") else None
    refused = _refused(attention)
    result: dict[str, Any] = {
        "seconds": {"dense": dense, "accelerated": fast},
        "loop_runs": {
            "dense": [r.seconds.get("loop") for r in pair.dense],
            "accelerated": [r.seconds.get("loop") for r in pair.fast],
        },
        "loop_spread": {
            side: summary(known)
            for side, runs in (("dense", pair.dense), ("accelerated", pair.fast))
            if (known := [r.seconds["loop"] for r in runs if "loop" in r.seconds])
        },
        "order": pair.order,
        "warmup_seconds": pair.warmup,
        "speedup": None if refused else _speedups(dense, fast),
        "attention_share": share,
        "effective_density": effective,
        "bound": None if share is None or effective is None else amdahl(share, effective),
        "memory": _sides(pair, _peak),
        "clocks": _sides(pair, lambda runs: None if runs[0].clocks is None else [run.clocks for run in runs]),
        "compiled": {"dense": any(r.compiled for r in pair.dense), "accelerated": any(r.compiled for r in pair.fast)},
        "fidelity": fidelity(pair.dense[-1].frames, pair.fast[-1].frames).to_dict(),
    }
    result["doubts"] = _doubts(result, [*pair.dense, *pair.fast])
    return result | ({"refused": refused} if refused else {})


def summarise(verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    """Several comparisons as one: median speed-ups, mean and worst fidelity. Empty speed-ups where any was refused."""
    speedups = [v["speedup"] or {} for v in verdicts]
    names = set.intersection(*(set(s) for s in speedups))
    psnr = [v["fidelity"]["psnr"] for v in verdicts]
    ssim = [v["fidelity"]["ssim"] for v in verdicts if v["fidelity"]["ssim"] is not None]
    return {
        "videos": len(verdicts),
        "speedup": {name: float(summary([s[name] for s in speedups])["median"]) for name in sorted(names)},
        "psnr": {"mean": sum(psnr) / len(psnr), "min": min(psnr)},
        "ssim": {"mean": sum(ssim) / len(ssim), "min": min(ssim)} if ssim else None,
    }


def _doubts(verdict: dict[str, Any], results: list[Result]) -> list[str]:
    """Why the timings should not be trusted, if there is a reason."""
    doubts = []
    cores = [r.cores for r in results if r.cores is not None]
    if cores and min(cores) < STARVED * torch.get_num_threads():
        threads = torch.get_num_threads()
        had = f"{min(cores):.2f} to {max(cores):.2f} cores"
        doubts.append(f"other work kept the CPU busy: {had} for {threads} thread{'s' * (threads > 1)}")
    gain, bound = (verdict["speedup"] or {}).get("loop"), verdict["bound"]
    if gain and bound and gain > bound * 1.03:
        doubts.append(f"the loop gained {gain:.2f}x, more than the bound of {bound:.2f}x: timing noise")
    if len(set(verdict.get("compiled", {}).values())) > 1:
        doubts.append("one side ran under torch.compile and the other did not")
    speeds = [[c["sm_mhz"] for c in runs if c["sm_mhz"]] for runs in (verdict.get("clocks") or {}).values()]
    if speeds and all(speeds):
        dense, fast = (summary(side)["median"] for side in speeds)
        if abs(dense - fast) > DRIFTED * dense:
            doubts.append(f"the GPU's clock changed: {dense:.0f} MHz dense, {fast:.0f} MHz accelerated")
    return doubts


def _sides(pair: Pair, of: Callable[[list[Result]], Any]) -> dict[str, Any] | None:
    """``of`` the runs of each side; None where it says so of the dense one."""
    found = {"dense": of(pair.dense), "accelerated": of(pair.fast)}
    return None if found["dense"] is None else found


def _peak(runs: list[Result]) -> dict[str, int] | None:
    """The most of any run; the allocator may keep what an earlier run reserved, so both sides are told."""
    known = [run.peak_memory for run in runs if run.peak_memory]
    return {kind: max(peak[kind] for peak in known) for kind in known[0]} if known else None


def _medians(results: list[Result]) -> dict[str, float]:
    phases = set.intersection(*(set(r.seconds) for r in results))
    return {phase: float(summary([r.seconds[phase] for r in results])["median"]) for phase in sorted(phases)}


def _speedups(dense: dict[str, float], fast: dict[str, float]) -> dict[str, float]:
    names = {"loop": "loop", "attention": "attention", "end_to_end": "total"}
    return {name: dense[key] / fast[key] for name, key in names.items() if dense.get(key) and fast.get(key)}


def _refused(attention: dict[str, Any]) -> str | None:
    """Why the timings say nothing about the method, or None."""
    tiers = attention.get("tiers") or {}
    emulated = sorted(set(tiers) & set(EMULATED))
    if emulated:
        return f"{', '.join(emulated)} ran, which emulates the kernel; a speed-up would say nothing"
    if tiers == {} and attention:
        return "no call was accelerated"
    return None
