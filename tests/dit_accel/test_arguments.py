"""What ``attend`` refuses, the same for a method, a plan, and dense attention."""

import numpy as np
import pytest
import torch

import dit_accel
from dit_accel import AdaSpa, AllBlocks, Layout, Radial, RadialProcessor, Schedule, Step, UsageError, attend

LAYOUT = Layout(grid=(2, 8, 8))
METHODS = {"dense": None, "a method": AllBlocks(), "a method's dense step": AdaSpa(search_steps=(3,))}


def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 128, 32, generator=generator) for _ in range(3)]


Q, K, V = tensors()
WRONG_TENSORS = {
    "values too short": ((Q, K, V[:, :, :100]), "do not fit together"),
    "values too long": ((Q, K, torch.cat([V, V], 2)), "do not fit together"),
    "another batch": ((Q, K.repeat(2, 1, 1, 1), V.repeat(2, 1, 1, 1)), "do not fit together"),
    "another head dim": ((Q, K[..., :16], V), "do not fit together"),
    "heads that do not divide": ((Q, K.repeat(1, 2, 1, 1)[:, :3], V.repeat(1, 2, 1, 1)[:, :3]), "not a multiple of 3"),
    "no key heads": ((Q, K[:, :0], V[:, :0]), "not a multiple of 0"),
    "another dtype": ((Q, K.half(), V), "cast them to one dtype"),
    "whole numbers": ((Q.long(), K.long(), V.long()), "torch.int64; attention takes float16, bfloat16, float32"),
    "three dimensions": ((Q[0], K[0], V[0]), r"q must be \(B, H, N, D\); got shape \(2, 128, 32\)"),
    "tokens that the layout has not": ((Q[:, :, :99], K, V), "q has 99 tokens but its layout .* has 128"),
    "lists": ((Q.tolist(), K, V), "q is a tensor"),
}
WRONG_SETTINGS = {
    "a made-up backend": ({"backend": "fast"}, "'fast' is unknown; choose one of auto, reference, gather, flex"),
    "a backend of quantised products": ({"backend": "quant-reference"}, "is unknown; choose one of auto"),
    "lengths as a list": ({"kv_valid": [3]}, r"kv_valid is an int32 tensor \(B,\), one length per sample; got \[3\]"),
    "lengths of another batch": ({"kv_valid": torch.tensor([3, 4])}, r"kv_valid must be \(1,\)"),
    "lengths that are no whole numbers": ({"kv_valid": torch.tensor([3.0])}, "got torch.float32"),
    "a grid for a layout": ({"layout": (2, 8, 8)}, r"a dit_accel.Layout, for example Layout\(.*got \(2, 8, 8\)"),
    "a grid for the keys' layout": ({"kv_layout": (2, 8, 8)}, r"kv_layout is None for the queries' or .*\(2, 8, 8\)"),
    "a word for a scale": ({"scale": "a"}, "scale is None for the method's own or a finite number; got 'a'"),
    "no number": ({"scale": float("nan")}, "a finite number; got nan"),
    "a number for a step": ({"step": 3}, r"Step\(index=3, total=50\); got 3"),
    "a dict for a state": ({"state": {}}, "State"),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("given", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_tensors(given, message, method):
    with pytest.raises(UsageError, match=message):
        attend(*given, method, layout=LAYOUT)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("given", "message"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_settings(given, message, method):
    with pytest.raises(UsageError, match=message):
        attend(Q, K, V, method, **{"layout": LAYOUT, **given})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("radial", r"got 'radial'. The method of that name is Radial\(\)"),
        ("fast", "got 'fast'. Methods: .*Radial, "),
        (Radial, r"got the class Radial. Did you forget the brackets\? Radial\(\)"),
        (RadialProcessor(), r"processor.method"),
        (Schedule(), "Methods: "),
        (3, "got 3"),
    ],
)
def test_what_is_no_method(method, message):
    with pytest.raises(UsageError, match=message):
        attend(Q, K, V, method, layout=LAYOUT)
    with pytest.raises(UsageError, match=message):
        dit_accel.plan(Q, K, V, method, layout=LAYOUT)


def test_a_method_beside_a_plan():
    made = dit_accel.plan(Q, K, V, Radial(block_size=32), layout=LAYOUT)
    with pytest.raises(UsageError, match="method=AllBlocks and plan= were both given"):
        attend(Q, K, V, AllBlocks(), plan=made, layout=LAYOUT)
    with pytest.raises(UsageError, match=r"what dit_accel.plan\(...\) returned; got 'radial'"):
        attend(Q, K, V, plan="radial", layout=LAYOUT)
    attend(Q, K, V, plan=made, layout=LAYOUT)


def test_a_plan_needs_a_method_and_tensors_that_fit():
    with pytest.raises(UsageError, match="dense attention has no plan"):
        dit_accel.plan(Q, K, V, None, layout=LAYOUT)
    with pytest.raises(UsageError, match="do not fit together"):
        dit_accel.plan(Q, K, V[:, :, :9], AdaSpa(), layout=LAYOUT)


@pytest.mark.parametrize("given", [{"index": -1}, {"index": 0.5}, {"total": 0}, {"index": "3"}])
def test_a_step_that_no_run_has(given):
    with pytest.raises(UsageError, match="Step: "):
        Step(**given)


def test_numbers_of_numpy_and_known_tiers_pass():
    for backend in ("auto", "triton", "flex", "flash", "gather", "reference"):
        out = attend(Q, K, V, layout=LAYOUT, backend=backend, scale=np.float32(0.2))
        torch.testing.assert_close(out, attend(Q, K, V, layout=LAYOUT, scale=0.2))
    attend(Q, K, V, AllBlocks(), layout=LAYOUT, step=Step(np.int64(3), 9), kv_valid=torch.tensor([128]))
