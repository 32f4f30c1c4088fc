"""What the guard costs: ``python -m dit_accel.eval.guard``.

The bundled model's transformer, one method, guards in turn, medians of runs of forwards in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time


def measure(repeats: int = 3, forwards: int = 32, backend: str = "auto") -> dict:
    """Median seconds of a run of ``forwards`` under each guard, in turn, and what each guard looked at.

    ``overhead``: over no guard at all.
    """
    import torch
    from diffusers import WanPipeline

    from .. import Guard, RadialProcessor, Schedule
    from ..diffusers import engines
    from ..pipelines.mini import defaults, path

    pipe = WanPipeline.from_pretrained(path(), dtype=torch.float32)
    model, size = pipe.transformer, defaults()
    channels = model.config.in_channels
    frames = (size["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    height, width = (size[side] // pipe.vae_scale_factor_spatial for side in ("height", "width"))
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(1, channels, frames, height, width, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 32, model.config.text_dim, generator=generator),
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
    counted = {}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, guard in guards.items():
                model.set_attn_processor(RadialProcessor(schedule=Schedule.none(), guard=guard, backend=backend))
                (engine,) = engines(model)
                start = time.perf_counter()
                for step in range(forwards):
                    model(**{**arguments, "timestep": torch.tensor([900.0 - 800.0 * step / forwards])})
                if turn:
                    seconds[name].append(time.perf_counter() - start)
                stats = engine.stats
                counted[name] = {"flag_reads": stats.flag_reads, "checks": stats.checks, "calls": stats.sparse}
    model.reset_attn_processor()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "forwards": forwards,
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "overhead": {name: round(value / medians["off"] - 1, 4) for name, value in medians.items()},
        "counted": counted,
        "tiers": stats.tiers,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_accel.eval.guard", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--forwards", type=int, default=32, help="of a run (default: 32)")
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args(argv)
    print(json.dumps(measure(args.repeats, args.forwards, args.backend), indent=1))
    return 0


if __name__ == "__main__":
    from .command import run as finish

    sys.exit(finish(main))
