"""Every method of the registry, small, and the formats that each must take."""

import torch
from paro_plans import plan_file

from dit_accel import Layout, Quant, Step
from dit_accel.methods import REGISTRY

LATE = Step(30, 50)
SETTINGS = {
    "radial": {"block_size": 32},
    "gna": {"window": (3, 5, 5)},
    "clear": {"radius": 8},
    "vmoba": {"chunks": (2, (3, 4), (2, 3, 4)), "k": 2},
    "pisa": {"block_size": 16, "density": 0.5},
    "rectified": {"block_size": 16},
    "adaspa": {"block_size": 16, "density": 0.5},
    "all-blocks": {"block_size": 32},
    "random-blocks": {"block_size": 16},
}
COMPUTE = {
    "int8": Quant(qk="int8"),
    "int8-fp8": Quant.sage2(),
    "int4": Quant(qk="int4", granularity="thread"),
}


def make(name, folder, layout, heads=3):
    """The method called ``name`` and the layout for it; ``folder`` takes its plan file."""
    if name == "clear":
        layout = Layout((1, layout.grid[0] * layout.grid[1], layout.grid[2]), text=layout.text)
    settings = dict(SETTINGS.get(name, {}))
    if name == "paro":
        settings["plan_file"], _ = plan_file(folder / "plan.safetensors", layout, block=16, heads=heads)
    return REGISTRY[name](**settings), layout


def tensors(layout, batch=1, heads=3, dim=32, bias=2.0, seed=0):
    """q, k and v with channels of their own mean, keys more so."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, layout.tokens, dim, generator=g)
    channels = torch.randn(2, 1, heads, 1, dim, generator=g)
    return q + channels[0] / 2, k + bias * channels[0], v + channels[1]


def error(out, expected):
    """Relative L1."""
    return ((out - expected).abs().sum() / expected.abs().sum()).item()
