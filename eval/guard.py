"""What the guard costs: ``python -m dit_accel.eval.guard``.

The bundled model's transformer, one method: every forward is made under each guard in turn, so that a machine whose
speed drifts slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from copy import deepcopy
from statistics import median

from .command import positive


def measure(repeats: int = 3, forwards: int = 32, backend: str = "auto") -> dict:
    """Seconds of a run of ``forwards`` under each guard, medians of ``repeats`` after one that warms up, and what each
    guard looked at in a run.

    ``overhead``: over no guard at all, the median of the repeats; ``overhead_range``: its least and most.
    """
    import torch
    from diffusers import WanPipeline

    from .. import Guard, RadialProcessor, Schedule
    from ..diffusers import engines
    from ..pipelines.mini import defaults, path
    from .environment import environment

    pipe = WanPipeline.from_pretrained(path(), dtype=torch.float32)
    size = defaults()
    channels = pipe.transformer.config.in_channels
    frames = (size["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    height, width = (size[side] // pipe.vae_scale_factor_spatial for side in ("height", "width"))
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(1, channels, frames, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(1, 32, pipe.transformer.config.text_dim, generator=generator),
        "return_dict": False,
    }
    guards = {
        "off": Guard.off(),
        "nonfinite": Guard(fault=False),
        "default": Guard(),
        "with drift": Guard(drift=True),
        "every call": Guard(drift=True, rate=1.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in guards}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            models = {name: deepcopy(pipe.transformer) for name in guards}
            for name, model in models.items():
                model.set_attn_processor(RadialProcessor(schedule=Schedule.none(), guard=guards[name], backend=backend))
            spent = dict.fromkeys(guards, 0.0)
            for step in range(forwards):
                timestep = torch.tensor([900.0 - 800.0 * step / forwards])
                # Whoever comes first after the step before gets colder caches, so all take turns at that.
                names = list(guards)
                for name in names[step % len(names) :] + names[: step % len(names)]:
                    start = time.perf_counter()
                    models[name](timestep=timestep, **arguments)
                    spent[name] += time.perf_counter() - start
            for name in guards if turn else ():
                seconds[name].append(spent[name])
    stats = {name: engines(model)[0].stats for name, model in models.items()}
    shares = {name: [one / off - 1 for one, off in zip(seconds[name], seconds["off"], strict=True)] for name in guards}
    return {
        "forwards": forwards,
        "seconds": {name: round(median(values), 4) for name, values in seconds.items()},
        "overhead": {name: round(median(values), 4) for name, values in shares.items()},
        "overhead_range": {name: [round(min(values), 4), round(max(values), 4)] for name, values in shares.items()},
        "counted": {
            name: {"flag_reads": one.flag_reads, "checks": one.checks, "calls": one.sparse}
            for name, one in stats.items()
        },
        "tiers": stats["default"].tiers,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_accel.eval.guard", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--forwards", type=positive, default=32, help="of a run (default: 32)")
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args(argv)
    print(json.dumps(measure(args.repeats, args.forwards, args.backend), indent=1))
    return 0


if __name__ == "__main__":
    from .command import run as finish

    sys.exit(finish(main))
