"""Whole transformer blocks, dense against accelerated: ``python -m dit_accel.eval.blocks -o eval/results/blocks.json``

diffusers' own models at their published widths with a few blocks and random weights, on one forward's worth of tokens.
``loop`` is what the blocks of a full model take in a whole run: the measured blocks times depth, steps and branches.
No gain may pass ``bound``, Amdahl's: attention's share of the dense blocks falls to density.

The guard looks for values that are not finite, as in a run. Its checks of sampled rows are left out: in a run they fall
on one call in 32, here on a layer of every forward, each being at the first step (``dit_accel.eval.guard`` has them).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..diffusers.api import engines, set_attn_processor
from ..guard import Guard
from ..pipelines.outputs import write_json
from ..processors import Processor
from ..schedule import Schedule
from .command import output_file
from .environment import environment
from .kernels.subjects import method_of
from .speed import amdahl, summary


@dataclass(frozen=True)
class Model:
    """``grid`` of latents (T, H, W), ``text`` tokens. ``depth``: blocks of the full model, by the model's attribute.

    ``live``: text tokens that a prompt fills, the first ones, where the model takes a mask; None is all of them.
    ``config``: of the diffusers class ``name``, but for the number of blocks, the keys of ``counts``.
    """

    name: str
    grid: tuple[int, int, int]
    text: int
    depth: dict[str, int]
    counts: dict[str, str]
    steps: int = 50
    branches: int = 1
    live: int | None = None
    config: dict[str, Any] = field(default_factory=dict)


_WAN = {"name": "WanTransformer3DModel", "depth": {"blocks": 40}, "counts": {"blocks": "num_layers"}, "branches": 2}
MODELS = {
    # The class's defaults are the 14B text-to-video model's.
    "wan-14b-480p": Model(grid=(21, 60, 104), text=512, **_WAN),
    "wan-14b-720p": Model(grid=(21, 90, 160), text=512, **_WAN),
    "hunyuan-video-720p": Model(
        "HunyuanVideoTransformer3DModel", (33, 90, 160), 256,
        {"transformer_blocks": 20, "single_transformer_blocks": 40},
        {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
        # Padding makes most of a usual prompt, and an attention that must leave it out is slower than one without.
        live=60,
    ),
}  # fmt: skip


def build(model: Model, blocks: int, device: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """The transformer with ``blocks`` blocks of each kind, and the arguments of a forward."""
    import diffusers

    torch.manual_seed(0)
    config = {**model.config, **dict.fromkeys(model.counts.values(), blocks)}
    with torch.device(device):
        made = getattr(diffusers, model.name)(**config).to(dtype).eval()
        facts = made.config
        call: dict[str, Any] = {
            "hidden_states": torch.randn(1, facts.in_channels, *model.grid, dtype=dtype),
            "timestep": torch.full((1,), 500, dtype=torch.long), "return_dict": False,
        }  # fmt: skip
        width = facts.text_dim if hasattr(facts, "text_dim") else facts.text_embed_dim
        call["encoder_hidden_states"] = torch.randn(1, model.text, width, dtype=dtype)
        if hasattr(facts, "pooled_projection_dim"):
            live = model.text if model.live is None else model.live
            call["encoder_attention_mask"] = torch.arange(model.text)[None] < live
            call["pooled_projections"] = torch.randn(1, facts.pooled_projection_dim, dtype=dtype)
            call["guidance"] = torch.full((1,), 6000.0, dtype=dtype) if facts.guidance_embeds else None
    return made, call


@torch.inference_mode()
def measure(
    name: str, method: str, density: float, *, blocks: int = 1, repeats: int = 5, device: str = "cuda",
    quant: str | None = None, backend: str = "auto", model: Model | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One model, dense and under ``METHOD`` at ``density``, forwards in turn. Times in seconds."""
    model = model or MODELS[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sides = {}
    for side in ("dense", "accelerated"):
        made, call = build(model, blocks, device, dtype)
        if sides:
            # One set of weights: two would be two peaks.
            made.load_state_dict(sides["dense"].state_dict(), assign=True)
        sides[side] = made
    set_attn_processor(sides["accelerated"], Processor(None))
    share = _share(sides["accelerated"], call, model, device)
    layout = engines(sides["accelerated"])[0].forward.layout
    chosen = method_of(method, density, layout)
    guard = Guard(fault=False)
    processor = Processor(chosen, quant=quant, schedule=Schedule.none(), guard=guard, backend=backend)
    set_attn_processor(sides["accelerated"], processor)
    clocks = {side: _Clock(made, model.depth, device) for side, made in sides.items()}
    outs, peaks = {}, {}
    for side, made in sides.items():
        made(**call)
        outs[side], peaks[side] = _peak(lambda made=made: made(**call)[0], device)
        clocks[side].taken.clear()
    for _ in range(repeats):
        for side, made in sides.items():
            made(**call)
            clocks[side].read()
    stats = engines(sides["accelerated"])[0].stats
    if not stats.sparse or stats.fallback:
        raise RuntimeError(f"{name}: the accelerated side ran {stats.sparse} sparse and {stats.fallback} stock calls")
    times = {side: {part: summary(found) for part, found in clock.taken.items()} for side, clock in clocks.items()}
    loop = {
        side: model.steps * model.branches * sum(
            of[part]["median"] / blocks * depth for part, depth in model.depth.items()
        )
        for side, of in times.items()
    }  # fmt: skip
    kept = stats.density
    return {
        "model": name, "class": model.name, "tokens": layout.tokens, "blocks": blocks, "method": method,
        "quant": quant, "guard": guard.to_dict(), "live_text": model.live,
        "density": kept, "tiers": dict(stats.tiers), "times": times, "loop": loop,
        "speedup": loop["dense"] / loop["accelerated"], "attention_share": share,
        "bound": None if kept is None else amdahl(share, kept), "peak_bytes": peaks,
        "changed": float((outs["accelerated"] - outs["dense"]).norm() / outs["dense"].norm()),
    }  # fmt: skip


def _share(made: nn.Module, call: dict[str, Any], model: Model, device: str) -> float:
    """Attention's share of the dense blocks' time; ``made`` runs under a dense processor of ours."""
    made(**call)
    stats = engines(made)[0].stats
    stats.reset()
    stats.timing = True
    clock = _Clock(made, model.depth, device)
    made(**call)
    clock.read()
    clock.remove()
    return stats.attention_seconds / sum(sum(found) for found in clock.taken.values())


class _Clock:
    """Seconds between the start of the first and the end of the last block of each kind, a value per forward."""

    def __init__(self, made: nn.Module, parts: dict[str, int], device: str) -> None:
        self.taken: dict[str, list[float]] = {}
        self._marks: dict[str, list[Any]] = {}
        self._cuda = device == "cuda"
        self._hooks = []
        for part in parts:
            stack = getattr(made, part)
            self._hooks.append(stack[0].register_forward_pre_hook(lambda *_, part=part: self._mark(part, True)))
            self._hooks.append(stack[-1].register_forward_hook(lambda *_, part=part: self._mark(part, False)))

    def _mark(self, part: str, start: bool) -> None:
        if self._cuda:
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks[part] = [mark] if start else [self._marks[part][0], mark]

    def read(self) -> None:
        """Keep the times of the last forward."""
        if self._cuda:
            torch.cuda.synchronize()
        for part, (start, end) in self._marks.items():
            seconds = start.elapsed_time(end) / 1e3 if self._cuda else end - start
            self.taken.setdefault(part, []).append(seconds)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _peak(run: Callable[[], Any], device: str) -> tuple[Any, int | None]:
    """What ``run`` gives, and the most memory it held beyond what was held before, None on the CPU."""
    if device != "cuda":
        return run(), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run()
    torch.cuda.synchronize()
    return out, torch.cuda.max_memory_allocated() - before


def markdown(document: dict[str, Any]) -> str:
    """The table for a README."""
    titles = (
        "model", "tokens", "method", "density", "dense loop, s", "loop, s", "speed-up", "Amdahl bound",
        "attention share", "peak, GiB (dense)",
    )  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in document["rows"]:
        peak = row["peak_bytes"]
        gib = "–" if peak["dense"] is None else f"{peak['accelerated'] / 2**30:.2f} ({peak['dense'] / 2**30:.2f})"
        what = row["method"] + (f"+{row['quant']}" if row["quant"] else "")
        bound = "–" if row["bound"] is None else f"{row['bound']:.2f}"
        kept = "–" if row["density"] is None else f"{row['density']:.3f}"
        lines.append(
            f"| {row['model']} | {row['tokens']:,} | {what} | {kept} | {row['loop']['dense']:.1f} | "
            f"{row['loop']['accelerated']:.1f} | {row['speedup']:.2f} | {bound} | "
            f"{row['attention_share']:.0%} | {gib} |"
        )
    left_out = "The guard's checks of sampled rows, one call in 32 of a run, are not in these times."
    return "\n".join([*lines, "", left_out])


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m dit_accel.eval.blocks", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    add("--methods", nargs="+", default=("radial", "rectified"))
    add("--density", type=float, default=0.2)
    add("--quant", help="a preset of Quant for the accelerated side")
    add("--blocks", type=int, default=1, help="of each kind")
    add("-o", "--output", type=output_file)
    args = parser.parse_args(given)
    if not torch.cuda.is_available():
        print("eval.blocks needs a CUDA device: these models do not fit a CPU's time", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "dit_accel.eval.blocks", *given])
    document: dict[str, Any] = {"command": command, "environment": environment(), "rows": []}
    for name in args.models:
        for method in args.methods:
            row = measure(name, method, args.density, blocks=args.blocks, quant=args.quant)
            document["rows"].append(row)
            if args.output:
                write_json(args.output, document)
    print(markdown(document))
    return 0


if __name__ == "__main__":
    from .command import run as finish

    sys.exit(finish(main))
