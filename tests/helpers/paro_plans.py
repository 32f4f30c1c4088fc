"""PARO plan files from random tensors, in milliseconds."""

from __future__ import annotations

import torch

from dit_accel import __version__
from dit_accel.methods.base import Call
from dit_accel.methods.paro_calibration import calibrate
from dit_accel.methods.paro_file import Header, describe_layout, write
from dit_accel.methods.paro_statistics import Statistics
from dit_accel.step import Step


def observed(layout, *, layers=2, heads=3, bins=2, block=8, steps=4, seed=0, head_dim=8):
    """Statistics of random q and k: ``steps`` calls per layer."""
    statistics = Statistics(bins=bins, block_size=block)
    g = torch.Generator().manual_seed(seed)
    for index in range(steps):
        for layer in range(layers):
            q, k = torch.randn((2, 1, heads, layout.tokens, head_dim), generator=g) * 2
            statistics.observe(q, k, None, Call(layout, layer=layer, step=Step(index, steps)))
    return statistics


def header(layout, *, bins=2, block=8, density=0.5, model="Tiny", config=None, steps=4):
    return Header(
        model=model, config=config or {"num_layers": 2}, segments=describe_layout(layout), steps=steps, bins=bins,
        block_size=block, layers=(), heads=0, density=density, reached=0.0, recall=0.0, metric="mass", alpha=1.0,
        budget="layer", library=__version__,
    )  # fmt: skip


def plan_file(path, layout, *, density=0.5, orders=None, bins=2, block=8, model="Tiny", config=None, **settings):
    """Write a plan to ``path`` and return (path, {layer: LayerPlan})."""
    statistics = observed(layout, bins=bins, block=block, **settings)
    plans = dict(calibrate(statistics, density=density, budget="layer"))
    for layer, ids in (orders or {}).items():
        plans[layer].orders[:] = torch.tensor(ids, dtype=torch.int8)
    head = header(layout, bins=bins, block=block, density=density, model=model, config=config)
    write(path, head, plans.items())
    return path, plans
