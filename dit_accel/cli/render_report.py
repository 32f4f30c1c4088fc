"""What ``dit-accel render`` prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .console import Console, table

_PHASES = ("text", "loop", "attention", "planning", "vae", "export")
# A bound below this is not worth a method.
LITTLE = 1.05
_WORDS = {
    "done": "rendered",
    "skipped": "skipped (finished)",
    "differs": "kept, made with other settings",
    "failed": "failed",
}


def planned(console: Console, plan: Any, *, dry: bool) -> None:
    """The resolved settings, once, and what was decided for the user."""
    dtype = str(plan.dtype).removeprefix("torch.")
    console.say(f"model      {plan.info.name} ({plan.info.pipeline_class.__name__}, {dtype} on {plan.device})")
    for line in dict.fromkeys(attention_line(o.shot) for o in plan.outcomes):
        console.say(f"attention  {line}")
    for note in dict.fromkeys(note for o in plan.outcomes for note in o.shot.choice.notes):
        console.note(f"note: {note}")
    for outcome in plan.outcomes:
        name = outcome.file.name
        if outcome.status == "differs":
            console.note(f"kept: {name} was made with other settings ({outcome.detail}); --overwrite renders it")
        elif outcome.damaged:
            console.note(f"again: {outcome.detail}; it is rendered again")
        elif outcome.status == "skipped":
            console.say(f"skip       {name} (finished)")
        if dry and outcome.status == "pending":
            console.say(f"would write {outcome.file}  {_size(outcome.shot)}, {outcome.shot.steps} steps")


def _size(shot: Any) -> str:
    size = f"{shot.width}x{shot.height}" if shot.width else "the model's own size"
    return f"{size}, {shot.frames} frame{'s' * (shot.frames > 1)}"


def attention_line(shot: Any) -> str:
    """``radial (decay 0.2, ...), density 0.24, 8 of 30 steps dense``."""
    choice = shot.choice
    if choice.processor is None:
        return "dense"
    method = choice.processor.method
    own = {k: v for k, v in (method.to_dict() if method else {}).items() if k != "method" and v is not None}
    dense = len(choice.processor.dense_steps(shot.steps))
    density = f", density {choice.density:.3f}" if choice.density is not None else ""
    settings = ", ".join(f"{key} {_short(value)}" for key, value in own.items())
    settings = f" ({settings})" if settings else ""
    return f"{choice.name}{settings}{density}, {dense} of {shot.steps} steps dense"


def show(console: Console) -> Callable[[str, dict[str, Any]], None]:
    """A listener for the job that prints what became of each output."""

    def listen(event: str, data: dict[str, Any]) -> None:
        if event != "end":
            return
        outcome = data["outcome"]
        if outcome.status == "failed":
            console.note(f"failed: {outcome.file.name}: {outcome.detail}")
            return
        if outcome.status == "skipped":
            console.say(f"skip       {outcome.file.name} (another run has finished it meanwhile)")
            return
        record = outcome.record
        console.say(f"{outcome.file}  {seconds_line(record['seconds'])}")
        for line in [*attention_report(record["attention"]), *compare_report(record.get("compare"))]:
            console.say(f"  {line}")
        for note in record["notes"]:
            if note not in outcome.shot.choice.notes:
                console.say(f"  {note}")

    return listen


def seconds_line(seconds: dict[str, float]) -> str:
    parts = [f"{name} {seconds[name]:.2f}" for name in _PHASES if name in seconds]
    return f"{seconds['total']:.2f} s ({', '.join(parts)})"


def attention_report(attention: dict[str, Any]) -> list[str]:
    """One line of what ran, and one per thing that did not run as asked."""
    if not attention.get("sparse_calls") and not attention.get("fallbacks"):
        return []
    density = attention["density"]
    lines = [
        f"tier {attention['tier']}, density {_number(density)}, effective {_number(attention['effective_density'])} "
        f"with the dense steps; fallbacks {_counts(attention['fallbacks'])}"
    ]
    events, drift = attention["guard_events"], attention.get("drift")
    if drift:
        lines.append(f"drift against exact attention: mean {drift['mean']:.3f}, most {drift['max']:.3f}, over the rows "
                     f"of {attention['guard_checks']} calls")  # fmt: skip
    lines += [f"guard: layer {e['layer']} ({e['name']}) ran dense from step {e['step']}: {e['kind'] or 'another rank'}"
              for e in events[:3]]  # fmt: skip
    if len(events) > 3:
        lines.append(f"guard: and {len(events) - 3} more events (see the JSON record)")
    return lines + [f"warning: {text}" for text in attention["warnings"] if not text.startswith("guard:")]


def density_report(runs: list[tuple[Any, dict[str, Any]]]) -> list[str]:
    """One line where finished runs, each a shot and what its attention did, had another density than was asked for."""
    missed = [(shot.choice, a["density"]) for shot, a in runs if shot.choice.missed(a.get("density"))]
    if not missed:
        return []
    choice = missed[0][0]
    return [density_note(choice.name, choice.asked, [density for _, density in missed], len(runs))]


def density_note(name: str, asked: float, missed: list[float], runs: int) -> str:
    """That ``missed``, of so many ``runs``, are the densities that a method had in the place of the one asked for."""
    had = sorted(missed)
    span = _number(had[0]) if had[-1] - had[0] < 0.0005 else f"{_number(had[0])} to {_number(had[-1])}"
    where = f" in {len(missed)} of {runs} outputs" if runs > 1 else ""
    return (
        f"note: density {asked:g} was asked for and {name} had {span}{where}; its own parameters, by --param, can "
        "bring it nearer (dit-accel methods lists them)"
    )


def compare_report(compare: dict[str, Any] | None) -> list[str]:
    """The comparison as a small table, the bound beside the measurement."""
    if not compare:
        return []
    from ..eval.speed import conditions

    dense, fast, speedup = compare["seconds"]["dense"], compare["seconds"]["accelerated"], compare["speedup"] or {}
    rows = [("", "dense", "accelerated", "speed-up")]
    for title, phase, name in _ROWS:
        if phase in dense and phase in fast:
            gain = f"{speedup[name]:.2f}x" if name in speedup else "-"
            rows.append((title, f"{dense[phase]:.2f} s", f"{fast[phase]:.2f} s", gain))
    lines = table(rows, right=frozenset({1, 2, 3}))
    if "refused" in compare:
        lines.append(f"no speed-up is stated: {compare['refused']}")
    if compare["bound"] is not None:
        lines.append(
            f"attention is {compare['attention_share']:.0%} of the dense loop; at effective density "
            f"{compare['effective_density']:.3f} the loop can gain at most {compare['bound']:.2f}x"
        )
    if compare["bound"] is not None and compare["bound"] < LITTLE:
        lines.append("attention is too small a part of this loop for any sparse method to help at this size")
    lines += [f"doubtful: {doubt}; measure again on a quiet machine, with --repeats 3" for doubt in compare["doubts"]]
    warm = ", ".join(f"{side} {seconds:.1f} s" for side, seconds in compare["warmup_seconds"].items())
    lines.append(f"warm-up, compilation included, not in these times: {warm}; run order {', '.join(compare['order'])}")
    lines += conditions(compare)
    same = compare["fidelity"]
    ssim = "-" if same["ssim"] is None else f"{same['ssim']:.4f}"
    lines.append(f"PSNR {same['psnr']:.2f} dB, SSIM {ssim}, accelerated against dense, frames before the codec")
    return lines


def summary_report(summary: dict[str, Any]) -> list[str]:
    """Several comparisons in two lines."""
    gains = ", ".join(f"{_GAINS[name]} {value:.2f}x" for name, value in summary["speedup"].items() if name in _GAINS)
    lines = [f"over {summary['videos']} outputs, median speed-up: {gains}"] if gains else []
    ssim = f", SSIM mean {summary['ssim']['mean']:.4f}, worst {summary['ssim']['min']:.4f}" if summary["ssim"] else ""
    return [*lines, f"PSNR mean {summary['psnr']['mean']:.2f} dB, worst {summary['psnr']['min']:.2f} dB{ssim}"]


_GAINS = {"loop": "denoising loop", "attention": "attention", "end_to_end": "end to end"}
_ROWS = (
    ("denoising loop", "loop", "loop"),
    ("attention", "attention", "attention"),
    ("end to end", "total", "end_to_end"),
)


def end_of_job(console: Console, plan: Any, *, interrupted: bool) -> int:
    """Print the summary; the exit code."""
    count = {status: sum(o.status == status for o in plan.outcomes) for status in (*_WORDS, "pending")}
    runs = [(o.shot, o.record["attention"]) for o in plan.outcomes if o.record and o.record.get("attention")]
    for line in density_report(runs):
        console.note(line)
    parts = [f"{count[status]} {word}" for status, word in _WORDS.items() if count[status]]
    if interrupted:
        console.note(
            f"interrupted: {', '.join(parts) or 'nothing rendered'}, {count['pending']} left; "
            "the same command with --resume continues"
        )
        return 130
    bad = bool(count["failed"] or count["differs"])
    (console.note if bad else console.say)(f"{', '.join(parts)} in {plan.job.out}")
    return 1 if bad else 0


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in counts.items()) or "none"
