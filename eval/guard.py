"""What the guard costs: ``python -m dit_accel.eval.guard``.

The bundled model's transformer, one method, guard on and off in turn, medians of whole forwards in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time


def measure(repeats: int = 9, backend: str = "auto") -> dict:
    """Median seconds of a transformer forward with the guard on and off, and how often each read its flags."""
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
    seconds: dict[bool, list[float]] = {True: [], False: []}
    reads = {}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for on in (True, False):
                processor = RadialProcessor(schedule=Schedule.none(), guard=Guard(nonfinite=on), backend=backend)
                model.set_attn_processor(processor)
                model(**arguments)  # the first forward of an engine makes the plan
                start = time.perf_counter()
                model(**arguments)
                if turn:
                    seconds[on].append(time.perf_counter() - start)
                (engine,) = engines(model)
                reads[on] = engine.stats.flag_reads
        tiers = engine.stats.to_dict()
    model.reset_attn_processor()
    on, off = (statistics.median(seconds[key]) for key in (True, False))
    return {
        "seconds_on": round(on, 4),
        "seconds_off": round(off, 4),
        "overhead": round(on / off - 1, 4),
        "flag_reads_on": reads[True],
        "flag_reads_off": reads[False],
        "tiers": tiers.get("tiers"),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_accel.eval.guard", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args(argv)
    print(json.dumps(measure(args.repeats, args.backend), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
