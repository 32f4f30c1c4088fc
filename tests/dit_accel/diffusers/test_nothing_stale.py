"""A pipeline that ran before gives what a fresh one gives, for every method that looks at the tensors.

Before each run: one that was interrupted, other prompts, step counts, sizes, guidance and batches. Wan calls its model
once per guidance branch, LTX once for both in one batch.
"""

import pytest
import torch
from tiny_ltx import tiny_ltx_pipeline

from dit_accel import Schedule
from dit_accel.diffusers import engines
from dit_accel.processors import (
    AdaSpaProcessor,
    PisaProcessor,
    PyramidProcessor,
    RectifiedProcessor,
    VMoBAProcessor,
)
from tiny_models import tiny_pipeline, tiny_run

COMMON = {"schedule": Schedule(first=1), "backend": "gather"}
PROCESSORS = {
    "adaspa": AdaSpaProcessor(density=0.4, block_size=12, search_steps=(0.2, 0.8), backend="gather"),
    "vmoba": VMoBAProcessor(k=2, chunks=(1, (2, 3), (2, 2, 3)), **COMMON),
    "pisa": PisaProcessor(density=0.3, block_size=12, tile=None, **COMMON),
    "rectified": RectifiedProcessor(density=0.2, block_size=8, neighbors=False, **COMMON),
    "pyramid": PyramidProcessor(block_q=16, block_k=8, tile=8, **COMMON),
}


def run(pipe, **settings):
    return tiny_run(pipe, **{"height": 64, "width": 96, **settings})


def run_ltx(pipe, steps=5, **settings):
    settings.setdefault("prompt", "a red ball runs")
    same = {"height": 32, "width": 64, "num_frames": 9, "frame_rate": 8, "guidance_scale": 4.0, **settings}
    return pipe(
        negative_prompt=["slow"] * 2 if isinstance(same["prompt"], list) else "slow", num_inference_steps=steps,
        max_sequence_length=8, output_type="latent", generator=torch.Generator().manual_seed(0), **same,
    ).frames  # fmt: skip


PIPELINES = {"branches apart": (tiny_pipeline, run, 2), "batched guidance": (tiny_ltx_pipeline, run_ltx, 1)}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("guidance", PIPELINES)
def test_a_run_leaves_nothing_to_the_next(guidance, name):
    build, render, forwards = PIPELINES[guidance]

    def made():
        pipe = build()
        pipe.set_attn_processor(PROCESSORS[name])
        return pipe

    def interrupt(pipe, index, timestep, kwargs):
        pipe._interrupt = index >= 1
        return kwargs

    used = made()
    (engine,) = engines(used)
    # Of as many steps as the next one, and stopped before AdaSpa's second search: nothing but its end tells them apart.
    render(used, steps=4, callback_on_step_end=interrupt)
    assert engine.stats.forwards == 2 * forwards
    other = "a slow blue cat"
    changes = (
        {"prompt": other}, {"steps": 6}, {"guidance_scale": 1.0}, {"prompt": [other, "a ball"]}, {"width": 32},
    )  # fmt: skip
    for change in changes:
        settings = {"steps": 4, **change}
        assert torch.equal(render(used, **settings), render(made(), **settings)), settings
        assert engine.stats.sparse > 0
        assert engine.stats.fallback == 0
        assert engine.stats.density < 0.9
